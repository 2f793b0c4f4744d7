"""The control socket: status and umount work whatever the server, the mount's process or others on the machine do."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from asking import status_of
from cell_lib import mounts
from outsider import Outsider
from promisefs_client.commands.mounts import find_mount
from promisefs_client.control.control_socket import directories, opened

if TYPE_CHECKING:
    from conftest import MakeCell

    Run = subprocess.CompletedProcess[str]

pytestmark = pytest.mark.alone
PROMISEFS = Path(sys.executable).with_name("promisefs")
LEASE = ("--lease", "2")
PROMPT_S = 15.0
"""For a command that waits for nothing, its start included, on a busy machine."""
FAILED, MOUNTPOINT, BUSY = 1, 3, 6


def run(*arguments: str | Path, limit_s: float = 40.0) -> Run:
    command = [PROMISEFS, *arguments]
    environment = {**os.environ, "COLUMNS": "250"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)


def promptly(*arguments: str | Path) -> Run:
    start = time.monotonic()
    done = run(*arguments)
    assert time.monotonic() - start < PROMPT_S
    return done


def refused(done: Run, code: int, *words: str) -> None:
    """One line that says what is wrong."""
    assert done.returncode == code, done
    assert len(done.stderr.strip().splitlines()) == 1, done
    for word in words:
        assert word in done.stderr, done


def wait_for(condition: Any, what: str, limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {limit_s:g} s"
        time.sleep(0.05)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def socket_of(device: str) -> tuple[int, int] | None:
    """Which control socket has that name: inode number, which others may get later, and time; None if there is none."""
    owner = os.geteuid()
    for directory in directories(owner):
        with suppress(FileNotFoundError), opened(directory, owner) as place:
            found = os.lstat(f"{place}/{device}")
            return found.st_ino, found.st_ctime_ns
    return None


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mount namespaces, other users")


# The server is away


def test_status_and_umount_while_the_server_is_away(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=2, server_options=LEASE, mount_options="timeout=60")
    root = cell.mountpoint("m1")
    (root / "f").write_bytes(b"stored")
    cell.stop_server(kill=True)
    wait_for(lambda: status_of(root)["leases_lost"] == 1, "the lease is lost")
    with Outsider() as asker:
        asker.tell(f"os.stat({str(root)!r}).st_ino")
        wait_for(lambda: status_of(root)["waiting"] > 0, "the stat waits")
        time.sleep(1.0)
        state = json.loads(promptly("status", "--json", root).stdout)
        assert not asker.has_answered()
        assert state["connected"] is False
        (server,) = state["servers"]
        assert server["disconnected_s"] > 2.0
        assert server["lease_left_s"] == 0.0
        assert server["waiting"] == state["waiting"] >= 1
        assert 1.0 <= server["longest_wait_s"] < 20.0
        shown = promptly("status", root)
        assert "NOT CONNECTED since" in shown.stdout
        assert "operations waiting" in shown.stdout
        assert "NOT CONNECTED since" in promptly("status").stdout

        # Nothing waits on the other mount, and all is stored.
        pid = cell.mounts["m2"].pid
        assert promptly("umount", cell.mountpoint("m2")).returncode == 0
        assert ended(pid)

        cell.start_server(*LEASE)
        assert asker.error() == "none"
    wait_for(lambda: status_of(root)["connected"], "it is connected again")
    assert status_of(root)["waiting"] == 0
    assert "NOT CONNECTED" not in run("status", root).stdout


def test_umount_of_what_cannot_be_stored(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1, server_options=LEASE, mount_options="timeout=3")
    root, pid = cell.mountpoint("m1"), cell.mounts["m1"].pid
    with Outsider() as writer:
        writer.do(f"(fd := os.open({str(root / 'f')!r}, os.O_RDWR | os.O_CREAT))")
        writer.do("os.pwrite(fd, b'precious', 0)")
        cell.stop_server(kill=True)
        writer.tell("os.close(fd)")
        assert writer.error() in ("ETIMEDOUT", "EIO")
    start = time.monotonic()
    refused(run("umount", "--wait", "2", root), BUSY, "8 bytes", "not stored", "--force", "server is away")
    assert 2.0 <= time.monotonic() - start < 2.0 + PROMPT_S
    assert mounts.fuse_mount_at(root)
    assert status_of(root)["dirty_bytes"] == 8
    assert status_of(root)["store_failures"] > 0
    forced = run("umount", "--force", root)
    assert forced.returncode == 0, forced
    assert not mounts.fuse_mount_at(root)
    assert ended(pid)


def test_what_needs_no_server_goes_on_while_hundreds_wait(make_cell: MakeCell) -> None:
    # With `posix` each asks for the root's attributes first; lookups in it would wait one after the other.
    cell = make_cell(mounts=1, server_options=LEASE, mount_options="timeout=60,posix")
    root = cell.mountpoint("m1")
    count = 500
    cell.stop_server(kill=True)
    wait_for(lambda: status_of(root)["leases_lost"] == 1, "the lease is lost")
    crowd = "import threading\nthreading.stack_size(1 << 17)\ncrowd = []"
    with Outsider(crowd) as askers, Outsider() as other:
        askers.do(
            f"[(crowd.append(threading.Thread(target=os.path.exists, args=({str(root)!r} + f'/{{n}}',), daemon=True)),"
            f" crowd[-1].start()) for n in range({count})] and None"
        )
        wait_for(lambda: status_of(root)["waiting"] == count, "all of them wait", 30)
        start = time.monotonic()
        # The kernel asks before every write whether the file has such a one; we know without the server.
        other.tell(f"os.getxattr({str(root)!r}, 'security.capability')")
        assert other.error() == "ENODATA"
        assert time.monotonic() - start < PROMPT_S
        assert status_of(root)["waiting"] == count
        cell.start_server(*LEASE)
        wait_for(lambda: status_of(root)["waiting"] == 0, "they go on", 30)


def test_the_kernel_knows_the_root_from_the_beginning(make_cell: MakeCell) -> None:
    """Else an invalidation during the first GETATTR leaves it a directory that nobody but root may enter."""
    cell = make_cell(mounts=1)
    assert status_of(cell.mountpoint("m1"))["upcalls"].get("getattr", 0) >= 1


# The mount's process is not well


def test_a_stopped_process(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1)
    mount = cell.mounts["m1"]
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        refused(run("status", mount.mountpoint), FAILED, str(mount.pid), "stopped")
        refused(run("umount", mount.mountpoint), FAILED, str(mount.pid), "stopped")
        assert time.monotonic() - start < 5.0 + 5.0 + PROMPT_S
        overview = run("status")
        assert overview.returncode == FAILED
        assert "no answer" in overview.stdout
        assert "stopped" in overview.stderr
    finally:
        os.kill(mount.pid, signal.SIGCONT)
    assert run("status", mount.mountpoint).returncode == 0


def test_a_killed_process_and_its_successor(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1)
    mount = cell.mounts.pop("m1")
    device = find_mount(str(mount.mountpoint)).device
    os.kill(mount.pid, signal.SIGKILL)
    wait_for(lambda: ended(mount.pid), "it ended")
    refused(run("status", mount.mountpoint), FAILED, "dead", "fusermount3 -u")
    refused(run("umount", mount.mountpoint), FAILED, "dead", "fusermount3 -u")
    assert socket_of(device) is not None
    assert run("umount", "--force", mount.mountpoint).returncode == 0
    pid = cell.mount("m1").pid  # most often under the same device number
    assert status_of(mount.mountpoint)["pid"] == pid


@pytest.mark.parametrize("command", ["fusermount3 -u", "umount"])
def test_unmounted_behind_our_back(make_cell: MakeCell, command: str) -> None:
    if command == "umount" and os.geteuid() != 0:
        pytest.skip("umount(8) of FUSE mounts is root's")
    cell = make_cell(mounts=1)
    mount = cell.mounts.pop("m1")
    device = find_mount(str(mount.mountpoint)).device
    (mount.mountpoint / "f").write_bytes(b"stored")
    own = socket_of(device)
    assert own is not None
    subprocess.run([*command.split(), mount.mountpoint], check=True, timeout=20)
    refused(run("status", mount.mountpoint), MOUNTPOINT, "not a promisefs mount")
    wait_for(lambda: ended(mount.pid), "its process ended")
    assert socket_of(device) != own  # another mount may have got the number by now
    cell.mount("m1")
    assert (mount.mountpoint / "f").read_bytes() == b"stored"


# Where it is mounted


def mount_over(cell: Any, path: Path) -> None:
    """An empty directory is a mountpoint, that of an empty mount too."""
    done = run("mount", "--log-file", cell.directory / "over.log", cell.address, path)
    assert done.returncode == 0, done


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount over a FUSE mount")
def test_two_mounts_over_each_other(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1)
    path, lower = cell.mountpoint("m1"), cell.mounts["m1"].pid
    below = os.open(path, os.O_PATH)  # a look at the covered one
    try:
        mount_over(cell, path)
    finally:
        os.close(below)
    upper = status_of(path)["pid"]
    assert upper != lower
    listed = [state["pid"] for state in json.loads(run("status", "--json").stdout) if state["mountpoint"] == str(path)]
    assert sorted(listed) == sorted([lower, upper])
    assert run("umount", path).returncode == 0
    assert ended(upper)
    assert status_of(path)["pid"] == lower
    (path / "f").write_bytes(b"goes on")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount over a FUSE mount")
def test_the_end_of_a_covered_mount_leaves_the_upper_one_alone(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1)
    path, lower = cell.mountpoint("m1"), cell.mounts["m1"].pid
    mount_over(cell, path)
    upper = status_of(path)["pid"]
    os.kill(lower, signal.SIGTERM)
    wait_for(lambda: ended(lower), "the covered one ended")
    assert status_of(path)["pid"] == upper
    (path / "f").write_bytes(b"goes on")
    assert run("umount", path).returncode == 0
    refused(run("status", path), FAILED, "dead", "fusermount3 -u")
    subprocess.run(["fusermount3", "-u", path], check=True, timeout=20)
    cell.mounts.pop("m1")


def in_namespace(script: str, **names: str | Path) -> str:
    """Run shell lines in a mount namespace of their own; return what they print."""
    setting = "".join(f"{name}={shlex.quote(os.fspath(value))}\n" for name, value in names.items())
    shell = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", setting + script]
    environment = {**os.environ, "COLUMNS": "250"}
    done = subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    return done.stdout


@as_root
@pytest.mark.parametrize("end", ['"$promisefs" umount "$new"', 'kill "$pid"'], ids=["umount", "SIGTERM"])
def test_a_mount_that_was_moved(make_cell: MakeCell, tmp_path: Path, end: str) -> None:
    cell = make_cell(mounts=0)
    old, new = tmp_path / "old place", tmp_path / "new place"
    old.mkdir()
    new.mkdir()
    said = in_namespace(
        f"""
        "$promisefs" mount --log-file "$new.log" "$address" "$old"
        mount --move "$old" "$new"
        mount -t tmpfs none "$old"
        "$promisefs" status --json "$new"
        pid=$("$promisefs" status --json "$new" | sed 's/.*"pid": \\([0-9]*\\).*/\\1/')
        {end}
        for _ in $(seq 200); do [ -e "/proc/$pid" ] || break; sleep 0.1; done
        grep -c fuse.promisefs.*"$address" /proc/self/mountinfo || true
        grep -c tmpfs.*none /proc/self/mountinfo | sed 's/[1-9][0-9]*/tmpfs stays/'
        """,
        promisefs=PROMISEFS,
        address=cell.address,
        old=old,
        new=new,
    )
    first, *rest = said.splitlines()
    state = json.loads(first)
    assert state["mountpoint"] == str(new)
    assert rest == ["0", "tmpfs stays"]
    assert ended(state["pid"])


@as_root
def test_bound_to_another_place(make_cell: MakeCell, tmp_path: Path) -> None:
    cell = make_cell(mounts=1)
    path, pid = cell.mountpoint("m1"), cell.mounts["m1"].pid
    said = in_namespace(
        'mount --bind "$path" "$bound"; "$promisefs" status "$bound" --json; "$promisefs" umount "$bound"',
        path=path,
        bound=tmp_path,
        promisefs=PROMISEFS,
    )
    assert json.loads(said)["pid"] == pid
    assert status_of(path)["pid"] == pid


@as_root
def test_unmounted_here_but_not_in_another_namespace(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1)
    mount = cell.mounts["m1"]
    holder = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; read _"]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            refused(promptly("umount", mount.mountpoint), BUSY, "unmounted here", str(mount.pid), "namespace")
            assert not mounts.fuse_mount_at(mount.mountpoint)
            assert not ended(mount.pid)
        finally:
            process.stdin.close()
    wait_for(lambda: ended(mount.pid), "it ends with the namespace")


@as_root
def test_out_of_reach(make_cell: MakeCell) -> None:
    """As in a container that sees the mount but not where the socket is."""
    cell = make_cell(mounts=1)
    path = cell.mountpoint("m1")
    said = in_namespace(
        'mount -t tmpfs none /run; "$promisefs" status "$path" 2>&1 || true', promisefs=PROMISEFS, path=path
    )
    assert len(said.splitlines()) == 1
    assert "no control socket" in said
    assert "container" in said


# Who may ask


OWNER, STRANGER = sorted(user.pw_uid for user in pwd.getpwall() if user.pw_uid)[:2]
"""Some users of the machine; fusermount3 does not serve those without a name."""


@as_root
def test_a_mount_of_another_user(make_cell: MakeCell) -> None:
    """Its owner and root may ask, nobody else; a directory that others could have made is not used.

    These users may read everything: Python may be installed where only root can reach it.
    """
    cell = make_cell(mounts=0, server_options=("--trust-everybody",))
    with ExitStack() as stack:
        place = Path(tempfile.mkdtemp(prefix="promisefs-test-", dir="/tmp"))
        stack.callback(place.rmdir)
        place.chmod(0o755)
        path, runtime, elsewhere = place / "mnt", Path(f"/tmp/promisefs-{OWNER}"), place / "elsewhere"
        for directory in (path, elsewhere):
            directory.mkdir(mode=0o700)
            os.chown(directory, OWNER, OWNER)
            stack.callback(directory.rmdir)
        said = in_namespace(
            """
            mount -t tmpfs none "$elsewhere"
            mknod -m 666 "$elsewhere/fuse" c 10 229
            mount --bind "$elsewhere/fuse" /dev/fuse
            umount -l "$elsewhere"
            plain() {
                uid=$1
                shift
                setpriv --reuid $uid --regid $uid --clear-groups "$@" 2>&1 || true
            }
            as() {
                uid=$1
                shift
                plain $uid --inh-caps +dac_read_search --ambient-caps +dac_read_search env -u XDG_RUNTIME_DIR "$@"
            }
            pid() { sed 's/.*"pid": \\([0-9]*\\).*/\\1/'; }

            as $owner "$promisefs" mount "$address" "$path"
            as $owner "$promisefs" status --json "$path" | pid
            as 0 "$promisefs" status --json "$path" | pid
            as $stranger "$promisefs" status --json "$path"
            plain $stranger ls "$runtime"
            stat -c "%a %u" "$runtime"
            as $owner "$promisefs" umount "$path"
            ls -A "$runtime"
            rmdir "$runtime"

            plain $stranger mkdir -m 777 "$runtime"
            as $owner "$promisefs" mount "$address" "$path"
            rmdir "$runtime"
            plain $stranger ln -s "$elsewhere" "$runtime"
            as $owner "$promisefs" mount "$address" "$path"
            rm "$runtime"
            grep -c promisefs.*"$path" /proc/self/mountinfo || true
            """,
            promisefs=PROMISEFS,
            address=cell.address,
            path=path,
            runtime=runtime,
            elsewhere=elsewhere,
            owner=str(OWNER),
            stranger=str(STRANGER),
        )
    owner_said, root_said, stranger_said, denied, mode, insecure, link, left = said.splitlines()
    assert owner_said == root_said
    assert owner_said.isdigit()
    assert f"uid {OWNER}" in stranger_said
    assert "only that user and root" in stranger_said
    assert "Permission denied" in denied
    assert mode == f"700 {OWNER}"
    for refusal in (insecure, link):
        assert str(runtime) in refusal
        assert "directory" in refusal
    assert left == "0"


@as_root
def test_a_stranger_who_gets_at_the_socket(make_cell: MakeCell) -> None:
    """The process looks who connects, too; here root lets a stranger through the directory."""
    cell = make_cell(mounts=1)
    path = cell.mountpoint("m1")
    device = find_mount(str(path)).device
    connect = f"""
