"""What the cell of a history looks like: how many servers, and where in it the directories of a history are.

A directory is one in the root volume, or the root of a volume of its own that hangs at a mount point. The root volume
is on the first server.
"""

from __future__ import annotations

from typing import NamedTuple

from promisefs_client.options import Source
from promisefs_client.vnodes.vnode import VOLUME_SHIFT
from promisefs_protocol.address import Address
from promisefs_protocol.cell_file import CellFile, CellServer
from promisefs_server.store.volumes import SERVER_BITS

Path = tuple[bytes, ...]

DIRECTORIES: tuple[Path, ...] = ((b"d0",), (b"d1",))
"""Always there. Everything else happens in them."""

CELL_NAME = "simulated"
PORT = 1
ROOT = "root"


class Home(NamedTuple):
    """Where a directory and the files in it are."""

    server: int
    volume: str


class Layout(NamedTuple):
    servers: int
    homes: tuple[Home, Home]
    """Of each of DIRECTORIES."""

    def home(self, path: Path) -> Home:
        return self.homes[DIRECTORIES.index(path[:1])]

    @property
    def is_cell(self) -> bool:
        """Whether its servers have a cell file; a server alone has none."""
        return self.servers > 1

    @property
    def cell_file(self) -> CellFile:
        return CellFile(CELL_NAME, tuple(CellServer(number, name, PORT) for number, name in enumerate(self.names)))

    @property
    def names(self) -> tuple[str, ...]:
        """What the servers are called."""
        return tuple(f"server{number}" for number in range(self.servers))

    @property
    def source(self) -> Source:
        """What clients mount."""
        return Source(CELL_NAME if self.is_cell else None, tuple(Address(name, PORT) for name in self.names), ROOT)

    def volumes_of(self, server: int) -> tuple[str, ...]:
        """The volumes of a server that are not the root volume."""
        return tuple(home.volume for home in self.homes if home.server == server and home.volume != ROOT)


def server_of(ino: int) -> int:
    """The server that has a file, by its inode number: that made its volume, for none moves here."""
    return ino >> VOLUME_SHIFT + SERVER_BITS


_IN_ROOT = Home(0, ROOT)

ALONE = Layout(1, (_IN_ROOT, _IN_ROOT))
"""One server, one volume."""
LAYOUTS = (
    Layout(1, (_IN_ROOT, Home(0, "v1"))),
    Layout(2, (_IN_ROOT, Home(1, "v1"))),
    Layout(2, (Home(1, "v0"), _IN_ROOT)),
    Layout(2, (Home(1, "v0"), Home(0, "v1"))),
    Layout(2, (Home(1, "v0"), Home(1, "v1"))),
    Layout(3, (Home(1, "v0"), Home(2, "v1"))),
    Layout(3, (_IN_ROOT, Home(2, "v1"))),
)
