"""fallocate, SEEK_DATA and SEEK_HOLE, copy_file_range: on one mount, seen at once on the other."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from asking import status_of
from promisefs_client.fuse.fuse_extension import SWITCH
from promisefs_protocol.messages import FallocateMode

if TYPE_CHECKING:
    from conftest import MakeCell, View

KIB = 1024
MIB = 1024 * KIB
PAGE = mmap.PAGESIZE
ALLOCATE, KEEP, ZERO = FallocateMode.ALLOCATE, FallocateMode.KEEP_SIZE, FallocateMode.ZERO_RANGE
PUNCH = FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE
COLLAPSE, INSERT = 0x08, 0x20
WITHOUT = os.environ.get(SWITCH) == "off"

extended = pytest.mark.skipif(WITHOUT, reason="without the FUSE extension")

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _LIBC.fallocate64(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def seek(fd: int, offset: int, whence: int) -> int | None:
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        assert error.errno == errno.ENXIO
        return None


def calls(mountpoint: Path) -> dict[str, int]:
    """How often each method of the protocol was called so far."""
    return {name: int(count) for name, count in status_of(mountpoint)["rpcs"].items()}


class Looker:
    """One file on one mount, open and mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        self.mapping = mmap.mmap(self.fd, 0, prot=mmap.PROT_READ)

    def expect(self, content: bytes) -> None:
        """Look by every way there is."""
        assert os.fstat(self.fd).st_size == os.stat(self.path).st_size == len(content)
        assert os.pread(self.fd, len(content) + 1, 0) == content
        mapped = min(len(self.mapping), len(content))
        assert self.mapping[:mapped] == content[:mapped]

    def close(self) -> None:
        self.mapping.close()
        os.close(self.fd)


@contextmanager
def looking(path: Path) -> Iterator[Looker]:
    looker = Looker(path)
    try:
        yield looker
    finally:
        looker.close()


@extended
@pytest.mark.parametrize("mode", [PUNCH, ZERO, ZERO | KEEP])
@pytest.mark.parametrize("mapped", [False, True])
def test_zeros_are_seen_at_once(cell: View, mode: int, mapped: bool) -> None:
    content = bytearray(b"x" * 300_000)
    (cell.a / "f").write_bytes(content)
    flags = os.O_RDWR if mapped else os.O_WRONLY
    with opened(cell.a / "f", flags) as fd, looking(cell.b / "f") as there, looking(cell.a / "f") as here:
        writable = mmap.mmap(fd, 0) if mapped else None
        for offset, length in ((100, 1), (0, PAGE), (5000, 200_000), (290_000, 20_000)):
            there.expect(content)
            here.expect(content)
            if writable is not None:
                at = max(offset - 1, 0)
                content[at : at + 3] = writable[at : at + 3] = b"yyy"
            fallocate(fd, mode, offset, length)
            if not mode & KEEP:
                content.extend(bytes(max(0, offset + length - len(content))))
            end = min(offset + length, len(content))
            content[offset:end] = bytes(end - offset)
            os.fsync(fd)
            there.expect(content)
            here.expect(content)
        if writable is not None:
            writable.close()


