"""What the operations that change a file's bytes share."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Sequence

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import Changed, StatusReply
from promisefs_protocol.transport import Reply

from promisefs_server.identity.caller import Caller
from promisefs_server.store.datafiles import DataFile
from promisefs_server.store.vnodes import SET_ID_BITS, Vnode

from .parts import Operations, Parts, break_of

log = logging.getLogger(__name__)

WRITE_THREADS = 8
"""For each group of operations: long ones do not hold up stores."""


class ByteOperations(Operations):
    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._limiter = trio.CapacityLimiter(WRITE_THREADS)
        self._writers = parts.writers

    def _regular(self, fid: Fid) -> Vnode:
        vnode = self._vnodes.get(fid)
        if vnode.is_dir:
            raise Aborted(AbortCode.ISDIR, f"{fid} is a directory")
        if not vnode.is_file:
            raise Aborted(AbortCode.INVAL, f"{fid} is not a regular file")
        return vnode

    def _readable(self, caller: Caller, fid: Fid) -> Vnode:
        vnode = self._regular(fid)
        self._access.need_read(caller.identity, vnode)
        return vnode

    def _writable(self, caller: Caller, fid: Fid) -> Vnode:
        """The row that a change of the file's bytes begins with.

        What somebody has written into it must not run as somebody else.
        """
        vnode = self._regular(fid)
        self._access.need_write(caller.identity, vnode)
        if vnode.mode & SET_ID_BITS and not caller.identity.administrator:
            vnode = vnode._replace(mode=vnode.mode & ~SET_ID_BITS)
        return vnode

    async def _cut(self, file: DataFile, size: int) -> None:
        """Drop bytes beyond the size that the database has. Raise OSError.

        Not before that size is durable: else power loss could bring back the longer file, with zeros in their place.
        """
        if file.reaches_beyond(size):
            await self._durability.commit()
            await trio.to_thread.run_sync(file.cut, size, limiter=self._limiter)

    async def _change_bytes(
        self, before: Vnode, after: Vnode, change: Callable[[], None]
    ) -> tuple[Vnode, Exception | None]:
        """Commit the new row, have `change` change the bytes in a thread; return the row to publish, and what failed.

        The vnode's lock is held, and the caller shielded. Raise sqlite3.Error if nothing has happened.
        """
        with self._database.transaction():
            self._vnodes.update(after)
        self._vnodes.being_stored[after.key] = before
        failure: Exception | None = None
        try:
            await trio.to_thread.run_sync(change, limiter=self._limiter)
        except Exception as error:
            # Whatever it is: the version is committed, so it has to be published and others be told.
            failure = error
        finally:
            del self._vnodes.being_stored[after.key]
        return self._stored(before, after, failure), failure

    def _stored(self, before: Vnode, after: Vnode, failure: Exception | None) -> Vnode:
        """The bytes are written, or some of them. Return the row to publish."""
        self._store.files.unsynced.add(after.key)
        if failure is not None and after.size > before.size:
            # Part of the bytes may be there: the new version stays, the size it would have had does not.
            return self._with_size(after, before.size)
        return after

    def _publish(self, caller: Caller, vnode: Vnode, what: Changed) -> tuple[Sequence[trio.Event], StatusReply]:
        """Commit a row, queue its break, grant the caller's promise: one step."""
        with self._database.transaction():
            self._vnodes.update(vnode)
        events = self._breaker.begin(caller.host, [break_of(vnode, what)])
        return events, StatusReply(self.promised(caller, vnode))

    def _with_size(self, vnode: Vnode, size: int) -> Vnode:
        """Correct the size after a failed write. If even that fails, the file ends in zeros; breaks go out as ever."""
        corrected = vnode._replace(size=size)
        try:
            with self._database.transaction():
                self._vnodes.update(corrected)
        except sqlite3.Error as error:
            log.error("%s: cannot correct its size: %s", vnode.fid, error)
            return vnode
        return corrected

    async def _settle_failed(self, events: Sequence[trio.Event], failure: Exception) -> Reply:
        await self._breaker.settle(events)
        raise failure
