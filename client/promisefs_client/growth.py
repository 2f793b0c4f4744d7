"""Has the kernel believe that an open file reaches as far as it does.

Beyond the end that the kernel believes in a mapping gets SIGBUS, and what is stored into its last page there is never
written back. Nothing makes the kernel ask: a fault sends a READ at most. A read asks for attributes, but the kernel
throws an answer away if it has taken an invalidation in, or another answer with attributes of the file, since it made
the request (fuse_change_attributes), and goes by the old size. So of several sizes that it was told it may believe in
any; `Vnode.told_size` is the least of them. Whenever an open file is found to reach further than that, the kernel is
shown the last byte (`Notifier.store`), which always counts: before a break is acknowledged, when promises have been
renewed, when the file is opened, and when the kernel asks for its attributes.
"""

from __future__ import annotations

import logging

from promisefs_protocol.abort import Aborted
from promisefs_protocol.messages import FetchData

from .cell import Cell
from .errors import ServerUnavailable
from .vnode import Vnode
from .vnode_table import KernelWork

log = logging.getLogger(__name__)


async def show_end(cell: Cell, vnode: Vnode, hint: int = 0) -> None:
    """Show the kernel the file's last byte if it reaches further than the kernel was told.

    `hint`: a break said that it reaches so far by now.
    """
    while vnode.opens and (end := max(vnode.size, hint)) > vnode.told_size:
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
        vnode.told_size = end
        vnode.shown_at = end - 1
        if contents is not None:
            contents.given(end - 1, byte)
        await cell.kernel.store_byte(vnode.ino, end - 1, byte)
        if vnode.size < end:  # cut here before the kernel took it in
            await cell.drop([KernelWork(vnode.ino, True, False, 0)])


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