@extended
def test_room_and_holes_as_stat_and_seek_show_them(cell: View) -> None:
    (cell.a / "f").write_bytes(b"x" * MIB)
    with opened(cell.a / "f") as fd, opened(cell.b / "f", os.O_RDONLY) as other:
        assert os.fstat(other).st_blocks * 512 >= MIB
        fallocate(fd, PUNCH, 256 * KIB, 512 * KIB)
        for each in (fd, other):
            assert os.fstat(each).st_blocks * 512 <= 600 * KIB
            assert seek(each, 0, os.SEEK_HOLE) == 256 * KIB
            assert seek(each, 256 * KIB, os.SEEK_DATA) == 768 * KIB
            assert seek(each, 800 * KIB, os.SEEK_HOLE) == MIB
            assert seek(each, MIB, os.SEEK_DATA) is None
        os.pwrite(fd, b"y", 512 * KIB)
        assert seek(fd, 256 * KIB, os.SEEK_DATA) == 512 * KIB  # dirty here
        os.fsync(fd)
        assert seek(other, 256 * KIB, os.SEEK_DATA) == 512 * KIB
        fallocate(fd, KEEP, 0, 2 * MIB)
        for each in (fd, other):
            assert os.fstat(each).st_blocks * 512 >= 2 * MIB and os.fstat(each).st_size == MIB
        fallocate(fd, ALLOCATE, MIB, 100)
        assert os.fstat(other).st_size == MIB + 100 and os.pread(other, 200, MIB - 1) == b"x" + bytes(100)


@extended
def test_what_is_only_stored_into_a_mapping_is_data(cell: View) -> None:
    with opened(cell.a / "f", os.O_RDWR | os.O_CREAT) as fd, opened(cell.a / "f", os.O_RDONLY) as reader:
        os.truncate(fd, MIB)
        with mmap.mmap(fd, 0) as mapping:
            mapping[512 * KIB] = 1
            assert seek(reader, 0, os.SEEK_DATA) == 512 * KIB


@extended
def test_what_is_refused(cell: View) -> None:
    (cell.a / "f").write_bytes(b"x" * 3 * PAGE)
    with opened(cell.a / "f") as fd:
        for mode, number in (
            (COLLAPSE, errno.EOPNOTSUPP),
            (INSERT, errno.EOPNOTSUPP),
            (FallocateMode.PUNCH_HOLE, errno.EOPNOTSUPP),
        ):
            with pytest.raises(OSError) as refusal:
                fallocate(fd, mode, 0, PAGE)
            assert refusal.value.errno == number
        with pytest.raises(OSError) as refusal:
            fallocate(fd, ALLOCATE, 0, 0)
        assert refusal.value.errno == errno.EINVAL
        with pytest.raises(OSError) as refusal:
            os.copy_file_range(fd, fd, PAGE, 0, 100)
        assert refusal.value.errno == errno.EINVAL
    with opened(cell.a / "f", os.O_RDONLY) as fd, pytest.raises(OSError) as refusal:
        fallocate(fd, ALLOCATE, 0, 1)
    assert refusal.value.errno == errno.EBADF
    assert (cell.b / "f").read_bytes() == b"x" * 3 * PAGE


@pytest.mark.skipif(not WITHOUT, reason="with the FUSE extension")
def test_without_the_extension(cell: View) -> None:
    (cell.a / "f").write_bytes(b"x" * 3 * PAGE)
    with opened(cell.a / "f") as fd:
        with pytest.raises(OSError) as refusal:
            fallocate(fd, PUNCH, 0, PAGE)
        assert refusal.value.errno == errno.EOPNOTSUPP
        assert seek(fd, 0, os.SEEK_HOLE) == 3 * PAGE
        assert os.copy_file_range(fd, fd, PAGE, 0, 2 * PAGE) == PAGE


class Busy:
    """Threads that do something again and again while the context lasts; none of them may fail."""

    def __init__(self, *work: Callable[[], object]) -> None:
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in work]

    def _run(self, work: Callable[[], object]) -> None:
        try:
            while not self._stop.is_set():
                work()
        except BaseException as failure:
            self._failures.append(failure)

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self._failures, self._failures


