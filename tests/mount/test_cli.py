"""The command line: mistakes end in one line that says what to do, a documented exit code, and no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from conftest import MakeCell, View

COMMANDS = Path(sys.executable).parent
DONE, FAILED, USAGE = 0, 1, 2
MOUNTPOINT, SERVER, FUSE, BUSY = 3, 4, 5, 6
STORE, ADDRESS = 3, 4
"""Exit codes as the help of both commands lists them."""
LEASE_S = 15.0
"""What promisefsd grants unless told otherwise."""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def is_refusal(self, code: int, *words: str) -> None:
        """One line on stderr, with these words in it, and the exit code."""
        assert self.code == code, self
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self
        for word in words:
            assert word.lower() in lines[0].lower(), self
        assert "Traceback" not in self.err
        assert len(lines[0]) < 300

    def is_misuse(self, *words: str) -> None:
        """Wrong usage: at most a few lines, the last of which says what is wrong."""
        assert self.code == USAGE, self
        lines = self.err.strip().splitlines()
        assert 1 <= len(lines) <= 5, self
        for word in words:
            assert word.lower() in lines[-1].lower(), self


def call(*command: str | Path, env: Mapping[str, str] | None = None, limit_s: float = 40) -> Outcome:
    """Run one of our commands, found by name, or something that runs it."""
    program, *arguments = [os.fspath(part) for part in command]
    if program in ("promisefs", "promisefsd"):
        program = str(COMMANDS / program)
    done = subprocess.run(
        [program, *arguments],
        env={**os.environ, "COLUMNS": "200", **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=limit_s,
        text=True,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def alive(pid: int) -> bool:
    """Whether the process runs; one that waits for its parent to notice its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def mountpoint(cell: View) -> Iterator[Path]:
    """An empty directory, below the directory that is cleaned up whatever happens."""
    path = cell.running.directory / f"mnt-{cell.name}"
    path.mkdir()
    yield path
    if os.path.ismount(path):
        call("promisefs", "umount", "--force", path)
    path.rmdir()


# promisefs mount


def test_mountpoint_that_is_not_there(cell: View, tmp_path: Path) -> None:
    refused = call("promisefs", "mount", cell.running.address, tmp_path / "missing")
    refused.is_refusal(MOUNTPOINT, "missing", "mkdir")


def test_mountpoint_that_is_a_removed_working_directory(cell: View, tmp_path: Path) -> None:
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    command = [COMMANDS / "promisefs", "mount", cell.running.address, "."]
    call("sh", "-c", f'cd "{tmp_path}" && {script}', "sh", *command).is_refusal(MOUNTPOINT, "does not exist")
    command = [COMMANDS / "promisefs", "umount", "."]
    call("sh", "-c", f'cd "{tmp_path}" && {script}', "sh", *command).is_refusal(MOUNTPOINT, "removed")


