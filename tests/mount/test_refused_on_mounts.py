"""Each cause of docs/refused-writes.md on real mounts: who is told, what is seen afterwards, where the bytes are.

Through write(2) and fsync; through a shared mapping and msync; through one that is unmapped before the file is closed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cell_lib.cell import COMMANDS, Cell, LogWatch
from promisefs_client.rejects.quarantine import KeptReject, kept_in

if TYPE_CHECKING:
    from conftest import MakeCell, Site, View

pytestmark = pytest.mark.allow_log("kept as reject", "the disk is full", "data file .* is missing")
PAGE = mmap.PAGESIZE
SERVERS = b"s" * PAGE
REFUSED = b"REFUSED"
AT = 100


class Mapping:
    """A shared mapping of a page, without a descriptor of its own: Python's has one, whose close says nothing."""

    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    _libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def __init__(self, descriptor: int) -> None:
        self._at = self._libc.mmap(None, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
        assert self._at != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())

    def store(self, data: bytes, offset: int) -> None:
        ctypes.memmove(self._at + offset, data, len(data))

    def load(self) -> bytes:
        return ctypes.string_at(self._at, PAGE)

    def sync(self) -> None:
        if self._libc.msync(self._at, PAGE, 4):  # MS_SYNC
            raise OSError(ctypes.get_errno(), "msync")

    def unmap(self) -> None:
        assert self._libc.munmap(self._at, PAGE) == 0


def name_of(call: Callable[[], object]) -> str:
    """The errno that a call ends with."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "none"


def by_write(path: Path) -> tuple[str, str]:
    """Write REFUSED at AT, while a mapping looks. Return the errno that is told, and that of the next fsync."""
    descriptor = os.open(path, os.O_RDWR)
    watcher = Mapping(descriptor)
    assert watcher.load() == SERVERS
    told = name_of(lambda: os.pwrite(descriptor, REFUSED, AT))  # it tells at once where there is little room
    if told == "none":
        assert watcher.load() != SERVERS
        told = name_of(lambda: os.fsync(descriptor))
    again = name_of(lambda: os.fsync(descriptor))
    with suppress(OSError):
        assert os.pread(descriptor, PAGE, 0) == SERVERS, "readers see the server's bytes"
        assert watcher.load() == SERVERS, "the mapping that was there sees them, too"
    watcher.unmap()
    os.close(descriptor)
    return told, again


def by_msync(path: Path) -> tuple[str, str]:
    descriptor = os.open(path, os.O_RDWR)
    mapping = Mapping(descriptor)
    mapping.store(REFUSED, AT)
    told, again = name_of(mapping.sync), name_of(mapping.sync)
    assert mapping.load() == SERVERS
    assert os.pread(descriptor, PAGE, 0) == SERVERS
    mapping.unmap()
    os.close(descriptor)
    return told, again


def by_unmapping(path: Path) -> tuple[str, str]:
    descriptor = os.open(path, os.O_RDWR)
    other = os.dup(descriptor)
    mapping = Mapping(descriptor)
    mapping.store(REFUSED, AT)
    mapping.unmap()
    told = name_of(lambda: os.close(descriptor))
    return told, name_of(lambda: os.close(other))


WAYS = [by_write, by_msync, by_unmapping]


def kept(cell: Cell, path: Path) -> list[tuple[int, bytes]]:
    """What the quarantine has of a file."""
    rejects: list[KeptReject]
    rejects, problems = kept_in(cell.rejects)
    assert problems == []
    ino = path.stat().st_ino
    return sorted(piece for reject in rejects if reject.reject.ino == ino for piece in reject.pieces())


def administer(cell: Cell, *arguments: str) -> None:
    cell.administer(arguments[0], cell.store_of(0), *arguments[1:])


@contextmanager
def volume_in(cell: View) -> Iterator[str]:
    """A volume of the test's own, mounted at `volume` in its directory, with a file of one page in it."""
    name = cell.name
    cell.running.create_volume(name)
    cell.running.mount_volume(cell.a / "volume", name)
    (cell.a / "volume" / "file").write_bytes(SERVERS)
    yield name
    administer(cell.running, "set", name, "--read-write")


def used_bytes(path: Path) -> int:
    """What a volume takes that has this one file: see schema.sql."""
    return 4096 + 1024 + 1024 + path.stat().st_size


@pytest.mark.parametrize("way", WAYS)
def test_read_only_volume(cell: View, way: Callable[[Path], tuple[str, str]]) -> None:
    with volume_in(cell) as name:
        path = cell.a / "volume" / "file"

        def made_read_only(path: Path) -> tuple[str, str]:
            descriptor = os.open(path, os.O_RDWR)  # while it may be written
            administer(cell.running, "set", name, "--read-only")
            os.close(descriptor)
            return way(path)

        assert made_read_only(path) == ("EROFS", "none")
        assert path.read_bytes() == (cell.b / "volume" / "file").read_bytes() == SERVERS
        assert kept(cell.running, path) == [(AT, REFUSED)]
        assert name_of(lambda: (cell.a / "volume" / "new").touch()) == "EROFS"


