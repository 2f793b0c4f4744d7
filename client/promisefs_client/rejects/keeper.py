"""Keeps bytes in the quarantine before they are thrown away.

Whoever throws bytes away has them kept first and goes on only if that worked. Bytes that must go at once, since the
lock under which they were written is lost, are kept afterwards (`keep_later`): a mount that is killed at that moment
loses them.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import trio
from promisefs_protocol.abort import Aborted
from promisefs_protocol.observe import tracing
from promisefs_protocol.observe.tracing import tell

from promisefs_client.control.open_files import known_paths
from promisefs_client.identity.key import Key
from promisefs_client.network.cell import Cell
from promisefs_client.vnodes.vnode import Vnode

from .quarantine import Quarantine
from .reject import Reject

log = logging.getLogger(__name__)

Piece = tuple[int, bytes | bytearray]
"""Offset in the file, and the bytes."""


@dataclass(slots=True)
class Event:
    """What happened to one file: its rejects belong together."""

    name: str
    path: str
    is_logged: bool = False


class RejectKeeper:
    def __init__(self, cell: Cell, quarantine: Quarantine, source: str) -> None:
        self._cell = cell
        self.quarantine = quarantine
        self.source = source
        """What was mounted, by which rejects are found again."""
        self.bytes_kept = 0
        """In the quarantine since the mount began, whatever became of them there."""
        self.failures = 0
        """How often something could not be kept."""

    def event(self, vnode: Vnode) -> Event:
        """Something happens to a file. The name that it is known by now is noted."""
        path = known_paths(self._cell.table, [vnode])[vnode.fid]
        return Event(secrets.token_hex(4), path.decode("utf-8", "surrogateescape"))

    async def keep(self, vnode: Vnode, event: Event, pieces: Sequence[Piece], key: Key | None, why: Aborted) -> None:
        """Return when the pieces are on disk. Raise OSError. Not cancelled: it takes as long as the local disk does."""
        if not pieces:
            return
        status = vnode.status
        uid = (key or self._cell.keys.own).uid
        reject = Reject(
            event.name, self.source, event.path, str(vnode.fid), vnode.ino, uid, time.time_ns(), why.errno, str(why),
            status.data_version, status.mtime_ns, tuple((offset, len(data)) for offset, data in pieces),
        )  # fmt: skip
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.quarantine.keep, reject, [data for _, data in pieces])
        except OSError as error:
            self.failures += 1
            log.error("%s: %s cannot be kept in the quarantine: %s", vnode.fid, _described(pieces), error)
            raise
        self.bytes_kept += reject.size_bytes
        level = logging.DEBUG if event.is_logged else logging.WARNING
        event.is_logged = True
        message, what = "%s (%s): %s not stored (%s): kept as reject %s", _described(pieces)
        about = {"fid": vnode.fid, "path": event.path, "server": vnode.server.name, "bytes": reject.size_bytes}
        told = (vnode.fid, event.path, what, why, event.name)
        tell(log, level, tracing.Event.STORE_REFUSED, message, *told, **about, reject=event.name, reason=why)

    def keep_later(self, vnode: Vnode, pieces: Sequence[Piece], key: Key | None, why: Aborted) -> None:
        """The pieces have been thrown away already."""
        if pieces:
            self._cell.start(self._keep_or_log, vnode, self.event(vnode), pieces, key, why)

    async def _keep_or_log(
        self, vnode: Vnode, event: Event, pieces: Sequence[Piece], key: Key | None, why: Aborted
    ) -> None:
        try:
            await self.keep(vnode, event, pieces, key, why)
        except OSError:
            return  # logged and counted


def _described(pieces: Iterable[Piece]) -> str:
    ranges = [f"{offset}-{offset + len(data)}" for offset, data in pieces]
    more = f" and {len(ranges) - 4} more ranges" if len(ranges) > 4 else ""
    return f"bytes {', '.join(ranges[:4])}{more}"
