"""Extended attributes: `user.*` are the server's.

Everything else is answered here: the kernel asks for security.capability before every write.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from promisefs_protocol.ids import MAX_XATTR_VALUE_BYTES
from promisefs_protocol.messages import GetXattr, ListXattrs, RemoveXattr, SetXattr, XattrFlags

from promisefs_client.errors import FsError
from promisefs_client.network.cell import Cell
from promisefs_client.vnodes.vnode import Vnode

_USER = b"user."


class Xattrs:
    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    async def get(self, vnode: Vnode, name: bytes) -> bytes:
        if not name.startswith(_USER) or await self._has_none(vnode):
            raise FsError(errno.ENODATA)
        _, value = await self._cell.call(GetXattr(vnode.fid, name))
        return value or b""

    async def set(self, vnode: Vnode, name: bytes, value: bytes) -> None:
        self._check_name(name)
        if len(value) > MAX_XATTR_VALUE_BYTES:
            raise FsError(errno.E2BIG)
        async with self._cell.ask(SetXattr(vnode.fid, name, XattrFlags.NONE), value) as answer:
            self._cell.table.install(answer.reply.entry, answer.mark)

    async def list(self, vnode: Vnode) -> Sequence[bytes]:
        if await self._has_none(vnode):
            return []
        reply, _ = await self._cell.call(ListXattrs(vnode.fid))
        names: tuple[bytes, ...] = reply.names
        return names

    async def remove(self, vnode: Vnode, name: bytes) -> None:
        self._check_name(name)
        async with self._cell.ask(RemoveXattr(vnode.fid, name)) as answer:
            self._cell.table.install(answer.reply.entry, answer.mark)

    async def _has_none(self, vnode: Vnode) -> bool:
        await self._cell.validate(vnode)
        return vnode.status.xattr_count == 0

    @staticmethod
    def _check_name(name: bytes) -> None:
        if not name.startswith(_USER):
            raise FsError(errno.EOPNOTSUPP)
