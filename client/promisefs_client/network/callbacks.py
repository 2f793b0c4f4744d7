"""Serves a server's calls: CB.CallBack, CB.InitCallBackState3, CB.AnswerLocks, CB.Probe.

Order of a break: the table changes in one step, then the kernel drops what is stale, then we acknowledge. The
kernel may wait for a READ that waits for the server, so the acknowledgement does not wait longer than `ack_wait_s`;
the kernel work goes on, and `early_acks` counts it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import (
    AnswerLocks,
    CallBack,
    CallBackReply,
    Empty,
    InitCallBackState3,
    LockAnswer,
    Probe,
)
from promisefs_protocol.observe.timings import Timing
from promisefs_protocol.observe.tracing import Event, tell, tracing
from promisefs_protocol.rights import READ
from promisefs_protocol.transport import Reply

from promisefs_client.data.resizing import correct_size, show_end
from promisefs_client.vnodes.vnode import Vnode
from promisefs_client.vnodes.vnode_table import KernelWork

from .cell import Cell
from .servers import Server

log = logging.getLogger(__name__)


class CallbackService:
    """What one server may call. `cell` is set once, before anything of the server's is cached."""

    def __init__(self, server: Server, ack_wait_s: float) -> None:
        self.server = server
        self.cell: Cell | None = None
        self.on_lock_answers: Callable[[Iterable[LockAnswer]], None] = lambda answers: None
        self.ack_wait_s = ack_wait_s
        self.acknowledgements = Timing()
        """CB.CallBack and CB.InitCallBackState3, until they are acknowledged."""
        self.breaks = 0
        self.resets = 0
        self.early_acks = 0
        self.overdue = 0
        """Of the early acknowledgements: those whose kernel work has not ended yet."""

    async def serve(self, request: Any, bulk: bytes | None, context: int) -> Reply:
        if not isinstance(request, CallBack | InitCallBackState3):
            return self._answer(request), None
        self.acknowledgements.started += 1
        began = trio.current_time()
        try:
            if isinstance(request, CallBack):
                return await self._call_back(request), None
            self.resets += 1
            message = "InitCallBackState3: no promise of %s holds any more"
            tell(log, logging.INFO, Event.CB_RESET, message, self.server.name, server=self.server.name)
            await self.reset()
            return Empty(), None
        finally:
            self.acknowledgements.took(trio.current_time() - began)

    def _answer(self, request: Any) -> Empty:
        match request:
            case AnswerLocks():
                self.on_lock_answers(request.answers)
                return Empty()
            case Probe():
                return Empty()
        raise Aborted(AbortCode.UNKNOWN_METHOD, "this is no call for a client")

    async def _call_back(self, request: CallBack) -> CallBackReply:
        cell = self.cell
        if cell is None:
            return CallBackReply(())
        began = trio.current_time()
        self.breaks += len(request.breaks)
        work, still_open = cell.table.break_promises(self.server, request.breaks)
        if work:
            files = [vnode.fid for item in work if (vnode := cell.table.by_ino(item.ino)) is not None]
            await self._bounded(lambda: self._drop_and_renew(cell, work), files)
        if tracing.on:
            tracing.emit(
                Event.CB_ACK,
                fid=request.breaks[0].fid,
                server=self.server.name,
                breaks=len(request.breaks),
                seconds=trio.current_time() - began,
            )
        return CallBackReply(tuple(still_open))

    async def _drop_and_renew(self, cell: Cell, work: list[KernelWork]) -> None:
        await cell.drop(work)
        for item in work:
            if item.grown_to and (vnode := cell.table.by_ino(item.ino)) is not None:
                await show_end(cell, vnode, item.grown_to)
        await self._renew(cell, work)

    @staticmethod
    async def _renew(cell: Cell, work: list[KernelWork]) -> None:
        """Get a promise again for open files: a mapping would not ask, and nobody would tell it of a change.

        The server sends further breaks to a host that has not acknowledged yet, so none falls in between.
        """
        found = [cell.table.by_ino(item.ino) for item in work if item.renew]
        vnodes = [vnode for vnode in found if vnode is not None and vnode.opens and not cell.valid(vnode)]
        if vnodes:
            await cell.revalidate(vnodes)
            dropped = [vnode for vnode in vnodes if not cell.valid(vnode) or not _all_may_read(vnode)]
            await cell.drop([KernelWork(vnode.ino, True, False, 0) for vnode in dropped])
            for vnode in vnodes:
                await correct_size(cell, vnode)
        for item in work:
            kept = cell.table.by_ino(item.ino) if item.twins else None
            if kept is not None and kept.contents is not None:
                kept.contents.forget_twins(item.twins)

    async def reset(self) -> None:
        """Nothing of the server's is served until it is validated: open files first, they may be mapped."""
        cell = self.cell
        if cell is None:
            return
        urgent, rest = cell.table.reset(self.server)
        if cell.kernel.has_epochs:
            cell.kernel.drop_every_name()  # so everything that is reached by a path is asked for again
        files = [vnode.fid for item in urgent if (vnode := cell.table.by_ino(item.ino)) is not None]
        await self._bounded(lambda: self._drop_in_order(cell, urgent, rest), files)
        cell.start(self._renew, cell, urgent)

    @staticmethod
    async def _drop_in_order(cell: Cell, urgent: list[KernelWork], rest: list[KernelWork]) -> None:
        """The rest begins after what is urgent, but does not wait for it: that may be held up by a READ."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cell.drop, urgent)
            await trio.lowlevel.checkpoint()
            await cell.drop(rest)

    async def _bounded(self, work: Callable[[], Awaitable[None]], fids: Sequence[Fid]) -> None:
        """Wait for kernel work, on these files, but not longer than the server should wait for us.

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
            fid = fids[0] if fids else None
            message = (
                "acknowledged to %s before the kernel dropped everything of %s%s: a READ or a writeback is in flight"
            )
            more = f" and {len(fids) - 1} more" if len(fids) > 1 else ""
            about = {"fid": fid, "files": len(fids), "server": self.server.name}
            tell(log, logging.WARNING, Event.CB_EARLY_ACK, message, self.server.name, fid or "names", more, **about)


def _all_may_read(vnode: Vnode) -> bool:
    """Whether everyone who has opened a file is known to have the right to read it still."""
    return all((vnode.rights_of(key.credentials) or 0) & READ for key in set(vnode.openers))
