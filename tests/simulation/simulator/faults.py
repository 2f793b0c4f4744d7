"""What goes wrong in a history, and what kernels do of their own accord."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from .plan import Fault

if TYPE_CHECKING:
    from .run import Cell

DISTURBANCES = ("shrink", "flush", "wall_clock")
"""Faults that are none: nobody's call may fail for them."""


class Faults:
    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._world = cell.world
        self._network = cell.network

    async def inject(self, fault: Fault) -> None:
        await trio.sleep(fault.at_s)
        self._cell.history.note("fault", f"{fault.kind}{fault.args}")
        await getattr(self, "_" + fault.kind)(*fault.args)

    async def heal(self) -> None:
        """Nothing is wrong from now on."""
        for link in self._network.links():
            link.unblock()
        for server in self._cell.servers:
            if not server.running:
                await server.start()

    # The network

    async def _cut(self, client: int, server: int) -> None:
        """All connections between the two break."""
        self._network.link(f"c{client}", f"server{server}").cut()

    async def _block(self, client: int, server: int, seconds: float, up: bool, down: bool) -> None:
        """Nothing gets through in one direction or both."""
        self._network.link(f"c{client}", f"server{server}").block(seconds, up, down)

    async def _stall(self, client: int, server: int, seconds: float, then_cut: bool) -> None:
        """What the server sends on one connection stays under way for a while, then perhaps the connection breaks."""
        link = self._network.link(f"c{client}", f"server{server}")
        connection = link.stall(seconds)
        if then_cut and connection is not None:
            await trio.sleep(seconds)
            link.cut(connection)

    # Servers

    async def _kill(self, server: int, down_s: float, lose_state: bool) -> None:
        """kill -9; started again after a while."""
        machine = self._cell.servers[server]
        if machine.running:
            machine.kill()
            await trio.sleep(down_s)
            self._cell.history.note("fault", f"{machine.name} starts again")
            await machine.start()

    async def _restart(self, server: int, down_s: float, lose_state: bool) -> None:
        """A clean shutdown and a start."""
        machine = self._cell.servers[server]
        if machine.running:
            await machine.stop()
            if lose_state:
                machine.forget_callbacks()
            await trio.sleep(down_s)
            self._cell.history.note("fault", f"{machine.name} starts again")
            await machine.start()

    # Clients

    async def _crash(self, client: int) -> None:
        """A client's machine is gone for good."""
        machine = self._cell.clients[client]
        if machine.alive:
            machine.crash()

    async def _shrink(self, client: int) -> None:
        """A client's kernel needs memory."""
        machine = self._cell.clients[client]
        if machine.alive:
            machine.names.shrink()

    async def _flush(self, client: int) -> None:
        """A client's kernel writes some dirty page back of its own accord."""
        machine = self._cell.clients[client]
        if machine.alive:
            for inode in list(machine.core.inodes.values()):
                machine.nursery.start_soon(machine.pages.flusher, inode)

    async def _wall_clock(self, jump_ns: int) -> None:
        """Every machine's wall clock jumps."""
        self._world.wall_offset_ns += jump_ns
