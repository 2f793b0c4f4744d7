"""One process of the torture: it changes names on its mount and looks at once on another, or it only looks.

python -m torture_lib.worker     reads its Task as JSON from standard input, prints a line of JSON ever so often:
                                 [checks so far, failures so far]; at the end one with its Tally
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .board import ABSENT, Board, State
from .looks import (
    BY_HANDLE,
    BY_PATH,
    KINDS,
    MIN_BYTES,
    NAMES,
    SCRATCH,
    STAMP_BYTES,
    HeldFile,
    Sight,
    is_right,
    look_by_handle,
    look_by_listing,
    look_by_path,
    name_of,
    stamp,
)
from .tally import Histogram, Tally

HELD = 5
"""Open files that each process keeps."""
SCRATCH_BYTES = 64
MAX_WORKERS = (MIN_BYTES - SCRATCH) // SCRATCH_BYTES
PAUSE_S = 0.004
"""At most, between two changes of one process."""
REPORT_S = 0.5
_VERSIONS_PER_WORKER = 1 << 40
DEEDS = ("fsync", "close", "msync", "append", "truncate", "unlink")
"""What is done to a file that is there; "create" if there is none. And names are moved (`Worker._replace`)."""


class Task(NamedTuple):
    number: int
    """Among the workers."""
    changes: bool
    seed: int
    mount: str
    other: str
    lock_file: str
    own_pipe: int
    writers: list[int]


class Worker:
    def __init__(self, task: Task) -> None:
        self.tally = Tally()
        self._board = Board(NAMES, Path(task.lock_file), task.own_pipe, task.writers)
        self._rng = random.Random(task.seed)
        self._index = task.number
        self._changes = task.changes
        self._mount = Path(task.mount)
        self._other = Path(task.other)
        self._held_on = self._other if task.changes else self._mount
        self._held: dict[int, HeldFile] = {}
        self._seen_ns: dict[tuple[str, int], int] = {}
        self._versions = task.number * _VERSIONS_PER_WORKER

    def run(self) -> Tally:
        report_at, told = 0.0, 0
        while not self._board.stopped:
            if self._changes:
                self._change_something()
            else:
                self._look_around()
            if self._rng.random() < (0.1 if self._changes else 0.01):
                self._use_held()
            if (now := time.monotonic()) >= report_at:
                failures = self.tally.failures
                print(json.dumps([self.tally.judged, self.tally.failed, failures[told:]]), flush=True)
                told = len(failures)
                report_at = now + REPORT_S
        for held in self._held.values():
            held.close()
        return self.tally

    def _fail(self, text: str) -> None:
        self.tally.fail(f"{self._mount} {text}")

    @contextmanager
    def _only_expected(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._fail(f"{what}: {errno.errorcode[error.errno or 0]}")

    # Looking

    def _look_around(self) -> None:
        heard = self._board.hear()
        number = heard[-1] if heard else self._rng.randrange(NAMES)
        self._look_in_every_way(self._mount, number, at_once=bool(heard))
        self._may_hold(number)

    def _look_in_every_way(self, mount: Path, number: int, *, at_once: bool) -> None:
        # Handles come first half of the time: a stat or a read by path would refresh what they show.
        ways = [BY_HANDLE, BY_PATH] if self._rng.random() < 0.5 else [KINDS]
        for kind in (kind for some in ways for kind in self._rng.sample(some, len(some))):
            at_once = not self._look(kind, mount, number, at_once=at_once) and at_once

    def _look(self, kind: str, mount: Path, number: int, *, at_once: bool) -> bool:
        """Look, and judge. `at_once`: it was published just now. Return whether there was a way to look like this."""
        with self._only_expected(f"{kind} of {name_of(number)}"):
            if kind in BY_HANDLE:
                return self._look_by_handle(kind, number, at_once)
            self._mark(kind, number)
            if kind == "listing":
                sights = dict(enumerate(look_by_listing(mount)))
            else:
                sights = {number: look_by_path(kind, mount, number)}
            self._judge(kind, sights, at_once, time.monotonic_ns())
        return True

    def _look_by_handle(self, kind: str, number: int, at_once: bool) -> bool:
        """A handle shows its file, whatever its name: judged as long as the name stands for it."""
        self._mark(kind, number)
        held, known = self._held.get(number), self._board.known[number]
        if held is None or held.inode != known.published.inode:
            return False
        sight = look_by_handle(kind, held)
        ended_ns = time.monotonic_ns()
        self._board.hear()
        if held.inode == known.published.inode:
            self._judge(kind, {number: sight}, at_once, ended_ns)
        return True

    def _mark(self, kind: str, number: int) -> None:
        self._board.hear()
        for known in self._board.known if kind == "listing" else [self._board.known[number]]:
            known.mark()

    def _judge(self, kind: str, sights: dict[int, Sight], at_once: bool, ended_ns: int) -> None:
        self._board.hear()
        checks = self.tally.checks_of(kind)
        checks.judged += 1
        known = self._board.known
        checks.busy += any(not known[number].quiet for number in sights)
        wrong = [number for number, sight in sights.items() if not is_right(sight, known[number])]
        for number in wrong:
            what = f"{kind} {'at once ' if at_once else ''}of {name_of(number)}"
            age_ms = (ended_ns - known[number].published_ns) / 1e6
            self._fail(f"{what}: {sights[number]}, may be {known[number].possible}, {age_ms:.1f} ms after publication")
        checks.stale += bool(wrong)
        quiet = [number for number in sights if known[number].quiet]
        checks.absent += any(not known[number].published.exists for number in quiet)
        first = [n for n in quiet if self._seen_ns.get((kind, n)) != known[n].published_ns]
        checks.first += bool(first)
        for number in first:
            self._seen_ns[kind, number] = known[number].published_ns
        if at_once and first and not wrong and any(known[number].published_ns for number in first):
            delay_ns = ended_ns - max(known[number].published_ns for number in first)
            self.tally.seen.setdefault(kind, Histogram()).add(delay_ns)

    # Holding files open, and using them whatever became of their names

    def _may_hold(self, number: int) -> None:
        """Open it, sometimes, unless what the name stands for is held already."""
        held = self._held.get(number)
        if (held is None or held.inode != self._board.known[number].published.inode) and self._rng.random() < 0.3:
            self._hold(number)

    def _hold(self, number: int) -> None:
        if number in self._held:
            self._held.pop(number).close()
        elif len(self._held) >= HELD:
            self._held.pop(self._rng.choice(list(self._held))).close()
        known = self._board.known[number]
        self._mark("open", number)
        with self._only_expected(f"open of {name_of(number)}"), suppress(FileNotFoundError, ValueError):
            try:
                held = HeldFile(os.path.join(self._held_on, name_of(number)))  # ValueError: just made, and empty
            except OSError as error:
                self._board.hear()
                if error.errno != errno.ESTALE or known.quiet:
                    raise
                return
            self._board.hear()
            held.was_complete = known.quiet
            self._held[number] = held

    def _use_held(self) -> None:
        if not self._held:
            return
        number, held = self._rng.choice(list(self._held.items()))
        data = self._rng.randbytes(SCRATCH_BYTES)
        place = SCRATCH + SCRATCH_BYTES * self._index
        with self._only_expected(f"use of an open handle of {name_of(number)}"):
            os.pwrite(held.fd, data, place)
            if os.pread(held.fd, SCRATCH_BYTES, place) != data:
                self._fail(f"own bytes in {name_of(number)} are not what was written")
            if self._rng.random() < 0.5:
                os.fsync(held.fd)
                if os.pread(held.fd, SCRATCH_BYTES, place) != data:
                    self._fail(f"own bytes in {name_of(number)} are not what was synced")
            if held.was_complete and held.mapping[:STAMP_BYTES] == bytes(STAMP_BYTES):
                self._fail(f"a mapping of {name_of(number)} shows zeros")
            self.tally.orphans += os.fstat(held.fd).st_nlink == 0

    # Changing

    def _change_something(self) -> None:
        number = self._rng.randrange(NAMES)
        with self._only_expected(f"change of {name_of(number)}"):
            if self._rng.random() < 0.3:
                self._replace(number, self._rng.randrange(NAMES))
            else:
                self._change(number)
        time.sleep(self._rng.random() * PAUSE_S)
        self._may_hold(number)

    @contextmanager
    def _published(self, deed: str, changes: dict[int, State]) -> Iterator[list[int]]:
        """Announce; the block makes the change and may put the file's inode number into the list; publish."""
        for number, state in changes.items():
            self._board.announce(number, state)
        inode: list[int] = []
        began_ns = time.monotonic_ns()
        yield inode
        took_ns = time.monotonic_ns() - began_ns
        for number, state in changes.items():
            self._board.publish(number, state._replace(inode=inode[0]) if inode else state)
        self.tally.deeds.setdefault(deed, Histogram()).add(took_ns)

    def _change(self, number: int) -> None:
        path = os.path.join(self._mount, name_of(number))
        with self._board.changing(number):
            old = self._board.known[number].published
            deed = self._rng.choice(DEEDS) if old.exists else "create"
            new = self._planned(deed, old)
            with self._published(deed, {number: new}) as inode:
                match deed:
                    case "create":
                        inode.append(_write(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, new, sync=False))
                    case "fsync" | "close":
                        _write(path, os.O_RDWR, new, sync=deed == "fsync")
                    case "msync":
                        _write_mapped(path, new.head)
                    case "append":
                        _append(path, new.size - old.size, new.tail)
                    case "truncate":
                        os.truncate(path, new.size)
                    case "unlink":
                        os.unlink(path)
            self._look_in_every_way(self._other, number, at_once=True)

    def _planned(self, deed: str, old: State) -> State:
        """What the name will stand for."""
        self._versions += 1
        version = self._versions
        match deed:
            case "unlink":
                return ABSENT
            case "msync":
                return old._replace(head=version)
            case "append":
                return old._replace(tail=version, size=old.size + STAMP_BYTES + version % 1000)
            case "truncate":
                return old._replace(tail=0, size=self._rng.choice([MIN_BYTES, old.size + mmap.PAGESIZE]))
        return State(version, version, MIN_BYTES + STAMP_BYTES + version % 1000, old.inode)

    def _replace(self, number: int, source: int) -> None:
        """Save by rename, or (another source) move one name over another."""
        board, path = self._board, os.path.join(self._mount, name_of(number))
        with board.changing(*{source, number}):
            if source == number:
                new = self._planned("create", ABSENT)
                own = os.path.join(self._mount, f"own{self._index}")
                inode = _write(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, new, sync=False)
                with self._published("save by rename", {number: new._replace(inode=inode)}):
                    os.rename(own, path)
            else:
                moved = board.known[source].published
                if not moved.exists:
                    return
                with self._published("rename", {source: ABSENT, number: moved}):
                    os.rename(os.path.join(self._mount, name_of(source)), path)
            for changed in {source, number}:
                self._look_in_every_way(self._other, changed, at_once=changed == number)


def _write(path: str, flags: int, new: State, *, sync: bool) -> int:
    """Write both stamps, and cut or extend the file to its size. Return its inode number."""
    fd = os.open(path, flags, 0o644)
    try:
        os.ftruncate(fd, new.size)
        os.pwrite(fd, stamp(new.head), 0)
        os.pwrite(fd, stamp(new.tail), new.size - STAMP_BYTES)
        if sync:
            os.fsync(fd)
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def _write_mapped(path: str, head: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        with mmap.mmap(fd, mmap.PAGESIZE) as page:
            page[:STAMP_BYTES] = stamp(head)
            page.flush()
    finally:
        os.close(fd)


def _append(path: str, length: int, tail: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, bytes(length - STAMP_BYTES) + stamp(tail))
    finally:
        os.close(fd)


def main() -> None:
    given: dict[str, Any] = json.loads(sys.stdin.readline())
    tally = Worker(Task(**given)).run()
    print(json.dumps(tally.as_json()), flush=True)


if __name__ == "__main__":
    main()
