"""What `promisefs fs flush` asks of a mount's process: to know nothing of a file any more."""

from __future__ import annotations

from typing import Any

from promisefs_protocol.messages import Break, Changed

from promisefs_client.names.mount_points import MountPoints
from promisefs_client.network.cell import Cell

from .control_server import Command
from .fs_commands import errors_in_words, names_in


class Flushing:
    def __init__(self, cell: Cell, mount_points: MountPoints) -> None:
        self._cell = cell
        self._mount_points = mount_points

    @property
    def commands(self) -> dict[str, Command]:
        return {"flush": self.flush}

    async def flush(self, args: dict[str, Any]) -> None:
        """Forget what is cached of `path`, here and in the kernel. What is not stored yet stays."""
        path = args["path"]
        with errors_in_words(path or "/"):
            vnode = await self._mount_points.vnode_at(names_in(path))
        everything = Break(vnode.fid, Changed.STATUS | Changed.DATA, vnode.status.data_version, vnode.status.size)
        work, _ = self._cell.table.break_promises(vnode.server, [everything])
        await self._cell.drop(work)
