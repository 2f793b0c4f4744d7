"""`promisefs status --mmaps`: what is open or mapped, what it is called, and who has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from outsider import Outsider

if TYPE_CHECKING:
    from conftest import MakeCell

pytestmark = pytest.mark.alone
PROMISEFS = Path(sys.executable).with_name("promisefs")
CREATE = "os.O_RDWR | os.O_CREAT"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "COLUMNS": "250"}
    return subprocess.run([PROMISEFS, *arguments], env=environment, capture_output=True, timeout=60)


def mmaps_of(mountpoint: Path) -> dict[str, dict[str, Any]]:
    """By path."""
    done = run("status", "--mmaps", "--json", mountpoint)
    assert done.returncode == 0, done
    report = json.loads(done.stdout)
    assert report["mountpoint"] == str(mountpoint)
    assert report["omitted"] == 0
    return {file["path"]: file for file in report["files"]}


def test_open_and_mapped_files(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=2, server_options=("--lease", "2"), mount_options="timeout=60")
    root = cell.mountpoint("m1")
    (root / "dir/sub").mkdir(parents=True)
    with Outsider() as mapper, Outsider() as opener:
        mapper.do(f"(fd := os.open({str(root / 'dir/sub/mapped')!r}, {CREATE}))")
        mapper.do("os.pwrite(fd, b'x' * 5000, 0)")
        mapper.do("(m := mmap.mmap(fd, 5000)) and None")
        mapper.do("os.closerange(fd, fd + 10)")  # mmap duplicates it
        opener.do(f"[os.open({str(root / 'twice')!r}, {CREATE}) for _ in 'ab'] and None")
        opener.do(f"(gone := os.open({str(root / 'gone')!r}, {CREATE}))")
        opener.do("os.pwrite(gone, b'dirty', 0)")
        opener.do(f"os.unlink({str(root / 'gone')!r})")
        opener.do(f"os.open({os.fsencode(root) + b'/no' + bytes([255]) + b'text'!r}, {CREATE})")
        time.sleep(1.5)  # until it is clear that a mapping outlives the close

        files = mmaps_of(root)
        assert sorted(files) == ["/dir/sub/mapped", "/no\udcfftext", "/twice", "?"]
        mapped, twice, gone = files["/dir/sub/mapped"], files["/twice"], files["?"]
        assert mapped["mapped"]
        assert mapped["outlives_close"]
        assert mapped["inode"] == os.stat(root / "dir/sub/mapped").st_ino
        (user,) = mapped["processes"]
        assert user["pid"] == mapper.pid
        assert (user["mappings"], user["descriptors"]) == (1, 0)
        assert user["command"].startswith("python")
        assert (twice["opens"], twice["mapped"], twice["outlives_close"]) == (2, False, False)
        (user,) = twice["processes"]
        assert (user["pid"], user["mappings"], user["descriptors"]) == (opener.pid, 0, 2)
        assert gone["deleted"]
        assert gone["dirty"]
        assert [user["pid"] for user in gone["processes"]] == [opener.pid]

        shown = run("status", "--mmaps", root).stdout.decode()
        assert "4 files open or mapped" in " ".join(shown.split())
        for line_with in ("/dir/sub/mapped", f"{mapper.pid} (1 mapped)", "/no\\xfftext", f"{opener.pid} (2 open)"):
            assert line_with in shown
        everywhere = json.loads(run("status", "--mmaps", "--json").stdout)
        assert [len(m["files"]) for m in everywhere if m["mountpoint"] == str(root)] == [4]

        # It asks nobody, least of all the server.
        cell.stop_server(kill=True)
        time.sleep(2.5)
        assert sorted(mmaps_of(root)) == sorted(files)
        cell.start_server("--lease", "2")
    assert mmaps_of(cell.mountpoint("m2")) == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="mount namespaces are root's")
def test_a_process_in_another_mount_namespace(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1)
    root = cell.mountpoint("m1")
    with (root / "f").open("wb"):
        code = f"fd = open({str(root / 'f')!r}, 'rb'); print('ready', flush=True); input()"
        command = ["unshare", "--mount", sys.executable, "-S", "-E", "-c", code]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                assert process.stdout.readline() == b"ready\n"
                users = mmaps_of(root)["/f"]["processes"]
                assert sorted(user["pid"] for user in users) == sorted([os.getpid(), process.pid])
            finally:
                process.stdin.close()


def test_many_mapped_files(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1)
    root = cell.mountpoint("m1")
    count = 1000
    with Outsider("import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))") as mapper:
        mapper.do(
            f"len(kept := [(fd := os.open({str(root)!r} + f'/{{n}}', {CREATE}), os.ftruncate(fd, 1), mmap.mmap(fd, 1))"
            f" for n in range({count})])"
        )
        files = mmaps_of(root)
        assert len(files) == count
        assert all(file["mapped"] for file in files.values())
        assert {user["pid"] for file in files.values() for user in file["processes"]} == {mapper.pid}
