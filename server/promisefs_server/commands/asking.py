"""Has a server carry out a command, or does it on the store if none runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.transport import ConnectionLost, Peer, Reply

from promisefs_server.administration import control_socket
from promisefs_server.administration.stopped import StoppedServer
from promisefs_server.errors import StoreError, StoreLocked

CHANGING_HANDS_S = 10.0
"""How long a server that is starting or ending is waited for."""
RETRY_S = 0.1


def say(text: str) -> None:
    click.echo(f"promisefsd: {text}", err=True)


async def ask(directory: Path, request: Any) -> Any:
    """Have the server that uses the store, or else this process, carry out a request. Return the reply."""
    deadline_s = trio.current_time() + CHANGING_HANDS_S
    while True:
        try:
            stream = await control_socket.connect(directory)
            if stream is not None:
                return await _ask_server(stream, request)
            with StoppedServer(directory, say) as stopped:
                return await stopped.carry_out(request)
        except StoreLocked:
            if trio.current_time() > deadline_s:
                raise
        except Aborted as refusal:
            if refusal.code != AbortCode.SHUTTING_DOWN or trio.current_time() > deadline_s:
                raise
        await trio.sleep(RETRY_S)


async def _ask_server(stream: trio.SocketStream, request: Any) -> Any:
    peer = Peer(stream, _refuse, "the server")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.run)
        try:
            reply, _ = await peer.call(request)
        except ConnectionLost:
            raise StoreError("the server ended before it answered: look whether it was done") from None
        finally:
            nursery.cancel_scope.cancel()
    return reply


async def _refuse(request: Any, bulk: bytes | None, context: int) -> Reply:
    raise Aborted(AbortCode.NOT_INTRODUCED, "commands serve nothing")
