"""What `promisefs fs whereis` and `examine` ask of a mount's process: which volume and server a file is on."""

from __future__ import annotations

from typing import Any

from promisefs_protocol.messages import GetVolumeStatus, SetVolumeStatus

from promisefs_client.errors import ExitCode, UserError
from promisefs_client.names.mount_points import MountPoints
from promisefs_client.network.cell import Cell

from .control_server import Command
from .fs_commands import errors_in_words, names_in


class Examination:
    def __init__(self, cell: Cell, mount_points: MountPoints) -> None:
        self._cell = cell
        self._mount_points = mount_points

    @property
    def commands(self) -> dict[str, Command]:
        return {"whereis": self.whereis, "examine": self.examine, "setquota": self.set_quota}

    async def whereis(self, args: dict[str, Any]) -> dict[str, Any]:
        """Return fid and volume of what `path` leads to, mount points followed, and the server that has it."""
        path = args["path"]
        with errors_in_words(path or "/"):
            vnode = await self._mount_points.vnode_at(names_in(path))
            volume = vnode.volume
            return {
                "fid": str(vnode.fid),
                "volume": volume.number,
                "name": volume.name,
                "server": str(self._cell.sessions[volume.server].address),
            }

    async def examine(self, args: dict[str, Any]) -> dict[str, Any]:
        """The same, and what the server says of the volume; sizes in KiB, as AFS has them."""
        found = await self.whereis(args)
        with errors_in_words(args["path"] or "/"):
            status, _ = await self._cell.call(GetVolumeStatus(found["volume"]))
        return {
            **found,
            "name": status.name,
            "available_kib": status.blocks_available * status.block_bytes // 1024,
            "total_kib": status.blocks * status.block_bytes // 1024,
            "files": status.files - status.files_free,
            "quota_kib": status.quota // 1024,
            "used_kib": -(-status.used // 1024),
            "read_only": status.read_only,
        }

    async def set_quota(self, args: dict[str, Any]) -> None:
        """Bound the volume of `path` to `kib` KiB; 0: not at all."""
        path, kib = args["path"], args["kib"]
        if type(kib) is not int or not 0 <= kib < 1 << 52:
            raise UserError("that is no quota", ExitCode.USAGE)
        with errors_in_words(path or "/"):
            vnode = await self._mount_points.vnode_at(names_in(path))
            await self._cell.call(SetVolumeStatus(vnode.volume.number, kib * 1024))
