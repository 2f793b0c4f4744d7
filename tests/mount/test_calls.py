"""System calls on files and names: what one mount did, the other shows, as POSIX and Linux have it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from asking import status_of
from promisefs_client.fuse import kernel_readahead
from trees import RENAME_EXCHANGE, RENAME_NOREPLACE, assert_same_trees, bytes_for, digest, renameat2, run

if TYPE_CHECKING:
    from conftest import MakeCell, View

GIB = 1 << 30


@contextmanager
def fails_with(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, f"{errno.errorcode[caught.value.errno or 0]}: {caught.value}"


@contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


# Files


def test_sparse_file_beyond_4_gib(cell: View) -> None:
    a, b = cell.a / "sparse", cell.b / "sparse"
    with opened(a, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 5 * GIB)
        os.pwrite(fd, b"end", 5 * GIB - 3)
        os.pwrite(fd, b"middle", 4 * GIB - 3)
    assert os.stat(b).st_size == 5 * GIB
    assert os.stat(b).st_blocks * 512 < 64 << 20
    with opened(b, os.O_RDWR) as fd:
        assert os.pread(fd, 20, 5 * GIB - 3) == b"end"
        assert os.pread(fd, 10, 4 * GIB - 5) == b"\0\0middle\0\0"
        assert os.pread(fd, 1 << 20, 3 * GIB) == bytes(1 << 20)
        assert os.pwrite(fd, b"more", 6 * GIB) == 4
    assert os.stat(a).st_size == 6 * GIB + 4
    with opened(a, os.O_RDONLY) as fd:
        assert os.pread(fd, 100, 6 * GIB - 2) == b"\0\0more"
        with mmap.mmap(fd, 8192, prot=mmap.PROT_READ, offset=4 * GIB - 4096) as mapped:
            assert mapped[4093:4099] == b"middle"
    os.truncate(b, 4 * GIB + 1)
    assert os.stat(a).st_size == 4 * GIB + 1


@pytest.mark.skipif(
    not os.access(kernel_readahead.SYSFS, os.W_OK),
    reason="the kernel's readahead is set in sysfs, by root, and not in a container",
)
def test_a_long_read_comes_in_large_requests(cell: View) -> None:
    content = bytes_for(2, 16 << 20)
    (cell.a / "f").write_bytes(content)

    def reads() -> int:
        return int(status_of(cell.running.mountpoint("m2"))["upcalls"].get("read", 0))

    before = reads()
    assert (cell.b / "f").read_bytes() == content
    assert reads() - before < (len(content) >> 17) / 2, "not in pieces of 128 KiB"


def test_truncate_in_both_directions(cell: View) -> None:
    a, b = cell.a / "f", cell.b / "f"
    content = bytes_for(1, 300_000)
    a.write_bytes(content)
    assert b.read_bytes() == content
    os.truncate(b, 100_001)
    assert a.read_bytes() == content[:100_001]
    os.truncate(a, 200_000)  # what was cut off must not come back
    expected = content[:100_001] + bytes(99_999)
    assert b.read_bytes() == expected
    assert a.read_bytes() == expected
    with opened(b, os.O_RDWR) as fd:
        os.ftruncate(fd, 5)
        os.pwrite(fd, b"x", 10)
        assert os.fstat(fd).st_size == 11
        os.fsync(fd)
        assert a.read_bytes() == content[:5] + bytes(5) + b"x"
    os.truncate(a, 0)
    assert b.read_bytes() == b""
    with opened(b, os.O_WRONLY | os.O_TRUNC):
        pass
    with fails_with(errno.EINVAL):
        os.truncate(a, -1)


def test_shrinking_and_growing_between_unstored_writes(cell: View) -> None:
    with opened(cell.a / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"A" * 10_000, 0)
        os.ftruncate(fd, 3000)
        os.pwrite(fd, b"B" * 100, 8000)
        os.ftruncate(fd, 8050)
        os.ftruncate(fd, 9000)
        expected = b"A" * 3000 + bytes(5000) + b"B" * 50 + bytes(950)
        assert os.pread(fd, 20_000, 0) == expected
        os.fsync(fd)
        assert (cell.b / "f").read_bytes() == expected
    assert (cell.a / "f").read_bytes() == expected


def test_open_flags(cell: View) -> None:
    a, b = cell.a / "f", cell.b / "f"
    os.close(os.open(a, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640))
    assert stat.S_IMODE(os.stat(b).st_mode) == 0o640
    with fails_with(errno.EEXIST):
        os.open(b, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    with opened(a, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"one ")
        os.write(fd, b"two ")
    with opened(b, os.O_WRONLY | os.O_APPEND) as fd:
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"three")
    assert a.read_bytes() == b"one two three"
    with opened(a, os.O_WRONLY) as fd, fails_with(errno.EBADF):
        os.read(fd, 1)
    with fails_with(errno.ENOTDIR):
        os.open(a, os.O_RDONLY | os.O_DIRECTORY)
    with fails_with(errno.EISDIR):
        os.open(cell.a, os.O_WRONLY)
    os.symlink("f", cell.a / "link")
    with fails_with(errno.ELOOP):
        os.open(cell.b / "link", os.O_RDONLY | os.O_NOFOLLOW)
    with opened(b, os.O_RDWR | os.O_TRUNC):
        assert os.stat(a).st_size == 0


def test_writes_are_seen_after_fsync_close_and_o_sync(cell: View) -> None:
    a, b = cell.a / "f", cell.b / "f"
    a.write_bytes(b"0" * 10_000)
    with opened(b, os.O_RDONLY) as reader, opened(a, os.O_RDWR) as writer:
        for i in range(1, 50):
            os.pwrite(writer, b"%05d" % i, i * 100)
            (os.fsync if i % 2 else os.fdatasync)(writer)
            assert os.pread(reader, 5, i * 100) == b"%05d" % i
        with opened(a, os.O_WRONLY | os.O_SYNC) as synchronous:
            os.pwrite(synchronous, b"sync", 0)
            assert os.pread(reader, 4, 0) == b"sync"
            os.pwrite(synchronous, b"longer", 20_000)
            assert os.fstat(reader).st_size == 20_006
            assert os.pread(reader, 100, 20_000) == b"longer"


def test_appenders_in_turn_on_both_mounts(cell: View) -> None:
    with (
        opened(cell.a / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT) as one,
        opened(cell.b / "log", os.O_WRONLY | os.O_APPEND) as other,
    ):
        for i in range(40):
            for fd in (one, other):
                os.write(fd, b"line %d\n" % i)
                os.fsync(fd)
    expected = b"".join(b"line %d\n" % (i // 2) for i in range(80))
    assert (cell.a / "log").read_bytes() == expected == (cell.b / "log").read_bytes()


@pytest.mark.parametrize("access", [os.O_WRONLY, os.O_RDWR])
@pytest.mark.parametrize("size", [10, 4096, 5000, 70_000])
def test_appenders_whose_kernel_has_not_seen_the_new_end(cell: View, access: int, size: int) -> None:
    """Nothing makes the kernel ask for the size; it splits writes at pages of its own idea of the end."""
    expected = bytearray()
    with (
        opened(cell.a / "log", access | os.O_APPEND | os.O_CREAT) as one,
        opened(cell.b / "log", access | os.O_APPEND) as other,
    ):
        for i in range(12):
            line = bytes([i + 1]) * (size + i % 3 // 2)
            os.write((one, other)[i % 2], line)
            os.fsync((one, other)[i % 2])
            expected += line
    assert os.stat(cell.a / "log").st_size == len(expected)
    assert (cell.a / "log").read_bytes() == expected == (cell.b / "log").read_bytes()


_APPENDER = """
import os, sys
path, number, writes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_WRONLY | os.O_APPEND)
for step in range(writes):
    data = bytes(number << 5 | (step + i) % 32 for i in range(1 + step * 37 % 300))
    assert os.write(fd, data) == len(data)
    if step % 50 == 0:
        os.fsync(fd)
