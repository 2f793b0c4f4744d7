"""What the client holds of one file's bytes, in three layers.

    dirty     written by applications, not on its way to the server
    storing   dirty bytes that a StoreData carries at this moment
    clean     what the server told us or took from us, all labelled with one version (`clean`)

Reading looks through them from the top. A store takes an extent from dirty into storing; its success moves it into
clean, its failure puts it back under what was written meanwhile. So a write during a store stays dirty, and dropping
clean blocks never loses a write.

A fetch takes time, so its reply says which version it belongs to and is taken in only if that is still the label.
Who fetches samples `fill_epoch` first, calls `set_version` with the status of the reply, then `fill`. The epoch voids
fills that were in flight when clean blocks were dropped or cut, or a store ended that they may have missed, whatever
they are labelled.

The kernel writes dirty mapped pages back whole, bytes included that nobody here wrote and another client may have
changed since. What of such a page counts as written: `whole_pages`.

Invariants:
I1  Extents in storing do not overlap.
I2  The cache's `dirty_bytes` contains this file's `dirty_bytes` exactly.
I3  Presumed pages are below `server_size`, and there are none while `version` is None.

Every method is synchronous and so atomic to other tasks. Offsets and sizes are bytes. Callers see to it that a
truncation is not sent while bytes past the new size are being stored: the server's order of the two would be unknown.
"""

from __future__ import annotations

import itertools

from promisefs_client.identity.key import Key

from .clean import CleanBytes
from .dirty import STORE_BYTES, Buffer, StoreExtent, StoringBytes
from .pagecache import BLOCK_BYTES, PageCache
from .whole_pages import PAGE_BYTES, Twins, Version, differing
from .written import WrittenBytes

__all__ = ["BLOCK_BYTES", "PAGE_BYTES", "STORE_BYTES", "FileContents", "PageCache", "StoreExtent"]