@extended
@pytest.mark.parametrize("how", ["punch", "truncate"])
def test_nothing_stale_reappears_under_reads_and_faults(cell: View, how: str) -> None:
    """Readers on both mounts fetch, fault and drop the very pages whose bytes go."""
    size, hole = 96 * PAGE, slice(10 * PAGE + 100, 90 * PAGE - 100)
    where = hole if how == "punch" else slice(hole.start, size)
    (cell.a / "f").write_bytes(bytes(size))
    with (
        opened(cell.a / "f", os.O_WRONLY) as fd,
        opened(cell.a / "f", os.O_RDONLY) as here,
        opened(cell.b / "f", os.O_RDONLY) as there,
        mmap.mmap(here, size, prot=mmap.PROT_READ) as here_mapped,
        mmap.mmap(there, size, prot=mmap.PROT_READ) as there_mapped,
    ):

        def drop(reader: int) -> None:
            os.posix_fadvise(reader, 0, 0, os.POSIX_FADV_DONTNEED)
            time.sleep(0.002)

        work = [partial(os.pread, reader, size, 0) for reader in (here, there)]
        work += [partial(drop, reader) for reader in (here, there)]
        if how == "punch":  # a file that is cut has nothing to map
            work += [lambda m=mapping: sum(m[::PAGE]) for mapping in (here_mapped, there_mapped)]
        with Busy(*work):
            for number in range(1, 41):
                data = bytes([number]) * size
                os.pwrite(fd, data, 0)
                os.fsync(fd)
                if how == "punch":
                    fallocate(fd, PUNCH, hole.start, hole.stop - hole.start)
                else:
                    os.ftruncate(fd, hole.start)
                    os.ftruncate(fd, size)
                expected = data[: where.start] + bytes(where.stop - where.start) + data[where.stop :]
                for _ in range(2):
                    assert os.pread(here, size, 0) == expected, number
                    assert os.pread(there, size, 0) == expected, number
                    assert here_mapped[:] == expected, number
                    assert there_mapped[:] == expected, number
                    time.sleep(0.005)


@extended
def test_what_is_stored_beside_a_hole_brings_nothing_back(cell: View) -> None:
    """A process stores into the pages of the hole's ends all the time, and they are written back."""
    size, start, stop = 4 * PAGE, PAGE // 2, 3 * PAGE + PAGE // 2
    (cell.a / "f").write_bytes(bytes(size))
    counter = 0
    with opened(cell.a / "f") as fd, opened(cell.b / "f", os.O_RDONLY) as there, mmap.mmap(fd, size) as mapping:

        def store() -> None:
            nonlocal counter
            counter = (counter + 1) % 256
            mapping[start - 1] = mapping[stop] = counter
            if counter % 8 == 0:
                mapping.flush()

        for number in range(1, 41):
            mapping[start:stop] = bytes([number]) * (stop - start)
            mapping.flush()
            with Busy(store):
                time.sleep(0.002)
                fallocate(fd, PUNCH, start, stop - start)
                assert mapping[start:stop] == bytes(stop - start), number
                time.sleep(0.002)
            last = counter
            mapping.flush()
            for found in (os.pread(there, size, 0), os.pread(fd, size, 0), mapping[:]):
                assert found[start:stop] == bytes(stop - start), number
                assert found[start - 1] == found[stop] == last, number


# Copies