os.close(fd)
"""


def test_appenders_on_both_mounts_at_the_same_time(make_cell: MakeCell) -> None:
    """Two processes on each mount: every write is there, once, in one piece, and those of one process in its order."""
    cell = make_cell(server_options=["--lease", "60"], mount_options="ack_wait=20")
    views = [cell.mountpoint("m1"), cell.mountpoint("m2")]
    (views[0] / "log").touch()
    writes = 200
    processes = [
        subprocess.Popen([sys.executable, "-c", _APPENDER, view / "log", str(number), str(writes)])
        for number, view in enumerate(views * 2)
    ]
    assert [process.wait(100) for process in processes] == [0] * len(processes)
    content = (views[0] / "log").read_bytes()
    assert content == (views[1] / "log").read_bytes()
    steps, at = [0] * len(processes), 0
    while at < len(content):
        number = content[at] >> 5
        step = steps[number]
        data = bytes(number << 5 | (step + i) % 32 for i in range(1 + step * 37 % 300))
        assert content[at : at + len(data)] == data, f"write {step} of {number} at {at} is torn"
        steps[number], at = step + 1, at + len(data)
    assert steps == [writes] * len(processes)
    early_acks = [int(status_of(view)["early_acks"]) for view in views]
    assert early_acks == [0, 0], "a WRITE that waits for the server held up an acknowledgement"


_READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
while True:
    os.pread(fd, 1 << 16, 0)
"""

