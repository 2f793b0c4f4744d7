"""The traps of FUSE that docs/fuse-traps.md numbers, each sprung on real mounts."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from asking import status_of

if TYPE_CHECKING:
    from conftest import View

PAGE = mmap.PAGESIZE
PROMPT_S = 5.0
"""What does not hang takes milliseconds; whatever waits for a lease or a bound takes longer than this."""


@contextmanager
def hammering(*actions: Callable[[], object]) -> Iterator[None]:
    """Repeat each action in a thread of its own meanwhile; what one of them raises is raised here."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def repeat(action: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                action()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


@contextmanager
def promptly(limit_s: float = PROMPT_S) -> Iterator[None]:
    start = time.monotonic()
    yield
    took_s = time.monotonic() - start
    assert took_s < limit_s, f"took {took_s:.1f} s"


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def early_acks(cell: View) -> int:
    """Breaks acknowledged before the kernel had dropped what it had, on all mounts."""
    return sum(int(status_of(mount.mountpoint)["early_acks"]) for mount in cell.running.mounts.values())


def store_at(path: Path, data: bytes, offset: int) -> None:
    with opened(path) as fd:
        os.pwrite(fd, data, offset)
        os.fsync(fd)


def test_trap_1_invalidation_of_dirty_mapped_pages(cell: View) -> None:
    (cell.a / "f").write_bytes(bytes(4 * PAGE))
    with opened(cell.a / "f") as fd_a, opened(cell.b / "f") as fd_b:
        with mmap.mmap(fd_a, 4 * PAGE) as on_a, mmap.mmap(fd_b, 4 * PAGE) as on_b:
            for i in range(1, 20):
                on_a[0] = i  # dirty in the kernel, not synced
                on_b[2 * PAGE] = i
                with promptly():
                    store_at(cell.b / "f", bytes([i]), PAGE)
                assert on_a[PAGE] == i
                with promptly():
                    store_at(cell.a / "f", bytes([i]), 3 * PAGE)
                assert on_b[3 * PAGE] == i
                on_a.flush()
                on_b.flush()
                assert (on_a[0], on_a[2 * PAGE], on_b[0], on_b[2 * PAGE]) == (i, i, i, i)


def test_trap_2_getcwd_after_changes_elsewhere(cell: View, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell.a / "d").mkdir()
    monkeypatch.chdir(cell.a / "d")
    for i in range(20):
        (cell.b / f"d/f{i}").touch()
        (cell.b / f"sibling{i}").mkdir()
        assert os.getcwd() == str(cell.a / "d")
        assert os.path.exists(f"f{i}")
        os.rename(cell.b / f"d/f{i}", cell.b / f"sibling{i}/g")
        assert os.getcwd() == str(cell.a / "d")
        assert not os.path.exists(f"f{i}")
        assert os.listdir(".") == []
    os.rename(cell.b / "d", cell.b / "renamed")
    Path("here").touch()
    assert (cell.b / "renamed/here").exists()
    assert (cell.a / "renamed/here").exists()
    assert os.getcwd() == str(cell.a / "renamed")


def test_trap_2_names_change_in_a_directory_that_is_being_used(cell: View) -> None:
    before = early_acks(cell)

    def look() -> None:
        os.listdir(cell.a)
        with suppress(FileNotFoundError):
            os.stat(cell.a / "missing")
        (cell.a / "mine").touch()
        (cell.a / "mine").unlink()

    with hammering(look), promptly(20):
        for i in range(100):
            (cell.b / f"f{i}").touch()
            assert (cell.a / f"f{i}").exists()
            (cell.b / f"f{i}").unlink()
            assert not (cell.a / f"f{i}").exists()
    assert early_acks(cell) == before


ASKER = """
import os, sys
i = 0
while True:
    i += 1
    try:
        os.stat(f"{sys.argv[1]}/no-such-{os.getpid()}-{i}")
    except FileNotFoundError:
        pass
"""


