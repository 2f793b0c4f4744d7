"""Byte ranges that an application wrote: the dirty layer of one file, and the layer of those being stored.

A layer maps offsets to buffers that do not overlap. Dirty extents are kept so that the usual writers are cheap: a large
write is kept as the object it came in, small appends grow one buffer, and nothing is moved when ranges merely touch.
They are joined when they are stored.

Invariants:
I1  Extents of a layer are not empty and do not overlap.
I2  A dirty extent lies within one cell (STORE_BYTES, aligned), which bounds what any one write copies.
I3  `size_bytes` and the count of each cell are exact; `_whole` holds the cells that are dirty from end to end.
I4  Data of a storing extent never changes: it has left the dirty layer, the only one that is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sortedcontainers import SortedDict

from promisefs_client.identity.key import Key

from .whole_pages import PAGE_BYTES, certain_parts

STORE_BYTES = 1 << 20
"""A cell: what write-behind stores at once, aligned. The most that one StoreData carries."""

_KEEP_BYTES = 1 << 16
"""A write of at least this much is kept as it came; a smaller one goes to the end of the buffer before it."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, eq=False)
class StoreExtent:
    """One range on its way to the server. `data` does not change."""

    offset: int
    data: bytes | bytearray
    bases: dict[int, bytes] = field(default_factory=dict)
    """Of the presumed pages in it (`whole_pages`)."""
    since: tuple[int, int] | None = None
    """Present iff there are such: to be stored only if no other client changed the file after this version."""
    drops: int = 0
    """How often the clean bytes had been dropped before."""
    key: Key | None = None
    """Whose it is: it is stored under this key; None: the mount's own."""

    @property
    def written(self) -> list[tuple[int, bytes]]:
        """What of it was written for certain, by offset."""
        return list(certain_parts(self.offset, self.data, self.bases))

    @property
    def length(self) -> int:
        return len(self.data)

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


class _Layer:
    """Questions that both layers answer."""

    __slots__ = ("_extents", "size_bytes")

    def __init__(self) -> None:
        self._extents: SortedDict = SortedDict()  # offset -> bytes | bytearray
        self.size_bytes = 0

    @property
    def end(self) -> int:
        """End of the last byte; 0 if there is none."""
        if not self._extents:
            return 0
        start, data = self._extents.peekitem(-1)
        return int(start + len(data))

    def covered_to(self, offset: int) -> int:
        """Return the end of the extent that holds `offset`, or `offset` if none does."""
        i = self._extents.bisect_right(offset) - 1
        if i >= 0:
            start, data = self._extents.peekitem(i)
            return int(max(start + len(data), offset))
        return offset

    def next_at(self, offset: int) -> int | None:
        """Return the offset of the first byte at or after `offset`."""
        if self.covered_to(offset) > offset:
            return offset
        i = self._extents.bisect_left(offset)
        return int(self._extents.peekitem(i)[0]) if i < len(self._extents) else None

    def overlaps(self, start: int, end: int) -> bool:
        first = self.next_at(start) if self.size_bytes else None
        return first is not None and first < end

    def within(self, start: int, end: int) -> Iterator[tuple[int, bytes | bytearray]]:
        """Give each extent that overlaps the range, whole, as (offset, data). The layer must not change meanwhile."""
        i = max(self._extents.bisect_right(start) - 1, 0)
        for offset in self._extents.islice(i):
            if offset >= end:
                return
            data = self._extents[offset]
            if offset + len(data) > start:
                yield offset, data

    def copy_into(self, target: memoryview, start: int) -> None:
        """Lay this layer's bytes over `target`, whose first byte is the file's byte `start`."""
        end = start + len(target)
        for offset, data in self.within(start, end):
            a, b = max(offset, start), min(offset + len(data), end)
            with memoryview(data) as view:
                target[a - start : b - start] = view[a - offset : b - offset]

    def check_invariants(self) -> None:
        last_end = size_bytes = 0
        for offset, data in self._extents.items():
            assert len(data) > 0 and offset >= last_end, "I1"
            last_end = offset + len(data)
            size_bytes += len(data)
        assert size_bytes == self.size_bytes, "I3"


