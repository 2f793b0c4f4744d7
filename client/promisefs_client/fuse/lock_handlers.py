"""The handlers of locks, which the FUSE extension adds to pyfuse3's: for the whole cell, or none at all.

A mount whose operations have none of them leaves locks to its own kernel.
"""

from __future__ import annotations

import errno

from promisefs_protocol.locks import WHOLE_FILE, Lock, LockOwner

from promisefs_client.errors import FsError
from promisefs_client.locks.file_lock import FileLock, LockKind
from promisefs_client.options import LockScope

from .handlers import Operations, handler
from .range_handlers import RangeHandlers


class CellLocks(RangeHandlers):
    """They hold among all mounts of the cell."""

    @handler
    async def getlk(self, inode: int, fh: int, owner: int, lock: FileLock) -> FileLock | None:
        wanted = Lock(lock.kind, lock.start, lock.end, lock.pid)
        found = await self._locks.get(self._file(fh).vnode, LockOwner(False, owner), wanted)
        return None if found is None else FileLock(LockKind(found.kind), found.start, found.end, found.pid)

    @handler
    async def setlk(self, inode: int, fh: int, owner: int, lock: FileLock, wait: bool) -> None:
        await self._set(fh, LockOwner(False, owner), lock, wait)

    @handler
    async def flock(self, inode: int, fh: int, owner: int, kind: LockKind, wait: bool) -> None:
        await self._set(fh, LockOwner(True, owner), FileLock(kind, *WHOLE_FILE, 0), wait)

    async def _set(self, fh: int, owner: LockOwner, lock: FileLock, wait: bool) -> None:
        vnode = self._file(fh).vnode
        if lock.kind == LockKind.UNLOCK:
            await self._locks.unlock(vnode, owner, lock.start, lock.end)
        else:
            await self._locks.set(vnode, fh, owner, Lock(lock.kind, lock.start, lock.end, lock.pid), wait=wait)


class NoLocks(RangeHandlers):
    """There are none: whoever asks for one is told so."""

    @handler
    async def getlk(self, inode: int, fh: int, owner: int, lock: FileLock) -> FileLock | None:
        raise FsError(errno.ENOLCK)

    @handler
    async def setlk(self, inode: int, fh: int, owner: int, lock: FileLock, wait: bool) -> None:
        raise FsError(errno.ENOLCK)

    @handler
    async def flock(self, inode: int, fh: int, owner: int, kind: LockKind, wait: bool) -> None:
        raise FsError(errno.ENOLCK)


OPERATIONS: dict[LockScope, type[Operations]] = {
    LockScope.CELL: CellLocks,
    LockScope.LOCAL: RangeHandlers,
    LockScope.OFF: NoLocks,
}
