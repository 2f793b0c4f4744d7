"""Ranges of files that change, or are looked through, at the server without their bytes' coming here.

What is dirty is stored first; so the server works on what processes here see. Then it is as after a store of our own,
but that we do not have the bytes: what is cached of the range goes, fills in flight are void.

The kernel gives back mapped pages of the range before it asks. What processes store into them while it waits is lost or
not, as they happen to fall. But such a page may hold old bytes of the range beside what was stored, and may reach us
when the range has been changed already. They must not come back: so they are compared with twins (`whole_pages`) until
the kernel has dropped every page from before.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from promisefs_protocol.abort import Aborted
from promisefs_protocol.messages import CopyRange, Fallocate, FallocateMode, Seek

from promisefs_client.errors import FsError
from promisefs_client.network.cell import Answer, Cell
from promisefs_client.vnodes.vnode import Version, Vnode
from promisefs_client.vnodes.vnode_table import KernelWork

from .contents import PAGE_BYTES, FileContents
from .filestore import FileStore

KERNEL_PAUSES_S = (0.02, 1.0)
"""The kernel takes some microseconds to go on with an answer, unless the machine is very busy."""


class Ranges:
    def __init__(self, cell: Cell, files: FileStore) -> None:
        self._cell = cell
        self._files = files

    async def fallocate(self, vnode: Vnode, mode: int, offset: int, length: int) -> None:
        """fallocate(2). Raise Aborted, ServerUnavailable, FsError."""
        zeros = bool(mode & (FallocateMode.PUNCH_HOLE | FallocateMode.ZERO_RANGE))
        request = Fallocate(vnode.fid, mode, offset, length)
        async with self._files.stored(vnode) as contents:
            async with self._ask(vnode, request) as answer:
                if zeros:
                    self._overwritten(vnode, contents, offset, offset + length)
                self._changed(vnode, contents, answer)
            made = answer.reply.entry.status.version
        if zeros:
            self._cell.start(self._watch_edges, vnode, made)
        if not mode & FallocateMode.KEEP_SIZE:
            vnode.kernel_size.reaches(offset + length)

    async def _watch_edges(self, vnode: Vnode, made: Version) -> None:
        """The kernel makes the ends of a hole zeros in the pages that it has, when it has our answer and gets to run.

        If another mount has stored something there in the meantime, the zeros are not to stay.
        """
        for pause_s in KERNEL_PAUSES_S:
            await trio.sleep(pause_s)
            if vnode.status.version != made or not self._cell.valid(vnode):
                await self._cell.drop([KernelWork(vnode.ino, True, False, 0)])

    async def seek(self, vnode: Vnode, offset: int, *, hole: bool) -> int:
        """Return where the next data or hole is, `offset` being one of it. Raise FsError(ENXIO) if there is none."""
        if vnode.kernel_pages and vnode.read_write_opens:
            # What was stored into mappings is data, too, and the kernel does not give it back for this.
            await self._cell.drop([KernelWork(vnode.ino, True, False, 0)])
        await self._files.store(vnode, sync=False)
        async with self._cell.ask(Seek(vnode.fid, offset, hole)) as answer:
            self._cell.table.install(answer.reply.entry, answer.mark)
            found: int | None = answer.reply.offset
        self._cell.drop_stale_later()
        if found is None:
            raise FsError(errno.ENXIO)
        return found

    async def copy(self, source: Vnode, source_offset: int, vnode: Vnode, offset: int, length: int) -> int:
        """copy_file_range(2). Return how many bytes were copied: 0 only at the source's end.

        Raise FsError(EXDEV or EOPNOTSUPP) if the kernel is to copy by reading and writing; Aborted, ServerUnavailable.
        """
        if source.volume is not vnode.volume:
            raise FsError(errno.EXDEV)
        await self._files.store(source, sync=False)
        end = offset + min(length, max(0, source.size - source_offset))
        if vnode.read_write_opens and (offset % PAGE_BYTES or (end % PAGE_BYTES and end < vnode.size)):
            # The kernel drops its pages whole, with what a process may be storing into a mapping beside the range.
            raise FsError(errno.EOPNOTSUPP)
        request = CopyRange(vnode.fid, offset, source.fid, source_offset, length)
        async with self._files.stored(vnode) as contents:
            async with self._ask(vnode, request) as answer:
                copied: int = answer.reply.copied
                self._overwritten(vnode, contents, offset, offset + copied)
                self._changed(vnode, contents, answer)
        vnode.kernel_size.reaches(offset + copied)
        return copied

    def _overwritten(self, vnode: Vnode, contents: FileContents, start: int, end: int) -> None:
        """In the step that takes the reply in."""
        may_be_written_back = vnode.kernel_pages and vnode.read_write_opens > 0
        contents.overwritten(start, end, keep_twins=may_be_written_back)
        if may_be_written_back:
            self._cell.drop_pages_later(vnode)  # which ends the use of the twins

    @asynccontextmanager
    async def _ask(self, vnode: Vnode, request: Any) -> AsyncIterator[Answer]:
        """Make a call that changes the vnode's bytes. If it fails they may have changed all the same."""
        try:
            async with self._cell.ask(request) as answer:
                yield answer
        except Aborted:
            self._cell.forget_changed(vnode.server, request)
            raise
        self._cell.drop_stale_later()

    def _changed(self, vnode: Vnode, contents: FileContents, answer: Answer) -> None:
        """Take in the status; `contents` has been brought in line with the change itself."""
        table, entry = self._cell.table, answer.reply.entry
        if entry.status.version == contents.version:
            table.install(entry, answer.mark)
        else:
            table.install_own_data(entry, answer.mark)
        if vnode.is_dirty:  # it counts as a write, and what is stored later must not undo its time
            vnode.pending_mtime_ns = vnode.written_ns = vnode.status.mtime_ns