class FileContents:
    """Layers of one file."""

    def __init__(self, cache: PageCache) -> None:
        self._cache = cache
        self._clean = CleanBytes(cache)
        self._storing = StoringBytes()
        self._dirty = WrittenBytes()
        self._twins = Twins()
        self._drops = 0
        self.fill_epoch = 0
        """To be sampled before a fetch."""

    # What the server says

    @property
    def version(self) -> Version | None:
        """Label of the clean bytes. None: there are none, and nothing is known about the server's bytes."""
        return self._clean.version

    @property
    def server_size(self) -> int:
        """Size at the server for `version`; meaningless while that is None."""
        return self._clean.size

    def set_version(self, version: Version, server_size: int, *, keep_twins: bool = False) -> bool:
        """Adopt a version and size that the server told.

        If it is the label already, only the size is taken and the result is False. Else clean blocks of another
        version go, fills in flight are void, and the result is True. When there was no label, nothing needs to be
        voided (dropping it did that), so the reply that brings a first label may bring the first blocks as well.
        `keep_twins` as in `drop_clean`.
        """
        if version == self.version:
            self._clean.resize(server_size)
            return False
        if self.version is not None:
            self.drop_clean(keep_twins=keep_twins)
        self._clean.version = version
        self._clean.size = server_size
        return True

    def advance_version(self, version: Version, server_size: int) -> None:
        """Adopt the version that this client's own change made of the label: clean blocks stay valid."""
        self._clean.version = version
        self._clean.resize(server_size)

    def drop_clean(self, *, keep_twins: bool = False) -> None:
        """Forget all the server said, and void fills in flight.

        `keep_twins`: the kernel may still write back pages that were made of these blocks, and is told to drop them.
        """
        if keep_twins:
            self.keep_twins()
        self._presume_nothing()
        self._drops += 1
        self.fill_epoch += 1
        self._clean.drop()

    def keep_twins(self) -> int:
        """The kernel is about to write back pages that may have been made of the clean blocks, and then to drop them.

        Return a number for `forget_twins`.
        """
        number = self._twins.begin_drop()
        for index, data in self._clean.blocks():
            if index not in self._twins:
                start = index * BLOCK_BYTES
                length = min(BLOCK_BYTES, self.server_size - start)  # beyond the block's own end there are zeros
                whole = len(data) == length and not self.is_dirty
                self._twins.keep(index, data if whole else self._readable(start, length))
        for page in itertools.chain(self._clean.pages(), self._storing.whole_pages()):
            if not self._twins.has_page(page):
                self._twins.keep_page(page, self._readable(page * PAGE_BYTES, PAGE_BYTES))
        return number

    def _readable(self, offset: int, length: int) -> bytes:
        data = self.read(offset, length, offset + length)
        assert data is not None, "what is clean or on its way can be read"
        return bytes(data)

    def forget_twins(self, number: int) -> None:
        """The kernel has no pages left from before that call of `keep_twins`."""
        self._twins.end_drop(number)

    def given(self, offset: int, data: Buffer) -> None:
        """The kernel takes these bytes for the file's from now on."""
        if self._twins and len(data):
            self._twins.given(offset, data)

    def fill(self, index: int, data: Buffer, epoch: int, version: Version) -> bool:
        """Add fetched bytes, which begin at block `index`, as clean blocks; return whether they were usable.

        The last block is short only if the file ends there. Blocks that exist stay: a store may have changed them
        since. What was just added is not evicted here, so a read with no await in between finds it whatever the limit.
        """
        if epoch != self.fill_epoch or version != self.version:
            return False
        self._clean.fill(index, data)
        return True

    def truncate(self, size: int, version: Version) -> None:
        """Follow a truncation (or extension) to `size`, which this client made and the server has accepted.

        `version`, which it made, is for `advance_version` or `set_version` in the same step. A label that is newer has
        a size of its own. Dirty bytes past `size` go; bytes in storing stay.
        """
        self.fill_epoch += 1
        self.discard_dirty(size, None)
        if self.version is None or version >= self.version:
            self._clean.resize(size)

    def overwritten(self, start: int, end: int, *, keep_twins: bool = False) -> None:
        """This client had the server change these bytes. What is dirty of them was written while it did, and goes.

        The version that it made is for `advance_version` or `set_version` in the same step. Nothing of the range is
        in storing. `keep_twins` as in `drop_clean`.
        """
        if keep_twins:
            self.keep_twins()
        self.fill_epoch += 1
        self.discard_dirty(start, end)
        self._clean.forget(start, end)

    def forget(self) -> None:
        """Give all memory back, because the vnode goes. Nothing may be dirty: store or discard it first."""
        assert not self.is_dirty, "forgetting these contents would lose writes"
        self.drop_clean()

    # Reading

    def read(self, offset: int, length: int, size: int) -> bytes | memoryview | None:
        """Return the bytes of the range up to `size`, the file's size; None if a clean block is missing for it.

        Exactly min(length, size - offset) bytes, none past the end. They do not change afterwards.
        """
        end = min(offset + length, size)
        if end <= offset:
            return b""
        if self.is_dirty and (self._dirty.overlaps(offset, end) or self._storing.shown.overlaps(offset, end)):
            return self._read_layers(offset, end)
        first = offset // BLOCK_BYTES
        block_start = first * BLOCK_BYTES
        if end <= block_start + BLOCK_BYTES:
            return self._clean.read(first, offset - block_start, end - block_start)
        parts: list[bytes] = []
        for index in range(first, (end - 1) // BLOCK_BYTES + 1):
            block_start = index * BLOCK_BYTES
            part = self._clean.read(index, max(offset - block_start, 0), min(end - block_start, BLOCK_BYTES))
            if part is None:
                return None
            parts.append(part)
        return b"".join(parts)

    def missing(self, offset: int, length: int) -> list[int]:
        """Return the indexes of the blocks to fetch before all of the range can be read, ascending.

        While there is no version the server's size is not known either: callers cut the range at the file's size.
        """
        wanted: list[int] = []
        if length <= 0:
            return wanted
        for index in range(offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES + 1):
            start = index * BLOCK_BYTES
            end = self._clean.cut_to_known(start + BLOCK_BYTES)
            if end <= start:
                break
            if index not in self._clean and not self._covered(start, end):
                wanted.append(index)
        return wanted

    def _read_layers(self, offset: int, end: int) -> memoryview | None:
        """Read a range in which something is dirty or storing."""
        target = memoryview(bytearray(end - offset))
        for index in range(offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1):
            block_start = index * BLOCK_BYTES
            a, b = max(offset, block_start), min(end, block_start + BLOCK_BYTES)
            data = self._clean.read(index, a - block_start, b - block_start)
            if data is not None:
                target[a - offset : b - offset] = data
            elif not self._covered(a, self._clean.cut_to_known(b)):
                return None
        self._storing.shown.copy_into(target, offset)
        self._dirty.copy_into(target, offset)
        return target.toreadonly()

    def _covered(self, start: int, end: int) -> bool:
        """Tell whether every byte of the range is dirty or storing."""
        if not self.is_dirty:
            return start >= end
        while start < end:
            after = max(self._dirty.covered_to(start), self._storing.shown.covered_to(start))
            if after == start:
                return False
            start = after
        return True

    # Writing

    @property
    def dirty_bytes(self) -> int:
        """Bytes in dirty and storing."""
        return self._dirty.size_bytes + self._storing.size_bytes

    @property
    def waiting_bytes(self) -> int:
        """Dirty bytes that no store carries yet."""
        return self._dirty.size_bytes

    @property
    def is_storing(self) -> bool:
        """Whether a store carries some of the bytes at this moment."""
        return self._storing.size_bytes > 0

    @property
    def is_dirty(self) -> bool:
        """Whether the server lacks something, or has not yet said that it has it."""
        return self._dirty.size_bytes > 0 or self._storing.size_bytes > 0

    @property
    def dirty_end(self) -> int:
        """End of the last dirty or storing byte, 0 if there is none."""
        return max(self._dirty.end, self._storing.end)

    def is_dirty_at(self, offset: int) -> bool:
        """Whether this byte is dirty or storing."""
        return self._covered(offset, offset + 1)

    def is_others(self, offset: int, length: int, key: Key | None) -> bool:
        """Whether a page of the range holds another key's bytes that the server has not said that it has."""
        if not self.is_dirty or not length:
            return False
        end = offset + length
        return self._dirty.is_others(offset, end, key) or self._storing.is_others(offset, end, key)

    def write(
        self,
        offset: int,
        data: Buffer,
        key: Key | None = None,
        *,
        mapped: bool = False,
        promised: bool = False,
        written_back: bool = False,
        reach: int = 0,
    ) -> None:
        """Lay `data`, written under `key`, over everything. Bytes objects may be kept; other buffers are copied.

        `mapped`: these may be whole pages of which a process wrote only some bytes through a mapping. `promised`: the
        server would tell before it accepted another client's change, so what equals the clean bytes equals its own.
        `written_back`: they surely are such pages, so zeros behind the server's end were not written. Nor do any count
        that may be such, as far as the file reaches here already: the server has, or gets, zeros there.
        `reach`: the server's size, as far as is known; behind an end from before that the kernel's pages have zeros.
        """
        before = self._dirty.size_bytes
        self._dirty.belongs_to(key, offset, offset + len(data))
        if mapped and offset % PAGE_BYTES == 0 and len(data):
            self._write_pages(offset, bytes(data), promised, written_back, reach)
        else:
            self._dirty.write_certain(offset, data)
        self.given(offset, data)
        self._cache.dirty_bytes += self._dirty.size_bytes - before
        self._cache.evict()

    def _write_pages(self, offset: int, data: bytes, promised: bool, written_back: bool, reach: int) -> None:
        """Take what may be pages written back from a mapping: all at once if nothing is special about them."""
        end = offset + len(data)
        hollow = written_back or end <= self.dirty_end
        known = (
            self._clean.knows_some(offset, end)
            or self._storing.shown.overlaps(offset, end)
            or self._dirty.presumed.overlapping(offset, end)
            or (hollow and self.version is not None and end > self.server_size)
        )
        if not self._twins and not (promised and known):
            self._dirty.write_certain(offset, data)
        elif self._twins or not self._presume(offset, data, promised):
            for at in range(offset, end, PAGE_BYTES):
                self._write_page(at, data[at - offset : at - offset + PAGE_BYTES], promised, hollow, reach)

    def _presume(self, offset: int, data: bytes, promised: bool) -> bool:
        """Make whole pages dirty, if none of their bytes is, and it is known what the server has; else return False."""
        end = offset + len(data)
        if not promised or self.version is None or end > self.server_size or self._dirty.overlaps(offset, end):
            return False
        known = self.read(offset, len(data), end)
        if known is None:
            return False
        self._dirty.write_presumed(offset, data, bytes(known), self.version)
        return True

    def _write_page(self, at: int, page: bytes, promised: bool, hollow: bool, reach: int) -> None:
        """`hollow`: zeros behind the server's end were not written."""
        end = at + len(page)
        twin = self._twins.of(at, len(page))
        known: bytes | memoryview | None = None if twin is None else twin.ljust(min(end, reach) - at, b"\0")
        if known is None and promised and self.version is not None:
            base = self._dirty.presumed.get(at // PAGE_BYTES)
            if base is not None and len(base) == len(page):
                self._dirty.write(at, page)
                return
            if self._presume(at, page, promised):
                return
            if self._dirty.run_end(at, end) < end:
                known = self.read(at, len(page), min(end, self.server_size))
        if known is None:
            self._dirty.write_certain(at, page)
            return
        if hollow:
            known = self._with_zeros_behind(at, bytes(known), len(page))
        for a, b in differing(page[: len(known)], bytes(known)):
            self._dirty.write_certain(at + a, page[a:b])
        self._dirty.write_certain(at + len(known), page[len(known) :])

    def _with_zeros_behind(self, at: int, known: bytes, length: int) -> bytes:
        """Continue a page that is known up to the server's end: behind it is what was written here, and zeros."""
        page = bytearray(length)
        self._storing.shown.copy_into(memoryview(page), at)
        self._dirty.copy_into(memoryview(page), at)
        page[: len(known)] = known
        return bytes(page)

    def _presume_nothing(self) -> None:
        before = self._dirty.size_bytes
        self._dirty.presume_nothing()
        self._storing.presume_nothing()
        self._cache.dirty_bytes += self._dirty.size_bytes - before

    def begin_store(self, max_bytes: int, *, whole_only: bool = False) -> StoreExtent | None:
        """Move one extent from dirty to storing and return it; None if there is none that may begin now.

        It is the first in the file, ends at the next multiple of `max_bytes` at the latest, and leaves out bytes of
        which an older version is being stored: two stores of one byte have no defined order. With `whole_only`
        (write-behind of streams) it is a whole aligned piece of `max_bytes`, which has to be STORE_BYTES.
        Each extent is to be given to `stored` or `store_failed`, once.
        """
        assert not whole_only or max_bytes == STORE_BYTES, "whole pieces are counted in STORE_BYTES"
        before = self._dirty.size_bytes
        extent = self._dirty.take_extent(self._storing, max_bytes, whole_only=whole_only, drops=self._drops)
        if extent is not None:
            self._storing.add(extent)
            before -= extent.length
        self._cache.dirty_bytes += self._dirty.size_bytes - before
        return extent

    def take_dirty(self, max_bytes: int) -> StoreExtent | None:
        """Remove the first extent that is not on its way: it is to be thrown away."""
        before = self._dirty.size_bytes
        extent = self._dirty.take_extent(StoringBytes(), max_bytes, whole_only=False, drops=self._drops)
        self._cache.dirty_bytes += self._dirty.size_bytes - before
        return extent

    def stored(self, extent: StoreExtent, version: Version, label: Version | None) -> bool:
        """The server has the extent: the store made this version. `label` is what it was before the reply was applied.

        If that was older than the version, the bytes become clean. If not, a break came meanwhile, and clean bytes
        contain these, or what another client wrote over them. Then the result is True: pages that the kernel was given
        before this have these on top, and are to be dropped (twins are kept); bases may, too. Where no clean block has
        the bytes now, fills in flight might bring one without them, and are void.
        """
        overtaken = label is not None and version < label
        if overtaken:
            self.keep_twins()
            self._presume_nothing()
        self._storing.remove(extent)
        self._cache.dirty_bytes -= extent.length
        current = self.version is not None and not overtaken and (label is not None or version == self.version)
        if not (current and self._clean.take_in(extent.offset, extent.data)):
            self.fill_epoch += 1
        self._cache.evict()
        return overtaken

    def appended(self, offset: int, data: Buffer, version: Version) -> None:
        """The server has put these bytes at its end of the file, and nobody else changed it since `version`."""
        if self.version is None or version != self.version or not self._clean.take_in(offset, data):
            self.fill_epoch += 1
        self._cache.evict()

    def store_failed(self, extent: StoreExtent, *, changed: bool = False) -> None:
        """The server refused the extent or did not answer: it is dirty again, under what was written meanwhile.

        If it did not answer, its bytes and version are not known any more: the caller calls `drop_clean` as well.
        `changed`: it refused since another client has changed the file, so nothing is to be presumed.
        """
        self._storing.remove(extent)
        if changed:
            self._presume_nothing()
        before = self._dirty.size_bytes
        still_presumed = not changed and self.version is not None and extent.drops == self._drops
        self._dirty.put_back(extent, still_presumed=still_presumed)
        self._cache.dirty_bytes += self._dirty.size_bytes - before - extent.length
        self._cache.evict()

    def refused(self, extent: StoreExtent) -> None:
        """The server does not take the extent, and never will: readers see what it has, or what was written meanwhile.

        The kernel's pages have it, so they are to be dropped (twins are kept). Clean bytes contain none of it. Fills in
        flight are void: nobody knows any more which of them a reader should take.
        """
        self.keep_twins()
        self._storing.remove(extent)
        self._cache.dirty_bytes -= extent.length
        self.fill_epoch += 1

    def discard_dirty(self, start: int, end: int | None) -> list[tuple[int, int]]:
        """Drop dirty (not storing) bytes from `start` to `end`, None being infinity; return the ranges dropped."""
        before = self._dirty.size_bytes
        removed = self._dirty.discard(start, max(self._dirty.end, start) if end is None else end)
        self._cache.dirty_bytes += self._dirty.size_bytes - before
        return removed

    def check_invariants(self) -> None:
        """Assert I3 and those of the layers; of I2, that the cache does not count less than this file has."""
        self._clean.check_invariants()
        self._storing.check_invariants()
        self._dirty.check_invariants()
        assert self._cache.dirty_bytes >= self.dirty_bytes, "I2"
        for page in self._dirty.presumed.pages():
            base = self._dirty.presumed.get(page)
            assert base is not None and self.version is not None, "I3"
            assert page * PAGE_BYTES + len(base) <= self.server_size, "I3"
