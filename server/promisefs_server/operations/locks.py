"""Operations on locks: checks, then the table, in one step each. Who has to wait is told so, and the rest later."""

from __future__ import annotations

from functools import partial

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.locks import WHOLE_FILE, HeldLock, LockKind, LockOwner
from promisefs_protocol.messages import (
    CancelLock,
    ExtendLock,
    ExtendLockReply,
    GetLock,
    GetLockReply,
    ReleaseLock,
    ReleaseLockReply,
    SetLock,
    SetLockReply,
)
from promisefs_protocol.transport import Reply

from promisefs_server.identity.caller import Caller
from promisefs_server.locks.lock_keeper import LockKeeper
from promisefs_server.locks.lock_table import Owner
from promisefs_server.promises.hosts import Host
from promisefs_server.store.vnodes import Vnode, key_of

from .parts import Later, Operation, Operations, Parts


class LockOperations(Operations):
    def __init__(self, parts: Parts, keeper: LockKeeper) -> None:
        super().__init__(parts)
        self._keeper = keeper
        self._table = keeper.table

    def table(self) -> dict[type, Operation]:
        return {
            SetLock: self.set_lock,
            CancelLock: self.cancel_lock,
            ReleaseLock: self.release_lock,
            GetLock: self.get_lock,
            ExtendLock: self.extend_lock,
        }

    def set_lock(self, caller: Caller, request: SetLock, bulk: bytes | None) -> Reply:
        host = caller.host
        vnode = self._file(request.fid)
        self._access.need_lock(caller.identity, vnode, exclusive=request.lock.kind == LockKind.WRITE)
        key = vnode.key
        _check_range(request.owner, request.lock.start, request.lock.end)
        if host.lease_end_s <= trio.current_time():
            raise Aborted(AbortCode.NO_CALLBACKS, "its lease has ended, and a lock would end with it")
        try:
            return SetLockReply(
                *self._table.set(key, _owner(host, request.owner), request.lock, request.request, wait=request.wait)
            ), None
        finally:
            self._keeper.changed_by(host)

    def cancel_lock(self, caller: Caller, request: CancelLock, bulk: bytes | None) -> Reply:
        owner = _owner(caller.host, request.owner)
        reply = SetLockReply(*self._table.cancel(key_of(request.fid), owner, request.lock, request.request))
        self._keeper.changed_by(caller.host)
        return reply, None

    def release_lock(self, caller: Caller, request: ReleaseLock, bulk: bytes | None) -> Reply:
        _check_range(request.owner, request.start, request.end)
        owner = _owner(caller.host, request.owner)
        order = self._table.release(key_of(request.fid), owner, request.start, request.end)
        self._keeper.changed_by(caller.host)
        return ReleaseLockReply(order), None

    def get_lock(self, caller: Caller, request: GetLock, bulk: bytes | None) -> Reply | Later:
        self._access.need_status(caller.identity, self._file(request.fid))
        _check_range(request.owner, request.lock.start, request.lock.end)
        return partial(self._get_lock_later, caller, request) if self._table.paused else self._get_lock(caller, request)

    async def _get_lock_later(self, caller: Caller, request: GetLock) -> Reply:
        await self._keeper.wait_resumed()
        return self._get_lock(caller, request)

    def _get_lock(self, caller: Caller, request: GetLock) -> Reply:
        found = self._table.conflicting(key_of(request.fid), _owner(caller.host, request.owner), request.lock)
        if found is None:
            return GetLockReply(None), None
        holder, lock = found
        return GetLockReply(lock if holder.host == caller.host.number else lock._replace(pid=0)), None

    def extend_lock(self, caller: Caller, request: ExtendLock, bulk: bytes | None) -> Reply:
        host = caller.host
        reclaims = request.reclaim and self._keeper.may_reclaim(host)
        lost = [i for i, held in enumerate(request.locks) if not self._still_holds(host, held, reclaims)]
        self._keeper.changed_by(host)
        if request.done:
            self._keeper.reclaimed(host)
        return ExtendLockReply(tuple(lost)), None

    def _still_holds(self, host: Host, held: HeldLock, reclaims: bool) -> bool:
        owner, key = _owner(host, held.owner), key_of(held.fid)
        if self._table.covers(key, owner, held.lock):
            return True
        if not reclaims or host.lease_end_s <= trio.current_time():
            return False
        try:
            self._file(held.fid)
            _check_range(held.owner, held.lock.start, held.lock.end)
        except Aborted:
            return False
        return self._table.restore(key, owner, held.lock)

    def _file(self, fid: Fid) -> Vnode:
        """A regular file that is here. Abort VNOVOL, VMOVED, VNOVNODE, INVAL."""
        vnode = self._vnodes.get(fid)
        if not vnode.is_file:
            raise Aborted(AbortCode.INVAL, f"{fid} is not a regular file")
        return vnode


def _owner(host: Host, owner: LockOwner) -> Owner:
    return Owner(host.number, owner.flock, owner.number)


def _check_range(owner: LockOwner, start: int, end: int) -> None:
    if end < start or (owner.flock and (start, end) != WHOLE_FILE):
        raise Aborted(AbortCode.INVAL, f"{start}..{end} is no range to lock")
