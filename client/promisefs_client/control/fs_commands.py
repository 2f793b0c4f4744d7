"""What `promisefs fs` asks of a mount's process. Paths are below the mount's root, without symlinks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from promisefs_protocol.abort import Aborted
from promisefs_protocol.fields import FieldError
from promisefs_protocol.ids import MAX_NAME_BYTES

from promisefs_client.errors import FsError, ServerUnavailable, UserError
from promisefs_client.names.mount_points import MountPoints
from promisefs_client.vnodes.vnode import Vnode

from .control_server import Command


class FsCommands:
    def __init__(self, mount_points: MountPoints) -> None:
        self._mount_points = mount_points

    @property
    def commands(self) -> dict[str, Command]:
        return {"mkmount": self.mkmount, "lsmount": self.lsmount, "rmmount": self.rmmount}

    async def mkmount(self, args: dict[str, Any]) -> None:
        """`path` is to stand for the volume of name `volume`."""
        with errors_in_words(args["path"]):
            directory, name = await self._place(args["path"])
            await self._mount_points.make(directory, name, args["volume"])

    async def lsmount(self, args: dict[str, Any]) -> dict[str, Any]:
        """Return the name of the `volume` that `path` stands for."""
        with errors_in_words(args["path"]):
            directory, name = await self._place(args["path"])
            mount_point = await self._mount_points.find(directory, name)
            return {"volume": await self._mount_points.target(mount_point)}

    async def rmmount(self, args: dict[str, Any]) -> None:
        """`path` is to stand for nothing any more."""
        with errors_in_words(args["path"]):
            directory, name = await self._place(args["path"])
            await self._mount_points.remove(directory, name)

    async def _place(self, path: str) -> tuple[Vnode, bytes]:
        """The directory that the path's last name is in, and that name."""
        names = names_in(path)
        if not names:
            raise UserError("the mount's own root is no mount point")
        return await self._mount_points.directory_at(names[:-1]), names[-1]


def names_in(path: str) -> list[bytes]:
    """The names in a path from the mount's root. Raise UserError."""
    names = [os.fsencode(name) for name in path.split("/") if name]
    if any(len(name) > MAX_NAME_BYTES or name in (b".", b"..") or b"\0" in name for name in names):
        raise UserError(f"{path!r} is not a path that can be in a mount")
    return names


@contextmanager
def errors_in_words(path: str) -> Iterator[None]:
    try:
        yield
    except (Aborted, FsError) as error:
        raise UserError(f"{path!r}: {os.strerror(error.errno)}") from None
    except (ServerUnavailable, FieldError) as error:
        raise UserError(f"{path!r}: {error}") from None
