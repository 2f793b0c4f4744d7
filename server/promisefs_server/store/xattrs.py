"""Extended attributes: `user.*` of files and directories."""

from __future__ import annotations

from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import MAX_XATTR_VALUE_BYTES
from promisefs_protocol.messages import MAX_LIST, XattrFlags

from .database import Database
from .vnodes import Vnode, VnodeTable

PREFIX = b"user."
MAX_NAMES_BYTES = 65536
"""All names of one vnode together, each with a NUL: Linux XATTR_LIST_MAX."""


class Xattrs:
    def __init__(self, database: Database, vnodes: VnodeTable) -> None:
        self._database = database
        self._vnodes = vnodes

    def get(self, vnode: Vnode, name: bytes) -> bytes:
        """Abort NODATA if there is none."""
        row = self._database.execute(
            "SELECT value FROM xattrs WHERE vnode = ? AND name = ?", (vnode.key, name)
        ).fetchone()
        if row is None:
            raise Aborted(AbortCode.NODATA, "no such extended attribute")
        value: bytes = row[0]
        return value

    def names(self, vnode: Vnode) -> tuple[bytes, ...]:
        rows = self._database.rows("SELECT name FROM xattrs WHERE vnode = ? ORDER BY name", (vnode.key,))
        return tuple(name for (name,) in rows)

    def set(self, vnode: Vnode, name: bytes, value: bytes, flags: XattrFlags, now_ns: int) -> Vnode:
        """Return the vnode after it. Abort NOTSUP, PERM, XATTR_TOO_BIG, EXIST, NODATA, NOSPC."""
        if not name.startswith(PREFIX) or name == PREFIX or b"\0" in name:
            raise Aborted(AbortCode.NOTSUP, "only user.* extended attributes are stored")
        if not (vnode.is_file or vnode.is_dir):
            raise Aborted(AbortCode.PERM, "only files and directories have user.* extended attributes")
        if len(value) > MAX_XATTR_VALUE_BYTES:
            raise Aborted(AbortCode.XATTR_TOO_BIG, f"a value has at most {MAX_XATTR_VALUE_BYTES} bytes")
        names = self.names(vnode)
        exists = name in names
        if exists and flags & XattrFlags.CREATE:
            raise Aborted(AbortCode.EXIST, "the extended attribute exists")
        if not exists and flags & XattrFlags.REPLACE:
            raise Aborted(AbortCode.NODATA, "no such extended attribute")
        names_bytes = sum(len(n) + 1 for n in (*names, name))
        if not exists and (len(names) >= MAX_LIST or names_bytes > MAX_NAMES_BYTES):
            raise Aborted(AbortCode.NOSPC, "too many extended attributes")
        self._database.execute("INSERT OR REPLACE INTO xattrs VALUES (?, ?, ?)", (vnode.key, name, value))
        return self._counted(vnode, len(names) + (not exists), now_ns)

    def remove(self, vnode: Vnode, name: bytes, now_ns: int) -> Vnode:
        """Return the vnode after it. Abort NODATA."""
        self.get(vnode, name)
        self._database.execute("DELETE FROM xattrs WHERE vnode = ? AND name = ?", (vnode.key, name))
        return self._counted(vnode, vnode.xattr_count - 1, now_ns)

    def _counted(self, vnode: Vnode, count: int, now_ns: int) -> Vnode:
        changed = vnode._replace(xattr_count=count, ctime_ns=vnode.later(now_ns))
        self._vnodes.update(changed)
        return changed
