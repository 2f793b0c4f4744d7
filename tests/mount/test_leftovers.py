"""What is done on a mount leaves no descriptor, thread, process or mount behind: in order, with errors, and killed.

Looked at are the daemons, server and mounts: each may have what it had before, and threads that wait for more work.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from asking import status_of
from cell_lib import mounts, processes
from cell_lib.cell import Cell
from trees import assert_same_trees, make_source, run

if TYPE_CHECKING:
    from conftest import MakeCell

SPARE_THREADS = 4
"""Threads that did something wait some seconds for more. So many more than before may wait when it is looked."""
OF_SQLITE = 2
"""Descriptors of the database: that of the checkpointer is closed only when no lock is held on the file, so it stays,
and is used again."""
SETTLE_S = 45.0
"""Removed files that somebody has open are given up every 30 s at the latest."""


class Holdings:
    """What the daemons of a cell hold."""

    def __init__(self, cell: Cell) -> None:
        pids = {name: mount.pid for name, mount in cell.mounts.items()}
        assert cell.server_pid
        pids["server"] = cell.server_pid
        self.descriptors = {name: descriptors(pid) for name, pid in pids.items()}
        self.threads = {name: len(os.listdir(f"/proc/{pid}/task")) for name, pid in pids.items()}
        self.processes = sorted(processes.marked(cell.mark))
        self.mounts = [mount.mountpoint for mount in mounts.fuse_mounts_below(cell.directory)]
        self.kept = {name: what_is_kept(mount.mountpoint) for name, mount in cell.mounts.items()}

    def complaints(self, before: Holdings) -> list[str]:
        found = []
        for name, held in self.descriptors.items():
            if more := held - before.descriptors[name]:
                found.append(f"{name} holds {dict(more)}")
            if self.threads[name] > before.threads[name] + SPARE_THREADS:
                found.append(f"{name} has {self.threads[name]} threads, had {before.threads[name]}")
        for what in ("processes", "mounts", "kept"):
            if getattr(self, what) != getattr(before, what):
                found.append(f"{what}: {getattr(self, what)}, were {getattr(before, what)}")
        return found


def what_is_kept(mountpoint: Path) -> dict[str, int]:
    status = status_of(mountpoint)
    return {what: status[what] for what in ("open_files", "dirty_files", "closes_owed")}


def descriptors(pid: int) -> Counter[str]:
    """What they stand for, and how many of each; sockets and pipes by kind only."""
    found: Counter[str] = Counter()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found[os.readlink(f"/proc/{pid}/fd/{number}").split(":[")[0]] += 1
    for name, count in found.items():
        if name.endswith("/store.sqlite") and count <= OF_SQLITE:
            found[name] = OF_SQLITE
    return found


def leaves_nothing(cell: Cell, work: Callable[[], None]) -> None:
    """`work` leaves the tree as it found it. Once to have everything opened that stays open, then thrice more."""
    work()
    time.sleep(0.5)
    before = Holdings(cell)
    for _ in range(3):
        work()
    deadline = time.monotonic() + SETTLE_S
    while complaints := Holdings(cell).complaints(before):
        assert time.monotonic() < deadline, complaints
        time.sleep(0.2)


@pytest.fixture
def cell(make_cell: MakeCell) -> Cell:
    return make_cell(server_options=["--lease", "2"])


@pytest.fixture
def a(cell: Cell) -> Path:
    return cell.mountpoint("m1")


@pytest.fixture
def b(cell: Cell) -> Path:
    return cell.mountpoint("m2")


@pytest.mark.limit_s(240)
def test_tools(cell: Cell, a: Path, b: Path, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")

    def work() -> None:
        run("cp", "-a", source, a / "copy")
        assert_same_trees(a / "copy", b / "copy")
        run("rm", "-r", b / "copy")

    leaves_nothing(cell, work)


def failing_calls(a: Path, b: Path) -> list[Callable[[], object]]:
    """Each raises OSError. There are a file `f`, a directory `d` with something in it, a symlink `round` to itself."""
    name = "x" * 256
    return [
        lambda: os.open(a / "missing", os.O_RDONLY),
        lambda: os.open(a / "f", os.O_CREAT | os.O_EXCL),
        lambda: os.open(a / "f" / "below", os.O_RDONLY),
        lambda: os.open(a / "d", os.O_WRONLY),
        lambda: os.open(a / "round", os.O_RDONLY),
        lambda: os.open(a / "f", os.O_RDONLY | os.O_DIRECTORY),
        lambda: os.open(a / name, os.O_RDWR | os.O_CREAT),
        lambda: os.mkdir(a / "d"),
        lambda: os.rmdir(a / "d"),
        lambda: os.unlink(a / "d"),
        lambda: os.rename(a / "d", a / "d" / "deeper"),
        lambda: os.link(a / "d", a / "link"),
        lambda: os.mknod(a / "device", 0o600 | 0o020000, os.makedev(1, 3)),
        lambda: os.getxattr(a / "f", "user.missing"),
        lambda: os.listdir(a / "f"),
        lambda: read_beyond_removal(a, b),
    ]


def read_beyond_removal(a: Path, b: Path) -> None:
    """A name that the other mount removes between two uses."""
    (a / "short-lived").write_bytes(b"x")
    (b / "short-lived").unlink()
    (a / "short-lived").read_bytes()


@pytest.mark.limit_s(240)
def test_errors(cell: Cell, a: Path, b: Path) -> None:
    (a / "f").write_bytes(b"content")
    (a / "d").mkdir()
    (a / "d" / "entry").touch()
    (a / "round").symlink_to("round")

    def work() -> None:
        for number, call in enumerate(failing_calls(a, b)):
            with pytest.raises(OSError):
                call()
                pytest.fail(f"call number {number} did not fail")
        fd = os.open(a / "f", os.O_RDONLY)
        with pytest.raises(OSError):
            os.write(fd, b"not for writing")
        os.close(fd)

    leaves_nothing(cell, work)


@pytest.mark.limit_s(240)
@pytest.mark.allow_log("connection .* lost|away|not answered|timed out|no answer")
def test_errors_of_a_server_that_is_away(make_cell: MakeCell) -> None:
    cell = make_cell(server_options=["--lease", "1"], mount_options="timeout=1")
    a = cell.mountpoint("m1")
    (a / "f").write_bytes(b"content")

    def work() -> None:
        fd = os.open(a / "f", os.O_RDWR)
        cell.stop_server(kill=True)
        for call in (lambda: os.mkdir(a / "d"), lambda: os.listdir(a), lambda: os.open(a / "g", os.O_CREAT)):
            with pytest.raises(OSError):
                call()
        os.pwrite(fd, b"CONTENT", 0)
        with pytest.raises(OSError):
            os.fsync(fd)
        with suppress(OSError):
            os.close(fd)
        cell.start_server("--lease", "1")
        deadline = time.monotonic() + 30
        while status_of(a)["dirty_files"] or not status_of(a)["connected"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (a / "f").write_bytes(b"content")

    work()
    before = Holdings(cell)
    work()
    deadline = time.monotonic() + SETTLE_S
    while complaints := [text for text in Holdings(cell).complaints(before) if not text.startswith("processes")]:
        assert time.monotonic() < deadline, complaints  # the server is another process each time
        time.sleep(0.2)


BUSY_APPLICATION = """
import mmap, os, sys, threading
here, own = sys.argv[1], f"{sys.argv[1]}/{os.getpid()}"
os.mkdir(own)

