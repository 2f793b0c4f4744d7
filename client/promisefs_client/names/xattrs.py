"""Extended attributes: `user.*` are the server's, `afs.*` say what AFS knows of a file.

afs.acl      the access control list, as `promisefs_protocol.rights` writes it; written, it is the new list, or, after a
             line with `+`, what is to change in it
afs.access   the letters of what the caller may do
afs.cell     the cell's name; of a server alone its address
afs.fid      volume, vnode and uniquifier, in hexadecimal digits
afs.volume   the volume's name
afs.whoami   whom the file's server takes the caller for: name, id, and on further lines groups

These can be read but are not listed: who copies a file with all its attributes does not mean them. Nothing else exists.
Of what is ABSENT the FUSE extension says so by itself: the kernel asks for security.capability before every write, and
`ls -l` for an ACL of each file.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from promisefs_protocol.ids import MAX_XATTR_VALUE_BYTES
from promisefs_protocol.messages import (
    FetchACL,
    GetXattr,
    ListXattrs,
    RemoveXattr,
    SetXattr,
    StoreACL,
    WhoAmI,
    XattrFlags,
)
from promisefs_protocol.rights import CHANGES_ONLY, acl_text, parse_acl, rights_text

from promisefs_client.errors import FsError
from promisefs_client.network.cell import Cell
from promisefs_client.vnodes.vnode import Vnode

ABSENT = (b"security.", b"system.", b"trusted.")
"""How names begin that no file has."""
_USER = b"user."
_ACL = b"afs.acl"


class Xattrs:
    def __init__(self, cell: Cell, cell_name: str) -> None:
        self._cell = cell
        self._cell_name = cell_name

    async def get(self, vnode: Vnode, name: bytes) -> bytes:
        if name.startswith(b"afs."):
            return (await self._of_afs(vnode, name)).encode()
        if not name.startswith(_USER) or await self._has_none(vnode):
            raise FsError(errno.ENODATA)
        _, value = await self._cell.call(GetXattr(vnode.fid, name))
        return value or b""

    async def set(self, vnode: Vnode, name: bytes, value: bytes) -> None:
        if name == _ACL:
            await self._set_acl(vnode, value)
            return
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

    # afs.*

    async def _of_afs(self, vnode: Vnode, name: bytes) -> str:
        if name == _ACL:
            async with self._cell.ask(FetchACL(vnode.fid)) as answer:
                self._cell.table.install(answer.reply.entry, answer.mark)
                return acl_text(answer.reply.acl)
        if name == b"afs.whoami":
            reply, _ = await self._cell.call(WhoAmI(vnode.volume.number))
            return "\n".join((reply.name, str(reply.user), *reply.groups)) + "\n"
        rights = await self._cell.validate(vnode)
        match name:
            case b"afs.access":
                return rights_text(rights)
            case b"afs.cell":
                return self._cell_name
            case b"afs.fid":
                return "{:x}:{:x}:{:x}".format(*vnode.fid)
            case b"afs.volume":
                return vnode.volume.name
        raise FsError(errno.ENODATA)

    async def _set_acl(self, vnode: Vnode, value: bytes) -> None:
        try:
            text = value.decode()
            acl = parse_acl(text.removeprefix(CHANGES_ONLY))
        except ValueError:
            raise FsError(errno.EINVAL) from None
        request = StoreACL(vnode.fid, acl, clear=not text.startswith(CHANGES_ONLY))
        async with self._cell.ask(request) as answer:
            self._cell.table.install(answer.reply.entry, answer.mark)
