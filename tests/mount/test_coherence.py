"""What one mount was told is done, the other shows at once: bytes, sizes, times, names; by path, handle and mapping."""

from __future__ import annotations

import errno
import json
import mmap
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from asking import status_of
from outsider import Outsider

if TYPE_CHECKING:
    from conftest import MakeCell, View

PAGE = mmap.PAGESIZE
ROUNDS = 200
STAMP_BYTES = 8


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def stamp(number: int) -> bytes:
    return number.to_bytes(STAMP_BYTES, "little")


def number_of(data: bytes) -> int:
    return int.from_bytes(data[:STAMP_BYTES], "little")


# Bytes and sizes


class Watched:
    """One file as one mount shows it, by every way there is to look at it. All of them were warm before each look."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self.fd = stack.enter_context(opened(path))
        self.mapping = stack.enter_context(mmap.mmap(self.fd, PAGE))
        self.looks: list[tuple[str, Callable[[], tuple[int, int]]]] = [
            ("mapping", self._mapping),
            ("pread", self._pread),
            ("fstat", lambda: (-1, os.fstat(self.fd).st_size)),
            ("stat", lambda: (-1, os.stat(path).st_size)),
            ("read by path", self._read),
            ("listing", self._listing),
        ]

    def _mapping(self) -> tuple[int, int]:
        return number_of(self.mapping[:STAMP_BYTES]), -1

    def _pread(self) -> tuple[int, int]:
        content = os.pread(self.fd, 1 << 20, 0)
        return number_of(content), len(content)

    def _read(self) -> tuple[int, int]:
        content = self.path.read_bytes()
        return number_of(content), len(content)

    def _listing(self) -> tuple[int, int]:
        with os.scandir(self.path.parent) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries}
        return -1, sizes[self.path.name]

    def stale(self, number: int, size: int, first: int) -> list[str]:
        """Ways to look that do not show this number and size; the one with index `first` is tried first."""
        found = []
        for name, look in self.looks[first:] + self.looks[:first]:
            seen_number, seen_size = look()
            if seen_number not in (number, -1) or seen_size not in (size, -1):
                found.append(f"{number}: {name} shows {seen_number}, {seen_size} bytes of {size}")
        return found


def _write_and(settle: Callable[[int], None]) -> Callable[[Watched, int, int], None]:
    def write(target: Watched, number: int, size: int) -> None:
        os.pwrite(target.fd, stamp(number), 0)
        os.pwrite(target.fd, b"+", size - 1)
        settle(target.fd)

    return write


def _msync(target: Watched, number: int, size: int) -> None:
    target.mapping[:STAMP_BYTES] = stamp(number)
    target.mapping.flush()


def _close(target: Watched, number: int, size: int) -> None:
    with opened(target.path, os.O_WRONLY) as fd:
        os.pwrite(fd, stamp(number), 0)
        os.pwrite(fd, b"+", size - 1)


def _synchronous(target: Watched, number: int, size: int) -> None:
    with opened(target.path, os.O_WRONLY | os.O_SYNC) as fd:
        os.pwrite(fd, stamp(number).ljust(size, b"s"), 0)


def _one_synchronous_write(target: Watched, number: int, size: int) -> None:
    """RWF_SYNC: the write itself is as good as synced, with a handle that stays open."""
    os.pwritev(target.fd, [stamp(number).ljust(size, b"s")], 0, os.RWF_SYNC)


WRITES: dict[str, tuple[Callable[[Watched, int, int], None], bool]] = {
    "fsync": (_write_and(os.fsync), True),
    "fdatasync": (_write_and(os.fdatasync), True),
    "msync": (_msync, False),
    "close": (_close, True),
    "O_SYNC": (_synchronous, True),
    "RWF_SYNC": (_one_synchronous_write, True),
}
"""How to write, and whether that makes the file longer."""


@pytest.mark.parametrize("how", list(WRITES))
def test_what_was_stored_on_one_mount_shows_on_the_other(cell: View, how: str) -> None:
    write, grows = WRITES[how]
    size = 2 * PAGE
    (cell.a / "f").write_bytes(bytes(size))
    stale: list[str] = []
    with ExitStack() as stack:
        views = [Watched(view / "f", stack) for view in cell.both]
        for number in range(1, ROUNDS + 1):
            writer, other = views[number % 2], views[1 - number % 2]
            size += 37 * grows
            write(writer, number, size)
            stale += other.stale(number, size, number // 2 % len(other.looks))
            stale += writer.stale(number, size, number // 2 % len(writer.looks))
    assert stale == []


def _chmod(path: Path, number: int) -> None:
    os.chmod(path, 0o600 + number % 64)


def _utime(path: Path, number: int) -> None:
    os.utime(path, ns=(number, number))


def _link(path: Path, number: int) -> None:
    os.link(path, path.with_name(f"link{number}"))


@pytest.mark.parametrize("change", [_chmod, _utime, _link], ids=["chmod", "utime", "link"])
def test_a_mapping_follows_after_a_change_of_status_only(cell: View, change: Callable[[Path, int], None]) -> None:
    """The break of a status leaves the pages but takes the promise: only a mapping would not ask for a new one."""
    (cell.a / "f").write_bytes(bytes(PAGE))
    stale: list[str] = []
    with ExitStack() as stack:
        views = [Watched(view / "f", stack) for view in cell.both]
        for number in range(1, 61):
            reader, writer = views[number % 2], views[1 - number % 2]
            assert reader.mapping[0] == (number - 1) % 256
            change(writer.path, number)
            if number % 3 == 0:  # two breaks with no look between them
                change(writer.path, number + 1000)
            writer.mapping[0] = number % 256
            writer.mapping.flush()
            if reader.mapping[0] != number % 256:
                stale.append(f"{number}: mapping shows {reader.mapping[0]}")
    assert stale == []


def test_a_change_of_status_elsewhere_costs_no_pages(cell: View) -> None:
    """CB.CallBack says what changed: the data did not, so nothing is read again."""
    (cell.a / "f").write_bytes(b"x" * 8 * PAGE)
    with ExitStack() as stack:
        fd = stack.enter_context(opened(cell.b / "f"))
        mapping = stack.enter_context(mmap.mmap(fd, 8 * PAGE))
        assert mapping[:] == os.pread(fd, 8 * PAGE, 0) == b"x" * 8 * PAGE
        before = status_of(cell.running.mountpoint("m2"))
        for number in range(20):
            _chmod(cell.a / "f", number)
            assert os.stat(cell.b / "f").st_mode & 0o777 == 0o600 + number
            assert mapping[:] == os.pread(fd, 8 * PAGE, 0) == b"x" * 8 * PAGE
        after = status_of(cell.running.mountpoint("m2"))
    assert after["breaks"] >= before["breaks"] + 20
    assert after["upcalls"]["read"] == before["upcalls"]["read"]
    assert after["rpcs"].get("FS.FetchData") == before["rpcs"].get("FS.FetchData")


def test_growth_elsewhere_is_readable_at_once(cell: View) -> None:
    size = PAGE + 100
    (cell.a / "f").write_bytes(b"x" * size)
    with ExitStack() as stack:
        views = [Watched(view / "f", stack) for view in cell.both]
        for number in range(1, 61):
            writer, reader = views[number % 2], views[1 - number % 2]
            assert os.pread(reader.fd, 10, size) == b""
            if number % 3:
                os.pwrite(writer.fd, stamp(number), size + 1000)
                os.fsync(writer.fd)
                assert os.pread(reader.fd, 5000, size) == bytes(1000) + stamp(number)
                size += 1000 + STAMP_BYTES
            else:
                os.ftruncate(writer.fd, size + 3 * PAGE)
                assert os.pread(reader.fd, 5 * PAGE, size) == bytes(3 * PAGE)
                size += 3 * PAGE
            assert os.fstat(reader.fd).st_size == os.stat(reader.path).st_size == size
            # A mapping made before may begin to reach into what is new (Python's are not made beyond the end).
            with mmap.mmap(reader.fd, size, prot=mmap.PROT_READ) as all_of_it:
                assert number_of(all_of_it[size - STAMP_BYTES :]) == (number if number % 3 else 0)


def test_shrinking_elsewhere_shows_at_once(cell: View) -> None:
    with ExitStack() as stack:
        (cell.a / "f").write_bytes(b"x" * 8 * PAGE)
        views = [Watched(view / "f", stack) for view in cell.both]
        for number in range(1, 61):
            writer, reader = views[number % 2], views[1 - number % 2]
            full = bytes([number]) * 8 * PAGE
            os.pwrite(writer.fd, full, 0)
            os.fsync(writer.fd)
            assert os.pread(reader.fd, len(full), 0) == full
            with mmap.mmap(reader.fd, 8 * PAGE, prot=mmap.PROT_READ) as mapping:
                assert mapping[7 * PAGE] == number
                cut = PAGE + 61 * number
                os.ftruncate(writer.fd, cut)
                assert os.pread(reader.fd, 100, cut) == b""
                assert os.pread(reader.fd, 1 << 20, 0) == full[:cut]
                assert os.fstat(reader.fd).st_size == cut
                assert os.lseek(reader.fd, 0, os.SEEK_END) == cut
                end = cut // PAGE * PAGE + PAGE  # a page that the end lies in reads as zeros behind it
                assert mapping[PAGE:end] == full[PAGE:cut] + bytes(end - cut)
                os.ftruncate(writer.fd, 8 * PAGE)  # what was cut off does not come back
                assert mapping[:] == full[:cut] + bytes(8 * PAGE - cut)


# Names


class Names:
    """One directory as one mount shows it, against what it should hold: name -> kind (of st_mode), or None."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def stale(self, expected: dict[str, int | None], turn: int) -> list[str]:
        found: list[str] = []
        looks = [self._stats, self._opens, self._listing]
        for look in looks[turn % 3 :] + looks[: turn % 3]:
            found += look(expected)
        return found

    def _stats(self, expected: dict[str, int | None]) -> list[str]:
        found = []
        for name, kind in expected.items():
            try:
                seen: int | None = stat.S_IFMT(os.lstat(self.directory / name).st_mode)
            except FileNotFoundError:
                seen = None
            if seen != kind:
                found.append(f"stat {name}: {seen} for {kind}")
        return found

    def _opens(self, expected: dict[str, int | None]) -> list[str]:
        found = []
        for name, kind in expected.items():
            if kind in (None, stat.S_IFREG, stat.S_IFDIR):
                try:
                    os.close(os.open(self.directory / name, os.O_RDONLY | os.O_NOFOLLOW))
                    opens = True
                except FileNotFoundError:
                    opens = False
                if opens != (kind is not None):
                    found.append(f"open {name}: {opens} for {kind}")
        return found

    def _listing(self, expected: dict[str, int | None]) -> list[str]:
        there = {name for name, kind in expected.items() if kind is not None}
        listed = set(os.listdir(self.directory))
        return [f"listing: {sorted(listed ^ there)} differ"] if listed != there else []


def _changes_of_names(directory: Path, expected: dict[str, int | None], turn: int) -> str:
    """Make the change of this turn and note what is there now. Every name is there in some turns and not in others."""
    match turn % 12:
        case 0:
            (directory / "file").write_bytes(b"%d" % turn)
            expected["file"] = stat.S_IFREG
        case 1:
            os.mkdir(directory / "dir")
            expected["dir"] = stat.S_IFDIR
        case 2:
            os.symlink("file", directory / "symlink")
            expected["symlink"] = stat.S_IFLNK
        case 3:
            os.link(directory / "file", directory / "link")
            expected["link"] = stat.S_IFREG
        case 4:
            os.rename(directory / "file", directory / "moved")
            expected["file"], expected["moved"] = None, stat.S_IFREG
        case 5:
            os.rename(directory / "dir", directory / "file")
            expected["dir"], expected["file"] = None, stat.S_IFDIR
        case 6:
            os.rename(directory / "symlink", directory / "moved")
            expected["symlink"], expected["moved"] = None, stat.S_IFLNK
        case 7:
            os.rmdir(directory / "file")
            expected["file"] = None
        case 8:
            os.unlink(directory / "moved")
            expected["moved"] = None
        case 9:
            os.rename(directory / "link", directory / "dir")
            expected["link"], expected["dir"] = None, stat.S_IFREG
        case 10:
            os.mkdir(directory / "link")
            os.rename(directory / "dir", directory / "link/inside")
            expected["link"], expected["dir"] = stat.S_IFDIR, None
        case 11:
            os.unlink(directory / "link/inside")
            os.rmdir(directory / "link")
            expected["link"] = None
    return f"turn {turn}"