def work(number):
    held = []
    i = 0
    while True:
        i += 1
        path = f"{own}/{number}-{i % 5}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(fd, os.urandom(50_000), 0)
        mapping = mmap.mmap(fd, 50_000)
        mapping[i % 50_000] = 1
        held.append((fd, mapping))
        entries = os.scandir(here)
        next(entries, None)
        held.append(entries)
        if i % 3 == 0:
            os.fsync(fd)
        if i % 4 == 0:
            os.unlink(path)
        if i % 10 == 0:
            for entry in held[: len(held) // 2]:
                if isinstance(entry, tuple):
                    os.close(entry[0])
                    entry[1].close()
            del held[: len(held) // 2]

threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(3)]
for thread in threads:
    thread.start()
print("busy", flush=True)
for thread in threads:
    thread.join()
"""


@pytest.mark.limit_s(300)
def test_applications_killed_in_the_midst(cell: Cell, a: Path, b: Path) -> None:
    rng = random.Random(4)

    def work() -> None:
        command = [sys.executable, "-S", "-E", "-c", BUSY_APPLICATION]
        busy = [subprocess.Popen([*command, view], stdout=subprocess.PIPE) for view in (a, a, b)]
        for process in busy:
            assert process.stdout is not None
            assert process.stdout.readline() == b"busy\n"
        time.sleep(0.2 + rng.random() * 0.5)
        for process in busy:
            process.send_signal(signal.SIGKILL)
        for process in busy:
            assert process.wait(60) == -signal.SIGKILL
            assert process.stdout is not None
            process.stdout.close()
        for process in busy:
            run("rm", "-r", b / str(process.pid))

    leaves_nothing(cell, work)


def test_a_killed_mount_leaves_nothing_in_the_server(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1, server_options=["--lease", "1"])
    (cell.mountpoint("m1") / "f").write_bytes(b"x")

    def work() -> None:
        mount = cell.mount("extra")
        fd = os.open(mount.mountpoint / "f", os.O_RDONLY)
        os.pread(fd, 1, 0)
        processes.send([mount.pid], cell.mark, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while processes.belongs(mount.pid, cell.mark):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with suppress(OSError):
            os.close(fd)
        run("fusermount3", "-u", mount.mountpoint)
        cell.unmount("extra")
        mount.mountpoint.rmdir()

    leaves_nothing(cell, work)
