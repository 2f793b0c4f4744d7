"""Connections to the control socket: frames as everywhere, no HELLO; administering volumes and users, statistics."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.messages import METHOD_OF_REQUEST, CreateVolume, Empty, GetStatistics
from promisefs_protocol.transport import Peer, Reply

from promisefs_server.identity.calls import Asker
from promisefs_server.identity.contexts import Contexts
from promisefs_server.identity.identity import SERVER

from .administration import Administration

if TYPE_CHECKING:
    from promisefs_server.service import Fileserver

MAX_CONTROL_CONNECTIONS = 16


class ControlSessions:
    def __init__(self, server: Fileserver, administration: Administration) -> None:
        self._server = server
        self._administration = administration
        self._count = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection to its end. Raises nothing but trio.Cancelled."""
        if self._count >= MAX_CONTROL_CONNECTIONS:
            await trio.aclose_forcefully(stream)
            return
        self._count += 1
        try:
            await Peer(stream, self._handle, "control").run()
        finally:
            self._count -= 1

    async def _handle(self, request: Any, bulk: bytes | None, context: int) -> Reply:
        if self._server.draining:
            raise Aborted(AbortCode.SHUTTING_DOWN, "the server is shutting down")
        if isinstance(request, GetStatistics):
            return Empty(), json.dumps(await self._server.statistics.report()).encode()
        if self._server.identity_calls.serves(request):
            whoever_runs_it = Asker(SERVER, Contexts(), "control")
            return await self._server.identity_calls.carry_out(whoever_runs_it, request), None
        if not self._administration.serves(request):
            raise Aborted(
                AbortCode.NOT_INTRODUCED, f"{METHOD_OF_REQUEST[type(request)].name} is no call for the control socket"
            )
        later = partial(self._carry_out, request)
        growing = isinstance(request, CreateVolume)
        return await self._server.carry_out(later, later, f"control: {type(request).__name__}", growing=growing)

    async def _carry_out(self, request: Any) -> Reply:
        return await self._administration.carry_out(request), None
