"""The model kernel's page cache: reading, writing, mappings, writeback, invalidation.

After mm/filemap.c, mm/truncate.c and fs/fuse/file.c without the kernel's writeback cache: write(2) goes through at
once, stores into mappings stay in dirty pages until fsync, msync, close, munmap, an invalidation, or whenever the
kernel likes. Pages are written back whole, as far as the size goes. A page that a READ fills is locked, one being
written back is in `writeback`: invalidation waits for both.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence

from promisefs_client.fuse.requests import Request, handling
from promisefs_client.vnodes.vnode_table import KernelWork
from promisefs_protocol.messages import FallocateMode

from .kernel_inodes import PAGE, Inode, KernelCore, OpenFile, Page

MAX_READAHEAD_PAGES = 3
_PUNCH = FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE


class BusError(Exception):
    """SIGBUS: a mapping reached beyond the end of the file, or the page could not be read."""


class PageCacheModel:
    def __init__(self, core: KernelCore) -> None:
        self._core = core
        self._world = core.world
        core.drop_pages = self.invalidate
        core.cut_pages = self.truncate

    # Waiting for pages

    async def _settled(self, inode: Inode, index: int, page: Page) -> bool:
        """Wait until the page is neither locked nor in writeback. Return whether it is still in the cache."""
        while page.locked or page.writeback:
            await inode.pages_changed.wait()
        return inode.pages.get(index) is page

    # Dropping

    async def invalidate(self, inode: Inode) -> None:
        """invalidate_inode_pages2: every page in turn, dirty ones written back first."""
        last = -1
        while (index := min((i for i in inode.pages if i > last), default=None)) is not None:
            page = inode.pages[index]
            last = index
            if not await self._settled(inode, index, page):
                continue
            if page.dirty:
                page.locked = True
                try:
                    await self._write_back(inode, [index])
                finally:
                    page.locked = False
                    inode.wake()
            if inode.pages.get(index) is page:
                del inode.pages[index]
                inode.wake()

    async def truncate(self, inode: Inode, size: int) -> None:
        """truncate_pagecache: pages beyond the size go without being written back."""
        for index in sorted(i for i in inode.pages if (i + 1) * PAGE > size):
            page = inode.pages.get(index)
            if page is None or not await self._settled(inode, index, page):
                continue
            keep = size - index * PAGE
            if keep <= 0:
                del inode.pages[index]
                inode.wake()
            else:
                page.data[keep:] = bytes(PAGE - keep)

    def shrink(self, inode: Inode) -> None:
        """Memory is wanted for something else: clean pages go."""
        for index, page in list(inode.pages.items()):
            if not (page.dirty or page.locked or page.writeback):
                del inode.pages[index]
        inode.wake()

    # Writing back

    async def _write_back(self, inode: Inode, indexes: Sequence[int]) -> None:
        """Send dirty pages, which are next to each other; a failed WRITE loses them, as it does in the kernel."""
        pages = [inode.pages[index] for index in indexes]
        start = indexes[0] * PAGE
        for page in pages:
            page.dirty = False
            page.writeback = True
        try:
            while inode.no_writeback:
                await inode.pages_changed.wait()
            data = b"".join(bytes(page.data) for page in pages)[: max(0, inode.size - start)]
            writers = [f for f in inode.handles if f.flags & os.O_ACCMODE]
            if data:
                assert writers, "a dirty page without a handle to write it back through"
                writer = self._world.random.choice(writers)
                await self._send(writer, start, data, from_page_cache=True)
        except OSError as error:
            inode.writeback_error = error.errno or errno.EIO
        finally:
            for page in pages:
                page.writeback = False
            inode.wake()

    async def _send(self, file: OpenFile, offset: int, data: bytes, *, from_page_cache: bool) -> int:
        """A WRITE, with FUSE_WRITE_CACHE or without."""
        with handling(Request(from_page_cache) if self._core.extension else Request()):
            return int(await self._core.request(self._core.operations.write, file.handle, offset, data))

    async def stop_writeback(self, inode: Inode) -> None:
        """fuse_set_nowrite: no page is in writeback while the size changes."""
        while inode.no_writeback or any(page.writeback for page in inode.pages.values()):
            await inode.pages_changed.wait()
        inode.no_writeback = True

    @staticmethod
    def resume_writeback(inode: Inode) -> None:
        inode.no_writeback = False
        inode.wake()

    async def write_back_dirty(self, inode: Inode) -> None:
        """filemap_write_and_wait: what is dirty now is written back when this returns."""
        for run in _runs(sorted(index for index, page in inode.pages.items() if page.dirty or page.writeback)):
            for index in run:
                page = inode.pages.get(index)
                if page is not None:
                    await self._settled(inode, index, page)
            for dirty in _runs([i for i in run if i in inode.pages and inode.pages[i].dirty]):
                await self._write_back_unlocked(inode, dirty)

    async def _write_back_unlocked(self, inode: Inode, indexes: Sequence[int]) -> None:
        ready = [i for i in indexes if i in inode.pages and inode.pages[i].dirty]
        for run in _runs([i for i in ready if not (inode.pages[i].locked or inode.pages[i].writeback)]):
            await self._write_back(inode, run)

    async def flusher(self, inode: Inode) -> None:
        """The kernel writes something back by itself."""
        dirty = [i for i, page in inode.pages.items() if page.dirty and not page.locked and not page.writeback]
        if dirty:
            await self._write_back(inode, [self._world.random.choice(dirty)])

    # Reading

    async def page(self, file: OpenFile, index: int) -> Page:
        """The page, up to date. Raise OSError."""
        inode = file.inode
        while True:
            page = inode.pages.get(index)
            if page is None:
                await self._read(file, index, MAX_READAHEAD_PAGES)
            elif page.locked:
                await inode.pages_changed.wait()
            elif page.uptodate:
                return page
            else:
                await self._read(file, index, 1)

    async def _read(self, file: OpenFile, index: int, most: int) -> None:
        """One READ, from this page on; further ones only where there are none yet and the file goes so far."""
        inode = file.inode
        most = self._world.random.randint(1, most)
        count = 1
        while count < most and index + count not in inode.pages and (index + count) * PAGE < inode.size:
            count += 1
        pages = []
        for i in range(index, index + count):
            page = inode.pages.setdefault(i, Page())
            page.locked = True
            pages.append(page)
        version = self._core.attr_version
        try:
            await self._core.pace.pause()  # readahead goes by the queue of background requests
            data = bytes(await self._core.request(self._core.operations.read, file.handle, index * PAGE, count * PAGE))
            end = index * PAGE + len(data)
            if len(data) < count * PAGE and version >= inode.attr_version:
                if end < inode.size and not inode.size_unstable:
                    # fuse_short_read: taken for the end of the file.
                    self._core.bump_attr_version(inode)
                    inode.size = end
            data = data.ljust(count * PAGE, b"\0")
            for i, page in enumerate(pages):
                page.data[:] = data[i * PAGE : (i + 1) * PAGE]
                page.uptodate = True
        finally:
            for i, page in enumerate(pages):
                page.locked = False
                if not page.uptodate and inode.pages.get(index + i) is page:
                    del inode.pages[index + i]
            inode.wake()

    async def read(self, file: OpenFile, offset: int, length: int) -> bytes:
        """pread(2)."""
        inode = file.inode
        if inode.attributes_until_s <= self._core.now():
            await self._core.attributes(inode)
        parts: list[bytes] = []
        at, end = offset, offset + length
        while at < end and at < inode.size:
            page = await self.page(file, at // PAGE)
            stop = min(end, inode.size, (at // PAGE + 1) * PAGE)
            if stop <= at:
                break
            parts.append(bytes(page.data[at % PAGE : at % PAGE + stop - at]))
            at = stop
        return b"".join(parts)

    # Writing

    async def write(self, file: OpenFile, offset: int | None, data: bytes) -> int:
        """pwrite(2), or write(2) with O_APPEND if `offset` is None."""
        inode = file.inode
        async with inode.lock.holding():
            at = inode.size if offset is None else offset
            if at + len(data) > inode.size:
                inode.size_unstable = True
            written = 0
            try:
                while written < len(data):
                    written += await self._write_some(file, at + written, data[written:])
            finally:
                inode.size_unstable = False
                inode.invalidate_attributes()
        return written

    async def _write_some(self, file: OpenFile, at: int, data: bytes) -> int:
        """fuse_fill_write_pages and one WRITE: it ends after the first page that is written only in part."""
        inode = file.inode
        done = 0
        held: Page | None = None
        filled: list[Page] = []
        while done < len(data) and held is None:
            index, within = divmod(at + done, PAGE)
            page = inode.pages.get(index)
            if page is None:
                page = inode.pages[index] = Page()
            elif not await self._settled(inode, index, page):
                continue
            piece = data[done : done + PAGE - within]
            page.data[within : within + len(piece)] = piece
            if len(piece) == PAGE:
                page.uptodate = True
            if not page.uptodate:
                page.locked = True
                held = page
            filled.append(page)
            done += len(piece)
        try:
            count = await self._send(file, at, data[:done], from_page_cache=False)
        except OSError:
            for page in filled:
                page.uptodate = False
            raise
        finally:
            if held is not None:
                held.locked = False
            inode.wake()
        self._core.bump_attr_version(inode)
        inode.size = max(inode.size, at + count)
        return count

    # Mappings

    async def load(self, file: OpenFile, offset: int, length: int) -> bytes:
        """Load bytes, within one page, from a mapping. Raise BusError."""
        page = await self._fault(file, offset // PAGE)
        return bytes(page.data[offset % PAGE : offset % PAGE + length])

    async def store(self, file: OpenFile, offset: int, data: bytes) -> None:
        """Store bytes, within one page, into a mapping. Raise BusError."""
        index = offset // PAGE
        while True:
            page = await self._fault(file, index)
            if page.writeback:
                await file.inode.pages_changed.wait()
                continue
            page.data[offset % PAGE : offset % PAGE + len(data)] = data
            page.dirty = True
            return

    async def _fault(self, file: OpenFile, index: int) -> Page:
        inode = file.inode
        if index * PAGE >= inode.size:
            raise BusError
        try:
            page = await self.page(file, index)
        except OSError as error:
            raise BusError from error
        if index * PAGE >= inode.size:
            raise BusError
        return page

    # Syncing and truncating

    async def punch(self, file: OpenFile, offset: int, length: int) -> None:
        """fallocate(2) for a hole (fuse_file_fallocate). Meanwhile pages may become dirty and be written back."""
        inode, end = file.inode, offset + length
        async with inode.lock.holding():
            await self.write_back_dirty(inode)
            try:
                await self._core.request(
                    self._core.operations.fallocate, inode.ino, file.handle, _PUNCH, offset, length
                )
            finally:
                inode.invalidate_attributes()
            for index in sorted(i for i in inode.pages if i * PAGE < end and offset < (i + 1) * PAGE):
                page = inode.pages.get(index)
                if page is None or not await self._settled(inode, index, page):
                    continue
                first, last = max(0, offset - index * PAGE), min(PAGE, end - index * PAGE)
                if last - first == PAGE:
                    del inode.pages[index]
                    inode.wake()
                else:
                    page.data[first:last] = bytes(last - first)

    async def sync(self, file: OpenFile) -> None:
        """fsync(2), msync(MS_SYNC)."""
        inode = file.inode
        async with inode.lock.holding():
            await self.write_back_dirty(inode)
            self._check_error(inode)
            await self._core.request(self._core.operations.fsync, file.handle, False)

    @staticmethod
    def _check_error(inode: Inode) -> None:
        if inode.writeback_error:
            number, inode.writeback_error = inode.writeback_error, 0
            raise OSError(number, errno.errorcode[number])

    async def flush(self, file: OpenFile) -> None:
        """What close(2) does before it lets go."""
        inode = file.inode
        async with inode.lock.holding():
            await self.write_back_dirty(inode)
        self._check_error(inode)
        await self._core.request(self._core.operations.flush, file.handle)

    # Notifications

    async def notify_invalidate(self, items: Sequence[KernelWork]) -> list[KernelWork]:
        """fuse_reverse_inval_inode for each; return those of unknown inodes."""
        unknown: list[KernelWork] = []
        for item in items:
            inode = self._core.inodes.get(item.ino)
            if inode is None:
                unknown.append(item)
                continue
            self._core.bump_attr_version(inode)
            inode.invalidate_attributes()
            if item.pages:
                inode.busy += 1
                try:
                    await self.invalidate(inode)
                finally:
                    inode.busy -= 1
        return unknown

    async def notify_store(self, ino: int, offset: int, data: bytes) -> None:
        """fuse_notify_store of bytes within one page."""
        inode = self._core.inodes.get(ino)
        if inode is None:
            return
        end = offset + len(data)
        if end > inode.size:
            inode.size = end
            self._core.bump_attr_version(inode)
        index, within = divmod(offset, PAGE)
        assert within + len(data) <= PAGE
        inode.busy += 1
        try:
            while (page := inode.pages.get(index)) is not None and page.locked:
                await inode.pages_changed.wait()
        finally:
            inode.busy -= 1
        if page is None:
            page = inode.pages[index] = Page()
        page.data[within : within + len(data)] = data
        if not page.uptodate and within == 0 and inode.size == end:
            page.data[len(data) :] = bytes(PAGE - len(data))
            page.uptodate = True
        inode.wake()


def _runs(indexes: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for index in indexes:
        if runs and runs[-1][-1] + 1 == index:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs
