"""Pages that come whole although only some of their bytes were written.

The kernel writes a page of a mapping back whole, and when it likes; nothing says that a WRITE is such a one. Bytes of
it that are as the kernel was given them must not undo what another mount has stored there since.

*Twins*: while the kernel drops pages, what it was last given of them. Of a page written meanwhile only what differs
from its twin is dirty.

*Presumed pages*: at other times such a page becomes dirty as a whole, so that it is stored in one piece with its
neighbours, and what it was before is kept as its base. What equals the base is presumed to be what the server has. The
store of such pages says since which version no other client may have changed the file (StoreData's `since`), and when
that is not so, or a break comes, only what differs from the base stays dirty.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable, Iterator

from . import pagecache

PAGE_BYTES = mmap.PAGESIZE
"""What the kernel writes back of a mapping is whole pages, but for the end of the file."""

Version = tuple[int, int]
"""Incarnation of the volume, data version of the file."""

_CHANGED = re.compile(rb"[^\0]+")
_EQUAL = re.compile(rb"\0+")


def differing(new: bytes, old: bytes) -> list[tuple[int, int]]:
    """Return the runs (start, end) in which two pieces of equal length differ, ascending."""
    return [run.span() for run in _CHANGED.finditer(_difference(new, old))]


def agreeing(new: bytes, old: bytes) -> list[tuple[int, int]]:
    """Return the other runs."""
    return [run.span() for run in _EQUAL.finditer(_difference(new, old))]


def _difference(new: bytes, old: bytes) -> bytes:
    assert len(new) == len(old)
    return (int.from_bytes(new, "big") ^ int.from_bytes(old, "big")).to_bytes(len(new), "big")


class Twins:
    """What the kernel was last given of pages that it may still write back. Empty but while it drops pages.

    Kept by block, or by page where no more is known.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, bytes] = {}
        self._pages: dict[int, bytes] = {}
        self._drops = 0

    def __bool__(self) -> bool:
        return bool(self._blocks or self._pages)

    def __contains__(self, index: int) -> bool:
        """Whether the block's is here."""
        return index in self._blocks

    def has_page(self, page: int) -> bool:
        return page in self._pages or page * PAGE_BYTES // pagecache.BLOCK_BYTES in self._blocks

    def begin_drop(self) -> int:
        """The kernel is about to drop pages; `keep` follows for what it may have, and `end_drop` with this number."""
        self._drops += 1
        return self._drops

    def keep(self, index: int, data: bytes) -> None:
        self._blocks[index] = data

    def keep_page(self, page: int, data: bytes) -> None:
        self._pages[page] = data

    def end_drop(self, number: int) -> None:
        """The kernel has no page left from before that drop began. A later one, still under way, needs the twins."""
        if number == self._drops:
            self._blocks.clear()
            self._pages.clear()

    def given(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """The kernel's pages are this from now on: it has read, or itself written, these bytes."""
        with memoryview(data) as view:
            for size, twins in ((pagecache.BLOCK_BYTES, self._blocks), (PAGE_BYTES, self._pages)):
                for index in range(offset // size, (offset + len(view) - 1) // size + 1) if twins else ():
                    twin = twins.get(index)
                    start = max(offset - index * size, 0)
                    if twin is not None and start <= len(twin):
                        part = bytes(view[max(index * size - offset, 0) : (index + 1) * size - offset])
                        twins[index] = twin[:start] + part + twin[start + len(part) :]

    def of(self, offset: int, length: int) -> bytes | None:
        """Return the twin of a page, short where the file ended; None if there is none."""
        if (page := self._pages.get(offset // PAGE_BYTES)) is not None:
            return page[:length]
        index, start = divmod(offset, pagecache.BLOCK_BYTES)
        twin = self._blocks.get(index)
        return None if twin is None else twin[start : start + length]


class PresumedPages:
    """Bases of dirty pages, by number of the page. Their sizes, the pages' own, are bounded by the dirty bytes."""

    def __init__(self) -> None:
        self._bases: dict[int, bytes] = {}
        self.since: Version | None = None
        """The oldest version that one of the bases is of; present iff there are any."""

    def __bool__(self) -> bool:
        return bool(self._bases)

    def get(self, page: int) -> bytes | None:
        return self._bases.get(page)

    def add(self, page: int, base: bytes, since: Version) -> None:
        self._bases[page] = base
        self.since = since if self.since is None else min(self.since, since)

    def pop(self, page: int) -> bytes:
        base = self._bases.pop(page)
        if not self._bases:
            self.since = None
        return base

    def pages(self) -> list[int]:
        return list(self._bases)

    def overlapping(self, start: int, end: int) -> list[int]:
        """Return the presumed pages that have bytes in the range, ascending."""
        if not self._bases:
            return []
        pages: Iterable[int] = range(start // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1)
        if len(self._bases) < end // PAGE_BYTES - start // PAGE_BYTES:
            pages = sorted(self._bases)
        return [page for page in pages if page in self._bases and self._overlaps(page, start, end)]

    def _overlaps(self, page: int, start: int, end: int) -> bool:
        at = page * PAGE_BYTES
        return at < end and start < at + len(self._bases[page])

    def cut(self, start: int, end: int) -> list[int]:
        """Return the presumed pages that have bytes both inside and outside of the range."""
        ends = {start // PAGE_BYTES, (end - 1) // PAGE_BYTES}
        return [page for page in ends if page in self._bases and self._is_cut(page, start, end)]

    def _is_cut(self, page: int, start: int, end: int) -> bool:
        at = page * PAGE_BYTES
        return self._overlaps(page, start, end) and not (start <= at and at + len(self._bases[page]) <= end)


def certain_parts(offset: int, data: bytes | bytearray, bases: dict[int, bytes]) -> Iterator[tuple[int, bytes]]:
    """Split a piece of a file that holds these presumed pages into what was written for certain, ascending."""
    at = 0
    for page in sorted(bases):
        base = bases[page]
        start = page * PAGE_BYTES - offset
        if start > at:
            yield offset + at, bytes(data[at:start])
        at = start + len(base)
        for a, b in differing(bytes(data[start:at]), base):
            yield offset + start + a, bytes(data[start + a : start + b])
    if at < len(data):
        yield offset + at, bytes(data[at:])