def test_names_changed_on_one_mount_show_on_the_other(cell: View) -> None:
    expected: dict[str, int | None] = dict.fromkeys(("file", "dir", "symlink", "link", "moved", "never"))
    views = [Names(view) for view in cell.both]
    stale: list[str] = []
    for turn in range(12 * 20):
        # 12 is even: an odd step makes each change fall to either mount in turn.
        writer, other = views if (turn + turn // 12) % 2 else views[::-1]
        where = _changes_of_names(writer.directory, expected, turn)
        stale += [f"{where}: other mount: {found}" for found in other.stale(expected, turn)]
        stale += [f"{where}: own mount: {found}" for found in writer.stale(expected, turn)]
    assert stale == []


def test_names_are_right_on_three_mounts(make_cell: MakeCell) -> None:
    running = make_cell(mounts=3)
    views = [Names(running.mountpoint(name)) for name in ("m1", "m2", "m3")]
    expected: dict[str, int | None] = dict.fromkeys(("file", "dir", "symlink", "link", "moved", "never"))
    stale: list[str] = []
    for turn in range(12 * 4):
        writer = views[(turn + turn // 12) % 3]
        where = _changes_of_names(writer.directory, expected, turn)
        stale += [f"{where}: {view.directory.name}: {f}" for view in views for f in view.stale(expected, turn)]
    assert stale == []


def test_an_entry_of_a_directory_that_another_mount_replaced(cell: View) -> None:
    """The process stands in a directory; its path is given to another one elsewhere."""
    (cell.a / "d").mkdir()
    (cell.a / "d/f").write_bytes(b"0")
    for turn in range(1, 40):
        writer, reader = cell.both if turn % 2 else cell.both[::-1]
        with opened(reader / "d", os.O_RDONLY | os.O_DIRECTORY) as inside:
            assert (reader / "d/f").read_bytes() == b"%d" % (turn - 1)
            (writer / "new").mkdir()
            (writer / "new/f").write_bytes(b"%d" % turn)
            os.rename(writer / "d", writer / "old")
            os.rename(writer / "new", writer / "d")
            assert (reader / "d/f").read_bytes() == b"%d" % turn
            assert (reader / "old/f").read_bytes() == b"%d" % (turn - 1)
            assert os.listdir(inside) == ["f"]
            os.unlink(writer / "old/f")
            assert os.listdir(inside) == []
            os.rmdir(writer / "old")
            with pytest.raises(OSError) as caught:
                os.stat("f", dir_fd=inside)
            assert caught.value.errno in (errno.ENOENT, errno.ESTALE)
        assert sorted(os.listdir(reader)) == ["d"]


# One directory at full speed

TEEMING = """
def teem(here, there, name, seconds):
    # Change names of one's own here, and look at them there as soon as each call has returned.
    stale, count = [], 0
    end = time.monotonic() + seconds

    def look(names, gone):
        listed = os.listdir(there)
        for one in names + gone:
            if os.path.exists(f"{there}/{one}") != (one in names):
                stale.append(f"{one}: to be there is {one in names}, a lookup differs")
            if (one in listed) != (one in names):
                stale.append(f"{one}: to be there is {one in names}, the listing differs")

    while time.monotonic() < end and not stale:
        count += 1
        first, second = f"{name}{count}", f"{name}-{count}"
        os.close(os.open(f"{here}/{first}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        look([first], [second])
        os.rename(f"{here}/{first}", f"{here}/{second}")
        look([second], [first])
        os.unlink(f"{here}/{second}")
        look([], [first, second])
        os.mkdir(f"{here}/{first}")
        look([first], [])
        os.rmdir(f"{here}/{first}")
        look([], [first, second])
    return count, stale
"""


def test_two_mounts_at_full_speed_in_one_directory_see_no_removed_name(cell: View) -> None:
    a, b = cell.both
    parts = [(a, b, "p"), (b, a, "q"), (a, b, "r"), (b, a, "s")]
    with ExitStack() as stack:
        workers = [stack.enter_context(Outsider(TEEMING)) for _ in parts]
        for worker, (here, there, name) in zip(workers, parts, strict=True):
            worker.tell(f"teem({str(here)!r}, {str(there)!r}, {name!r}, 4.0)")
        for worker in workers:
            count, stale = worker.answer()  # type: ignore[misc]
            assert stale == []
            assert count >= 3
    assert os.listdir(a) == os.listdir(b) == []


# Without a name


def data_files(store: Path) -> int:
    return sum(path.is_file() for path in (store / "data").rglob("*"))


def wait_for_data_files(store: Path, count: int, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while (left := data_files(store)) != count:
        assert time.monotonic() < deadline, f"{left} data files instead of {count} after {limit_s:g} s"
        time.sleep(0.02)


def _unlink(path: Path) -> None:
    os.unlink(path)


def _rename_over(path: Path) -> None:
    path.with_name("other").write_bytes(b"other")
    os.rename(path.with_name("other"), path)


@pytest.mark.parametrize("remove", [_unlink, _rename_over], ids=["unlink", "rename over"])
def test_an_open_file_outlives_its_name_and_goes_with_its_last_handle(
    make_cell: MakeCell, remove: Callable[[Path], None]
) -> None:
    running = make_cell()
    a, b = (running.mountpoint(name) for name in ("m1", "m2"))
    content = os.urandom(5 * PAGE)
    before = data_files(running.store) + (remove is _rename_over)
    for turn in range(4):
        opener, remover = (a, b) if turn % 2 else (b, a)
        (opener / "f").write_bytes(content)
        if turn < 2:
            assert (remover / "f").read_bytes() == content  # the one that removes has used it, or not
        with opened(opener / "f") as fd:
            mapping = mmap.mmap(fd, 5 * PAGE)
            assert mapping[0] == content[0]
            remove(remover / "f")
            assert os.fstat(fd).st_nlink == 0
            assert os.pread(fd, 1 << 20, 0) == content
            assert mapping[:] == content
            os.pwrite(fd, b"w" * 2 * PAGE, 4 * PAGE)
            os.fsync(fd)
            assert os.fstat(fd).st_size == 6 * PAGE
            mapping[1] = 77
            mapping.flush()
            os.ftruncate(fd, 5 * PAGE + 1)
            assert os.pread(fd, 1 << 20, 4 * PAGE) == b"w" * (PAGE + 1)
            with mmap.mmap(fd, PAGE) as another:
                assert another[1] == 77
        # The mapping alone keeps it now.
        time.sleep(0.05)
        assert data_files(running.store) == before + 1
        assert mapping[2 * PAGE : 3 * PAGE] == content[2 * PAGE : 3 * PAGE]
        mapping[2] = 78
        mapping.flush()
        mapping.close()
        wait_for_data_files(running.store, before)


def test_two_mounts_hold_a_file_without_a_name(make_cell: MakeCell) -> None:
    running = make_cell(mounts=3)
    a, b, c = (running.mountpoint(name) for name in ("m1", "m2", "m3"))
    (a / "f").write_bytes(b"first")
    with opened(a / "f") as on_a:
        with opened(b / "f") as on_b:
            os.unlink(c / "f")
            for number in range(50):
                writer, reader = (on_a, on_b) if number % 2 else (on_b, on_a)
                os.pwrite(writer, stamp(number), number)
                os.fsync(writer)
                assert os.pread(reader, STAMP_BYTES, number) == stamp(number)
                assert os.fstat(reader).st_size == number + STAMP_BYTES
        os.pwrite(on_a, b"alone", 0)
        os.fsync(on_a)
        assert os.pread(on_a, 5, 0) == b"alone"
        assert data_files(running.store) == 1
    wait_for_data_files(running.store, 0)


# What a mount says of itself


def status_by_command(mountpoint: Path) -> dict[str, int]:
    command: list[str | Path] = [Path(sys.executable).with_name("promisefs"), "status", "--json", mountpoint]
    state = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=30).stdout)
    assert isinstance(state, dict)
    return state


def wait_for_status(mountpoint: Path, limit_s: float = 10.0, **expected: int) -> None:
    deadline = time.monotonic() + limit_s
    while {name: (state := status_of(mountpoint))[name] for name in expected} != expected:
        assert time.monotonic() < deadline, f"not {expected}: {state}"
        time.sleep(0.05)


def test_status_counts_bytes_and_handles(make_cell: MakeCell) -> None:
    limit = 16 << 20
    running = make_cell(mount_options="cache=16M")
    a, b = (running.mountpoint(name) for name in ("m1", "m2"))
    chunk = os.urandom(1 << 20)
    with opened(a / "big", os.O_RDWR | os.O_CREAT) as fd:
        for i in range(48):
            os.pwrite(fd, chunk, i << 20)
            if i % 4 == 0:
                state = status_of(a)
                assert state["cache_limit_bytes"] == limit
                assert state["cache_bytes"] + state["dirty_bytes"] <= limit
                assert state["open_files"] == 1
        os.fsync(fd)
        os.pwrite(fd, b"dirty", 0)
        state = status_of(a)
        assert (state["dirty_bytes"], state["dirty_files"]) == (5, 1)
        os.fsync(fd)
        assert status_of(a)["dirty_bytes"] == 0
    with opened(b / "big", os.O_RDONLY) as fd:
        for i in range(48):
            assert len(os.pread(fd, 1 << 20, i << 20)) == 1 << 20
            if i % 4 == 0:
                assert status_of(b)["cache_bytes"] <= limit
        assert status_of(b)["open_files"] == 1
        assert status_of(b)["cache_bytes"] > limit // 4, "nothing is cached at all"
        with mmap.mmap(fd, PAGE, prot=mmap.PROT_READ) as mapping:
            assert mapping[:5] == b"dirty"
    for mountpoint in (a, b):
        wait_for_status(mountpoint, open_files=0, dirty_bytes=0, dirty_files=0, store_failures=0)
        state = status_by_command(mountpoint)
        assert (state["open_files"], state["dirty_bytes"], state["cache_limit_bytes"]) == (0, 0, limit)
        assert limit // 4 < state["cache_bytes"] <= limit
