"""Decides whether refused writes were told, kept, and nothing else was (G5).

The quarantines say which bytes were refused, and every write has a value of its own, so each kept byte has one write
that it came from. What is not kept counts as any other write, for `checker_contents`: who excises too much, or keeps
too little, makes stale reads. Here is decided that
    - what is kept was written on that mount;
    - who wrote it was told, by the first fsync, msync or close of his that began when it was kept, at the latest.
When a call that had to do with the bytes has told of a refusal nobody may see them any more, nor the size they gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .history import NEVER, Call, History, Kept

REFUSALS = {"ENOSPC", "EDQUOT", "EROFS"}
_SYNCING = {"fsync", "msync", "close"}


@dataclass(frozen=True, slots=True)
class RefusedRange:
    start: int
    stop: int
    at: float
    """When it was kept."""
    gone: float


class RefusalsChecker:
    def __init__(self, history: History) -> None:
        self._calls = history.calls if history.kept else []
        self._problems: list[str] = []
        self._ranges: dict[Call, list[RefusedRange]] = {}
        for kept in history.kept:
            self._assign(kept)

    def of(self, call: Call, confirmed: float) -> list[RefusedRange]:
        """What of a write was refused, ascending, or was overwritten on its mount by what was, before it was stored."""
        ranges = list(self._ranges.get(call, ()))
        for other, refused in self._ranges.items():
            same_file = (other.client, other.ino) == (call.client, call.ino)
            if same_file and other is not call and other.end > call.begin and confirmed > other.begin:
                ranges += [replace(each, gone=NEVER) for each in refused]
        return sorted(ranges, key=lambda refused: (refused.start, refused.gone))

    def check(self) -> Iterator[str]:
        yield from self._problems
        for call, ranges in self._ranges.items():
            first = min(refused.at for refused in ranges)
            must_tell = self._must_tell(call, first)
            if must_tell is not None and not self._was_told(call, first, must_tell):
                yield f"swallowed: {call} was refused, which {must_tell} did not say"

    def _assign(self, kept: Kept) -> None:
        at = 0
        while at < len(kept.data):
            value = kept.data[at]
            end = len(kept.data) - len(kept.data[at:].lstrip(bytes((value,))))
            start, stop = kept.offset + at, kept.offset + end
            at = end
            if not value:
                continue  # of a page that comes whole, where that is not known; zeros tell nothing
            call = next((c for c in self._calls if _wrote(c, kept, start, stop, value)), None)
            if call is None:
                self._problems.append(
                    f"quarantine: {value} at {start} to {stop} by {kept.client}, where nobody wrote it"
                )
                continue
            self._ranges.setdefault(call, []).append(RefusedRange(start, stop, kept.at, self._gone(call, kept.at)))

    def _gone(self, written: Call, at: float) -> float:
        """When some call has told of it that stored all that had been written before it began."""
        return min(
            (
                c.end
                for c in self._calls
                if c.kind in _SYNCING and c.error in REFUSALS and (c.client, c.ino) == (written.client, written.ino)
                and c.begin > written.end and c.end > at
            ),
            default=NEVER,
        )  # fmt: skip

    def _must_tell(self, written: Call, at: float) -> Call | None:
        """The first call that can say it, through the file or mapping that it was written through."""
        kinds, last = ({"msync"}, "unmap") if written.kind == "store" else ({"fsync", "close"}, "reopen")
        for call in self._calls:
            if call.process != written.process or call.begin < written.end:
                continue
            if call.kind == last:
                return None
            if call.kind in kinds and call.ino == written.ino and call.begin > at and call.end < NEVER:
                return call
        return None

    def _was_told(self, written: Call, at: float, must_tell: Call) -> bool:
        return any(
            c.process == written.process and c.ino == written.ino and c.error in REFUSALS
            and c.end > at and c.begin <= must_tell.begin
            for c in self._calls
        )  # fmt: skip


def _wrote(call: Call, kept: Kept, start: int, stop: int, value: int) -> bool:
    if call.kind not in ("write", "store") or (call.client, call.ino) != (kept.client, kept.ino):
        return False
    offset, length, written = call.args
    return written == value and offset <= start and stop <= offset + length and call.begin < kept.at
