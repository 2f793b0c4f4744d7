"""Decides from a history whether what was read could have been there: G1, G3, G4, G6, and sizes.

For each byte of each file a write is *visible* to a call when it has returned on the same mount, or when it was
*confirmed* (an fsync, msync or close that began after it has returned) before the call began. A write *precedes*
another if it was confirmed before the other began, or returned before it on the same mount. A read is stale iff it
shows a write that precedes one which is visible to it. Truncations count as writes of zeros from the new size on,
confirmed when they return. Nothing else is asked: concurrent writes and reads may come out in any order.

A store into a mapping changes nothing beyond the end of the file; where it is not certain that the file went so far,
whether it counts is not certain either. Nor does it make a file longer, but one that is cut before the store is
confirmed: as a write's, its bytes may come after the truncation. What was refused may be seen until whoever waited for
it was told, by nobody afterwards, and need not be seen at all (`checker_refusals`). Appends are for `checker_appends`.

That is weaker than linearizability (two readers may see concurrent stores in different order), and it is what the
guarantees say.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from .checker_refusals import REFUSALS, RefusalsChecker
from .history import NEVER, Call, History
from .layout import Path
from .plan import FILE_BYTES, FILES, LOG

INFINITY = 1 << 60
_SYNCING = {"fsync", "msync", "close"}


@dataclass(slots=True, eq=False)
class Update:
    """A write, or a truncation, which writes zeros from its size to infinity."""

    call: Call | None
    """None: the file's initial zeros."""
    client: str
    start: int
    stop: int
    value: int
    begin: float
    end: float
    """NEVER: it failed or did not return, so it may happen at any time."""
    confirmed: float
    grows: bool = True
    """Whether it makes the file reach to its stop: not so for a mapping, or a hole."""
    regrows_to: int = 0
    """So far the file may reach again if it was cut before this was confirmed. Only of mappings."""
    gone: float = NEVER
    """It was refused, and nobody who looks after this may see it."""

    def precedes(self, other: Update) -> bool:
        return self.confirmed < other.begin or (self.client == other.client and self.end < other.begin)

    def visible_to(self, call: Call) -> bool:
        return self.confirmed < call.begin or (self.client == call.client and self.end < call.begin)

    @property
    def cuts(self) -> bool:
        return self.stop == INFINITY

    def __str__(self) -> str:
        return "the initial zeros" if self.call is None else str(self.call)


