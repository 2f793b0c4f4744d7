"""How much room is left where files are written: near its end writes go through, so that `write` itself fails.

A server says how much there is (GetVolumeStatus: of its disk, or of the volume's quota). What is not stored yet comes
off it, and from then on every byte that is written here, also one that only replaces another. It is asked again while
bytes are written, every ASK_EVERY_S at most, in the background. So what other clients write in that time is not known
of; NEAR_BYTES is for them, and for what servers keep for themselves. A write that turns out not to fit all the same is
refused when it is stored, as any other (`refusing`).
"""

from __future__ import annotations

import math

import trio
from promisefs_protocol.abort import Aborted
from promisefs_protocol.messages import GetVolumeStatus

from promisefs_client.errors import FsError, ServerUnavailable
from promisefs_client.network.cell import Cell
from promisefs_client.vnodes.volumes import Volume

from .pagecache import PageCache

ASK_EVERY_S = 2.0
NEAR_BYTES = 32 << 20


class Rooms:
    """Those of all volumes."""

    def __init__(self, cell: Cell, cache: PageCache) -> None:
        self._cell = cell
        self._cache = cache
        self._left_bytes: dict[Volume, int] = {}
        self._asked_s: dict[Volume, float] = {}

    def take(self, volume: Volume, size_bytes: int) -> bool:
        """So many bytes are being written. Return whether the end of the room is near."""
        now_s = trio.current_time()
        due = now_s - self._asked_s.get(volume, -math.inf) >= ASK_EVERY_S
        if due and self._cell.sessions[volume.server].connected:
            self._asked_s[volume] = now_s
            self._cell.start(self._ask, volume)
        left_bytes = self._left_bytes.get(volume)
        if left_bytes is None:
            return False
        self._left_bytes[volume] = left_bytes - size_bytes
        return left_bytes - size_bytes < NEAR_BYTES

    async def _ask(self, volume: Volume) -> None:
        try:
            status, _ = await self._cell.call(GetVolumeStatus(volume.number))
        except (Aborted, FsError, ServerUnavailable):
            return  # who may write but not look, say; what is known stays
        self._left_bytes[volume] = status.blocks_available * status.block_bytes - self._cache.dirty_bytes
