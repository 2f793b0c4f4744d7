"""Several processes on several mounts change and watch the same few names; nothing that is shown may be stale.

What is true stands in a local shared memory: for each name a generation (odd while a change is in flux), the version
of the file (0: no such name), its size and inode number. A change is published after its last call has returned. Who
looks samples the generation before and after, and judges only if it was even and stayed the same. Changes of
one name exclude each other by a record lock on a local file.

A file holds its version in its first and last 8 bytes and is never shorter than MIN_BYTES once it was published, so
that its first page may be mapped. Bytes from SCRATCH on belong to whoever has the file open, with or without a name.

    python torture.py ROLE SEED SECONDS STATE MOUNT OTHER_MOUNT      prints one JSON object
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

NAMES = 8
MIN_BYTES = 2 * mmap.PAGESIZE
SCRATCH = mmap.PAGESIZE
STAMP_BYTES = 8
HELD = 4
"""Open files that each process keeps."""
PAUSE_S = 0.004
MAX_FAILURES = 20
GENERATION, VERSION, SIZE, INODE, WORDS = range(5)


@dataclass(slots=True)
class Tally:
    failures: list[str] = field(default_factory=list)
    judged: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.failures += other.failures
        for mine, its in ((self.judged, other.judged), (self.done, other.done)):
            for name, count in its.items():
                mine[name] = mine.get(name, 0) + count


@dataclass(frozen=True, slots=True)
class Truth:
    """What is published of one name."""

    generation: int
    version: int
    size: int
    inode: int

    @property
    def in_flux(self) -> bool:
        return self.generation % 2 == 1


class Board:
    """The shared memory. One store of a word is atomic; the order of stores is kept by the processor."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._words = memoryview(mmap.mmap(self._fd, os.fstat(self._fd).st_size)).cast("Q")

    @staticmethod
    def make(path: Path) -> None:
        path.write_bytes(bytes(8 * (NAMES * WORDS + 1)))

    @contextmanager
    def changing(self, *names: int) -> Iterator[None]:
        """Nobody else changes these names meanwhile."""
        for name in sorted(names):
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, name)
        try:
            yield
        finally:
            for name in names:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, name)

    def new_version(self) -> int:
        with self.changing(NAMES):
            self._words[NAMES * WORDS] += 1
            return self._words[NAMES * WORDS]

    def truth(self, name: int) -> Truth:
        at = name * WORDS
        return Truth(*(self._words[at + word] for word in range(WORDS)))

    def begin(self, name: int) -> None:
        self._words[name * WORDS + GENERATION] += 1

    def publish(self, name: int, version: int, size: int, inode: int) -> None:
        at = name * WORDS
        self._words[at + VERSION], self._words[at + SIZE], self._words[at + INODE] = version, size, inode
        self._words[at + GENERATION] += 1


def name_of(number: int) -> str:
    return f"name{number}"


def stamp(version: int) -> bytes:
    return version.to_bytes(STAMP_BYTES, "little")


