"""Operations on ranges of a file's bytes that bring no bytes: reserving, holes, copies.

They change bytes as a store does, by its rules: first the new version is committed, then the bytes change, under the
vnode's lock, and whoever looks meanwhile is told the old status. What reserves room does so before anything else, so
that it fails with nothing changed.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import MAX_FILE_BYTES, Fid
from promisefs_protocol.messages import (
    Changed,
    CopyRange,
    CopyRangeReply,
    Fallocate,
    FallocateMode,
    Seek,
    SeekReply,
    StatusReply,
)
from promisefs_protocol.transport import Reply

from promisefs_server.identity.caller import Caller
from promisefs_server.store import ranges
from promisefs_server.store.vnodes import Vnode, key_of

from .file_bytes import ByteOperations
from .parts import Later, Operation, break_of, now_ns

MAX_COPY_BYTES = 64 << 20
"""Most that one CopyRange copies: others wait for the files' locks meanwhile."""
BLOCK_BYTES = 65536
"""No smaller than a block of the disk's file system: the file's last one is freed only as a whole."""
_MODES = (
    FallocateMode.ALLOCATE,
    FallocateMode.KEEP_SIZE,
    FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE,
    FallocateMode.ZERO_RANGE,
    FallocateMode.ZERO_RANGE | FallocateMode.KEEP_SIZE,
)


