"""Has the kernel believe in the true size of an open file.

If it believes in less: beyond that end a mapping gets SIGBUS, what is stored into its last page there is never written
back, and a read that overlaps with another change ends early. Nothing makes the kernel ask: a fault sends a READ at
most, and an answer to GETATTR may be thrown away (`kernel_size`). So it is shown the last byte (`Notifier.store`).

If it believes in more: a read that overlaps with another change shows zeros there, and a mapping reaches beyond the
end. What it believes in becomes smaller only by attributes that it asked for. So it is made to ask (`Notifier.ask`).

This is done before a break is acknowledged, when promises have been renewed, when a file is opened; and, for what grew,
when the kernel asks for attributes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio
from promisefs_protocol.abort import Aborted
from promisefs_protocol.messages import FetchData

from promisefs_client.errors import ServerUnavailable
from promisefs_client.network.cell import Cell
from promisefs_client.vnodes.vnode import Vnode
from promisefs_client.vnodes.vnode_table import KernelWork

log = logging.getLogger(__name__)

ASK_TRIES = 10
ASK_AGAIN_S = 0.002
"""It throws the answer away while a write here makes the file longer, which takes a moment; and while a truncation is
under way here, which may take long, but brings the size with it."""


async def correct_size(cell: Cell, vnode: Vnode, hint: int = 0) -> None:
    """Have the kernel believe in the size that the file has. `hint`: a break said that it reaches so far by now."""
    await show_end(cell, vnode, hint)
    await cut_end(cell, vnode)


async def show_end(cell: Cell, vnode: Vnode, hint: int = 0) -> None:
    """Show the kernel the file's last byte if it reaches further than the kernel may believe."""
    if vnode.append_opens:
        # What is being appended lies in the kernel's pages at its own idea of the end: the byte might get into it.
        await _have_asked(cell, vnode, lambda: vnode.size > vnode.kernel_size.least)
        return
    while vnode.opens and (end := max(vnode.size, hint)) > vnode.kernel_size.least:
        hint = 0
        byte = _known(cell, vnode, end)
        if not byte:
            fetched = await _fetch(cell, vnode, end)
            if fetched is None:
                return
            byte = fetched
            if not byte or vnode.size != end or _known(cell, vnode, end) not in (b"", byte):
                continue  # broken, cut or written meanwhile
        contents = vnode.contents
        # A break that comes from here on has the kernel drop the byte after it has taken it in (`KernelCaches`).
        vnode.kernel_size.reaches(end)
        vnode.shown_at = end - 1
        if contents is not None:
            contents.given(end - 1, byte)
        await cell.kernel.store_byte(vnode.ino, end - 1, byte)
        if vnode.size < end:  # cut here before the kernel took it in
            await cell.drop([KernelWork(vnode.ino, True, False, 0)])
    await cell.kernel.byte_taken(vnode.ino)  # another task may be showing it


async def cut_end(cell: Cell, vnode: Vnode) -> None:
    """Have the kernel ask for the size if it may believe in a larger one."""
    await _have_asked(cell, vnode, lambda: vnode.size < vnode.kernel_size.most)


async def _have_asked(cell: Cell, vnode: Vnode, needed: Callable[[], bool]) -> None:
    """Have the kernel ask for the size as long as that is needed, but not for ever."""
    for tried in range(ASK_TRIES):
        if not vnode.opens or not needed():
            return
        if tried:
            await trio.sleep(ASK_AGAIN_S * tried)
        believed = await cell.kernel.ask(vnode.ino, vnode.fid.uniquifier)
        if believed is None:
            return
        vnode.kernel_size.believes(believed)
    log.debug("%s: the kernel goes on believing in %d bytes", vnode.fid, vnode.kernel_size.most)


def _known(cell: Cell, vnode: Vnode, end: int) -> bytes:
    """The last byte, if it is here and may be shown; else nothing."""
    contents = vnode.contents
    if contents is None or not (cell.valid(vnode) or contents.is_dirty_at(end - 1)):
        return b""
    return bytes(contents.read(end - 1, 1, end) or b"")


async def _fetch(cell: Cell, vnode: Vnode, end: int) -> bytes | None:
    """The last byte from the server; nothing if another break came meanwhile, None if it cannot be had."""
    try:
        async with cell.ask(FetchData(vnode.fid, end - 1, 1)) as answer:
            entry = answer.reply.entry
            cell.table.install(entry, answer.mark)
            byte: bytes = answer.bulk or b""
    except (Aborted, ServerUnavailable) as error:
        log.info("%s grew, but its new end cannot be fetched: %s", vnode.fid, error)
        return None
    cell.drop_stale_later()
    if cell.valid(vnode):
        return byte
    return b"" if entry.promise_s else None  # without a promise nobody tells us when to drop the byte