class HeldFile:
    """Open for reading and writing, and mapped."""

    def __init__(self, path: str) -> None:
        self.was_complete = False  # the file had all its stamps when it was opened
        self.fd = os.open(path, os.O_RDWR)
        try:
            self.inode = os.fstat(self.fd).st_ino
            self.mapping = mmap.mmap(self.fd, SCRATCH, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        self.mapping.close()
        os.close(self.fd)


class Worker:
    def __init__(self, seed: int, board: Board, mount: Path, other: Path) -> None:
        self.tally = Tally()
        self._rng = random.Random(seed)
        self._board = board
        self._mount = mount
        self._other = other
        self._held: dict[int, HeldFile] = {}
        self._own_name = f"own{os.getpid()}"

    def path(self, number: int) -> str:
        return os.path.join(self._mount, name_of(number))

    def fail(self, text: str) -> None:
        if len(self.tally.failures) < MAX_FAILURES:
            self.tally.failures.append(f"{self._mount.parent.name} {text}")

    def did(self, deed: str) -> None:
        self.tally.done[deed] = self.tally.done.get(deed, 0) + 1

    def run(self, role: str, seconds: float) -> None:
        step = {"writer": self.write_something, "reader": self.look}[role]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            step()
            if self._rng.random() < 0.1:
                self.use_held()
        for held in self._held.values():
            held.close()

    # Looking

    def judge(self, check: str, numbers: Sequence[int], seen: Callable[[], dict[int, object]], sure: bool) -> None:
        """Compare what `seen` returns for each name with (version, size), None where one cannot say, 0 for absent."""
        before = {number: self._board.truth(number) for number in numbers}
        found = seen()
        for number in numbers:
            truth = before[number]
            if truth.in_flux or self._board.truth(number) != truth or number not in found:
                continue
            expected = (truth.version, truth.size) if truth.version else None
            value = found[number]
            right = value == expected
            if isinstance(value, tuple) and expected is not None:
                right = all(v in (None, e) for v, e in zip(value, expected, strict=True))
            if not right:
                self.fail(f"{'at once ' if sure else ''}{check} of {name_of(number)}: {value} instead of {expected}")
            for what in (check, *(["absent"] if expected is None else []), *(["other mount"] if sure else [])):
                self.tally.judged[what] = self.tally.judged.get(what, 0) + 1

    def look(self) -> None:
        number = self._rng.randrange(NAMES)
        self.look_at(self._mount, [number], sure=False)
        self.judge("mapping", [number], lambda: self._look_through_held(number), sure=False)
        if self._rng.random() < 0.2:
            self._hold(number)

    def look_at(self, mount: Path, numbers: list[int], *, sure: bool) -> None:
        looks: list[tuple[str, Callable[[], dict[int, object]]]] = [
            ("read", lambda: {number: _by_reading(mount, number) for number in numbers}),
            ("stat", lambda: {number: _by_stat(mount, number) for number in numbers}),
            ("listing", lambda: _by_listing(mount)),
        ]
        self._rng.shuffle(looks)
        for check, look in looks:
            with self._only_expected(f"{check} of {numbers}"):
                self.judge(check, range(NAMES) if check == "listing" and not sure else numbers, look, sure)

    def _look_through_held(self, number: int) -> dict[int, object]:
        """What the handle and the mapping of before show, if the name still stands for that file."""
        held = self._held.get(number)
        truth = self._board.truth(number)
        if held is None or held.inode != truth.inode:
            return {}
        version = int.from_bytes(held.mapping[:STAMP_BYTES], "little")
        size = os.fstat(held.fd).st_size
        if truth.version and int.from_bytes(os.pread(held.fd, STAMP_BYTES, 0), "little") == truth.version:
            self.tally.judged["held"] = self.tally.judged.get("held", 0) + 1
        elif self._board.truth(number) == truth and not truth.in_flux:
            self.fail(f"pread of a handle of {name_of(number)} does not show {truth}")
        return {number: (version, size)}

    @contextmanager
    def _only_expected(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fail(f"{what}: {errno.errorcode[error.errno or 0]}")

    # Holding files open, and using them whatever became of their names

    def _hold(self, number: int) -> None:
        if number in self._held:
            self._held.pop(number).close()
        elif len(self._held) >= HELD:
            self._held.pop(self._rng.choice(list(self._held))).close()
        truth = self._board.truth(number)
        with self._only_expected(f"open of {name_of(number)}"), suppress(FileNotFoundError, ValueError):
            try:
                held = HeldFile(self.path(number))  # ValueError: it has just been made and is empty
                # Who makes a file cuts it to its size before he writes his stamps: until then it holds zeros.
                held.was_complete = bool(truth.version) and not truth.in_flux and self._board.truth(number) == truth
                self._held[number] = held
            except OSError as error:
                if _raced(error) and not truth.in_flux and self._board.truth(number) == truth:
                    raise

    def use_held(self) -> None:
        if not self._held:
            return
        number, held = self._rng.choice(list(self._held.items()))
        data = self._rng.randbytes(64)
        place = SCRATCH + 64 + 64 * (os.getpid() % 16)
        with self._only_expected(f"use of an open handle of {name_of(number)}"):
            os.pwrite(held.fd, data, place)
            if os.pread(held.fd, 64, place) != data:
                self.fail(f"own bytes in {name_of(number)} are not what was written")
            if self._rng.random() < 0.5:
                os.fsync(held.fd)
                if os.pread(held.fd, 64, place) != data:
                    self.fail(f"own bytes in {name_of(number)} are not what was synced")
            if held.was_complete and int.from_bytes(held.mapping[:STAMP_BYTES], "little") == 0:
                self.fail(f"a mapping of {name_of(number)} shows zeros")
            if os.fstat(held.fd).st_nlink == 0:
                self.did("orphan")

    # Changing

    def write_something(self) -> None:
        number = self._rng.randrange(NAMES)
        with self._only_expected(f"change of {name_of(number)}"):
            if self._rng.random() < 0.3:
                self._replace(number)
            else:
                self._change(number)
        time.sleep(self._rng.random() * PAUSE_S)
        if self._rng.random() < 0.2:
            self._hold(number)

    def _change(self, number: int) -> None:
        board, path = self._board, self.path(number)
        with board.changing(number):
            version = board.new_version()
            size = MIN_BYTES + STAMP_BYTES + version % 1000
            there = board.truth(number).version
            board.begin(number)
            inode = 0
            if not there:
                deed, flags = "create", os.O_WRONLY | os.O_CREAT | os.O_EXCL
            else:
                deed, flags = self._rng.choice([("fsync", os.O_RDWR), ("close", os.O_WRONLY), ("unlink", 0)])
            if deed == "unlink":
                os.unlink(path)
                version = size = 0
            else:
                inode = self._store(path, flags, version, size, sync=deed == "fsync")
            board.publish(number, version, size, inode)
            self.did(deed)
            self.look_at(self._other, [number], sure=True)

    def _replace(self, number: int) -> None:
        """Save by rename, or move one name over another."""
        board, path = self._board, self.path(number)
        source = self._rng.randrange(NAMES)
        if source == number:
            with board.changing(number):
                version = board.new_version()
                size = MIN_BYTES + STAMP_BYTES + version % 1000
                own = os.path.join(self._mount, self._own_name)
                inode = self._store(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, version, size, sync=False)
                board.begin(number)
                os.rename(own, path)
                board.publish(number, version, size, inode)
                self.did("rename")
                self.look_at(self._other, [number], sure=True)
            return
        with board.changing(source, number):
            moved = board.truth(source)
            if not moved.version:
                return
            board.begin(number)
            board.begin(source)
            os.rename(self.path(source), path)
            board.publish(source, 0, 0, 0)
            board.publish(number, moved.version, moved.size, moved.inode)
            self.did("rename")
            self.look_at(self._other, [source, number], sure=True)

    @staticmethod
    def _store(path: str, flags: int, version: int, size: int, *, sync: bool) -> int:
        """Give the file its new version and return its inode number."""
        fd = os.open(path, flags, 0o644)
        try:
            os.ftruncate(fd, size)
            os.pwrite(fd, stamp(version), 0)
            os.pwrite(fd, stamp(version), size - STAMP_BYTES)
            if sync:
                os.fsync(fd)
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)


def _by_reading(mount: Path, number: int) -> object:
    try:
        file = open(os.path.join(mount, name_of(number)), "rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        return _raced(error)
    with file:
        content = file.read()
    first, last = content[:STAMP_BYTES], content[-STAMP_BYTES:]
    return int.from_bytes(first, "little") if first == last else f"torn {first!r} {last!r}", len(content)


def _by_stat(mount: Path, number: int) -> object:
    try:
        return None, os.stat(os.path.join(mount, name_of(number))).st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        return _raced(error)


def _raced(error: OSError) -> object:
    """A path whose file is replaced again and again may give ESTALE (the kernel tries only twice), an open file never.

    So it is right while the name is in flux, and wrong, like any other value, while it is not.
    """
    if error.errno != errno.ESTALE:
        raise error
    return "ESTALE"


def _by_listing(mount: Path) -> dict[int, object]:
    with os.scandir(mount) as entries:
        there = {entry.name for entry in entries}
    return {number: (None, None) if name_of(number) in there else None for number in range(NAMES)}


def run_torture(mounts: list[Path], directory: Path, seconds: float) -> Tally:
    """Two processes that change and one that looks on each mount. Return what all of them saw and did."""
    state = directory / "state"
    Board.make(state)
    children = []
    for index, mount in enumerate(mounts):
        other = mounts[(index + 1) % len(mounts)]
        for seed, role in enumerate(("writer", "writer", "reader")):
            words = [role, str(10 * index + seed), str(seconds), str(state), str(mount), str(other)]
            children.append(subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True))
    total = Tally()
    try:
        for child in children:
            output = child.communicate(timeout=seconds + 40)[0]
            if child.returncode:
                total.failures.append(f"a process ended with status {child.returncode}")
            else:
                total.add(Tally(**json.loads(output)))
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return total


if __name__ == "__main__":
    role, seed, seconds, state, mount, other = sys.argv[1:]
    worker = Worker(int(seed), Board(Path(state)), Path(mount), Path(other))
    worker.run(role, float(seconds))
    json.dump(asdict(worker.tally), sys.stdout)