_MAPPING_APPENDER = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
mapped = os.open(sys.argv[1], os.O_RDONLY)
# Beyond the end, so that nothing is asked of the file again: mmap.mmap would ask for its size.
address = libc.mmap(None, 1 << 16, mmap.PROT_READ, mmap.MAP_SHARED, mapped, 0)
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
end = 1
for step in range(1, 400):
    data = bytes([step % 255 + 1]) * (step % 90 + 1)
    os.write(fd, data)
    assert ctypes.string_at(address + end, len(data)) == data, step
    end += len(data)
"""


def test_what_was_appended_is_seen_at_once_in_a_mapping(cell: View) -> None:
    """Appending leaves the kernel's pages alone; who reads meanwhile fills them, with zeros behind the end that was."""
    path = cell.a / "log"
    path.write_bytes(b"x")
    reader = subprocess.Popen([sys.executable, "-S", "-c", _READER, path])
    try:
        run(sys.executable, "-S", "-c", _MAPPING_APPENDER, path)
    finally:
        reader.kill()
        reader.wait(10)


# What the kernel need not ask for


def _upcalls(mountpoint: Path, name: str) -> int:
    return int(status_of(mountpoint)["upcalls"].get(name, 0))


def test_targets_of_symlinks_stay_in_the_kernel(cell: View) -> None:
    mountpoint = cell.running.mountpoint("m2")
    if not status_of(mountpoint)["features"]["cached_symlinks"]:
        pytest.skip("the kernel keeps them only if the FUSE extension allows it")
    a, b = cell.a / "link", cell.b / "link"
    a.symlink_to("one")
    before = _upcalls(mountpoint, "readlink")
    assert [os.readlink(b) for _ in range(5)] == ["one"] * 5
    assert _upcalls(mountpoint, "readlink") == before + 1
    (cell.a / "new").symlink_to("two, which is longer")
    os.rename(cell.a / "new", a)
    assert os.readlink(b) == "two, which is longer"
    a.unlink()
    a.symlink_to("3")
    assert os.readlink(b) == "3"
    assert os.lstat(b).st_size == 1


def test_attributes_that_no_file_has_are_not_asked_for(cell: View) -> None:
    mountpoint = cell.running.mountpoint("m1")
    if not status_of(mountpoint)["features"]["write_flags"]:
        pytest.skip("without the FUSE extension each takes a request")
    with opened(cell.a / "f", os.O_CREAT | os.O_WRONLY) as fd:
        before = _upcalls(mountpoint, "getxattr")
        for _ in range(10):
            os.write(fd, b"x")
        for name in ("security.capability", "system.posix_acl_access", "trusted.x"):
            with fails_with(errno.ENODATA):
                os.getxattr(fd, name)
        assert _upcalls(mountpoint, "getxattr") == before
        os.setxattr(fd, "user.security.x", b"there")
        assert os.getxattr(fd, "user.security.x") == b"there"
        assert _upcalls(mountpoint, "getxattr") == before + 1


_PAGE_APPENDER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_APPEND)
for step in range(150):
    assert os.write(fd, bytes([int(sys.argv[2]) << 7 | step % 128]) * 4096) == 4096
