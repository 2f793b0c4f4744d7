"""The clean layer of one file: what the server has of it, as far as that is known here.

*Blocks* are what it told. Where a block is not here, whole *pages* that this client has stored are kept: the kernel has
made pages of its own of them, without a READ, and of what a mapping writes into those only what differs was written.

Invariants:
I1  There are blocks and pages only while `version` is not None, and all are of that version or newer.
I2  None reaches past `size`. Where one ends before that, and past `size`, the file has zeros.
I3  There is no page of a block that is here.
"""

from __future__ import annotations

from collections.abc import Iterator

from .dirty import Buffer
from .pagecache import BLOCK_BYTES, CleanBlock, PageCache
from .whole_pages import PAGE_BYTES, Version


def _piece(data: Buffer, start: int, end: int) -> bytes:
    """Copy a range of a buffer, once (a whole bytes object is not copied)."""
    return data[start:end] if isinstance(data, bytes) else bytes(memoryview(data)[start:end])


class CleanBytes:
    """Clean bytes of one file. The cache may take some: that costs a fetch, or of a page what it is kept for."""

    def __init__(self, cache: PageCache) -> None:
        self._cache = cache
        self._blocks: dict[int, CleanBlock] = {}
        self._pages: dict[int, CleanBlock] = {}
        self.version: Version | None = None
        """Label of all of it. None: nothing is known about the server's bytes."""
        self.size = 0
        """Size at the server for `version`; meaningless while that is None."""

    def __contains__(self, index: int) -> bool:
        """Whether a block is here."""
        return index in self._blocks

    def knows_some(self, offset: int, end: int) -> bool:
        """Whether a block or page of the range is here."""
        if any(index in self._blocks for index in range(offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1)):
            return True
        pages = range(offset // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1)
        return bool(self._pages) and any(page in self._pages for page in pages)

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """Give the number and the bytes of each block: those missing before the end of the file are zeros."""
        return ((index, block.data) for index, block in self._blocks.items())

    def pages(self) -> Iterator[int]:
        """Give the numbers of pages."""
        return iter(self._pages)

    def cut_to_known(self, end: int) -> int:
        """Cut the end of a range to where the server may have bytes."""
        return end if self.version is None else min(end, self.size)

    def read(self, index: int, start: int, end: int) -> bytes | None:
        """Return the server's bytes of a block from `start` to `end` within it; None if they have to be fetched."""
        part = self._blocks.get(index)
        if part is None and self._pages:
            page, within = divmod(index * BLOCK_BYTES + start, PAGE_BYTES)
            if within + end - start <= PAGE_BYTES and (part := self._pages.get(page)) is not None:
                start, end = within, within + end - start
        if part is not None:
            self._cache.touch(part)
            data = part.data[start:end]
        elif self.cut_to_known(index * BLOCK_BYTES + end) > index * BLOCK_BYTES + start:
            return None
        else:
            data = b""
        return data if len(data) == end - start else data.ljust(end - start, b"\0")

    def fill(self, index: int, data: Buffer) -> None:
        """Add what the server told, from block `index` on. Blocks that exist stay: a store may have changed them since.

        What is added is not evicted here, so a read with no await in between finds it whatever the limit.
        """
        length = min(len(data), self.size - index * BLOCK_BYTES)
        added = 0
        for at in range(0, length, BLOCK_BYTES):
            if index not in self._blocks:
                self._add_block(index, _piece(data, at, min(at + BLOCK_BYTES, length)))
                added += 1
            index += 1
        self._cache.evict(keep=added)

    def _add_block(self, index: int, data: bytes) -> None:
        self._cache.add(CleanBlock(self._blocks, index, data))
        if self._pages:
            first = index * BLOCK_BYTES // PAGE_BYTES
            for page in range(first, first + BLOCK_BYTES // PAGE_BYTES):
                if page in self._pages:
                    self._cache.remove(self._pages[page])

    def take_in(self, offset: int, data: Buffer) -> bool:
        """Take bytes that the server has by our own doing; return whether there is a block now for all of them.

        A new one is made where they cover all that the server has of it.
        """
        end = offset + len(data)
        complete = True
        for index in range(offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1):
            start = index * BLOCK_BYTES
            a, b = max(offset, start), min(end, start + BLOCK_BYTES)
            block = self._blocks.get(index)
            piece = _piece(data, a - offset, b - offset)
            if block is not None:
                self._lay_over(block, a - start, piece)
            elif a == start and b >= min(start + BLOCK_BYTES, self.size):
                self._add_block(index, piece)
            else:
                self._take_pages(a, piece)
                complete = False
        self.size = max(self.size, end)
        return complete

    def _take_pages(self, offset: int, data: bytes) -> None:
        """Take what lies within a block that is not here: whole pages, and parts of pages that are."""
        end = offset + len(data)
        for page in range(offset // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1):
            start = page * PAGE_BYTES
            a, b = max(offset, start), min(end, start + PAGE_BYTES)
            known = self._pages.get(page)
            if known is not None:
                self._lay_over(known, a - start, data[a - offset : b - offset])
            elif b - a == PAGE_BYTES:
                self._cache.add(CleanBlock(self._pages, page, data[a - offset : b - offset]))

    def _lay_over(self, part: CleanBlock, at: int, data: bytes) -> None:
        old = part.data
        self._cache.replace(part, old[:at].ljust(at, b"\0") + data + old[at + len(data) :])

    def resize(self, size: int) -> None:
        """Take a new size at the server; what lies beyond it goes."""
        if size < self.size:
            for unit, parts in ((BLOCK_BYTES, self._blocks), (PAGE_BYTES, self._pages)):
                for index in [i for i in parts if (i + 1) * unit > size]:
                    keep_bytes = size - index * unit
                    if keep_bytes <= 0:
                        self._cache.remove(parts[index])
                    else:
                        self._cache.replace(parts[index], parts[index].data[:keep_bytes])
        self.size = size

    def forget(self, start: int, end: int) -> None:
        """Forget these bytes. Of blocks that have some of them, the pages that have none are kept."""
        for index in [i for i in self._blocks if i * BLOCK_BYTES < end and start < (i + 1) * BLOCK_BYTES]:
            block = self._blocks[index]
            self._cache.remove(block)
            for at in range(0, len(block.data), PAGE_BYTES):
                page = (index * BLOCK_BYTES + at) // PAGE_BYTES
                self._cache.add(CleanBlock(self._pages, page, block.data[at : at + PAGE_BYTES]))
        for page in [p for p in self._pages if p * PAGE_BYTES < end and start < (p + 1) * PAGE_BYTES]:
            self._cache.remove(self._pages[page])

    def drop(self) -> None:
        """Forget everything."""
        self.version = None
        for part in [*self._blocks.values(), *self._pages.values()]:
            self._cache.remove(part)

    def check_invariants(self) -> None:
        assert self.version is not None or not (self._blocks or self._pages), "I1"
        for unit, parts in ((BLOCK_BYTES, self._blocks), (PAGE_BYTES, self._pages)):
            for index, part in parts.items():
                assert part.home is parts and part.index == index
                assert len(part.data) <= unit and index * unit + len(part.data) <= self.size, "I2"
        assert not any(page * PAGE_BYTES // BLOCK_BYTES in self._blocks for page in self._pages), "I3"