def test_quota(cell: View) -> None:
    with volume_in(cell) as name:
        path, there = cell.a / "volume" / "file", cell.b / "volume" / "file"
        administer(cell.running, "setquota", name, str(used_bytes(path) + 10))
        descriptor = os.open(path, os.O_RDWR)
        other = os.open(path, os.O_RDWR)
        os.pwrite(descriptor, b"ten bytes!", PAGE)
        os.fsync(descriptor)
        os.pwrite(descriptor, b"in place", 0)
        told = name_of(lambda: (os.pwrite(descriptor, REFUSED, PAGE + 10), os.fsync(descriptor)))
        assert told == "EDQUOT"
        assert name_of(lambda: os.fsync(descriptor)) == "none"
        assert os.fstat(descriptor).st_size == PAGE + 10, "the size is the server's again"
        assert there.read_bytes()[:8] == b"in place", "what could be stored was"
        assert there.stat().st_size == PAGE + 10
        assert name_of(lambda: os.close(other)) == "EDQUOT", "another open file could have written it"
        os.close(descriptor)
        assert name_of(lambda: (cell.b / "volume" / "new").touch()) == "EDQUOT"
        statfs = os.statvfs(cell.running.mountpoint("m1"))
        assert statfs.f_bavail > 0
        path.unlink()
        (cell.b / "volume" / "new").touch()


def test_close_and_the_next_write_tell_too(cell: View) -> None:
    with volume_in(cell) as name:
        path = cell.a / "volume" / "file"
        first, second = os.open(path, os.O_WRONLY), os.open(path, os.O_WRONLY)
        administer(cell.running, "set", name, "--read-only")
        os.pwrite(first, REFUSED, AT)
        deadline = time.monotonic() + 20
        while not kept(cell.running, path):  # the timer stores it
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert name_of(lambda: os.pwrite(first, b"more", 0)) == "EROFS"
        os.close(first)
        assert name_of(lambda: os.close(second)) == "EROFS"
        assert path.read_bytes() == SERVERS


def test_two_keys_in_one_file(make_cell: MakeCell) -> None:
    """Alice changes what is there, Bob would need room: he is told, and keeps nothing of hers from being stored."""
    cell = make_cell(mounts=2, mount_options="allow_other")
    root = cell.mountpoint("m1")
    (root / "file").write_bytes(SERVERS)
    (root / "file").chmod(0o666)
    # They have not logged in: what they may do is what anybody may.
    subprocess.run([COMMANDS / "promisefs", "fs", "setacl", root, "system:anyuser", "rlidwk"], check=True)
    directory = os.open(root, os.O_RDONLY)

    def opened_by(uid: int) -> int:
        os.seteuid(uid)
        try:
            return os.open("file", os.O_RDWR, dir_fd=directory)
        finally:
            os.seteuid(0)

    alice, bob = opened_by(1001), opened_by(1002)
    os.close(directory)
    administer(cell, "setquota", "root", str(used_bytes(root / "file")))
    os.pwrite(alice, b"alice", 0)
    mapping = Mapping(alice)
    told = name_of(lambda: (os.pwrite(bob, REFUSED, 2 * PAGE), os.fsync(bob)))
    os.pwrite(alice, b"ALICE", 10)
    assert name_of(lambda: os.fsync(alice)) == "none"
    assert told == "EDQUOT"
    expected = b"alice" + b"s" * 5 + b"ALICE" + SERVERS[15:]
    assert mapping.load() == os.pread(bob, 3 * PAGE, 0) == expected
    assert (cell.mountpoint("m2") / "file").read_bytes() == expected
    mapping.unmap()
    os.close(alice)
    os.close(bob)


def test_server_cannot_write(make_cell: MakeCell) -> None:
    """A data file has vanished from the server's disk."""
    cell = make_cell(mounts=1)
    path = cell.mountpoint("m1") / "file"
    path.write_bytes(SERVERS)
    assert path.read_bytes() == SERVERS
    cell.stop_server()
    (data,) = [file for file in (cell.store_of(0) / "data").glob("*/*/*") if file.is_file()]
    data.rename(data.with_name("away"))
    cell.start_server()
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, REFUSED, AT)
    assert name_of(lambda: os.fsync(descriptor)) == "EIO"
    assert name_of(lambda: os.close(descriptor)) == "none"
    assert kept(cell, path) == [(AT, REFUSED)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("way", WAYS)
def test_full_disk(
    small_disk: Path, site: Site, watched: list[tuple[Cell, LogWatch]], way: Callable[[Path], tuple[str, str]]
) -> None:
    cell = site.new_cell()
    cell.directory.mkdir()
    (small_disk / "store").mkdir(mode=0o700)
    cell.store_of(0).symlink_to(small_disk / "store")
    watched.append((cell, LogWatch(cell)))
    cell.up(1)
    path = cell.mountpoint("m1") / "file"
    path.write_bytes(SERVERS)
    descriptor = os.open(path, os.O_RDWR)
    disk = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - (4 << 20)))
    time.sleep(1.1)  # the server looks at its disk once a second
    assert way(path) == ("ENOSPC", "none")
    assert path.read_bytes() == SERVERS
    # What write(2) itself refused was never taken.
    assert kept(cell, path) == ([] if way is by_write else [(AT, REFUSED)])
    (small_disk / "filler").unlink()
    time.sleep(1.1)
    assert name_of(lambda: os.fsync(descriptor)) == "ENOSPC", "it was open, and could have written it"
    os.pwrite(descriptor, REFUSED, AT)
    os.fsync(descriptor)
    os.close(descriptor)
