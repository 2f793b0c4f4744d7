"""The administration of volumes: what the commands `promisefsd volume ...` ask for, but moves.

Done by the server when it runs, over its control socket, and else by the command itself. After a change of what
volumes there are or what they are called no client may go by what it knew: `announce` is called in one step with the
commit, and the change is answered when that has returned and the change is durable. Only then is anything deleted,
else power loss could bring a volume back without its bytes.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import trio
from promisefs_protocol.messages import (
    CreateVolume,
    Empty,
    ListVolumes,
    ListVolumesReply,
    RemoveVolume,
    RenameVolume,
    SetVolume,
    VolumeEntry,
    VolumeInfo,
)

from promisefs_server.operations.parts import now_ns, volume_entry
from promisefs_server.store.database import BUSY_TIMEOUT_S
from promisefs_server.store.store import Store
from promisefs_server.store.volume_remains import VolumeRemains
from promisefs_server.store.volumes import VNODE_BITS, Volume, VolumeState

MAX_PAGE_VOLUMES = 256
_SIZES = (
    f"SELECT vnode >> {VNODE_BITS}, count(*), total(CASE WHEN mode & 0xF000 = 0x8000 THEN size ELSE 0 END)"
    " FROM vnodes WHERE vnode BETWEEN ? AND ? GROUP BY 1"
)


class Administration:
    def __init__(
        self, store: Store, remains: VolumeRemains,
        announce: Callable[[], Awaitable[None]], make_durable: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        """`announce` returns when no client uses what it knew before, `make_durable` when all commits are on disk."""
        self._store = store
        self._remains = remains
        self._announce = announce
        self._make_durable = make_durable
        self._table: dict[type, Callable[[Any], Awaitable[Any]]] = {
            CreateVolume: self.create,
            ListVolumes: self.list,
            RemoveVolume: self.remove,
            RenameVolume: self.rename,
            SetVolume: self.set,
        }

    def serves(self, request: Any) -> bool:
        return type(request) in self._table

    async def carry_out(self, request: Any) -> Any:
        """Return the reply. Raise Aborted, OSError, sqlite3.Error."""
        return await self._table[type(request)](request)

    async def create(self, request: CreateVolume) -> VolumeEntry:
        volume = self._store.volumes.create(request.name, os.getuid(), os.getgid(), now_ns())
        await self._make_durable()
        return volume_entry(self._store, volume)

    async def remove(self, request: RemoveVolume) -> Empty:
        volume = self._store.volumes.remove(request.name)
        await self._announce()
        await self._make_durable()
        self._remains.add(volume)
        return Empty()

    async def rename(self, request: RenameVolume) -> VolumeEntry:
        entry = volume_entry(self._store, self._store.volumes.rename(request.name, request.new_name))
        await self._announce()
        await self._make_durable()
        return entry

    async def set(self, request: SetVolume) -> VolumeEntry:
        volumes = self._store.volumes
        volume = volumes.by_name(request.name)
        if request.quota is not None:
            volume = volumes.set_quota(request.name, request.quota)
        if request.read_only is not None:
            volume = volumes.set_read_only(request.name, request.read_only)
            await self._announce()
        await self._make_durable()
        return volume_entry(self._store, volume)

    async def list(self, request: ListVolumes) -> ListVolumesReply:
        there = self._store.volumes.in_state(VolumeState.HERE, VolumeState.LEAVING, VolumeState.MOVED)
        there = [volume for volume in there if volume.volume > request.after]
        page, more = there[:MAX_PAGE_VOLUMES], len(there) > MAX_PAGE_VOLUMES
        found = await trio.to_thread.run_sync(sizes, self._store.database.path, page)
        infos = (
            VolumeInfo(
                volume.name,
                volume.volume,
                *found.get(volume.volume, (0, 0)),
                _moved_to(volume),
                volume.quota_bytes,
                volume.read_only,
            )
            for volume in page
        )
        return ListVolumesReply(tuple(infos), more)


def _moved_to(volume: Volume) -> str:
    match volume.state:
        case VolumeState.MOVED:
            return f"server {volume.other_number}"
        case VolumeState.LEAVING:
            return f"server {volume.other_number}, unfinished: move it again"
    return ""


def sizes(path: Path, volumes: Sequence[Volume]) -> dict[int, tuple[int, int]]:
    """(vnodes, bytes) of volumes that have any. For threads: counting reads every row."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        found: dict[int, tuple[int, int]] = {}
        for volume in volumes:
            for number, count, size in connection.execute(_SIZES, volume.keys):
                found[number] = (count, min(int(size), 2**64 - 1))
        return found
    finally:
        connection.close()
