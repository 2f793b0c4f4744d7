"""Serves a server's calls: CB.CallBack, CB.InitCallBackState3, CB.Probe.

Order of a break: the table changes in one step, then the kernel drops what is stale, then we acknowledge. The
kernel may wait for a READ that waits for the server, so the acknowledgement does not wait longer than `ack_wait_s`;
the kernel work goes on, and `early_acks` counts it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.messages import (
    CallBack,
    CallBackReply,
    Empty,
    FetchData,
    InitCallBackState3,
    Probe,
)
from promisefs_protocol.transport import Reply

from .cell import Cell
from .servers import Server
from .session import ServerUnavailable
from .vnode_table import KernelWork

log = logging.getLogger(__name__)


class CallbackService:
    """What one server may call. `cell` is set once, before anything of the server's is cached."""

    def __init__(self, server: Server, ack_wait_s: float) -> None:
        self.server = server
        self.cell: Cell | None = None
        self.ack_wait_s = ack_wait_s
        self.breaks = 0
        self.resets = 0
        self.early_acks = 0
        self.overdue = 0
        """Of the early acknowledgements: those whose kernel work has not ended yet."""

    async def serve(self, request: Any, bulk: bytes | None) -> Reply:
        match request:
            case CallBack():
                return await self._call_back(request), None
            case InitCallBackState3():
                self.resets += 1
                log.info("InitCallBackState3: no promise of %s holds any more", self.server.name)
                await self.reset()
                return Empty(), None
            case Probe():
                return Empty(), None
        raise Aborted(AbortCode.UNKNOWN_METHOD, "a client serves CB.CallBack, CB.InitCallBackState3 and CB.Probe")

    async def _call_back(self, request: CallBack) -> CallBackReply:
        cell = self.cell
        if cell is None:
            return CallBackReply(())
        self.breaks += len(request.breaks)
        work, still_open = cell.table.break_promises(self.server, request.breaks)
        if work:
            await self._bounded(lambda: self._drop_and_grow(cell, work))
        return CallBackReply(tuple(still_open))

    async def _drop_and_grow(self, cell: Cell, work: list[KernelWork]) -> None:
        await cell.drop(work)
        for item in work:
            if item.grown_to:
                await self._grow(cell, item)
        await self._renew(cell, [item for item in work if item.renew])

    async def _renew(self, cell: Cell, kept: list[KernelWork]) -> None:
        """Get a promise again for files whose pages stay: a mapping would not ask, and nobody would tell it.

        The server sends further breaks to a host that has not acknowledged yet, so none falls in between.
        """
        vnodes = [vnode for item in kept if (vnode := cell.table.by_ino(item.ino)) is not None and vnode.opens]
        if vnodes:
            await cell.revalidate(vnodes)
            unpromised = [vnode for vnode in vnodes if not cell.valid(vnode)]
            await cell.drop([KernelWork(vnode.ino, True, False, 0) for vnode in unpromised])
        for item in kept:
            vnode = cell.table.by_ino(item.ino)
            if vnode is not None and vnode.contents is not None:
                vnode.contents.forget_twins(item.twins)

    async def _grow(self, cell: Cell, item: KernelWork) -> None:
        """Show the kernel the new last byte: a mapping may reach there already."""
        vnode = cell.table.by_ino(item.ino)
        if vnode is None or not vnode.opens:
            return
        try:
            async with cell.ask(FetchData(vnode.fid, item.grown_to - 1, 1)) as answer:
                cell.table.install(answer.reply.entry, answer.mark)
                byte = answer.bulk
        except (Aborted, ServerUnavailable) as error:
            log.info("%s grew, but its new end cannot be fetched: %s", vnode.fid, error)
            return
        cell.drop_stale_later()
        if not byte or vnode.size < item.grown_to or (vnode.contents and vnode.contents.is_dirty_at(item.grown_to - 1)):
            return  # cut again, or written here: then the kernel reaches there by itself
        vnode.told_size = max(vnode.told_size, item.grown_to)
        vnode.shown_at = item.grown_to - 1
        if vnode.contents is not None:
            vnode.contents.given(vnode.shown_at, byte)
        await cell.kernel.store_byte(item.ino, item.grown_to - 1, byte)
        if vnode.size < item.grown_to or not cell.valid(vnode):
            await cell.drop([KernelWork(vnode.ino, True, False, 0)])  # changed before the kernel took it in

    async def reset(self) -> None:
        """Nothing of the server's is served until it is validated: open files first, they may be mapped."""
        cell = self.cell
        if cell is None:
            return
        urgent, rest = cell.table.reset(self.server)
        if cell.kernel.has_epochs:
            cell.kernel.drop_every_name()  # so everything that is reached by a path is asked for again
        await self._bounded(lambda: self._drop_in_order(cell, urgent, rest))

    @staticmethod
    async def _drop_in_order(cell: Cell, urgent: list[KernelWork], rest: list[KernelWork]) -> None:
        """The rest begins after what is urgent, but does not wait for it: that may be held up by a READ."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cell.drop, urgent)
            await trio.lowlevel.checkpoint()
            await cell.drop(rest)

    async def _bounded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Wait for kernel work, but not longer than the server should wait for us.

        Half a lease at most: what comes after a whole one is no acknowledgement any more, and a HELLO that waits for
        InitCallBackState3 would never be answered.
        """
        assert self.cell is not None
        lease_s = self.cell.sessions[self.server].lease_s  # 0: of a server that we have nothing of yet
        done = trio.Event()
        early = False

        async def run() -> None:
            try:
                await work()
            finally:
                done.set()
                self.overdue -= early

        self.cell.start(run)
        with trio.move_on_after(min(self.ack_wait_s, lease_s / 2) if lease_s else self.ack_wait_s):
            await done.wait()
        if not done.is_set():
            early = True
            self.early_acks += 1
            self.overdue += 1
            log.warning("acknowledged before the kernel dropped everything: a READ or a writeback is in flight")
