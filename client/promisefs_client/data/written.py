"""The dirty layer of one file: what was written, and pages of which only part was (`whole_pages`).

Invariants:
I1  A presumed page is dirty from end to end.
I2  What is stored or put back is never presumed on the way: a piece that is taken has its pages' bases with it.
I3  A piece that is taken was written under one key.
"""

from __future__ import annotations

from promisefs_client.identity.key import Key

from .dirty import STORE_BYTES, Buffer, DirtyBytes, StoreExtent, StoringBytes
from .page_keys import PageKeys
from .whole_pages import PAGE_BYTES, PresumedPages, Version, agreeing, certain_parts


class WrittenBytes(DirtyBytes):
    """Bytes that are not on their way to the server. `presumed` are those that may be as the server has them."""

    __slots__ = ("keys", "presumed")

    def __init__(self) -> None:
        super().__init__()
        self.presumed = PresumedPages()
        self.keys = PageKeys()

    def belongs_to(self, key: Key | None, start: int, end: int) -> None:
        """What is written in this range next is written under that key."""
        self.keys.set(start, end, key, alone=not self.size_bytes)

    def is_others(self, start: int, end: int, key: Key | None) -> bool:
        """Whether a page of the range has dirty bytes of another key."""
        if not self.size_bytes or not self.keys.may_be_other(key):
            return False
        first, last = _whole_pages(start, end)
        for offset, data in self.within(first, last):
            at, stop = max(offset, first), min(offset + len(data), last)
            while at < stop:
                if self.keys.of(at) != key:
                    return True
                at = self.keys.run_end(at, stop)
        return False

    def write_certain(self, offset: int, data: Buffer) -> None:
        """Take bytes that were written, all of them."""
        if len(data):
            self._make_certain(offset, offset + len(data))
            self.write(offset, data)

    def write_presumed(self, offset: int, data: bytes, bases: bytes, since: Version) -> None:
        """Take whole pages, where nothing is dirty, of which only what differs from `bases` was written."""
        self.write(offset, data)
        for at in range(0, len(data), PAGE_BYTES):
            self.presumed.add((offset + at) // PAGE_BYTES, bases[at : at + PAGE_BYTES], since)

    def discard(self, start: int, end: int) -> list[tuple[int, int]]:
        """Drop bytes; return the ranges dropped."""
        self._make_certain(start, end)
        return self.remove(start, end)

    def presume_nothing(self) -> None:
        """Leave only what was written for certain."""
        for page in self.presumed.pages():
            self._settle(page)

    def take_extent(self, storing: StoringBytes, max_bytes: int, *, whole_only: bool, drops: int) -> StoreExtent | None:
        """Remove what may be stored next; see `FileContents.begin_store`."""
        while (
            found := self._whole_range(storing) if whole_only else self._storable_range(storing, max_bytes)
        ) is not None:
            start, end = found
            cut = self.presumed.cut(start, end)
            if not cut:
                since = self.presumed.since
                bases = {page: self.presumed.pop(page) for page in self.presumed.overlapping(start, end)}
                key = self.keys.of(start)
                return StoreExtent(start, self.take(start, end), bases, since if bases else None, drops, key)
            for page in cut:
                self._settle(page)
        return None

    def put_back(self, extent: StoreExtent, *, still_presumed: bool) -> None:
        """Take an extent back that was not stored, under what was written meanwhile."""
        if not self.is_others(extent.offset, extent.end, extent.key):
            self.belongs_to(extent.key, extent.offset, extent.end)
        else:
            for at in range(*_whole_pages(extent.offset, extent.end), PAGE_BYTES):
                if not self.is_others(at, at + PAGE_BYTES, extent.key):
                    self.belongs_to(extent.key, at, at + PAGE_BYTES)
        for page in self.presumed.overlapping(extent.offset, extent.end):
            self._settle(page)
        if still_presumed and not self.overlaps(extent.offset, extent.end):
            self.write(extent.offset, extent.data)
            for page, base in extent.bases.items():
                assert extent.since is not None
                self.presumed.add(page, base, extent.since)
        else:
            for offset, piece in certain_parts(extent.offset, extent.data, extent.bases):
                self.write_under(offset, piece)

    def _make_certain(self, start: int, end: int) -> None:
        """Before all bytes of the range are overwritten or dropped: presume nothing of their pages any more."""
        cut = self.presumed.cut(start, end) if end > start else []
        for page in self.presumed.overlapping(start, end):
            if page in cut:
                self._settle(page)
            else:
                self.presumed.pop(page)

    def _settle(self, page: int) -> None:
        """Leave of a presumed page only what was written."""
        base = self.presumed.pop(page)
        at = page * PAGE_BYTES
        now = bytearray(len(base))
        self.copy_into(memoryview(now), at)
        for a, b in agreeing(bytes(now), base):
            self.remove(at + a, at + b)

    def _whole_range(self, storing: StoringBytes) -> tuple[int, int] | None:
        for start in self.whole_cells():
            end = start + STORE_BYTES
            if not storing.overlaps(start, end) and self.keys.run_end(start, end) == end:
                return start, end
        return None

    def _storable_range(self, storing: StoringBytes, max_bytes: int) -> tuple[int, int] | None:
        start = self.next_at(0)
        while start is not None:
            busy_to = storing.covered_to(start)
            if busy_to == start:
                limit = (start // max_bytes + 1) * max_bytes
                busy_from = storing.next_at(start)
                limit = self.keys.run_end(start, limit if busy_from is None else min(limit, busy_from))
                return start, self.run_end(start, limit)
            start = self.next_at(busy_to)
        return None

    def check_invariants(self) -> None:
        """Assert I1 and those of DirtyBytes."""
        super().check_invariants()
        for page in self.presumed.pages():
            base = self.presumed.get(page)
            assert base, "I1"
            start, end = page * PAGE_BYTES, page * PAGE_BYTES + len(base)
            assert self.run_end(start, end) == end, "I1"


def _whole_pages(start: int, end: int) -> tuple[int, int]:
    return start // PAGE_BYTES * PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES
