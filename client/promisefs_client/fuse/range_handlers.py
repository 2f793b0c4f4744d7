"""The handlers that the FUSE extension adds for ranges of files: holes, reserved room, copies."""

from __future__ import annotations

import errno
import os

from promisefs_client.errors import FsError
from promisefs_client.vnodes.vnode import Vnode

from .handlers import Operations, handler


class RangeHandlers(Operations):
    @handler
    async def fallocate(self, inode: int, fh: int, mode: int, offset: int, length: int) -> None:
        vnode = await self._about_to_change(fh)
        await self._ranges.fallocate(vnode, mode, offset, length)

    @handler
    async def lseek(self, inode: int, fh: int, offset: int, whence: int) -> int:
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise FsError(errno.EINVAL)
        vnode = self._file(fh).vnode
        await self._locks.check(fh)
        return await self._ranges.seek(vnode, offset, hole=whence == os.SEEK_HOLE)

    @handler
    async def copy_file_range(
        self,
        inode_in: int,
        fh_in: int,
        offset_in: int,
        inode_out: int,
        fh_out: int,
        offset_out: int,
        length: int,
        flags: int,
    ) -> int:
        await self._locks.check(fh_in)
        vnode = await self._about_to_change(fh_out)
        return await self._ranges.copy(self._open_files[fh_in].vnode, offset_in, vnode, offset_out, length)

    async def _about_to_change(self, fh: int) -> Vnode:
        file = self._file(fh)
        await self._locks.check(fh)
        if not file.keeps_privileges:
            await self._drop_privileges(file.vnode)
        return file.vnode
