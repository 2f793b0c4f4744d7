"""What becomes of bytes that the server refuses for good, or that must not reach it any more.

They leave every cache: the dirty bytes here, what the kernel's pages have of them (mappings reread what the server
has), and the size that they gave the file, unless somebody else has extended it since. Never anything else: bytes that
were stored, that were written meanwhile, or under another key stay as they are. First they are in the quarantine.
"""

from __future__ import annotations

import logging

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.messages import MAX_BULK_BYTES, Break, Changed
from promisefs_protocol.observe.tracing import Event, tell

from promisefs_client.network.cell import Cell
from promisefs_client.rejects.keeper import RejectKeeper
from promisefs_client.vnodes.vnode import Vnode
from promisefs_client.vnodes.vnode_table import KernelWork

from .contents import FileContents, StoreExtent
from .file_state import FileState
from .resizing import correct_size

log = logging.getLogger(__name__)

SHOWN_WAIT_S = 5.0
"""How long an fsync or close that reports a refusal waits for the kernel to drop the refused bytes."""


class Refuser:
    def __init__(self, cell: Cell, rejects: RejectKeeper, key_wait_s: float) -> None:
        self._cell = cell
        self.key_wait_s = key_wait_s
        self.rejects = rejects
        self.files_lost = 0
        """Files that were gone at the server while bytes of theirs were not stored."""
        self.bytes_refused = 0
        """The server did not take them, for good."""

    def waits_for_token(self, state: FileState, refusal: Aborted) -> bool:
        """Whether the bytes stay dirty, since whoever wrote them may get a fresh token within `key_wait`."""
        if refusal.code != AbortCode.KEYEXPIRED:
            return False
        now_s = trio.current_time()
        if state.expired_since is None:
            state.expired_since = now_s
        return now_s - state.expired_since < self.key_wait_s

    async def refused(self, state: FileState, contents: FileContents, extent: StoreExtent, refusal: Aborted) -> None:
        """The server does not take these bytes, ever. They go to the quarantine, and out of every cache.

        Raise the refusal if they cannot be kept: they stay dirty then.
        """
        vnode = state.vnode
        if refusal.code == AbortCode.VNOVNODE:
            self._cell.table.vnode_is_gone(vnode)
        if not (vnode.deleted and not vnode.opens):  # else nobody could ever have read it
            if state.event is None:
                state.event = self.rejects.event(vnode)
            try:
                if not any(start <= extent.offset and extent.end <= end for start, end in state.through):
                    await self.rejects.keep(vnode, state.event, extent.written, extent.key, refusal)
            except OSError:
                contents.store_failed(extent)
                raise refusal from None
            if refusal.code == AbortCode.VNOVNODE and not vnode.lost:
                vnode.lost = True
                self.files_lost += 1
                message, left = "%s was removed while %d bytes of it were not stored", contents.dirty_bytes
                about = {"fid": vnode.fid, "server": vnode.server.name, "bytes": left}
                tell(log, logging.ERROR, Event.FILE_LOST, message, vnode.fid, left, **about)
            self.bytes_refused += extent.length
            state.refusals.note(extent.key, refusal)
        # It may have written some of it, and breaks no promise of ours.
        changed = Break(vnode.fid, Changed.STATUS | Changed.DATA, 0)
        self._cell.table.break_promises(vnode.server, [changed])
        contents.refused(extent)
        state.to_show = True

    def show(self, state: FileState) -> None:
        """After stores: if something was refused have the kernel see the server's bytes, in the background."""
        if state.to_show:
            state.to_show = False
            state.shown = trio.Event()
            self._cell.start(self._show_servers_bytes, state.vnode, state.shown)

    async def _show_servers_bytes(self, vnode: Vnode, shown: trio.Event) -> None:
        """Have the kernel drop pages with refused bytes, and believe in the size that the file has without them."""
        try:
            await self._cell.drop([KernelWork(vnode.ino, True, False, 0)])
            if vnode.opens:
                await correct_size(self._cell, vnode)
        finally:
            shown.set()

    async def wait_until_shown(self, state: FileState) -> None:
        if state.shown is not None:
            with trio.move_on_after(SHOWN_WAIT_S):
                await state.shown.wait()

    async def keep_unstored(self, vnodes: list[Vnode], why: str) -> int:
        """The mount ends: put what could not be stored into the quarantine. Return how many bytes that worked for."""
        kept = 0
        reason = Aborted(AbortCode.IO, why)
        for vnode in vnodes:
            contents, event = vnode.contents, self.rejects.event(vnode)
            assert contents is not None
            while (extent := contents.begin_store(MAX_BULK_BYTES)) is not None:
                try:
                    await self.rejects.keep(vnode, event, extent.written, extent.key, reason)
                except OSError:
                    contents.store_failed(extent)
                    break
                contents.refused(extent)
                kept += extent.length
        return kept

    def throw_away(self, vnode: Vnode, contents: FileContents, why: Aborted) -> None:
        """What is dirty and not on its way goes at once, and to the quarantine afterwards."""
        extents: list[StoreExtent] = []
        while (extent := contents.take_dirty(MAX_BULK_BYTES)) is not None:
            extents.append(extent)
        for key in dict.fromkeys(extent.key for extent in extents):
            pieces = [piece for extent in extents if extent.key == key for piece in extent.written]
            self.rejects.keep_later(vnode, pieces, key, why)
