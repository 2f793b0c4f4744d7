"""Asks the server and installs what it says: the vnode table joined with the session and the kernel.

Every call that brings statuses goes through `ask`, which marks its start, so that a promise that was broken while its
reply was under way is not installed. After any await the state may have changed: callers validate again, or take the
answer as of a moment after they began.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.connection import Piece
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import (
    MAX_LIST,
    Break,
    Changed,
    CreateFile,
    FetchStatus,
    GiveUpCallBacks,
    GiveUpOpen,
    InlineBulkStatus,
    Link,
    MakeDir,
    RemoveDir,
    RemoveFile,
    RemoveXattr,
    Rename,
    SetXattr,
    StoreData,
    StoreStatus,
    Symlink,
)

from .kernel import KernelCaches
from .session import ServerSession, ServerUnavailable
from .vnode import Vnode
from .vnode_table import CallMark, KernelWork, VnodeTable

log = logging.getLogger(__name__)

MUTATIONS = (
    StoreData,
    StoreStatus,
    SetXattr,
    RemoveXattr,
    CreateFile,
    MakeDir,
    Symlink,
    Link,
    RemoveFile,
    RemoveDir,
    Rename,
)

RENEW_EVERY_S = 30.0
RENEW_BEFORE_S = 90.0
"""Promises on open files are renewed when less than this is left: a mapping has no other moment to ask."""


class Answer(NamedTuple):
    reply: Any
    bulk: bytes | None
    mark: CallMark


class Cell:
    """One server's vnodes, as this mount knows them. `nursery` runs what outlives the call that began it."""

    def __init__(self, session: ServerSession, table: VnodeTable, kernel: KernelCaches, nursery: trio.Nursery) -> None:
        self.session = session
        self.table = table
        self.kernel = kernel
        self._nursery = nursery

    def start(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run something in the background. A defect in it is logged; it does not end the mount."""
        self._nursery.start_soon(self._guarded, function, args)

    @staticmethod
    async def _guarded(function: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
        try:
            await function(*args)
        except Exception:
            log.exception("%s failed: a defect here", getattr(function, "__name__", function))

    def valid(self, vnode: Vnode) -> bool:
        return self.table.valid(vnode, trio.current_time())

    @asynccontextmanager
    async def ask(self, request: Any, bulk: Piece | None = None) -> Any:
        """Call the server; inside the block, without awaiting, install what the Answer brings."""
        mark = self.table.begin_call(trio.current_time())
        try:
            try:
                reply, data = await self.session.call(request, bulk)
            except Aborted:
                raise
            except BaseException:
                if isinstance(request, MUTATIONS):
                    self._forget_changed(request)
                raise
            yield Answer(reply, data, mark)
        finally:
            self.table.end_call(mark)

    def _forget_changed(self, request: Any) -> None:
        """A change may or may not have been made, and the server breaks no promise of who made it: do it ourselves."""
        changed = Changed.STATUS | Changed.DATA
        work, _ = self.table.break_promises([Break(fid, changed, 0) for fid in request if isinstance(fid, Fid)])
        self.start(self.drop, work)

    async def validate(self, vnode: Vnode) -> None:
        """Return when the vnode's status is that of a moment after this was called.

        Raise Aborted(VNOVNODE) if it is gone, ServerUnavailable.
        """
        if self.valid(vnode):
            return
        await self.fetch_status(vnode)
        self.drop_stale_later()

    async def fetch_status(self, vnode: Vnode) -> None:
        try:
            async with self.ask(FetchStatus(vnode.fid)) as answer:
                self.table.install(answer.reply.entry, answer.mark)
        except Aborted as refusal:
            if refusal.code == AbortCode.VNOVNODE:
                self.table.vnode_is_gone(vnode)
            raise

    async def fetch_statuses(self, fids: list[Fid]) -> None:
        """Bring many statuses up to date. Those that are gone are marked so; no error for them."""
        for start in range(0, len(fids), MAX_LIST // 4):
            part = tuple(fids[start : start + MAX_LIST // 4])
            async with self.ask(InlineBulkStatus(part)) as answer:
                for fid, entry in zip(part, answer.reply.entries, strict=True):
                    if not isinstance(entry, int):
                        self.table.install(entry, answer.mark)
                    elif entry == AbortCode.VNOVNODE and (vnode := self.table.get(fid)) is not None:
                        self.table.vnode_is_gone(vnode)

    async def drop(self, work: list[KernelWork]) -> None:
        """Have the kernel drop this; pages it writes back meanwhile are compared with their twins."""
        try:
            await self.kernel.drop(work)
        finally:
            for item in work:
                vnode = self.table.by_ino(item.ino)
                if item.pages and vnode is not None and vnode.contents is not None:
                    vnode.contents.forget_twins()

    # Kernel caches found stale without a break

    def drop_stale_later(self) -> None:
        """Have the kernel drop what statuses showed to be stale.

        In the background: the caller may be serving a READ that the kernel holds pages locked for.
        """
        work = self.table.found_stale
        if work:
            self.table.found_stale = []
            self.start(self.drop, work)

    async def drop_stale(self) -> None:
        """The same, and wait: only where the kernel holds no page of the file locked for us."""
        work = self.table.found_stale
        if work:
            self.table.found_stale = []
            await self.drop(work)

    def drop_pages_later(self, vnode: Vnode) -> None:
        self.start(self.drop, [KernelWork(vnode.ino, True, False, 0)])

    # Handles

    def close_handle(self, vnode: Vnode) -> None:
        """A handle of the kernel's is gone; the last one of an unlinked file is the end of the file."""
        if vnode.kept and vnode.opens == 1:
            vnode.kept = False
            self.give_up_open([vnode.fid])
        self.table.drop_open(vnode)

    def lost_a_name(self, vnode: Vnode, *, kept_open: bool) -> None:
        """After our own removal, in which we said whether it is open here."""
        if vnode.deleted and kept_open:
            vnode.kept = vnode.opens > 0
            if not vnode.kept:  # closed meanwhile
                self.give_up_open([vnode.fid])
        self.table.may_be_idle(vnode)

    def give_up_open(self, fids: list[Fid]) -> None:
        """Tell the server that these deleted files need not be kept for us."""
        if fids:
            self.start(self._give_up, GiveUpOpen(tuple(fids)))

    async def _give_up(self, request: GiveUpOpen | GiveUpCallBacks) -> None:
        try:
            await self.session.call(request)
        except (Aborted, ServerUnavailable) as error:
            log.warning("giving up %d fids: %s", len(request.fids), error)

    # Upkeep

    async def renew_promises(self) -> None:
        """Keep a promise on everything open; give up those of evicted vnodes. Runs until cancelled."""
        while True:
            await trio.sleep(RENEW_EVERY_S)
            await self.give_up_evicted()
            soon = trio.current_time() + RENEW_BEFORE_S
            await self.revalidate(v for v in self.table if v.opens and v.promise_until < soon and not v.status.is_dir)

    async def revalidate(self, vnodes: Iterable[Vnode]) -> None:
        try:
            await self.fetch_statuses([vnode.fid for vnode in vnodes])
        except (Aborted, ServerUnavailable) as error:
            log.warning("renewing promises: %s", error)
        self.drop_stale_later()

    async def give_up_evicted(self) -> None:
        while self.table.given_up:
            fids = self.table.begin_giving_up(MAX_LIST)
            try:
                await self._give_up(GiveUpCallBacks(fids))
            finally:
                self.table.end_giving_up(fids)
