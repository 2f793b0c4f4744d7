"""What goes wrong in a history, and what kernels do of their own accord."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from unittest.mock import patch

import trio

from .network import LONGEST_NOTICE_S
from .plan import Fault
from .server_machine import ServerMachine

if TYPE_CHECKING:
    from .run import Cell

OF_SERVERS = ("cut", "linger", "block", "stall", "isolate", "kill", "restart")
"""Faults that hit one server, or what lies between it and clients."""


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
        self._cell.history.unreachable(server, f"c{client}", LONGEST_NOTICE_S)
        self._network.link(f"c{client}", f"server{server}").cut()

    async def _block(self, client: int, server: int, seconds: float, up: bool, down: bool) -> None:
        """Nothing gets through in one direction or both."""
        self._cell.history.unreachable(server, f"c{client}", seconds)
        self._network.link(f"c{client}", f"server{server}").block(seconds, up, down)

    async def _isolate(self, server: int, seconds: float) -> None:
        """Nobody reaches the server."""
        for client in range(self._cell.plan.clients):
            await self._block(client, server, seconds, True, True)

    async def _stall(self, client: int, server: int, callbacks: bool, seconds: float, then_cut: bool) -> None:
        """What the server sends on one connection stays under way for a while, then perhaps the connection breaks."""
        self._cell.history.unreachable(server, f"c{client}", seconds + then_cut * LONGEST_NOTICE_S)
        link = self._network.link(f"c{client}", f"server{server}")
        connection = link.stall(callbacks, seconds)
        if then_cut and connection is not None:
            await trio.sleep(seconds)
            link.cut(connection)

    async def _linger(self, client: int, server: int, seconds: float) -> None:
        """All connections between the two break, but what the client had sent on them still arrives, so much later."""
        self._cell.history.unreachable(server, f"c{client}", LONGEST_NOTICE_S)
        self._network.link(f"c{client}", f"server{server}").linger(seconds)

    # Servers

    async def _kill(self, server: int, down_s: float, lose_state: bool) -> None:
        """kill -9; started again after a while."""
        machine = self._cell.servers[server]
        if machine.running:
            with self._cell.history.away(server):
                machine.kill()
                await self._start_again(machine, down_s)

    async def _restart(self, server: int, down_s: float, lose_state: bool) -> None:
        """A clean shutdown and a start."""
        machine = self._cell.servers[server]
        if machine.running:
            with self._cell.history.away(server):
                await machine.stop()
                if lose_state:
                    machine.forget_callbacks()
                await self._start_again(machine, down_s)

    async def _start_again(self, machine: ServerMachine, down_s: float) -> None:
        await trio.sleep(down_s)
        self._cell.history.note("fault", f"{machine.name} starts again")
        await machine.start()

    async def _full_disk(self, server: int, seconds: float) -> None:
        """There is no room at a server for a while."""
        machine = self._cell.servers[server]
        if machine.server is None:
            return
        self._cell.history.refuses()
        ballast = machine.server.store.ballast
        with patch.object(ballast, "available_bytes", lambda: 0):
            ballast._checked_s = -math.inf
            await trio.sleep(seconds)
        ballast._checked_s = -math.inf

    async def _quota(self, server: int, volume: str, room_bytes: int, seconds: float) -> None:
        """A volume may not grow by more than that for a while."""
        machine = self._cell.servers[server]
        if machine.server is None:
            return
        self._cell.history.refuses()
        volumes = machine.server.store.volumes
        volumes.set_quota(volume, volumes.usage_bytes(volumes.by_name(volume).volume) + room_bytes)
        await trio.sleep(seconds)
        volumes.set_quota(volume, 0)

    async def _read_only(self, server: int, volume: str, seconds: float) -> None:
        """A volume takes nothing for a while."""
        machine = self._cell.servers[server]
        if machine.server is None:
            return
        self._cell.history.refuses()
        machine.server.store.volumes.set_read_only(volume, True)
        await trio.sleep(seconds)
        machine.server.store.volumes.set_read_only(volume, False)

    async def _busy_disks(self, long_s: float) -> None:
        """What is done in threads takes up to so long, twice, from now on."""
        self._world.threads.slow_down(long_s)

    # Clients

    async def _crash(self, client: int) -> None:
        """A client's machine is gone for good."""
        machine = self._cell.clients[client]
        if machine.alive:
            machine.crash()

    async def _busy_processor(self, client: int, long_s: float) -> None:
        """Processes on a client wait up to so long for their turn when an answer has come, from now on."""
        self._cell.clients[client].core.wait_for_turn(long_s)

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