os.close(fd)
"""


def test_appenders_of_whole_pages_on_both_mounts_at_the_same_time(cell: View) -> None:
    """By offset and length these look like pages of a mapping. Every byte is there, once, those of each in order."""
    if not status_of(cell.running.mountpoint("m1"))["features"]["write_flags"]:
        pytest.skip("which WRITEs are pages of mappings is known only with the FUSE extension")
    for i in range(3):
        (cell.a / f"log{i}").touch()
        processes = [
            subprocess.Popen([sys.executable, "-S", "-c", _PAGE_APPENDER, view / f"log{i}", str(number)])
            for number, view in enumerate(cell.both)
        ]
        assert [process.wait(100) for process in processes] == [0, 0]
        content = (cell.a / f"log{i}").read_bytes()
        assert content == (cell.b / f"log{i}").read_bytes()
        for number in range(2):
            expected = b"".join(bytes([number << 7 | step % 128]) * 4096 for step in range(150))
            assert bytes(byte for byte in content if byte >> 7 == number) == expected


@pytest.mark.parametrize("access", [os.O_WRONLY, os.O_RDWR])
@pytest.mark.parametrize("old_size", [353, 8192, 210_000])
def test_appending_after_the_file_was_cut_elsewhere(cell: View, access: int, old_size: int) -> None:
    """The kernel still believes in the old end, and splits the write at the pages that it would touch there."""
    (cell.a / "log").write_bytes(bytes(old_size))
    with opened(cell.b / "log", access | os.O_APPEND) as fd:
        os.fstat(fd)
        (cell.a / "log").write_bytes(b"short")
        os.write(fd, b"z" * 5000)
        assert os.fstat(fd).st_size == 5005
    for view in cell.both:
        assert (view / "log").read_bytes() == b"short" + b"z" * 5000


def test_vectors_and_copies_between_descriptors(cell: View) -> None:
    content = bytes_for(2, 500_000)
    with opened(cell.a / "f", os.O_RDWR | os.O_CREAT) as fd, opened(cell.a / "copy", os.O_RDWR | os.O_CREAT) as copy:
        assert os.pwritev(fd, [content[:1000], content[1000:4097], content[4097:]], 0) == len(content)
        left, at = len(content), 0
        while left:
            n = os.copy_file_range(fd, copy, left, at, at)
            assert n > 0
            left, at = left - n, at + n
        buffers = [bytearray(7), bytearray(5000)]
        assert os.preadv(copy, buffers, 100) == 5007
        assert bytes(buffers[0] + buffers[1]) == content[100:5107]
        os.posix_fallocate(fd, 0, 600_000)
        assert os.fstat(fd).st_size == 600_000
        sent = 0
        with opened(cell.a / "sent", os.O_RDWR | os.O_CREAT) as target:
            while sent < len(content):
                sent += os.sendfile(target, fd, sent, len(content) - sent)
    assert (cell.b / "copy").read_bytes() == content == (cell.b / "sent").read_bytes()
    assert (cell.b / "f").read_bytes() == content + bytes(100_000)


def test_unlinked_but_open(cell: View) -> None:
    for opener, remover in (cell.both, cell.both[::-1], (cell.a, cell.a)):
        path = opener / "f"
        path.write_bytes(b"before")
        with opened(path, os.O_RDWR) as fd:
            assert os.read(fd, 6) == b"before"
            os.unlink(remover / "f")
            assert not path.exists()
            with fails_with(errno.ENOENT):
                os.open(path, os.O_RDWR)
            assert os.pread(fd, 10, 0) == b"before"
            assert os.pwrite(fd, b"after!" * 10_000, 3) == 60_000
            os.fsync(fd)
            assert os.fstat(fd).st_size == 60_003
            assert os.fstat(fd).st_nlink == 0
            os.ftruncate(fd, 9)
            os.fchmod(fd, 0o600)
            assert os.pread(fd, 100, 0) == b"befafter!"
            path.write_bytes(b"another")  # the name is free again
            assert os.pread(fd, 100, 0) == b"befafter!"
            assert (remover / "f").read_bytes() == b"another"
        path.unlink()


def test_renamed_over_but_open(cell: View) -> None:
    (cell.a / "f").write_bytes(b"old")
    (cell.b / "g").write_bytes(b"new")
    with opened(cell.a / "f", os.O_RDWR) as on_a, opened(cell.b / "f", os.O_RDWR) as on_b:
        os.rename(cell.b / "g", cell.b / "f")
        assert (cell.a / "f").read_bytes() == b"new"
        assert os.pread(on_a, 10, 0) == os.pread(on_b, 10, 0) == b"old"
        os.pwrite(on_a, b"older", 0)
        os.fsync(on_a)
        assert os.pread(on_b, 10, 0) == b"older"
        assert os.fstat(on_b).st_nlink == 0
    assert (cell.b / "f").read_bytes() == b"new"


def test_shared_mappings(cell: View) -> None:
    a, b = cell.a / "f", cell.b / "f"
    a.write_bytes(bytes(3 * 4096 + 100))
    with opened(a, os.O_RDWR) as fd_a, opened(b, os.O_RDWR) as fd_b:
        with mmap.mmap(fd_a, 3 * 4096 + 100) as on_a, mmap.mmap(fd_b, 3 * 4096 + 100) as on_b:
            for i in range(20):
                writer, reader = (on_a, on_b) if i % 2 else (on_b, on_a)
                at = (i * 1237) % len(writer)
                writer[at] = i + 1
                writer.flush()
                assert reader[at] == i + 1
            on_a[4096:8192] = b"m" * 4096
            on_a.flush()
            assert b.read_bytes()[4096:8192] == b"m" * 4096
        os.ftruncate(fd_b, 5 * 4096)
        with mmap.mmap(fd_a, 5 * 4096) as on_a:
            on_a[-1:] = b"z"
            on_a[3 * 4096 + 99] = 7
    assert b.read_bytes()[-1:] == b"z"
    assert b.read_bytes()[3 * 4096 + 99] == 7
    assert digest(a) == digest(b)


def test_private_and_executable_mappings(cell: View) -> None:
    run("cp", "/bin/true", cell.a / "true")
    run(cell.b / "true")
    (cell.a / "f").write_bytes(b"a" * 4096)
    with (
        opened(cell.b / "f", os.O_RDONLY) as fd,
        mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as private,
    ):
        private[0] = ord("p")
        assert (cell.a / "f").read_bytes() == b"a" * 4096
        assert private[:2] == b"pa"


def test_locks_within_one_mount(cell: View) -> None:
    path = cell.a / "f"
    path.touch()
    with opened(path, os.O_RDWR) as one, opened(path, os.O_RDWR) as other:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with fails_with(errno.EAGAIN):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(one, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)


# Attributes


@pytest.mark.parametrize("ns", [0, 1, 999_999_999, 1_700_000_000_123_456_789, -1, -5_000_000_001, 2**33 * 10**9 + 7])
def test_times_in_nanoseconds(cell: View, ns: int) -> None:
    (cell.a / "f").touch()
    (cell.a / "d").mkdir()
    os.symlink("f", cell.a / "l")
    for name in ("f", "d", "l"):
        os.utime(cell.a / name, ns=(ns + 1, ns), follow_symlinks=False)
        for view in cell.both:
            st = os.lstat(view / name)
            assert (st.st_mtime_ns, st.st_atime_ns) == (ns, ns + 1)
    with opened(cell.b / "f", os.O_WRONLY) as fd:
        os.utime(fd, ns=(ns, ns + 5))
    assert os.stat(cell.a / "f").st_mtime_ns == ns + 5


def test_times_follow_changes(cell: View) -> None:
    a, b = cell.a / "f", cell.b / "f"
    a.write_bytes(b"1")
    os.utime(a, ns=(0, 0))
    before = os.stat(b)
    with opened(b, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"2")
    after = os.stat(a)
    assert after.st_mtime_ns > 10**18 > before.st_mtime_ns
    assert after.st_ctime_ns > before.st_ctime_ns
    os.chmod(b, 0o600)
    again = os.stat(a)
    assert again.st_mtime_ns == after.st_mtime_ns
    assert again.st_ctime_ns > after.st_ctime_ns
    folder = os.stat(cell.b)
    (cell.a / "g").touch()
    assert os.stat(cell.b).st_mtime_ns > folder.st_mtime_ns
    # A time set while writes are not yet stored stays.
    with opened(a, os.O_WRONLY) as fd:
        os.write(fd, b"xyz")
        os.utime(fd, ns=(5, 5))
    assert os.stat(b).st_mtime_ns == 5 == os.stat(a).st_mtime_ns
    # But a write after it counts, stored or not.
    with opened(a, os.O_WRONLY) as fd:
        os.write(fd, b"xyz")
        os.utime(fd, ns=(6, 6))
        os.write(fd, b"more")
        assert os.fstat(fd).st_mtime_ns > 10**18
    assert os.stat(b).st_mtime_ns > 10**18 < os.stat(a).st_mtime_ns


def test_modes_and_owners(cell: View) -> None:
    (cell.a / "f").touch()
    (cell.a / "d").mkdir()
    for mode in (0, 0o777, 0o4755, 0o2711, 0o1000, 0o640):
        for name in ("f", "d"):
            os.chmod(cell.a / name, mode)
            assert stat.S_IMODE(os.stat(cell.b / name).st_mode) == mode
    old = os.umask(0o027)
    try:
        (cell.b / "masked").touch()
        (cell.b / "dmasked").mkdir()
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(cell.a / "masked").st_mode) == 0o640
    assert stat.S_IMODE(os.stat(cell.a / "dmasked").st_mode) == 0o750
    st = os.stat(cell.a / "f")
    assert (st.st_uid, st.st_gid) == (os.getuid(), os.getgid())
    if os.getuid() == 0:
        os.chown(cell.a / "f", 12345, 54321)
        assert (os.stat(cell.b / "f").st_uid, os.stat(cell.b / "f").st_gid) == (12345, 54321)
        os.chown(cell.b / "f", -1, 7)
        assert (os.stat(cell.a / "f").st_uid, os.stat(cell.a / "f").st_gid) == (12345, 7)


def test_xattrs(cell: View) -> None:
    (cell.a / "f").touch()
    (cell.a / "d").mkdir()
    for name in ("f", "d"):
        a, b = cell.a / name, cell.b / name
        assert os.listxattr(b) == []
        os.setxattr(a, "user.one", b"1\0\xff")
        os.setxattr(a, "user.empty", b"")
        assert sorted(os.listxattr(b)) == ["user.empty", "user.one"]
        assert os.getxattr(b, "user.one") == b"1\0\xff"
        assert os.getxattr(b, "user.empty") == b""
        with fails_with(errno.EEXIST):
            os.setxattr(b, "user.one", b"2", os.XATTR_CREATE)
        with fails_with(errno.ENODATA):
            os.setxattr(b, "user.two", b"2", os.XATTR_REPLACE)
        os.setxattr(b, "user.one", b"2", os.XATTR_REPLACE)
        assert os.getxattr(a, "user.one") == b"2"
        big = bytes_for(3, 65536)
        os.setxattr(a, "user.big", big)
        assert os.getxattr(b, "user.big") == big
        os.removexattr(b, "user.big")
        with fails_with(errno.ENODATA):
            os.getxattr(a, "user.big")
        with fails_with(errno.ENODATA):
            os.removexattr(a, "user.big")
        with fails_with(errno.E2BIG):
            os.setxattr(a, "user.big", bytes(65537))
        # Of others than root the kernel does not even ask us.
        with fails_with(errno.EOPNOTSUPP if os.geteuid() == 0 else errno.EPERM):
            os.setxattr(a, "trusted.x", b"")
        long = "user." + "n" * 250
        os.setxattr(a, long, b"long")
        assert os.getxattr(b, long) == b"long"


def test_statvfs(cell: View) -> None:
    seen = [os.statvfs(view) for view in cell.both]
    for st in seen:
        assert st.f_bsize >= 512
        assert st.f_frsize >= 512
        assert 0 < st.f_bavail <= st.f_bfree <= st.f_blocks
        assert 0 < st.f_files
        assert st.f_namemax == 255
    assert seen[0].f_blocks == seen[1].f_blocks
    run("df", cell.a)


# Names


def test_names_are_bytes(cell: View) -> None:
    names = [bytes([i]) + b"x" for i in range(1, 256) if i != ord("/")] + [b"n" * 255, "ü".encode() * 127, b"...", b" "]
    a, b = os.fsencode(cell.a), os.fsencode(cell.b)
    for i, name in enumerate(names):
        with open(a + b"/" + name, "wb") as file:
            file.write(b"%d" % i)
    assert sorted(os.listdir(b)) == sorted(names)
    for i, name in enumerate(names):
        with open(b + b"/" + name, "rb") as file:
            assert file.read() == b"%d" % i
    for path in (a, b):
        with fails_with(errno.ENAMETOOLONG):
            os.stat(path + b"/" + b"n" * 256)
        with fails_with(errno.ENAMETOOLONG):
            os.mkdir(path + b"/" + b"n" * 256)
        with fails_with(errno.ENOENT):
            os.stat(path + b"/" + b"N" * 255)  # case counts
    for i, name in enumerate(names):
        os.rename((a, b)[i % 2] + b"/" + name, (b, a)[i // 2 % 2 ^ 1 ^ (i % 2) ^ (i // 2 % 2)] + b"/renamed-%d" % i)
    assert len(os.listdir(a)) == len(names)
    assert all(name.startswith(b"renamed-") for name in os.listdir(b))


def test_hard_links_across_directories(cell: View) -> None:
    for name in ("d1", "d2"):
        (cell.a / name).mkdir()
    (cell.a / "d1/f").write_bytes(b"one")
    os.link(cell.b / "d1/f", cell.b / "d2/g")
    os.link(cell.a / "d2/g", cell.a / "h")
    for view in cell.both:
        assert {os.stat(view / n).st_nlink for n in ("d1/f", "d2/g", "h")} == {3}
        assert len({os.stat(view / n).st_ino for n in ("d1/f", "d2/g", "h")}) == 1
    (cell.a / "h").write_bytes(b"through another name")
    assert (cell.b / "d1/f").read_bytes() == b"through another name"
    assert os.stat(cell.a / "d2/g").st_size == 20
    os.unlink(cell.b / "d1/f")
    assert os.stat(cell.a / "h").st_nlink == 2
    os.rename(cell.a / "h", cell.a / "d2/g")  # two names of one file: nothing happens
    assert (cell.b / "h").exists()
    with fails_with(errno.EEXIST):
        os.link(cell.b / "h", cell.b / "d2/g")
    with fails_with(errno.EPERM):
        os.link(cell.b / "d1", cell.b / "d3")
    os.chmod(cell.a / "h", 0o600)
    assert stat.S_IMODE(os.stat(cell.b / "d2/g").st_mode) == 0o600


def test_symlinks(cell: View) -> None:
    (cell.a / "d").mkdir()
    (cell.a / "d/f").write_bytes(b"found")
    os.symlink("d/f", cell.a / "relative")
    os.symlink(cell.b / "d", cell.a / "absolute")
    os.symlink("loop", cell.a / "loop")
    os.symlink(b"\xff/" * 2047 + b"x", os.fsencode(cell.a) + b"/long")
    assert (cell.b / "relative").read_bytes() == b"found"
    assert (cell.b / "absolute/f").read_bytes() == b"found"
    assert os.readlink(os.fsencode(cell.b) + b"/long") == b"\xff/" * 2047 + b"x"
    assert os.lstat(cell.b / "long").st_size == 4095
    with fails_with(errno.ELOOP):
        (cell.b / "loop").read_bytes()
    with fails_with(errno.EINVAL):
        os.readlink(cell.b / "d")
    os.rename(cell.b / "relative", cell.b / "d/relative")
    with fails_with(errno.ENOENT):
        (cell.a / "d/relative").read_bytes()
    os.unlink(cell.a / "d/relative")
    assert (cell.b / "d/f").exists()


def test_fifos_and_sockets(cell: View, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(cell.a / "fifo", 0o622)
    assert stat.S_ISFIFO(os.stat(cell.b / "fifo").st_mode)
    with opened(cell.a / "fifo", os.O_RDONLY | os.O_NONBLOCK) as reader:
        with opened(cell.a / "fifo", os.O_WRONLY) as writer:
            os.write(writer, b"through")
        assert os.read(reader, 10) == b"through"
    monkeypatch.chdir(cell.a)  # paths of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        server.listen(1)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("socket")
    assert stat.S_ISSOCK(os.stat(cell.b / "socket").st_mode)


def test_rename_flags(cell: View) -> None:
    (cell.a / "f").write_bytes(b"f")
    (cell.a / "d").mkdir()
    (cell.a / "d/inside").write_bytes(b"i")
    for view in cell.both:
        with fails_with(errno.EEXIST):
            renameat2(view / "f", view / "d", RENAME_NOREPLACE)
        with fails_with(errno.EEXIST):
            renameat2(view / "f", view / "d/inside", RENAME_NOREPLACE)
        with fails_with(errno.ENOENT):
            renameat2(view / "f", view / "missing", RENAME_EXCHANGE)
        with fails_with(errno.EINVAL):
            renameat2(view / "f", view / "d", RENAME_EXCHANGE | RENAME_NOREPLACE)
    renameat2(cell.a / "f", cell.a / "d", RENAME_EXCHANGE)
    assert (cell.b / "d").read_bytes() == b"f"
    assert os.listdir(cell.b / "f") == ["inside"]
    renameat2(cell.b / "d", cell.b / "f/inside", RENAME_EXCHANGE)
    assert (cell.a / "d").read_bytes() == b"i"
    assert (cell.a / "f/inside").read_bytes() == b"f"
    renameat2(cell.a / "d", cell.a / "e", RENAME_NOREPLACE)
    assert sorted(os.listdir(cell.b)) == ["e", "f"]
    # A directory and a file of two directories change places: link counts of the parents follow.
    (cell.a / "p").mkdir()
    (cell.a / "p/sub").mkdir()
    renameat2(cell.b / "p/sub", cell.b / "f/inside", RENAME_EXCHANGE)
    for view in cell.both:
        assert os.stat(view / "p").st_nlink == 2
        assert os.stat(view / "f").st_nlink == 3
        assert os.path.realpath(view / "f/inside/..") == os.path.realpath(view / "f")


ERRORS: dict[str, tuple[int, Callable[[Path], object]]] = {
    "rmdir full": (errno.ENOTEMPTY, lambda d: os.rmdir(d / "full")),
    "rmdir file": (errno.ENOTDIR, lambda d: os.rmdir(d / "file")),
    "rmdir missing": (errno.ENOENT, lambda d: os.rmdir(d / "missing")),
    "unlink dir": (errno.EISDIR, lambda d: os.unlink(d / "full")),
    "unlink missing": (errno.ENOENT, lambda d: os.unlink(d / "missing")),
    "mkdir over dir": (errno.EEXIST, lambda d: os.mkdir(d / "full")),
    "mkdir over file": (errno.EEXIST, lambda d: os.mkdir(d / "file")),
    "mkdir below missing": (errno.ENOENT, lambda d: os.mkdir(d / "missing/x")),
    "mkdir below file": (errno.ENOTDIR, lambda d: os.mkdir(d / "file/x")),
    "symlink over file": (errno.EEXIST, lambda d: os.symlink("x", d / "file")),
    "link missing": (errno.ENOENT, lambda d: os.link(d / "missing", d / "new")),
    "rename missing": (errno.ENOENT, lambda d: os.rename(d / "missing", d / "new")),
    "rename dir into itself": (errno.EINVAL, lambda d: os.rename(d / "full", d / "full/sub/x")),
    "rename dir over full": (errno.ENOTEMPTY, lambda d: os.rename(d / "empty", d / "full")),
    "rename dir over file": (errno.ENOTDIR, lambda d: os.rename(d / "empty", d / "file")),
    "rename file over dir": (errno.EISDIR, lambda d: os.rename(d / "file", d / "empty")),
    "rename over ancestor": (errno.ENOTEMPTY, lambda d: os.rename(d / "full/sub", d / "full")),
    "rename to other fs": (errno.EXDEV, lambda d: os.rename(d / "file", "/dev/shm/promisefs-test")),
    "open missing": (errno.ENOENT, lambda d: os.open(d / "missing", os.O_RDONLY)),
    "listdir file": (errno.ENOTDIR, lambda d: os.listdir(d / "file")),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_errors_of_names(cell: View, tmp_path: Path, case: str) -> None:
    number, operation = ERRORS[case]
    for root in (tmp_path, cell.a):
        for d in ("full/sub", "empty"):
            (root / d).mkdir(parents=True)
        (root / "file").touch()
    if case == "rename to other fs" and os.stat(tmp_path).st_dev == os.stat("/dev/shm").st_dev:
        pytest.skip("the temporary directory is in /dev/shm")
    for root in (tmp_path, *cell.both):
        with fails_with(number):
            operation(root)
    assert_same_trees(tmp_path, cell.b, times=False)


def test_directory_link_counts(cell: View) -> None:
    (cell.a / "d").mkdir()
    for i in range(5):
        ((cell.a, cell.b)[i % 2] / f"d/{i}").mkdir()
        assert {os.stat(view / "d").st_nlink for view in cell.both} == {i + 3}
    os.rmdir(cell.b / "d/0")
    os.rename(cell.a / "d/1", cell.a / "moved")
    assert {os.stat(view / "d").st_nlink for view in cell.both} == {5}


@pytest.mark.limit_s(240)
def test_a_directory_with_20000_entries(cell: View) -> None:
    count = 20_000
    (cell.a / "big").mkdir()
    expected = [f"entry-{i:05}" for i in range(count)]
    (cell.a / "big" / expected[0]).write_bytes(b"x")
    for name in expected[1:]:
        os.link(cell.a / "big" / expected[0], cell.a / "big" / name)
    assert sorted(os.listdir(cell.b / "big")) == expected
    assert os.stat(cell.b / "big" / expected[-1]).st_nlink == count
    # Changes while the other mount lists: what was there all the time is seen exactly once.
    seen = []
    with os.scandir(cell.b / "big") as entries:
        for i, entry in enumerate(entries):
            seen.append(entry.name)
            if i % 100 == 0:
                os.unlink(cell.a / "big" / expected[i // 100])
                (cell.a / "big" / f"zz-new-{i}").touch()
    assert len(seen) == len(set(seen))
    assert set(expected[count // 100 :]) <= set(seen)
    assert len(os.listdir(cell.a / "big")) == len(os.listdir(cell.b / "big")) == count
    run("rm", "-r", cell.b / "big")
    assert os.listdir(cell.a) == []


def test_directory_position_survives_removal_of_what_was_read(cell: View) -> None:
    """rm -r: read some, remove them, read on."""
    for i in range(500):
        (cell.a / f"f{i}").touch()
    with os.scandir(cell.b) as entries:
        for entry in entries:
            os.unlink(entry.path)
    assert os.listdir(cell.a) == []