class RangeOperations(ByteOperations):
    def table(self) -> dict[type, Operation]:
        return {Fallocate: self.fallocate, Seek: self.seek, CopyRange: self.copy_range}

    # Reserving, zeros

    def fallocate(self, caller: Caller, request: Fallocate, bulk: bytes | None) -> Reply | Later:
        if request.mode not in _MODES:
            raise Aborted(AbortCode.NOTSUP, f"fallocate with mode {request.mode:#x}")
        mode = FallocateMode(request.mode)
        _check_end(request.offset + request.length)
        if not mode & FallocateMode.PUNCH_HOLE:
            self._store.ballast.admit(request.length, trio.current_time())
        return partial(self._fallocate, caller, request, mode)

    async def _fallocate(self, caller: Caller, request: Fallocate, mode: FallocateMode) -> Reply:
        async with self._locks.hold(key_of(request.fid)):
            vnode = self._writable(caller, request.fid)
            with trio.CancelScope(shield=True):
                if mode & FallocateMode.PUNCH_HOLE:
                    changed, failure = await self._punch(vnode, request.offset, request.length)
                else:
                    changed, failure = await self._reserve(vnode, request, mode)
            events = self._tell(caller, vnode, changed)
            reply = StatusReply(self.promised(caller, changed))
        return await self._end(events, reply, failure)

    async def _punch(self, vnode: Vnode, offset: int, length: int) -> tuple[Vnode, Exception | None]:
        changed = _changed(vnode)._replace(sparse=1, data_version=vnode.data_version + 1)
        length = min(length, vnode.size + BLOCK_BYTES - offset)
        with self.data_file(vnode, create=False) as file:
            change = _nothing if file is None or length <= 0 else partial(ranges.punch, file, offset, length)
            return await self._change_bytes(vnode, changed, change)

    async def _reserve(self, vnode: Vnode, request: Fallocate, mode: FallocateMode) -> tuple[Vnode, Exception | None]:
        """Have room on disk for the range, which may become zeros, and the file be so long."""
        end = request.offset + request.length
        zeros = bool(mode & FallocateMode.ZERO_RANGE)
        size = vnode.size if mode & FallocateMode.KEEP_SIZE else max(vnode.size, end)
        self._store.volumes.check_quota(vnode.volume, size - vnode.size)
        changed = _changed(vnode)._replace(sparse=1, size=size)  # it may take more room than its size
        with self.data_file(vnode, create=True) as file:
            assert file is not None
            if end > vnode.size:
                # Garbage that a crash may have left there must not come to light.
                await self._cut(file, vnode.size)
            self._store.files.unsynced.add(vnode.key)
            try:
                await trio.to_thread.run_sync(
                    ranges.allocate, file, request.offset, request.length, limiter=self._limiter
                )
            except OSError as error:
                if not zeros or error.errno != errno.EOPNOTSUPP:
                    raise
            if not zeros and size == vnode.size:
                with self._database.transaction():
                    self._vnodes.update(changed)
                return changed, None
            changed = changed._replace(data_version=vnode.data_version + 1)
            change = partial(ranges.zero, file, request.offset, request.length) if zeros else _nothing
            return await self._change_bytes(vnode, changed, change)

    # Looking for holes

    def seek(self, caller: Caller, request: Seek, bulk: bytes | None) -> Reply | Later:
        self._readable(caller, request.fid)
        return partial(self._seek, caller, request)

    async def _seek(self, caller: Caller, request: Seek) -> Reply:
        vnode = self._readable(caller, request.fid)
        entry = self.promised(caller, vnode)
        size = entry.status.size
        found: int | None = None
        if request.offset < size:
            with self.data_file(self._vnodes.shown(vnode), create=False) as file:
                if file is not None:
                    look = partial(ranges.seek, file, request.offset, size, hole=request.hole)
                    found = await trio.to_thread.run_sync(look, limiter=self._limiter)
                elif request.hole:
                    found = request.offset
        return SeekReply(entry, found), None

    # Copying

    def copy_range(self, caller: Caller, request: CopyRange, bulk: bytes | None) -> Reply | Later:
        if request.fid.volume != request.source.volume:
            raise Aborted(AbortCode.XDEV, f"{request.source} is in another volume than {request.fid}")
        return partial(self._copy_range, caller, request)

    async def _copy_range(self, caller: Caller, request: CopyRange) -> Reply:
        async with self._both_held(request.fid, request.source):
            source, vnode = self._readable(caller, request.source), self._writable(caller, request.fid)
            length = max(0, min(request.length, source.size - request.source_offset))
            if source.key == vnode.key and abs(request.offset - request.source_offset) < length:
                raise Aborted(AbortCode.INVAL, "the ranges overlap")
            length = min(length, MAX_COPY_BYTES)
            if not length:
                return CopyRangeReply(self.promised(caller, vnode), 0), None
            _check_end(request.offset + length)
            self._store.ballast.admit(length, trio.current_time())
            with trio.CancelScope(shield=True):
                changed, failure = await self._copy(source, vnode, request, length)
            events = self._tell(caller, vnode, changed)
            reply = CopyRangeReply(self.promised(caller, changed), length)
        return await self._end(events, reply, failure)

    async def _copy(
        self, source: Vnode, vnode: Vnode, request: CopyRange, length: int
    ) -> tuple[Vnode, Exception | None]:
        changed = _changed(vnode)._replace(
            size=max(vnode.size, request.offset + length),
            sparse=int(vnode.sparse or source.sparse or request.offset > vnode.size),
            data_version=vnode.data_version + 1,
        )
        with self.data_file(source, create=False) as original, self.data_file(vnode, create=True) as file:
            assert file is not None
            if request.offset > vnode.size:
                await self._cut(file, vnode.size)
            change = partial(ranges.copy, original, request.source_offset, file, request.offset, length)
            return await self._change_bytes(vnode, changed, change)

    @contextlib.asynccontextmanager
    async def _both_held(self, one: Fid, other: Fid) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for key in sorted({key_of(one), key_of(other)}):
                await stack.enter_async_context(self._locks.hold(key))
            yield

    # All of them

    def _tell(self, caller: Caller, before: Vnode, after: Vnode) -> Sequence[trio.Event]:
        what = Changed.STATUS
        if after.data_version != before.data_version:
            what |= Changed.DATA
            self._writers.changed(after.key, caller.host.number, after.data_version)
        return self._breaker.begin(caller.host, [break_of(after, what)])

    async def _end(self, events: Sequence[trio.Event], reply: Any, failure: Exception | None) -> Reply:
        if failure is not None:
            return await self._settle_failed(events, failure)
        await self._breaker.settle(events)
        return reply, None


def _changed(vnode: Vnode) -> Vnode:
    """Its bytes, or the room that they take, changed now."""
    now = now_ns()
    return vnode._replace(mtime_ns=now, ctime_ns=vnode.later(now))


def _check_end(end: int) -> None:
    if end > MAX_FILE_BYTES:
        raise Aborted(AbortCode.FBIG, f"files end at {MAX_FILE_BYTES} bytes")


def _nothing() -> None:
    """The bytes are zeros already."""