import os, socket
connection = socket.socket(socket.AF_UNIX)
os.setuid(int({str(STRANGER)!r}) if uid else 0)
connection.connect("/proc/self/fd/" + str(at))
print(len(connection.makefile("rb").readline()))
"""
    for uid, heard in ((0, True), (STRANGER, False)):
        with opened(directories(0)[0], 0) as place:
            at = os.open(f"{place}/{device}", os.O_PATH)
        try:
            os.chmod(f"/proc/self/fd/{at}", 0o777)
            code = f"uid, at = {uid}, {at}\n{connect}"
            command = [sys.executable, "-S", "-E", "-c", code]
            done = subprocess.run(command, pass_fds=[at], capture_output=True, text=True, timeout=20)
        finally:
            os.close(at)
        assert done.returncode == 0, done
        assert (int(done.stdout) > 0) == heard


# Askers that behave badly


def connected(path: Path) -> socket.socket:
    entry = find_mount(str(path))
    for directory in directories(entry.owner):
        with suppress(FileNotFoundError), opened(directory, entry.owner) as place:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(10)
            connection.connect(f"{place}/{entry.device}")
            return connection
    raise AssertionError("no socket")


def test_askers_that_say_nothing(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1)
    path = cell.mountpoint("m1")
    with ExitStack() as stack:
        silent = [stack.enter_context(connected(path)) for _ in range(100)]
        assert run("status", path).returncode == 0
        assert len(silent) == 100


@pytest.mark.parametrize(
    "request_line",
    [b"\n", b"no json\n", b"[]\n", b'{"command": "no such", "args": {}}\n', b'{"command": []}\n', b"\xff\x00\n"],
)
def test_requests_that_are_not_understood(make_cell: MakeCell, request_line: bytes) -> None:
    cell = make_cell(mounts=1)
    with connected(cell.mountpoint("m1")) as connection, connection.makefile("rb") as lines:
        lines.readline()
        connection.sendall(request_line)
        assert "not understood" in json.loads(lines.readline())["error"]
    with connected(cell.mountpoint("m1")) as connection, connection.makefile("rb") as lines:
        lines.readline()
        with suppress(OSError):
            for _ in range(1000):
                connection.sendall(b"x" * 4096)
        with suppress(ConnectionResetError):
            assert lines.readline() == b""
    assert status_of(cell.mountpoint("m1"))["connected"]


def test_removed_files_that_are_closed_while_the_server_is_away(make_cell: MakeCell) -> None:
    """The server is told when it is back: nothing of them stays in its store."""
    cell = make_cell(mounts=1, server_options=LEASE, mount_options="timeout=60")
    root = cell.mountpoint("m1")

    def data_files() -> int:
        return sum(path.is_file() for path in (cell.store / "data").rglob("*"))

    with Outsider() as holder:
        holder.do("len(fds := [])")
        for number in range(5):
            path = str(root / str(number))
            holder.do(f"fds.append(os.open({path!r}, os.O_RDWR | os.O_CREAT))")
            holder.do("os.pwrite(fds[-1], b'data', 0), os.fsync(fds[-1])")
            holder.do(f"os.unlink({path!r})")
        assert data_files() == 5
        cell.stop_server(kill=True)
        holder.do("[os.close(fd) for fd in fds]")
    wait_for(lambda: status_of(root)["closes_owed"] == 5, "they are closed")
    assert status_of(root)["waiting"] == 0
    cell.start_server(*LEASE)
    assert data_files() == 5
    wait_for(lambda: status_of(root)["closes_owed"] == 0, "the server is told", 30)
    wait_for(lambda: data_files() == 0, "they are gone", 30)
