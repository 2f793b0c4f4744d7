"""Locks of fcntl(2) and flock(2) that hold for the whole cell: what processes of this mount hold and wait for.

A lock lasts as long as the lease from its server. When that has run out, or the server was restarted, it is *unsure*:
I/O through handles that it was taken through waits. After every HELLO, before any other call goes out, the server is
told what is held (`reclaim`), and its answer makes each lock certain or *lost*. A lost one is never assumed: what is
dirty in a file whose write lock was lost is thrown away, for another may have stored since; the next fsync or close
says so, and I/O through these handles fails with EIO until the owner has released what it believes to hold, or closed.

Who waits has no call under way: the server says later that the lock is granted (`answered`), and the request is made
again, by the same number, when the connection has been lost in between.

What is written under a lock is stored before the server is told that it is released, what is still in mappings too:
data passed on under a lock is always seen. The kernel sends no request for the end of a lock of an open file
description, so every owner is noted with the handles that it locked through, and ends with the last of them.

Calls for one owner and file are made one after the other (`_Holder.turn`). What must still reach the server before the
next one, a release while it is away, or the taking back of a request that nobody waits for any more, is its *debts*.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import trio
from promisefs_protocol.abort import Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.locks import WHOLE_FILE, HeldLock, Lock, LockKind, LockOwner, cover
from promisefs_protocol.messages import (
    MAX_LIST,
    CancelLock,
    ExtendLock,
    GetLock,
    LockAnswer,
    ReleaseLock,
    SetLock,
)
from promisefs_protocol.observe.tracing import Event, tell
from promisefs_protocol.transport import Peer

from promisefs_client.data.filestore import FileStore
from promisefs_client.data.resizing import correct_size
from promisefs_client.errors import FsError, ServerUnavailable
from promisefs_client.fuse.requests import interruptible
from promisefs_client.network.cell import Cell
from promisefs_client.network.servers import Server
from promisefs_client.vnodes.vnode import Vnode
from promisefs_client.vnodes.vnode_table import KernelWork

from .held_locks import HeldLocks
from .prompt import Promptly

log = logging.getLogger(__name__)

DEBT_RETRY_S = 2.0
RECHECK_S = 0.05


class _Holder:
    """One owner, on one file."""

    __slots__ = ("busy", "debts", "handles", "held", "lapses", "owner", "run", "server", "turn", "vnode")

    def __init__(self, vnode: Vnode, owner: LockOwner) -> None:
        self.vnode = vnode
        self.owner = owner
        self.held = HeldLocks()
        self.handles: set[int] = set()  # it has locked through these
        self.server = vnode.server  # whose word the locks are
        self.run = 0  # of that server: `Server.start_id`
        self.lapses = 0  # `Server.lapses` when they were certain last
        self.turn = trio.Lock()
        self.busy = 0  # requests under way, those that wait among them
        self.debts: list[Callable[[], Awaitable[None]]] = []

    @property
    def key(self) -> tuple[Fid, LockOwner]:
        return self.vnode.fid, self.owner


class _Waiter:
    """A request for a lock, from when it is first made until it is over."""

    __slots__ = ("answer", "event", "holder", "lock")

    def __init__(self, holder: _Holder, lock: Lock) -> None:
        self.holder = holder
        self.lock = lock
        self.event = trio.Event()
        self.answer: LockAnswer | None = None


class LockManager:
    def __init__(self, cell: Cell, files: FileStore) -> None:
        self._cell = cell
        self._files = files
        self._holders: dict[tuple[Fid, LockOwner], _Holder] = {}
        self._by_handle: dict[int, set[_Holder]] = {}
        self._waiters: dict[int, _Waiter] = {}
        self._next_request = 0
        self._certain: dict[Server, trio.Event] = {}
        """Set when the server has answered what is still held."""
        self.losses = 0
        """Locks that were lost while somebody believed to hold them."""

    @property
    def held(self) -> int:
        """Ranges that are locked."""
        return sum(len(holder.held.pieces) for holder in self._holders.values())

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    # What processes ask for

    async def get(self, vnode: Vnode, owner: LockOwner, lock: Lock) -> Lock | None:
        """A lock that is in the way of this one. Raise Aborted, ServerUnavailable."""
        reply, _ = await self._cell.call(GetLock(vnode.fid, owner, lock))
        found: Lock | None = reply.lock
        return found

    async def set(self, vnode: Vnode, handle: int, owner: LockOwner, lock: Lock, *, wait: bool) -> None:
        """Have the owner hold the lock. Raise Aborted, FsError, ServerUnavailable: then it has not got it."""
        holder = self._holder(vnode, owner)
        holder.busy += 1
        try:
            if holder.held.lost:
                raise FsError(errno.EIO)
            self._note_handle(holder, handle)
            if lock.kind == LockKind.READ and holder.held.writes_within(lock.start, lock.end):
                await self._store(vnode)  # others may read then
            await self._request(holder, lock, wait)
        finally:
            holder.busy -= 1
            self._settle(holder)
        await self._show_what_is_there(vnode)

    async def unlock(self, vnode: Vnode, owner: LockOwner, start: int, end: int) -> None:
        """The owner holds nothing of the range from now on. Raise Aborted, ServerUnavailable: then it may still."""
        holder = self._holders.get((vnode.fid, owner))
        if holder is None:
            return
        holder.busy += 1
        try:
            holder.held.give_up_lost(start, end)
            if holder.held.writes_within(start, end):
                await self._store(vnode)
            async with Promptly(holder.turn):
                await self._pay(holder)
                await self._release(holder, start, end)
        finally:
            holder.busy -= 1
            self._settle(holder)

    async def flushed(self, vnode: Vnode, number: int | None) -> None:
        """A process has closed a descriptor of the file: its locks on it are over, whichever it took them through.

        What was dirty has been stored, if it could be.
        """
        holder = None if number is None else self._holders.get((vnode.fid, LockOwner(False, number)))
        if holder is not None:
            await self._end(holder)

    async def released(self, vnode: Vnode, handle: int) -> None:
        """The handle is gone, and with it who locked through no other."""
        for holder in self._by_handle.pop(handle, ()):
            holder.handles.discard(handle)
            if not holder.handles:
                await self._end(holder)

    async def check(self, handle: int) -> None:
        """Before I/O through this handle. Raise FsError if a lock taken through it is lost, ServerUnavailable."""
        if handle not in self._by_handle:
            return
        with trio.move_on_after(self._cell.timeout_s):
            while (unsure := self._unsure(handle)) is not None:
                with interruptible():
                    await self._certain.setdefault(unsure.server, trio.Event()).wait()
        if self._unsure(handle) is not None:
            raise ServerUnavailable("the server has not said whether a lock is still held")
        if any(holder.held.lost for holder in self._by_handle.get(handle, ())):
            raise FsError(errno.EIO)

    def _unsure(self, handle: int) -> _Holder | None:
        return next((holder for holder in self._by_handle.get(handle, ()) if not self._is_sure(holder)), None)

    # Requests for locks

    async def _request(self, holder: _Holder, lock: Lock, wait: bool) -> None:
        self._next_request += 1
        number = self._next_request
        waiter = self._waiters[number] = _Waiter(holder, lock)
        try:
            await self._until_granted(waiter, number, wait)
        except ServerUnavailable:
            if not await self._withdraw(waiter, number):
                raise
        finally:
            del self._waiters[number]

    async def _until_granted(self, waiter: _Waiter, number: int, wait: bool) -> None:
        while True:
            waiter.event = trio.Event()
            if await self._ask(waiter, number, wait):
                return
            with interruptible():
                await waiter.event.wait()
            if waiter.answer is not None:
                if waiter.answer.code:
                    raise Aborted(waiter.answer.code, "the lock is not granted")
                return

    async def _ask(self, waiter: _Waiter, number: int, wait: bool) -> bool:
        """Make the request, or make it again. Return whether the lock is granted."""
        holder, lock = waiter.holder, waiter.lock
        async with Promptly(holder.turn):
            while True:
                await self._pay(holder)
                if holder.owner.flock:
                    holder.held.clear()  # a conversion that is not granted has lost what there was
                reply, _ = await self._cell.call(SetLock(holder.vnode.fid, holder.owner, lock, number, wait))
                if not reply.granted:
                    return False
                if self._lease_runs(holder.vnode.server):
                    self._note_granted(holder, reply.order, lock)
                    return True
                await trio.sleep(RECHECK_S)  # the answer may be as old as the lease

    def answered(self, answers: Iterable[LockAnswer]) -> None:
        """CB.AnswerLocks. Those that come when the lease is over are worth nothing: the requests are made again."""
        for answer in answers:
            waiter = self._waiters.get(answer.request)
            if waiter is not None and waiter.answer is None and self._lease_runs(waiter.holder.vnode.server):
                waiter.answer = answer
                if not answer.code:
                    self._note_granted(waiter.holder, answer.order, waiter.lock)
                waiter.event.set()

    async def _withdraw(self, waiter: _Waiter, number: int) -> bool:
        """Its process does not wait any more. Return whether the lock is granted all the same; else it will not be."""
        holder = waiter.holder
        if waiter.answer is None and self._cell.connected(holder.vnode):
            try:
                async with Promptly(holder.turn):
                    await self._pay(holder)
                    granted, order = await self._cancel(holder, waiter.lock, number)
                if granted and waiter.answer is None:
                    self._note_granted(holder, order, waiter.lock)
                return granted
            except Aborted:
                return False
            except ServerUnavailable as error:
                log.info("%s: withdrawing a lock request: %s", holder.vnode.fid, error)
        if waiter.answer is not None:
            return waiter.answer.code == 0
        self._owe(holder, partial(self._undo, holder, waiter.lock, number))
        return False

    async def _cancel(self, holder: _Holder, lock: Lock, number: int) -> tuple[bool, int]:
        reply, _ = await self._cell.call(CancelLock(holder.vnode.fid, holder.owner, lock, number))
        return reply.granted and self._lease_runs(holder.vnode.server), reply.order

    async def _undo(self, holder: _Holder, lock: Lock, number: int) -> None:
        """Nobody waits for this request any more: if it was granted go back to what the owner held before."""
        granted, _ = await self._cancel(holder, lock, number)
        if granted:
            for start, end, before in holder.held.differences(lock):
                await self._release(holder, start, end) if before is None else await self._put_back(holder, before)

    async def _put_back(self, holder: _Holder, before: Lock) -> None:
        self._next_request += 1
        await self._cell.call(SetLock(holder.vnode.fid, holder.owner, before, self._next_request, False))

    def _note_granted(self, holder: _Holder, order: int, lock: Lock) -> None:
        server = holder.server = holder.vnode.server
        holder.held.granted(order, lock)
        holder.run, holder.lapses = server.start_id, server.lapses

    # Releases

    async def _release(self, holder: _Holder, start: int, end: int) -> None:
        reply, _ = await self._cell.call(ReleaseLock(holder.vnode.fid, holder.owner, start, end))
        holder.held.released(reply.order, start, end)

    async def _end(self, holder: _Holder) -> None:
        """The owner is gone, or has closed the file."""
        held = holder.held
        wrote = held.writes_within(*WHOLE_FILE)
        nothing = not held.pieces and not holder.busy
        held.clear()
        self._forget_handles(holder)
        if not nothing:
            holder.debts.append(partial(self._release_at_last, holder, wrote))
        if holder.debts:
            await self._pay_now_or_later(holder)
        self._settle(holder)

    async def _release_at_last(self, holder: _Holder, wrote: bool) -> None:
        if wrote and holder.vnode.is_dirty:
            try:
                await self._files.store(holder.vnode, sync=False)
            except (Aborted, FsError) as error:
                log.warning("%s: a lock is released before what was written is stored: %s", holder.vnode.fid, error)
        await self._release(holder, *WHOLE_FILE)

    # Debts

    def _owe(self, holder: _Holder, debt: Callable[[], Awaitable[None]]) -> None:
        holder.debts.append(debt)
        self._cell.start(self._pay_in_time, holder)

    async def _pay(self, holder: _Holder) -> None:
        """Do what is owed, with the turn held. Raise ServerUnavailable."""
        while holder.debts:
            try:
                await holder.debts[0]()
            except Aborted as refusal:
                log.info("%s: releasing locks: %s", holder.vnode.fid, refusal)
            del holder.debts[0]

    async def _pay_now_or_later(self, holder: _Holder) -> None:
        if self._cell.connected(holder.vnode):
            try:
                async with Promptly(holder.turn):
                    await self._pay(holder)
            except ServerUnavailable as error:
                log.info("%s: releasing locks: %s; trying again", holder.vnode.fid, error)
        if holder.debts:
            self._cell.start(self._pay_in_time, holder)

    async def _pay_in_time(self, holder: _Holder) -> None:
        while holder.debts:
            try:
                async with Promptly(holder.turn):
                    await self._pay(holder)
            except ServerUnavailable as error:
                log.info("%s: releasing locks: %s; trying again", holder.vnode.fid, error)
                await trio.sleep(DEBT_RETRY_S)
        self._settle(holder)

    # Certainty

    async def reclaim(self, server: Server, peer: Peer) -> None:
        """Tell the server what is held, and learn what is lost. Raise ConnectionLost, Aborted."""
        run, lapses = server.start_id, server.lapses
        same_run: list[tuple[_Holder, Lock]] = []
        earlier_run: list[tuple[_Holder, Lock]] = []
        for holder in [holder for holder in self._holders.values() if holder.server is server]:
            if holder.run != run and holder.lapses != lapses:
                self._lose(holder)  # the run that is over may have given it to another
            held = same_run if holder.run == run else earlier_run
            held += [(holder, piece) for piece in holder.held.pieces]
        sure = {holder for holder, _ in [*same_run, *earlier_run]}
        lost = await self._extend(peer, same_run, reclaim=False) + await self._extend(peer, earlier_run, reclaim=True)
        await peer.call(ExtendLock((), True, True))
        for holder, piece in lost:
            if cover(holder.held.pieces, piece):  # not released meanwhile
                self._lose(holder)
        for holder in sure:
            holder.run, holder.lapses = run, lapses
        event = self._certain.pop(server, None)
        if event is not None:
            event.set()
        for waiter in self._waiters.values():
            if waiter.holder.vnode.server is server:
                waiter.event.set()  # its answer may be lost

    @staticmethod
    async def _extend(peer: Peer, held: list[tuple[_Holder, Lock]], *, reclaim: bool) -> list[tuple[_Holder, Lock]]:
        lost: list[tuple[_Holder, Lock]] = []
        for first in range(0, len(held), MAX_LIST):
            part = held[first : first + MAX_LIST]
            named = tuple(HeldLock(holder.vnode.fid, holder.owner, piece) for holder, piece in part)
            reply, _ = await peer.call(ExtendLock(named, reclaim, False))
            lost += [part[position] for position in reply.lost if position < len(part)]
        return lost

    def _lease_runs(self, server: Server) -> bool:
        return self._cell.now() < server.lease_until

    def _is_sure(self, holder: _Holder) -> bool:
        server = holder.server
        if server is not holder.vnode.server:
            self._lose(holder)  # the volume has moved, and locks do not
        if not holder.held.pieces:
            return True
        return self._lease_runs(server) and (holder.run, holder.lapses) == (server.start_id, server.lapses)

    def _lose(self, holder: _Holder) -> None:
        pieces = holder.held.pieces
        if not pieces:
            return
        message, fid = "%s: %d locks are lost: the server was away for too long", holder.vnode.fid
        about = {"fid": fid, "server": holder.vnode.server.name, "locks": len(pieces)}
        tell(log, logging.ERROR, Event.LOCK_LOST, message, fid, len(pieces), **about)
        self.losses += len(pieces)
        holder.held.lose()
        if any(piece.kind == LockKind.WRITE for piece in pieces):
            self._files.void(holder.vnode)
        self._owe(holder, partial(self._release, holder, *WHOLE_FILE))  # what is left of them

    # The file under a lock

    async def _store(self, vnode: Vnode) -> None:
        """Have the server know what was written here. Raise Aborted, FsError, ServerUnavailable."""
        if vnode.read_write_opens:
            # The kernel gives us what was stored into mappings only when it drops the pages.
            await self._cell.drop([KernelWork(vnode.ino, True, False, 0)])
        await self._files.store(vnode, sync=False)

    async def _show_what_is_there(self, vnode: Vnode) -> None:
        """What others stored before they released the lock is what the kernel shows from now on."""
        if self._cell.is_dropping(vnode):
            # A break was acknowledged before the kernel had dropped everything. This returns when it has.
            await self._cell.drop([KernelWork(vnode.ino, True, False, 0)])
        try:
            await self._cell.validate(vnode)
            await self._cell.drop_stale()
            await correct_size(self._cell, vnode)
        except (Aborted, ServerUnavailable) as error:
            log.info("%s: locked, but its status cannot be fetched: %s", vnode.fid, error)  # whoever reads will ask

    # Holders

    def _holder(self, vnode: Vnode, owner: LockOwner) -> _Holder:
        holder = self._holders.get((vnode.fid, owner))
        if holder is None:
            holder = self._holders[vnode.fid, owner] = _Holder(vnode, owner)
        return holder

    def _note_handle(self, holder: _Holder, handle: int) -> None:
        holder.handles.add(handle)
        self._by_handle.setdefault(handle, set()).add(holder)

    def _settle(self, holder: _Holder) -> None:
        """If nothing is under way: forget what is not needed any more."""
        if holder.busy or holder.debts:
            return
        held = holder.held
        held.settle()
        if held.pieces or held.lost or self._holders.get(holder.key) is not holder:
            return
        del self._holders[holder.key]
        self._forget_handles(holder)

    def _forget_handles(self, holder: _Holder) -> None:
        for handle in holder.handles:
            there = self._by_handle.get(handle, set())
            there.discard(holder)
            if not there:
                self._by_handle.pop(handle, None)
        holder.handles.clear()

    def check_invariants(self) -> None:
        for handle, holders in self._by_handle.items():
            assert holders and all(handle in holder.handles for holder in holders)
        for key, holder in self._holders.items():
            assert holder.key == key
            assert all(holder in self._by_handle[handle] for handle in holder.handles)
            assert holder.busy or holder.debts or holder.held.pieces or holder.held.lost