@extended
def test_cp_moves_no_bytes_through_the_client(cell: View) -> None:
    content = os.urandom(3 * MIB + 17)
    (cell.a / "f").write_bytes(content)
    before = calls(cell.b.parent)
    subprocess.run(["cp", "--reflink=auto", cell.b / "f", cell.b / "copy"], check=True)
    after = calls(cell.b.parent)
    made = {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
    assert made.get("FS.CopyRange", 0) >= 1
    assert "FS.FetchData" not in made and "FS.StoreData" not in made, made
    for view in cell.both:
        assert (view / "copy").read_bytes() == content


@extended
def test_a_copy_is_seen_at_once_and_has_what_was_not_stored_yet(cell: View) -> None:
    (cell.a / "source").write_bytes(b"s" * 20_000)
    content = bytearray(b"t" * 30_000)
    (cell.a / "target").write_bytes(content)
    with (
        opened(cell.a / "source") as source,
        opened(cell.a / "target", os.O_WRONLY) as target,
        looking(cell.b / "target") as there,
        looking(cell.a / "target") as here,
        mmap.mmap(source, 0) as mapping,
    ):
        for offset, length in ((0, 100), (4000, 5000), (25_000, 10_000)):
            there.expect(content)
            here.expect(content)
            mapping[10:21] = b"mapped%5d" % offset
            os.pwrite(source, b"written", 30)
            os.pwrite(target, b"dirty", offset + 50)
            content[offset + 50 : offset + 55] = b"dirty"
            assert os.copy_file_range(source, target, length, 5, offset) == length
            expected = bytearray(b"s" * 20_000)
            expected[10:21] = b"mapped%5d" % offset
            expected[30:37] = b"written"
            content[offset : offset + length] = expected[5 : 5 + length]
            os.fsync(target)
            there.expect(content)
            here.expect(content)


@extended
def test_a_copy_into_a_file_that_is_mapped_for_writing_keeps_what_is_beside_it(cell: View) -> None:
    (cell.a / "source").write_bytes(b"s" * PAGE)
    (cell.a / "target").write_bytes(b"t" * 3 * PAGE)
    with opened(cell.a / "source") as source, opened(cell.a / "target") as target, mmap.mmap(target, 0) as mapping:
        mapping[10] = 1
        assert os.copy_file_range(source, target, PAGE, 0, PAGE + 100) == PAGE
        mapping[PAGE + 99] = 2
        mapping[2 * PAGE + 100] = 3
        mapping.flush()
    expected = bytearray(b"t" * 3 * PAGE)
    expected[PAGE + 100 : 2 * PAGE + 100] = b"s" * PAGE
    expected[10], expected[PAGE + 99], expected[2 * PAGE + 100] = 1, 2, 3
    assert (cell.b / "target").read_bytes() == expected


@extended
def test_holes_survive_cp_and_tar(cell: View, tmp_path: Path) -> None:
    with opened(cell.a / "f", os.O_RDWR | os.O_CREAT) as fd:
        for at in (0, 2 * MIB, 5 * MIB):
            os.pwrite(fd, os.urandom(64 * KIB), at)
        os.truncate(fd, 8 * MIB)
    content = (cell.a / "f").read_bytes()
    subprocess.run(["cp", "--sparse=auto", cell.b / "f", cell.b / "auto"], check=True)
    subprocess.run(["cp", "--sparse=always", cell.b / "f", cell.b / "always"], check=True)
    subprocess.run(["tar", "-C", cell.b, "-S", "-cf", tmp_path / "archive", "f"], check=True)
    assert (tmp_path / "archive").stat().st_size < MIB
    (cell.a / "unpacked").mkdir()
    subprocess.run(["tar", "-C", cell.a / "unpacked", "-S", "-xf", tmp_path / "archive"], check=True)
    for name in ("auto", "always", "unpacked/f"):
        for view in cell.both:
            assert (view / name).read_bytes() == content, name
            assert (view / name).stat().st_blocks * 512 < MIB, name
    shutil.rmtree(cell.a / "unpacked")


@extended
def test_cp_to_another_volume(make_cell: MakeCell) -> None:
    running = make_cell()
    running.create_volume("other")
    mountpoint = running.mountpoint("m1")
    running.mount_volume(mountpoint / "there", "other")
    content = os.urandom(MIB + 5)
    (mountpoint / "f").write_bytes(content)
    subprocess.run(["cp", mountpoint / "f", mountpoint / "there" / "f"], check=True)
    assert (mountpoint / "there" / "f").read_bytes() == content
    with opened(mountpoint / "f", os.O_RDONLY) as source, opened(mountpoint / "there" / "f") as target:
        assert os.copy_file_range(source, target, 100, 1, 0) == 100
        assert os.pread(target, 100, 0) == content[1:101]
    assert "FS.CopyRange" not in calls(mountpoint)
