"""Vnodes: one row each, and what readers are told of them.

Invariants
I1  `ctime_ns` grows at every change of a row, whatever the clock does (`changed`).
I2  While bytes are being written, `being_stored` holds the vnode's row from before; readers are told that one
    (`shown`). The committed row has the new data version already, so a crash cannot leave new bytes under an old one.
I3  Rows in `being_stored` are of vnodes whose lock is held; every change of a row of a regular file takes that lock,
    or is one step while it is free.
"""

from __future__ import annotations

import secrets
import stat
from collections.abc import Callable
from typing import NamedTuple

from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import S_IFMNT, Fid, Status

from .database import Database
from .volumes import VNODE_BITS, VNODE_MASK, VolumeTable

COLUMNS = (
    "vnode, uniquifier, mode, uid, gid, nlink, size, sparse, data_version,"
    " atime_ns, mtime_ns, ctime_ns, xattr_count, parent, acl"
)
"""Of table vnodes, in the order of `Vnode`."""

SET_ID_BITS = stat.S_ISUID | stat.S_ISGID

_SELECT = f"SELECT {COLUMNS} FROM vnodes WHERE vnode = ?"
_INSERT = f"INSERT INTO vnodes ({COLUMNS}, target) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_UPDATE = (
    "UPDATE vnodes SET mode = ?, uid = ?, gid = ?, nlink = ?, size = ?, sparse = ?, data_version = ?,"
    " atime_ns = ?, mtime_ns = ?, ctime_ns = ?, xattr_count = ?, parent = ?, acl = ? WHERE vnode = ?"
)


class Vnode(NamedTuple):
    """One row of table vnodes, see schema.sql."""

    key: int
    uniquifier: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    sparse: int
    data_version: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    xattr_count: int
    parent: int
    acl: int

    @property
    def fid(self) -> Fid:
        return Fid(self.key >> VNODE_BITS, self.key & VNODE_MASK, self.uniquifier)

    @property
    def volume(self) -> int:
        return self.key >> VNODE_BITS

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_mount_point(self) -> bool:
        return stat.S_IFMT(self.mode) == S_IFMNT

    def later(self, now_ns: int) -> int:
        """The ctime of a change made now (I1)."""
        return max(now_ns, self.ctime_ns + 1)


def key_of(fid: Fid) -> int:
    return fid.volume << VNODE_BITS | fid.vnode


class VnodeTable:
    def __init__(self, database: Database, volumes: VolumeTable, allocated_bytes: Callable[[int], int]) -> None:
        """`allocated_bytes(key)` says what a data file takes on disk."""
        self._database = database
        self._volumes = volumes
        self._allocated_bytes = allocated_bytes
        self.being_stored: dict[int, Vnode] = {}

    # Reading

    def find(self, key: int) -> Vnode | None:
        """The row as committed, or None."""
        row = self._database.execute(_SELECT, (key,)).fetchone()
        return None if row is None else Vnode._make(row)

    def get(self, fid: Fid) -> Vnode:
        """The row as committed. Abort VNOVOL, VMOVED or VNOVNODE."""
        self._volumes.get(fid.volume)
        vnode = self.find(fid.volume << VNODE_BITS | fid.vnode)
        if vnode is None or vnode.uniquifier != fid.uniquifier:
            raise Aborted(AbortCode.VNOVNODE, f"no vnode {fid}")
        return vnode

    def directory(self, fid: Fid) -> Vnode:
        """`get`, or abort NOTDIR."""
        vnode = self.get(fid)
        if not vnode.is_dir:
            raise Aborted(AbortCode.NOTDIR, f"{fid} is not a directory")
        return vnode

    def shown(self, vnode: Vnode) -> Vnode:
        """What readers are to be told in place of the committed row (I2)."""
        return self.being_stored.get(vnode.key, vnode)

    def status(self, vnode: Vnode) -> Status:
        (key, _, mode, uid, gid, nlink, size, sparse, version, atime_ns, mtime_ns, ctime_ns, xattrs, _, _) = vnode
        allocated = self._allocated_bytes(key) if sparse else size
        incarnation = self._volumes.get(key >> VNODE_BITS).incarnation
        return Status(
            mode, uid, gid, nlink, size, allocated, version, incarnation, atime_ns, mtime_ns, ctime_ns, xattrs
        )

    def target(self, key: int) -> bytes:
        """A symlink's target, or the volume name of a mount point."""
        (target,) = self._database.execute("SELECT target FROM vnodes WHERE vnode = ?", (key,)).fetchone()
        assert isinstance(target, bytes)
        return target

    # Changing; within a transaction

    def insert(
        self, volume: int, mode: int, uid: int, gid: int, nlink: int, size: int, parent: int, acl: int,
        target: bytes | None, now_ns: int,
    ) -> Vnode:  # fmt: skip
        vnode = Vnode(
            self._volumes.new_key(volume), secrets.randbits(32), mode, uid, gid, nlink, size, 0, 1,
            now_ns, now_ns, now_ns, 0, parent, acl,
        )  # fmt: skip
        self._database.execute(_INSERT, (*vnode, target))
        return vnode

    def update(self, vnode: Vnode) -> None:
        self._database.execute(_UPDATE, (*vnode[2:], vnode.key))

    def delete(self, key: int) -> None:
        """Delete the row and its extended attributes."""
        self._database.execute("DELETE FROM vnodes WHERE vnode = ?", (key,))
        self._database.execute("DELETE FROM xattrs WHERE vnode = ?", (key,))

    def check_invariants(self, is_locked: Callable[[int], bool]) -> None:
        """Assert I2 and I3; `is_locked(key)`: whether somebody holds the vnode's lock."""
        for key, shown in self.being_stored.items():
            assert is_locked(key), "I3"
            committed = self.find(key)
            if committed is not None:  # an orphan may go meanwhile
                assert committed.ctime_ns > shown.ctime_ns and committed.data_version > shown.data_version, "I2"