def test_trap_3_requesters_killed_while_their_request_waits_to_be_read(cell: View) -> None:
    """The other mount's store needs an answer of the first one's daemon, and makes no request to it."""
    (cell.a / "f").write_bytes(b"x")
    rng = random.Random(3)
    for i in range(25):
        askers = [
            subprocess.Popen([sys.executable, "-S", "-E", "-c", ASKER, cell.a], stderr=subprocess.DEVNULL)
            for _ in range(3)
        ]
        (cell.a / "f").read_bytes()  # a promise
        time.sleep(0.1 + rng.random() * 0.02)
        for asker in askers:
            os.kill(asker.pid, signal.SIGKILL)
        with promptly():
            store_at(cell.b / "f", b"%d" % i, 0)
        for asker in askers:
            asker.wait(20)
    with promptly():
        assert (cell.a / "f").read_bytes() == b"24"


def test_trap_4_breaks_while_reads_are_in_flight(cell: View) -> None:
    size = 24 << 20
    (cell.a / "big").write_bytes(bytes(size))
    before = early_acks(cell)

    def read_all() -> None:
        with open(cell.b / "big", "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass

    with hammering(read_all, read_all), promptly(30):
        for i in range(60):
            store_at(cell.a / "big", bytes([i]) * 100, i * 300_000)
            with opened(cell.b / "big", os.O_RDONLY) as fd:
                assert os.pread(fd, 100, i * 300_000) == bytes([i]) * 100
    assert early_acks(cell) == before


def test_trap_4_two_truncations_with_dirty_mappings_on_both_sides(cell: View) -> None:
    """The cycle that only the bound on acknowledgements opens: slow is allowed, hanging is not."""
    for round_ in range(5):
        (cell.a / "f").write_bytes(bytes(8 * PAGE))
        with opened(cell.a / "f") as fd_a, opened(cell.b / "f") as fd_b:
            with mmap.mmap(fd_a, 8 * PAGE) as on_a, mmap.mmap(fd_b, 8 * PAGE) as on_b:
                on_a[0] = on_b[PAGE] = round_
                threads = [
                    threading.Thread(target=os.ftruncate, args=(fd_a, 6 * PAGE)),
                    threading.Thread(target=os.ftruncate, args=(fd_b, 4 * PAGE)),
                ]
                with promptly(10):
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
        assert os.stat(cell.a / "f").st_size == os.stat(cell.b / "f").st_size


def test_trap_5_both_mounts_change_one_directory(cell: View) -> None:
    before = early_acks(cell)
    failures: list[BaseException] = []

    def work(view: Path, name: str) -> None:
        try:
            for i in range(150):
                (view / f"{name}{i}").touch()
                os.rename(view / f"{name}{i}", view / f"{name}-{i}")
                if i % 2:
                    (view / f"{name}-{i}").unlink()
        except BaseException as failure:
            failures.append(failure)

    workers = [(view, f"{view.parent.name}{letter}") for view in cell.both for letter in "xy"]
    threads = [threading.Thread(target=work, args=worker) for worker in workers]
    with promptly(60):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert sorted(os.listdir(cell.a)) == sorted(os.listdir(cell.b))
    assert early_acks(cell) == before


class Counter:
    """A number in a file, and how far it is certainly stored."""

    def __init__(self) -> None:
        self.stored = 0


def test_trap_6_no_stale_page_survives_a_break(cell: View) -> None:
    (cell.a / "f").write_bytes((0).to_bytes(8, "little") + bytes(PAGE))
    counter = Counter()
    with opened(cell.b / "f", os.O_RDONLY) as fd, mmap.mmap(fd, PAGE, prot=mmap.PROT_READ) as mapped:

        def check(seen: Callable[[], bytes]) -> None:
            floor = counter.stored
            value = int.from_bytes(seen(), "little")
            assert value >= floor, f"read {value} after {floor} was stored"

        readers = [
            lambda: check(lambda: os.pread(fd, 8, 0)),
            lambda: check(lambda: mapped[:8]),
            lambda: check(lambda: (cell.b / "f").read_bytes()[:8]),
        ]
        with hammering(*readers), opened(cell.a / "f") as writer:
            for i in range(1, 300):
                os.pwrite(writer, i.to_bytes(8, "little"), 0)
                os.fsync(writer)
                counter.stored = i


def test_trap_6_and_7_attributes_are_never_older_than_what_was_stored(cell: View) -> None:
    """Files are made, chmodded and replaced on one mount while the other looks them up without end."""
    counter = Counter()
    (cell.a / "f").touch()
    os.truncate(cell.a / "f", 0)

    def look() -> None:
        floor = counter.stored
        size = os.stat(cell.b / "f").st_size
        assert size >= floor, f"size {size} after {floor} was stored"

    with hammering(look, look):
        for i in range(1, 300):
            if i % 3:
                (cell.a / f"new{i}").write_bytes(bytes(i))
                os.rename(cell.a / f"new{i}", cell.a / "f")
            else:
                os.truncate(cell.a / "f", i)
            counter.stored = i


def test_trap_7_lookups_in_flight_of_files_just_made(cell: View) -> None:
    for i in range(150):
        name = f"f{i}"

        def look(name: str = name) -> None:
            with suppress(FileNotFoundError):
                os.stat(cell.b / name)

        with hammering(look):
            (cell.a / name).write_bytes(b"1")
            os.chmod(cell.a / name, 0o600)
            os.truncate(cell.a / name, 5)
        st = os.stat(cell.b / name)
        assert (st.st_size, st.st_mode & 0o777) == (5, 0o600)


def test_trap_8_names_positive_and_negative(cell: View) -> None:
    for i in range(100):
        writer, reader = cell.both if i % 2 else cell.both[::-1]
        assert not (reader / "name").exists()
        assert not (reader / "name").exists()  # negative, cached
        (writer / "name").write_bytes(b"%d" % i)
        assert (reader / "name").read_bytes() == b"%d" % i
        inode = os.stat(reader / "name").st_ino
        (writer / "other").write_bytes(b"o")
        os.rename(writer / "other", writer / "name")
        assert os.stat(reader / "name").st_ino != inode
        assert (reader / "name").read_bytes() == b"o"
        (writer / "name").unlink()
        assert not (reader / "name").exists()
        (writer / "name").mkdir()
        assert (reader / "name").is_dir()
        os.symlink("elsewhere", writer / "name/link")
        assert os.readlink(reader / "name/link") == "elsewhere"
        os.unlink(reader / "name/link")
        os.rmdir(reader / "name")


GROWER = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
page = mmap.PAGESIZE
fd = os.open(sys.argv[1], os.O_RDONLY)
address = libc.mmap(None, 64 * page, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
byte = lambda offset: ctypes.c_ubyte.from_address(address + offset).value
print(byte(0), flush=True)
for line in sys.stdin:
    print(byte(int(line)), flush=True)
"""


def test_trap_9_growth_under_a_mapping(cell: View) -> None:
    """The mapping reaches beyond the end of the file; what it loads past the old end must not be SIGBUS."""
    (cell.a / "f").write_bytes(b"\x07" * 100)
    command = [sys.executable, "-c", GROWER, cell.b / "f"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        try:
            assert reader.stdout.readline() == "7\n"
            for i in range(1, 60):
                store_at(cell.a / "f", bytes([i]) * 10, i * PAGE + 123)
                for offset, value in ((i * PAGE + 125, i), (i * PAGE, 0), (0, 7)):
                    reader.stdin.write(f"{offset}\n")
                    reader.stdin.flush()
                    assert reader.stdout.readline() == f"{value}\n", f"status {reader.poll()} at page {i}"
            os.truncate(cell.a / "f", 62 * PAGE)
            reader.stdin.write(f"{61 * PAGE}\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "0\n"
        finally:
            reader.stdin.close()
            reader.wait(20)


def test_trap_10_reads_are_never_short_before_the_end(cell: View) -> None:
    chunk = 300_001
    (cell.a / "f").write_bytes(b"s" * chunk)
    counter = Counter()
    counter.stored = chunk

    def read() -> None:
        floor = counter.stored
        with opened(cell.b / "f", os.O_RDONLY) as fd:
            assert os.fstat(fd).st_size >= floor
            data = b""
            while part := os.pread(fd, 1 << 20, len(data)):
                data += part
            assert len(data) >= floor
            assert os.fstat(fd).st_size >= len(data)

    with hammering(read), opened(cell.a / "f", os.O_WRONLY | os.O_APPEND) as fd:
        for _ in range(25):
            os.write(fd, b"s" * chunk)
            os.fsync(fd)
            counter.stored += chunk
    assert os.stat(cell.b / "f").st_size == counter.stored == os.stat(cell.a / "f").st_size


def test_trap_11_laundered_pages_do_not_undo_bytes_of_another_mount(cell: View) -> None:
    """One page, mapped and dirty on one mount when the other stores different bytes of it."""
    (cell.a / "f").write_bytes(bytes(PAGE))
    with opened(cell.a / "f") as fd, mmap.mmap(fd, PAGE) as mapped:
        for i in range(1, 20):
            mapped[0] = i
            store_at(cell.b / "f", bytes([i]), 100)
            mapped.flush()
            for view in cell.both:
                content = (view / "f").read_bytes()
                assert (content[0], content[100]) == (i, i), f"{view}"


def test_trap_11_a_page_laundered_before_the_other_mounts_store_does_not_undo_it(cell: View) -> None:
    """Nothing but the size and place of a WRITE says that it may be a page of a mapping, and none is stored at once."""
    (cell.a / "f").write_bytes(b"o" * PAGE)
    with opened(cell.a / "f", os.O_RDWR) as fd:
        for round_ in range(3):
            store_through_mapping(fd, round_, b"A")
            store_at(cell.b / "f", b"B", 100 + round_)
            os.fsync(fd)
            expected = b"A" * (round_ + 1) + b"o" * (99 - round_) + b"B" * (round_ + 1)
            for view in cell.both:
                assert (view / "f").read_bytes()[: len(expected)] == expected


def store_through_mapping(fd: int, offset: int, data: bytes) -> None:
    """Map a page, change it, unmap it: the kernel writes it back whole. (Python's mmap would also close a descriptor,
    which is a flush, which stores.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    assert address not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    ctypes.memmove(address + offset, data, len(data))
    assert libc.munmap(address, PAGE) == 0


def test_trap_11_what_was_laundered_reaches_the_server(cell: View) -> None:
    """Pages that a break pushed out of the kernel count as written: fsync stores them, close too."""
    (cell.a / "f").write_bytes(bytes(4 * PAGE))
    fd = os.open(cell.a / "f", os.O_RDWR)
    with mmap.mmap(fd, 4 * PAGE) as mapped:
        os.close(fd)  # mmap has a descriptor of its own; no further flush follows the last munmap
        mapped[5] = 55
        store_at(cell.b / "f", b"x", 3 * PAGE)
        mapped[6] = 66
    with promptly():
        while (cell.b / "f").read_bytes()[5:7] != bytes([55, 66]):
            time.sleep(0.05)


def test_trap_12_own_writes_change_the_time_seldom_and_it_ends_as_that_of_the_last(cell: View) -> None:
    with opened(cell.a / "f", os.O_RDWR | os.O_CREAT) as fd:
        times = set()
        began = time.monotonic()
        for i in range(100):
            last = time.time_ns()
            os.pwrite(fd, b"%04d" % i, i * 4)
            times.add(os.fstat(fd).st_mtime_ns)
        assert len(times) <= 1 + (time.monotonic() - began)
        os.fsync(fd)
        at_the_end = os.fstat(fd).st_mtime_ns
        assert at_the_end >= last
        assert at_the_end == os.stat(cell.b / "f").st_mtime_ns


def test_trap_12_a_burst_of_writes_costs_the_kernel_its_pages_once(cell: View) -> None:
    """Each file that becomes dirty gets one new time, at which the kernel drops its pages; writes after it do not."""
    size = 8 << 20
    read_size = 128 << 10
    (cell.a / "f").write_bytes(bytes(size))

    def reads() -> int:
        return int(status_of(cell.running.mountpoint("m1"))["upcalls"].get("read", 0))

    with opened(cell.a / "f") as fd:
        os.pread(fd, size, 0)
        before = reads()
        for i in range(20):
            os.pwrite(fd, b"w" * 100, i * 300_000)
            assert os.fstat(fd).st_size == size
            os.pread(fd, size, 0)
        assert reads() - before <= 2 * size // read_size


def test_trap_13_the_servers_size_counts(cell: View) -> None:
    with opened(cell.a / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"a" * 10_000, 0)
        os.fsync(fd)
        for size in (20_000, 3, 5000, 0, 12_345):
            os.truncate(cell.b / "f", size)
            os.pwrite(fd, b"m", 0)
            os.fsync(fd)
            assert os.fstat(fd).st_size == max(size, 1)
            assert os.stat(cell.b / "f").st_size == max(size, 1)


@pytest.mark.parametrize("access", [os.O_WRONLY, os.O_RDWR], ids=["O_WRONLY", "O_RDWR"])
def test_appending_where_the_kernel_ignored_the_size_it_was_told(cell: View, access: int) -> None:
    """It ignores sizes that an invalidation overtook, and then appends where it last believed the end to be: at 0."""
    path = cell.b / "f"

    def look() -> None:
        os.listdir(cell.b)
        with suppress(FileNotFoundError):
            os.stat(path)

    with hammering(look, look):
        for i in range(150):
            with opened(cell.a / path.name, os.O_WRONLY | os.O_CREAT) as fd:
                os.write(fd, b"begin")
            with opened(path, access | os.O_APPEND) as fd:
                os.write(fd, b"appended")
            assert (cell.a / path.name).read_bytes() == b"beginappended", f"round {i}"
            os.unlink(path)


def test_a_mapping_and_an_appender_in_one_process(cell: View) -> None:
    """The kernel writes mapped pages back through any handle that can write, one with O_APPEND too."""
    (cell.a / "f").write_bytes(bytes(3 * PAGE))
    with opened(cell.a / "f", os.O_RDWR | os.O_APPEND) as fd, mmap.mmap(fd, 3 * PAGE) as mapped:
        mapped[PAGE] = 1
        mapped.flush()
        assert os.fstat(fd).st_size == 3 * PAGE
        os.write(fd, b"appended")
        mapped[0] = 2
        mapped.flush()
    expected = bytearray(3 * PAGE) + b"appended"
    expected[0], expected[PAGE] = 2, 1
    for view in cell.both:
        assert (view / "f").read_bytes() == expected


def test_mappings_beyond_the_end_are_sigbus_and_nothing_worse(cell: View) -> None:
    """A file cut on the other mount: loads past its end get SIGBUS, as on a local file, and the mount goes on."""
    (cell.a / "f").write_bytes(b"\x01" * 3 * PAGE)
    command = [sys.executable, "-c", GROWER, cell.b / "f"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "1\n"
        reader.stdin.write(f"{2 * PAGE}\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "1\n"
        os.truncate(cell.a / "f", PAGE)
        with suppress(BrokenPipeError):
            reader.stdin.write(f"0\n{2 * PAGE}\n")
            reader.stdin.close()
        assert reader.stdout.readline() == "1\n"
        assert reader.wait(20) == -signal.SIGBUS
    assert (cell.b / "f").read_bytes() == b"\x01" * PAGE