class ContentsChecker:
    def __init__(self, history: History, refusals: RefusalsChecker | None = None) -> None:
        self._calls = history.calls
        self._refusals = refusals or RefusalsChecker(history)
        self._updates: dict[int, list[Update]] = defaultdict(list)
        self._sizes: dict[int, int] = {}

    def check(self, initial: dict[Path, int]) -> Iterator[str]:
        """Give every problem. `initial` tells the inode numbers of the files that were there."""
        for path in FILES:
            self._sizes[initial[path]] = FILE_BYTES
        syncs = self._syncs()
        for call in self._calls:
            self._collect(call, syncs)
        for call in self._calls:
            if call.kind == "store":
                self._collect_store(call, syncs)
        for call in self._calls:
            if call.succeeded and call.ino and call.ino != initial[LOG]:
                if call.kind in ("read", "load"):
                    yield from self._check_read(call)
                elif call.kind == "stat":
                    yield from self._check_size(call)

    def _syncs(self) -> dict[tuple[str, int], list[Call]]:
        syncs: dict[tuple[str, int], list[Call]] = defaultdict(list)
        for call in self._calls:
            if call.kind in _SYNCING and call.succeeded:
                syncs[call.client, call.ino].append(call)
        return syncs

    def _collect(self, call: Call, syncs: dict[tuple[str, int], list[Call]]) -> None:
        match call.kind, call.args:
            case "write", (int() as offset, int() as length, int() as value):
                end = call.end if call.succeeded else NEVER
                self._add_written(call, offset, offset + length, value, end, _confirmed(call, syncs), grows=True)
            case (("truncate" | "punch" | "reopen"), _) if call.error in REFUSALS:
                return
            case "truncate", (int() as size,):
                end = call.end if call.succeeded else NEVER
                self._add(call, size, INFINITY, 0, end, end)
            case "punch", (int() as offset, int() as length):
                end = call.end if call.succeeded else NEVER
                self._add(call, offset, offset + length, 0, end, end, grows=False)
            case "reopen", (_, int() as flags) if flags & os.O_TRUNC:
                # If it failed it may have cut whatever file it found.
                end = call.end if call.succeeded else NEVER
                self._add(call, 0, INFINITY, 0, end, end)

    def _collect_store(self, call: Call, syncs: dict[tuple[str, int], list[Call]]) -> None:
        offset, length, value = call.args
        lowest, highest = self._size_range(call)
        certain = max(offset, min(offset + length, lowest))
        end = call.end if call.succeeded else NEVER
        reach = min(offset + length, highest)
        if certain > offset:
            for update in self._add_written(call, offset, certain, value, end, _confirmed(call, syncs), grows=False):
                update.regrows_to = min(update.stop, reach)
        if certain < offset + length:
            for update in self._add_written(call, certain, offset + length, value, NEVER, NEVER, grows=False):
                update.regrows_to = min(update.stop, reach)

    def _add_written(
        self, call: Call, start: int, stop: int, value: int, end: float, confirmed: float, *, grows: bool
    ) -> list[Update]:
        """Add what was written, less what was refused, and that as something that may never have been."""
        updates: list[Update] = []
        at = start
        for refused in self._refusals.of(call, confirmed):
            first, last = max(at, refused.start), min(stop, refused.stop)
            if first >= last:
                continue
            if at < first:
                updates.append(self._add(call, at, first, value, end, confirmed, grows))
            updates.append(self._add(call, first, last, value, NEVER, NEVER, grows))
            updates[-1].gone = refused.gone
            at = last
        if at < stop:
            updates.append(self._add(call, at, stop, value, end, confirmed, grows))
        return updates

    def _add(
        self, call: Call, start: int, stop: int, value: int, end: float, confirmed: float, grows: bool = True
    ) -> Update:
        update = Update(call, call.client, start, stop, value, call.begin, end, confirmed, grows)
        self._updates[call.ino].append(update)
        return update

    def _updates_before_end(self, call: Call) -> list[Update]:
        """What the call may see."""
        return [u for ino in (call.ino, 0) for u in self._updates[ino] if u.begin < call.end and u.gone > call.begin]

    # Bytes

    def _check_read(self, call: Call) -> Iterator[str]:
        updates = self._updates_before_end(call)
        initial = Update(None, "", 0, INFINITY, 0, -1.0, -1.0, -1.0)
        candidates = [initial, *updates]
        visible = [u for u in updates if u.visible_to(call)]
        offset, length = call.args[:2]
        for start, stop, value in _pieces(call.result, offset, length, updates):
            sources = [u for u in candidates if u.value == value and u.start <= start and stop <= u.stop]
            if not sources:
                yield f"garbage: {call} has {value} at {start} to {stop}, which nobody wrote there"
                return
            over = [u for u in visible if u.start <= start and stop <= u.stop]
            stale = [next((o for o in over if source.precedes(o)), None) for source in sources]
            if None not in stale:
                newer = stale[0]
                yield f"stale: {call} has {value} at {start} to {stop}, from {sources[0]}, overwritten by {newer}"
                return

    # Sizes

    def _check_size(self, call: Call) -> Iterator[str]:
        (size, _) = call.result
        lowest, highest = self._size_range(call)
        if not lowest <= size <= highest:
            yield f"size: {call} says {size}, but it has to be from {lowest} to {highest}"

    def _size_range(self, call: Call) -> tuple[int, int]:
        """The smallest and the largest size that the file can have as the call sees it."""
        initial = Update(None, "", self._sizes.get(call.ino, 0), INFINITY, 0, -1.0, -1.0, -1.0)
        updates = self._updates_before_end(call)
        every = [initial, *(u for u in updates if u.grows)]
        cuts = [u for u in every if u.cuts]
        lowest = highest = 0
        for update in every:
            reach = update.start if update.cuts else update.stop
            if update is initial or update.visible_to(call):
                later = [c.start for c in cuts if c is not update and not c.precedes(update)]
                lowest = max(lowest, min([reach, *later]))
            highest = max(highest, self._highest_reach(reach, update, cuts, call))
        for update in updates:
            highest = max(highest, self._highest_reach(update.regrows_to, update, cuts, call))
        return lowest, highest

    @staticmethod
    def _highest_reach(reach: int, update: Update, cuts: list[Update], call: Call) -> int:
        """How far the file can still go because of the update, as the call sees it."""
        certain = [c.start for c in cuts if update.precedes(c) and c.visible_to(call)]
        return min([reach, *certain])


def _confirmed(call: Call, syncs: dict[tuple[str, int], list[Call]]) -> float:
    if not call.succeeded:
        return NEVER
    return min((s.end for s in syncs[call.client, call.ino] if s.begin > call.end), default=NEVER)


def _pieces(data: bytes, offset: int, length: int, updates: Iterable[Update]) -> Iterator[tuple[int, int, int]]:
    """Split what was read, zeros after its end, where its value changes or an update begins or ends."""
    data = data.ljust(length, b"\0")
    marks = {0, length}
    for update in updates:
        for mark in (update.start - offset, update.stop - offset):
            if 0 < mark < length:
                marks.add(mark)
    ordered = sorted(marks)
    for start, stop in pairwise(ordered):
        while start < stop:
            value = data[start]
            end = stop - len(data[start:stop].lstrip(bytes((value,))))
            yield offset + start, offset + end, value
            start = end
