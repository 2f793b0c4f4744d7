"""Operations on bytes and attributes of one vnode, and on durability.

A store is one step from its commit until its breaks are queued, or if it needs a thread it runs shielded: a call that
is cancelled meanwhile, because its connection ended, has happened, and everyone who has to know is told.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Sequence
from functools import partial

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import MAX_FILE_BYTES, Fid
from promisefs_protocol.messages import (
    METHOD_OF_REQUEST,
    AppendData,
    AppendDataReply,
    Changed,
    Empty,
    RemoveXattr,
    SetXattr,
    StatusReply,
    StoreData,
    StoreStatus,
    Sync,
    XattrFlags,
)
from promisefs_protocol.transport import Reply

from promisefs_server.identity.caller import Caller
from promisefs_server.store.vnodes import SET_ID_BITS, Vnode, key_of

from .file_bytes import ByteOperations
from .parts import Later, Operation, Parts, break_of, now_ns

log = logging.getLogger(__name__)

INLINE_WRITE_BYTES = 16384
INLINE_WRITE_BYTES_PER_S = 16 << 20


class DataOperations(ByteOperations):
    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._inline_since_s = 0.0
        self._inline_bytes = 0

    def table(self) -> dict[type, Operation]:
        return {
            StoreData: self.store_data,
            AppendData: self.append_data,
            StoreStatus: self.store_status,
            Sync: self.sync,
            SetXattr: self.set_xattr,
            RemoveXattr: self.remove_xattr,
        }

    # Bytes

    def store_data(self, caller: Caller, request: StoreData, bulk: bytes | None) -> Reply | Later:
        if bulk is None:
            raise Aborted(AbortCode.BAD_MESSAGE, "StoreData without bytes")
        if request.offset + len(bulk) > MAX_FILE_BYTES:
            raise Aborted(AbortCode.FBIG, f"files end at {MAX_FILE_BYTES} bytes")
        self._store.ballast.admit(len(bulk), trio.current_time())
        if self._locks.any_held((key_of(request.fid),)):
            return partial(self._store_later, caller, request, bulk)
        vnode = self._writable(caller, request.fid)
        if not bulk:
            return StatusReply(self.promised(caller, vnode)), None
        self._check_unchanged(caller, vnode, request)
        if not self._may_write_here(vnode, request.offset, len(bulk)):
            return partial(self._store_later, caller, request, bulk)
        with self.data_file(vnode, create=True) as file:
            assert file is not None
            changed = self._with_bytes(vnode, request, len(bulk))
            with self._database.transaction():
                self._vnodes.update(changed)
            failure: Exception | None = None
            try:
                file.write(bulk, request.offset)
            except Exception as error:
                failure = error  # see `_change_bytes`
            changed = self._stored(vnode, changed, failure)
        return self._answer_store(caller, request, changed, failure)

    async def _store_later(self, caller: Caller, request: StoreData, bulk: bytes) -> Reply:
        """Store with the lock held, for it may take long."""
        async with self._locks.hold(key_of(request.fid)):
            vnode = self._writable(caller, request.fid)
            if not bulk:
                return StatusReply(self.promised(caller, vnode)), None
            self._check_unchanged(caller, vnode, request)
            with trio.CancelScope(shield=True):
                vnode, failure = await self._store_bytes(vnode, request, bulk)
            answer = self._answer_store(caller, request, vnode, failure)
        return answer if isinstance(answer, tuple) else await answer()

    def append_data(self, caller: Caller, request: AppendData, bulk: bytes | None) -> Reply | Later:
        if not bulk:
            raise Aborted(AbortCode.BAD_MESSAGE, "AppendData without bytes")
        self._store.ballast.admit(len(bulk), trio.current_time())
        return partial(self._append, caller, request, bulk)

    async def _append(self, caller: Caller, request: AppendData, data: bytes) -> Reply:
        """Write beyond the end, where nobody sees it; then publish, in the transaction that keeps the reply.

        A crash in between leaves garbage beyond the end, and the repeated call writes over it.
        """
        host, method = caller.host, METHOD_OF_REQUEST[AppendData]
        async with self._locks.hold(key_of(request.fid)):
            if self._breaker.hosts.by_number(host.number) is not host:
                raise Aborted(AbortCode.NOT_INTRODUCED, "this host has said that it is gone")
            reply = self._store.replies.find(host.number, request.operation, method)
            if reply is not None:
                return reply, None
            vnode = self._writable(caller, request.fid)
            end = vnode.size + len(data)
            if end > MAX_FILE_BYTES:
                raise Aborted(AbortCode.FBIG, f"files end at {MAX_FILE_BYTES} bytes")
            with self.data_file(vnode, create=True) as file:
                assert file is not None
                if self._may_write_here(vnode, vnode.size, len(data)):
                    file.write(data, vnode.size)
                else:
                    await trio.to_thread.run_sync(file.write, data, vnode.size, limiter=self._limiter)
                self._store.files.unsynced.add(vnode.key)
            now = now_ns()
            changed = vnode._replace(
                size=end,
                data_version=vnode.data_version + 1,
                mtime_ns=now if request.mtime_ns is None else request.mtime_ns,
                ctime_ns=vnode.later(now),
            )
            with self._database.transaction():
                self._vnodes.update(changed)
                kept = AppendDataReply(self.unpromised(changed), vnode.size)
                self._store.replies.save(host.number, request.operation, method, kept)
            self._writers.changed(vnode.key, host.number, changed.data_version)
            self._breaker.begin(host, [break_of(changed, Changed.STATUS | Changed.DATA)])
            return AppendDataReply(self.promised(caller, changed), vnode.size), None

    def _check_unchanged(self, caller: Caller, vnode: Vnode, request: StoreData) -> None:
        """Abort CHANGED unless nobody but this host is known to have changed the bytes after `since`."""
        since = request.since
        if since is None:
            return
        last = vnode.data_version
        same = since.data_version == last
        same |= self._writers.only(vnode.key, caller.host.number, since.data_version, last)
        if not same or since.incarnation != self._vnodes.status(vnode).incarnation:
            raise Aborted(AbortCode.CHANGED, f"{request.fid} is not as of version {since.data_version}")

    async def _store_bytes(self, vnode: Vnode, request: StoreData, data: bytes) -> tuple[Vnode, Exception | None]:
        """Commit the new version, write the bytes, publish. Return the row, and what went wrong after the commit.

        Raise OSError or sqlite3.Error if nothing has happened.
        """
        with self.data_file(vnode, create=True) as file:
            assert file is not None
            if request.offset > vnode.size:
                # Garbage that a crash may have left between the two must not come to light.
                await self._cut(file, vnode.size)
            changed = self._with_bytes(vnode, request, len(data))
            return await self._change_bytes(vnode, changed, partial(file.write, data, request.offset))

    def _with_bytes(self, vnode: Vnode, request: StoreData, length: int) -> Vnode:
        """The row that the vnode has when so many bytes are written."""
        now = now_ns()
        return vnode._replace(
            size=max(vnode.size, request.offset + length),
            sparse=int(vnode.sparse or request.offset > vnode.size),
            data_version=vnode.data_version + 1,
            mtime_ns=now if request.mtime_ns is None else request.mtime_ns,
            ctime_ns=vnode.later(now),
        )

    def _answer_store(
        self, caller: Caller, request: StoreData, vnode: Vnode, failure: Exception | None
    ) -> Reply | Later:
        self._writers.changed(vnode.key, caller.host.number, vnode.data_version)
        events = self._breaker.begin(caller.host, [break_of(vnode, Changed.STATUS | Changed.DATA)])
        reply = StatusReply(self.promised(caller, vnode))
        if failure is not None:
            return partial(self._settle_failed, events, failure)
        if request.sync:
            return partial(self._settle_and_sync, events, reply, vnode.key)
        return self.settled(events, reply)

    async def _settle_and_sync(self, events: Sequence[trio.Event], reply: StatusReply, key: int) -> Reply:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._breaker.settle, events)
            failure = await self._durability.sync((key,))
        if failure is not None:
            raise failure
        return reply, None

    def _may_write_here(self, vnode: Vnode, offset: int, length: int) -> bool:
        """Whether a write may be made on the trio thread: a thread costs more than it, and it will not wait.

        It is small; it only adds to the file's end, so nothing has to be read from disk for it; and few such were made
        lately, so the kernel has no reason to throttle us for them.
        """
        if length > INLINE_WRITE_BYTES or offset != vnode.size:
            return False
        now_s = trio.current_time()
        if now_s - self._inline_since_s >= 1.0:
            self._inline_since_s, self._inline_bytes = now_s, 0
        self._inline_bytes += length
        return self._inline_bytes <= INLINE_WRITE_BYTES_PER_S

    # Attributes

    def store_status(self, caller: Caller, request: StoreStatus, bulk: bytes | None) -> Reply | Later:
        vnode = self._to_change(caller, request)
        if self._locks.any_held((vnode.key,)) or self._resizes(vnode, request):
            return partial(self._store_status_later, caller, request)
        return self.settled(*self._store_attributes(caller, vnode, request))

    async def _store_status_later(self, caller: Caller, request: StoreStatus) -> Reply:
        async with self._locks.hold(key_of(request.fid)):
            vnode = self._to_change(caller, request)
            if self._resizes(vnode, request):
                with trio.CancelScope(shield=True):
                    events, reply = await self._resize(caller, vnode, request, request.size or 0)
                    self._writers.changed(vnode.key, caller.host.number, vnode.data_version + 1)
            else:
                events, reply = self._store_attributes(caller, vnode, request)
        await self._breaker.settle(events)
        return reply, None

    def _to_change(self, caller: Caller, request: StoreStatus) -> Vnode:
        vnode = self._vnodes.get(request.fid)
        if request.size is not None and not vnode.is_mount_point:
            vnode = self._writable(caller, request.fid)
        else:
            self._access.need_change(caller.identity, vnode)
        if vnode.is_mount_point:
            raise Aborted(AbortCode.PERM, f"{request.fid} is a mount point: it has the attributes of what it shows")
        if not caller.identity.administrator:
            if request.uid not in (None, vnode.uid):
                raise Aborted(AbortCode.PERM, "only administrators give files to others")
            if request.mode is not None and vnode.is_file and request.mode & ~vnode.mode & SET_ID_BITS:
                raise Aborted(AbortCode.PERM, "only administrators have files run as somebody else")
        return vnode

    @staticmethod
    def _resizes(vnode: Vnode, request: StoreStatus) -> bool:
        return request.size is not None and request.size != vnode.size

    def _store_attributes(
        self, caller: Caller, vnode: Vnode, request: StoreStatus
    ) -> tuple[Sequence[trio.Event], StatusReply]:
        if all(field is None for field in request[1:]):
            return (), StatusReply(self.promised(caller, vnode))
        return self._publish(caller, self._with_attributes(vnode, request), Changed.STATUS)

    def _with_attributes(self, vnode: Vnode, request: StoreStatus) -> Vnode:
        now = now_ns()
        mode = vnode.mode if request.mode is None else stat.S_IFMT(vnode.mode) | request.mode
        mtime_ns = vnode.mtime_ns if request.size is None else now
        return vnode._replace(
            mode=mode,
            uid=vnode.uid if request.uid is None else request.uid,
            gid=vnode.gid if request.gid is None else request.gid,
            atime_ns=vnode.atime_ns if request.atime_ns is None else request.atime_ns,
            mtime_ns=mtime_ns if request.mtime_ns is None else request.mtime_ns,
            ctime_ns=vnode.later(now),
        )

    async def _resize(
        self, caller: Caller, vnode: Vnode, request: StoreStatus, size: int
    ) -> tuple[Sequence[trio.Event], StatusReply]:
        changed = self._with_attributes(vnode, request)._replace(
            size=size,
            sparse=int(size > 0 and (vnode.sparse or size > vnode.size)),
            data_version=vnode.data_version + 1,
        )
        what = Changed.STATUS | Changed.DATA
        # One that is cut to nothing need not have its bytes any more.
        with self.data_file(vnode if size else changed, create=False) as file:
            if size > vnode.size:
                if file is not None:
                    # What lies beyond the old size must not come to light.
                    await self._cut(file, vnode.size)
                return self._publish(caller, changed, what)
            events, reply = self._publish(caller, changed, what)
            if file is not None:
                # Only frees space: the size in the database is in force already.
                try:
                    await self._cut(file, size)
                except OSError as error:
                    log.error("%s: cannot cut its data file: %s", vnode.fid, error)
                self._store.files.unsynced.add(vnode.key)
            return events, reply

    # Extended attributes

    def set_xattr(self, caller: Caller, request: SetXattr, bulk: bytes | None) -> Reply | Later:
        def apply(vnode: Vnode) -> Vnode:
            flags = XattrFlags(request.flags)
            return self._store.xattrs.set(vnode, request.name, bulk or b"", flags, now_ns())

        return partial(self._change_xattrs, caller, request.fid, apply)

    def remove_xattr(self, caller: Caller, request: RemoveXattr, bulk: bytes | None) -> Reply | Later:
        def apply(vnode: Vnode) -> Vnode:
            return self._store.xattrs.remove(vnode, request.name, now_ns())

        return partial(self._change_xattrs, caller, request.fid, apply)

    async def _change_xattrs(self, caller: Caller, fid: Fid, apply: Callable[[Vnode], Vnode]) -> Reply:
        async with self._locks.hold(key_of(fid)):
            vnode = self._vnodes.get(fid)
            self._access.need_change(caller.identity, vnode)
            with self._database.transaction():
                vnode = apply(vnode)
            events = self._breaker.begin(caller.host, [break_of(vnode, Changed.STATUS)])
            reply = StatusReply(self.promised(caller, vnode))
        await self._breaker.settle(events)
        return reply, None

    # Durability

    def sync(self, caller: Caller, request: Sync, bulk: bytes | None) -> Reply | Later:
        return partial(self._sync, request)

    async def _sync(self, request: Sync) -> Reply:
        if request.seen:
            await self._breaker.settle(self._breaker.outstanding())
        if request.durable:
            failure = await self._durability.sync([key_of(fid) for fid in request.fids])
            if failure is not None:
                raise failure
        return Empty(), None