class _ShownBytes(_Layer):
    """What readers see of the extents on their way to the server."""

    __slots__ = ()

    def add(self, offset: int, data: bytes | bytearray) -> None:
        self._extents[offset] = data
        self.size_bytes += len(data)

    def remove(self, offset: int) -> None:
        self.size_bytes -= len(self._extents.pop(offset))

    def extents(self) -> Iterator[tuple[int, bytes | bytearray]]:
        return iter(self._extents.items())


class StoringBytes(_Layer):
    """Extents on their way to the server."""

    __slots__ = ("_on_their_way", "shown")

    def __init__(self) -> None:
        super().__init__()
        self.shown = _ShownBytes()
        self._on_their_way: dict[StoreExtent, list[int]] = {}  # with the offsets of its parts in `shown`

    def add(self, extent: StoreExtent) -> None:
        assert not self.overlaps(extent.offset, extent.end), "two stores of one byte: their order would be undefined"
        self._extents[extent.offset] = extent.data
        self.size_bytes += extent.length
        self.shown.add(extent.offset, extent.data)
        self._on_their_way[extent] = [extent.offset]

    def remove(self, extent: StoreExtent) -> None:
        for offset in self._on_their_way.pop(extent):
            self.shown.remove(offset)
        del self._extents[extent.offset]
        self.size_bytes -= extent.length

    def is_others(self, start: int, end: int, key: Key | None) -> bool:
        """Whether some of the range is on its way under another key."""
        return any(e.key != key and e.offset < end and start < e.end for e in self._on_their_way)

    def whole_pages(self) -> Iterator[int]:
        """Give the numbers of pages of which every byte is shown from one extent."""
        for start, data in self.shown.extents():
            yield from range(-(-start // PAGE_BYTES), (start + len(data)) // PAGE_BYTES)

    def presume_nothing(self) -> None:
        """Show only what was written for certain."""
        for extent, offsets in self._on_their_way.items():
            if extent.bases:
                for offset in offsets:
                    self.shown.remove(offset)
                offsets.clear()
                for offset, piece in certain_parts(extent.offset, extent.data, extent.bases):
                    self.shown.add(offset, piece)
                    offsets.append(offset)

    def check_invariants(self) -> None:
        super().check_invariants()
        self.shown.check_invariants()
        assert sorted(extent.offset for extent in self._on_their_way) == list(self._extents)


class DirtyBytes(_Layer):
    """Bytes that were written and are not on their way to the server."""

    __slots__ = ("_cell_bytes", "_whole")

    def __init__(self) -> None:
        super().__init__()
        self._cell_bytes: dict[int, int] = {}  # cell -> dirty bytes in it, never 0
        self._whole: set[int] = set()

    def write(self, offset: int, data: Buffer) -> None:
        """Lay `data` over what is here. A `bytes` object may be kept; anything else is copied."""
        end = offset + len(data)
        if end == offset:
            return
        if offset // STORE_BYTES == (end - 1) // STORE_BYTES:
            self._write_in_cell(offset, data)
            return
        with memoryview(data) as view:
            start = offset
            while start < end:
                stop = min(end, (start // STORE_BYTES + 1) * STORE_BYTES)
                with view[start - offset : stop - offset] as part:
                    self._write_in_cell(start, part)
                start = stop

    def write_under(self, offset: int, data: Buffer) -> None:
        """Put back bytes that are older than what is here: only the gaps take them."""
        start, end = offset, offset + len(data)
        with memoryview(data) as view:
            while start < end:
                after = self.covered_to(start)
                if after == start:
                    following = self.next_at(start)
                    after = end if following is None else min(following, end)
                    self.write(start, bytes(view[start - offset : after - offset]))
                start = after

    def remove(self, start: int, end: int) -> list[tuple[int, int]]:
        """Drop the bytes in the range; return what was dropped as (start, end), ascending, touching ranges joined."""
        removed: list[tuple[int, int]] = []
        for offset, data in list(self.within(start, end)):
            extent_end = offset + len(data)
            a, b = max(offset, start), min(extent_end, end)
            if a == offset and b == extent_end:
                del self._extents[offset]
            else:
                self._trim(offset, a, b)
            self._count(a, a - b)
            if removed and removed[-1][1] == a:
                removed[-1] = (removed[-1][0], b)
            else:
                removed.append((a, b))
        return removed

    def take(self, start: int, end: int) -> bytes | bytearray:
        """Remove a range that is dirty from end to end, and return its bytes."""
        parts: list[bytes | bytearray] = []
        for offset, data in self.within(start, end):
            inside = offset >= start and offset + len(data) <= end
            parts.append(data if inside else data[max(start - offset, 0) : end - offset])
        removed = self.remove(start, end)
        assert removed == [(start, end)], "taken bytes must all be dirty"
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def run_end(self, start: int, limit: int) -> int:
        """Return where the dirty run that holds `start` ends, at most `limit`."""
        end = start
        while end < limit:
            after = self.covered_to(end)
            if after == end:
                return end
            end = after
        return limit

    def whole_cells(self) -> list[int]:
        """Return the offsets of all cells that are dirty from end to end, ascending."""
        return [cell * STORE_BYTES for cell in sorted(self._whole)]

    def _write_in_cell(self, start: int, data: Buffer) -> None:
        """Write what lies within one cell."""
        end = start + len(data)
        i = self._extents.bisect_right(start) - 1
        appends = i + 1 == len(self._extents)  # nothing begins after `start`
        grows = False
        if i >= 0:
            offset, held = self._extents.peekitem(i)
            held_end = offset + len(held)
            if offset < start < held_end or (offset == start and end < held_end):
                self._write_over(offset, start, data)
                return
            appends = appends and held_end <= start
            grows = held_end == start and self._may_grow(held, start, data)
        if not appends:
            self.remove(start, end)
        if grows:
            held += data
        elif len(data) >= _KEEP_BYTES:
            self._extents[start] = data if type(data) is bytes else bytes(data)
        else:
            self._extents[start] = bytearray(data)
        self._count(start, len(data))

    @staticmethod
    def _may_grow(held: bytes | bytearray, held_end: int, data: Buffer) -> bool:
        return type(held) is bytearray and len(data) < _KEEP_BYTES and held_end % STORE_BYTES != 0

    def _write_over(self, offset: int, start: int, data: Buffer) -> None:
        """Write data that begins inside the extent at `offset`, and may go on past its end."""
        held = self._mutable(offset)
        held_end = offset + len(held)
        end = start + len(data)
        if end > held_end:
            self.remove(held_end, end)
            self._count(held_end, end - held_end)
        held[start - offset : end - offset] = data

    def _mutable(self, offset: int) -> bytearray:
        data = self._extents[offset]
        if type(data) is not bytearray:
            data = self._extents[offset] = bytearray(data)
        return data

    def _trim(self, offset: int, start: int, end: int) -> None:
        """Cut the range, which is not all of the extent at `offset`, out of it."""
        data = self._mutable(offset)
        extent_end = offset + len(data)
        if start == offset:
            del self._extents[offset]
            del data[: end - offset]
            self._extents[end] = data
            return
        if end < extent_end:
            self._extents[end] = data[end - offset :]
        del data[start - offset :]

    def _count(self, offset: int, change_bytes: int) -> None:
        """Account for bytes that came or went in the cell of `offset`."""
        self.size_bytes += change_bytes
        cell = offset // STORE_BYTES
        now_bytes = self._cell_bytes.get(cell, 0) + change_bytes
        if now_bytes:
            self._cell_bytes[cell] = now_bytes
        else:
            del self._cell_bytes[cell]
        if now_bytes == STORE_BYTES:
            self._whole.add(cell)
        else:
            self._whole.discard(cell)

    def check_invariants(self) -> None:
        """Assert I1, I2 and I3."""
        super().check_invariants()
        counts: dict[int, int] = {}
        for offset, data in self._extents.items():
            cell = offset // STORE_BYTES
            assert cell == (offset + len(data) - 1) // STORE_BYTES, "I2"
            counts[cell] = counts.get(cell, 0) + len(data)
        assert counts == self._cell_bytes, "I3"
        assert {cell for cell, count in counts.items() if count == STORE_BYTES} == self._whole, "I3"