def test_mountpoint_that_is_not_empty(cell: View, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    call("promisefs", "mount", cell.running.address, tmp_path).is_refusal(MOUNTPOINT, str(tmp_path), "not empty")


def test_mountpoint_that_is_a_file(cell: View, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = call("promisefs", "mount", cell.running.address, tmp_path / "file")
    refused.is_refusal(MOUNTPOINT, "not a directory")


def test_mountpoint_in_use(cell: View) -> None:
    refused = call("promisefs", "mount", cell.running.address, cell.running.mountpoint("m1"))
    refused.is_refusal(MOUNTPOINT, "m1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("foreground", [True, False])
def test_no_server_there(mountpoint: Path, foreground: bool) -> None:
    address = f"127.0.0.1:{free_port()}"
    refused = call("promisefs", "mount", *(["-f"] if foreground else []), address, mountpoint)
    refused.is_refusal(SERVER, address, "connection refused", "promisefsd serve")


def test_unknown_host(mountpoint: Path) -> None:
    refused = call("promisefs", "mount", "no-such-host.invalid", mountpoint, limit_s=60)
    refused.is_refusal(SERVER, "no-such-host.invalid")


@pytest.mark.parametrize("speech", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "http"])
def test_something_else_answers_there(mountpoint: Path, speech: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [COMMANDS / "promisefs", "mount", "-o", "timeout=3", f"127.0.0.1:{port}", mountpoint]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        listener.settimeout(20)
        with contextlib.ExitStack() as connections:
            listener_until_done(process, listener, speech, connections)
            out, err = process.communicate(timeout=40)
    Outcome(process.returncode, out, err).is_refusal(SERVER, str(port))


def listener_until_done(
    process: subprocess.Popen[str], listener: socket.socket, speech: bytes, connections: contextlib.ExitStack
) -> None:
    """Accept whatever comes and say the same to it, until the command has ended."""
    listener.settimeout(0.1)
    deadline = time.monotonic() + 40
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            connection = connections.enter_context(listener.accept()[0])
            with contextlib.suppress(OSError):
                connection.sendall(speech)


def test_no_such_volume(cell: View, mountpoint: Path) -> None:
    refused = call("promisefs", "mount", f"{cell.running.address}/nowhere", mountpoint)
    refused.is_refusal(SERVER, "nowhere", "volume")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["-o", "cache=lots"], "lots"),
        (["-o", "cache=1K"], "cache"),
        (["-o", "timeout=-1"], "timeout"),
        (["-o", "nonsense"], "nonsense"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_options_that_are_not_understood(cell: View, mountpoint: Path, arguments: list[str], word: str) -> None:
    call("promisefs", "mount", cell.running.address, mountpoint, *arguments).is_misuse(word)


@pytest.mark.parametrize("source", ["", "host:99999", "host:x", "[::1", "a:b:c"])
def test_sources_that_are_not_understood(mountpoint: Path, source: str) -> None:
    assert call("promisefs", "mount", source, mountpoint).code == USAGE


def test_arguments_missing() -> None:
    call("promisefs", "mount").is_misuse("missing argument")
    call("promisefs", "mount", "host").is_misuse("missing argument")
    call("promisefsd", "serve").is_misuse("missing argument")
    call("promisefs", "nonsense").is_misuse("nonsense")


def test_log_file_that_cannot_be_written(cell: View, mountpoint: Path) -> None:
    log_file = mountpoint.parent / "missing" / "log"
    call("promisefs", "mount", "--log-file", log_file, cell.running.address, mountpoint).is_refusal(FAILED, "missing")


def test_no_fusermount3(cell: View, mountpoint: Path) -> None:
    refused = call("promisefs", "mount", cell.running.address, mountpoint, env={"PATH": "/nonexistent"})
    refused.is_refusal(FUSE, "fusermount3", "fuse3")


@pytest.mark.alone
def test_no_dev_fuse(cell: View, mountpoint: Path) -> None:
    unshare = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces cannot be made here")
    script = 'mount -t tmpfs none /dev && exec "$@"'
    command = [COMMANDS / "promisefs", "mount", cell.running.address, mountpoint]
    call(*unshare, "sh", "-c", script, "sh", *command).is_refusal(FUSE, "/dev/fuse", "modprobe fuse")


def test_a_mount_that_is_refused_says_why_and_holds_nobody_up(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1)
    place = cell.directory / "refused"
    place.mkdir()
    if os.getuid() == 0:
        unable = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
        refused = call(*unable, COMMANDS / "promisefs", "mount", cell.address, place)
        refused.is_refusal(FUSE, str(place), "not permitted")
    elif "\nuser_allow_other" in Path("/etc/fuse.conf").read_text():
        pytest.skip("nothing is known here that would be refused")
    else:
        refused = call("promisefs", "mount", "-o", "allow_other", cell.address, place)
        refused.is_refusal(FUSE, str(place), "user_allow_other")
    began = time.monotonic()
    (cell.mountpoint("m1") / "d").mkdir()
    assert time.monotonic() - began < LEASE_S / 2, "the mount that was refused has left its lease behind"


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every directory")
def test_mountpoint_that_may_not_be_read(cell: View, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    refused = call("promisefs", "mount", cell.running.address, tmp_path / "closed")
    refused.is_refusal(MOUNTPOINT, "closed", "permission denied")


# promisefs mount, umount and status that work


def test_mount_status_umount(cell: View, mountpoint: Path) -> None:
    mounted = call("promisefs", "mount", f"{cell.running.address}/root", mountpoint, "-o", "cache=32M,rw,_netdev")
    assert mounted == (DONE, "", "")
    assert cell.name in os.listdir(mountpoint)
    state = json.loads(call("promisefs", "status", mountpoint, "--json").out)
    assert state["mountpoint"] == str(mountpoint)
    assert state["connected"] is True
    assert state["cache_limit_bytes"] == 32 << 20
    shown = call("promisefs", "status", mountpoint)
    assert shown.code == DONE
    assert "upcalls" in shown.out
    overview = call("promisefs", "status")
    assert str(mountpoint) in overview.out
    everything = json.loads(call("promisefs", "status", "--json").out)
    assert str(mountpoint) in [entry["mountpoint"] for entry in everything]

    (mountpoint / cell.name / "f").write_bytes(b"data")
    with (mountpoint / cell.name / "g").open("wb") as file:
        file.write(b"in use")
        file.flush()
        call("promisefs", "umount", mountpoint).is_refusal(BUSY, str(mountpoint), "--force")
        assert os.path.ismount(mountpoint)
    assert call("promisefs", "umount", mountpoint) == (DONE, "", "")
    assert not os.path.ismount(mountpoint)
    assert not alive(state["pid"])
    assert (cell.a / "f").read_bytes() == b"data"
    assert (cell.a / "g").read_bytes() == b"in use"


def test_a_mountpoint_named_by_a_symbolic_link(cell: View, mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mountpoint)
    (tmp_path / "second").symlink_to("link")
    assert call("promisefs", "mount", cell.running.address, tmp_path / "second").code == DONE
    assert call("promisefs", "status", tmp_path / "second").code == DONE
    assert call("promisefs", "umount", tmp_path / "second") == (DONE, "", "")
    assert not os.path.ismount(mountpoint)
    call("promisefs", "umount", tmp_path / "second").is_refusal(MOUNTPOINT, "not a promisefs mount")
    (tmp_path / "round").symlink_to("round")
    call("promisefs", "umount", tmp_path / "round").is_refusal(MOUNTPOINT, "not a promisefs mount")


def test_umount_without_fusermount3(cell: View, mountpoint: Path) -> None:
    assert call("promisefs", "mount", cell.running.address, mountpoint).code == DONE
    refused = call("promisefs", "umount", mountpoint, env={"PATH": "/nonexistent"})
    refused.is_refusal(FUSE, "fusermount3", "fuse3")
    assert call("promisefs", "umount", mountpoint).code == DONE


@pytest.mark.parametrize("command", ["umount", "status"])
def test_what_is_not_a_mount(tmp_path: Path, command: str) -> None:
    call("promisefs", command, tmp_path).is_refusal(MOUNTPOINT, str(tmp_path), "not a promisefs mount")
    call("promisefs", command, tmp_path / "missing").is_refusal(MOUNTPOINT, "missing")


def test_umount_ends_the_mount_of_a_dead_process(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1)
    mount = cell.mounts["m1"]
    os.kill(mount.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while alive(mount.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    said = call("promisefs", "status", mount.mountpoint)
    assert said.code != DONE
    said.is_refusal(said.code, "fusermount3 -u")
    call("promisefs", "mount", cell.address, mount.mountpoint).is_refusal(MOUNTPOINT, "fusermount3 -u")
    assert call("promisefs", "umount", "--force", mount.mountpoint).code == DONE
    assert not os.path.ismount(mount.mountpoint)


def test_a_mount_process_that_is_killed_softly_stores_first(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=2)
    first, second = cell.mounts["m1"], cell.mounts["m2"]
    fd = os.open(first.mountpoint / "f", os.O_WRONLY | os.O_CREAT)
    try:
        os.write(fd, b"dirty")
        os.kill(first.pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while alive(first.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
    assert (second.mountpoint / "f").read_bytes() == b"dirty"


# promisefsd serve


def serve(*arguments: str | Path) -> Outcome:
    """For a server that must not start; if it does it is ended, and the test fails."""
    command = [str(COMMANDS / "promisefsd"), "serve", *[os.fspath(part) for part in arguments]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"the server started: {out} {err}")
    return Outcome(process.returncode, out, err)


def test_store_below_a_directory_that_is_missing(tmp_path: Path) -> None:
    serve(tmp_path / "missing" / "store", "--port", "0").is_refusal(STORE, "missing")


def test_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    serve(tmp_path / "file", "--port", "0").is_refusal(STORE, "file")


def test_store_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    serve(tmp_path, "--port", "0").is_refusal(STORE, str(tmp_path))
    assert os.listdir(tmp_path) == ["letter.txt"]


def test_store_that_is_served_already(cell: View) -> None:
    serve(cell.running.store, "--port", "0").is_refusal(STORE, str(cell.running.store))


def test_port_in_use(cell: View, tmp_path: Path) -> None:
    refused = serve(tmp_path / "store", "--listen", cell.running.address)
    refused.is_refusal(ADDRESS, cell.running.address, "in use")


def test_addresses_that_cannot_be_used(tmp_path: Path) -> None:
    serve(tmp_path / "store", "--listen", "no-such-host.invalid:0").is_refusal(ADDRESS, "no-such-host.invalid")
    serve(tmp_path / "store", "--listen", "0.0.0.0:0").is_refusal(ADDRESS, "--insecure")
    serve(tmp_path / "store", "--listen", "127.0.0.1:x").is_misuse("port")
    serve(tmp_path / "store", "--port", "70000").is_misuse("70000")
    serve(tmp_path / "store", "--lease", "-1").is_misuse("lease")


def test_server_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    refused = serve(tmp_path / "store", "--port", "0", "--log-file", tmp_path / "missing" / "log")
    refused.is_refusal(FAILED, "missing")


# Help


@pytest.mark.parametrize(
    "command",
    [
        ["promisefs"],
        ["promisefs", "mount"],
        ["promisefs", "umount"],
        ["promisefs", "status"],
        ["promisefsd"],
        ["promisefsd", "serve"],
    ],
    ids=" ".join,
)
def test_help(command: list[str]) -> None:
    shown = call(*command, "--help")
    assert shown.code == DONE
    assert shown.err == ""
    if len(command) == 2:
        assert "Example" in shown.out
    else:
        assert "Exit codes" in shown.out


@pytest.mark.parametrize("command", ["promisefs", "promisefsd"])
def test_version(command: str) -> None:
    assert call(command, "--version").out.startswith(command)
