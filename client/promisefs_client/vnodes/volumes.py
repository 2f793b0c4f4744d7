"""Volumes, and which server has each. Core: no I/O.

A location is what a server said: this volume is here, and has this name. The server has every client forget everything
before it removes, renames or moves a volume. So whatever ends its promises makes its locations uncertain too:
InitCallBackState3, a lost lease; and so does a refusal with VMOVED or VNOVOL. A volume of uncertain location keeps the
server it had. If that one is there it is just called, and its answer says whether it still has the volume; else all
servers are asked.

Invariants
V1  `learn` never takes a located volume from the server that has it: two servers with one volume are a mistake of
    somebody's, and whoever came second is refused.
V2  A name is remembered only while the location of its volume is certain.
V3  Nothing of a volume is promised while its location is uncertain (`VnodeTable`). So what a server says of it in the
    same step makes it certain first.
"""

from __future__ import annotations

from collections.abc import Iterator

from promisefs_protocol.ids import Fid

from promisefs_client.network.servers import CallMark, Server


class Volume:
    """A tree of vnodes, the server that has it, and the fid of its root directory."""

    __slots__ = ("located", "name", "number", "root", "server")

    def __init__(self, number: int, name: str, root: Fid, server: Server) -> None:
        self.number = number
        self.name = name
        self.root = root
        self.server = server
        self.located = True  # the server said so, and would have told us of a change


class TwoServersHaveIt(Exception):
    """A server claims a volume that another one has."""

    def __init__(self, volume: Volume, claimant: Server) -> None:
        super().__init__(
            f"{claimant.name} says that it has volume {volume.number}, but {volume.server.name} has it: "
            "volume numbers must be unique in a cell"
        )


class Volumes:
    """The volumes that this mount has met. None is ever forgotten: their number is bounded by those of the cell."""

    def __init__(self) -> None:
        self._by_number: dict[int, Volume] = {}
        self._by_name: dict[str, Volume] = {}

    def __iter__(self) -> Iterator[Volume]:
        return iter(self._by_number.values())

    def __getitem__(self, number: int) -> Volume:
        """The volume of a fid that is known here."""
        return self._by_number[number]

    def get(self, number: int) -> Volume | None:
        return self._by_number.get(number)

    def named(self, name: str) -> Volume | None:
        """The volume of that name, if a server said so and that still counts (V2)."""
        return self._by_name.get(name)

    def learn(self, number: int, name: str, root: Fid, server: Server) -> Volume:
        """A server said that it has this volume. Raise TwoServersHaveIt (V1)."""
        volume = self._by_number.get(number)
        if volume is None:
            volume = self._by_number[number] = Volume(number, name, root, server)
        elif volume.located and volume.server is not server:
            raise TwoServersHaveIt(volume, server)
        self._forget_names(volume)
        volume.name, volume.root, volume.server, volume.located = name, root, server, True
        self._by_name[name] = volume
        return volume

    def confirm(self, volume: Volume, mark: CallMark) -> None:
        """The server has answered the marked call for the volume, so it is there."""
        if mark.server is volume.server and mark.server.unreset_since(mark):
            volume.located = True

    def lose(self, volume: Volume) -> None:
        """The location is uncertain from now on."""
        volume.located = False
        self._forget_names(volume)

    def lose_all_of(self, server: Server) -> None:
        for volume in self._by_number.values():
            if volume.server is server:
                self.lose(volume)

    def _forget_names(self, volume: Volume) -> None:
        for name in [name for name, named in self._by_name.items() if named is volume]:
            del self._by_name[name]

    def check_invariants(self) -> None:
        """Assert V2."""
        for name, volume in self._by_name.items():
            assert volume.located and volume.name == name and self._by_number[volume.number] is volume, "V2"
