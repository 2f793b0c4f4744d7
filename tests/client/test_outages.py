"""What the log says of a server that is away: each thing once, and no error for what a restart explains."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from promisefs_client.identity.key import Keyring
from promisefs_client.network import session as sessions
from promisefs_client.network.servers import Server
from promisefs_client.network.session import Refused, ServerSession
from promisefs_protocol.address import Address
from promisefs_protocol.messages import Empty, GetEntryByName
from server_cell import running_cell

TRIES = 5


class Door:
    """Where the session dials: into the server, or there is nobody, or somebody who hangs up at once."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.state = "open"
        self.tried, self.turn = trio.open_memory_channel[None](100)
        self.streams: list[trio.abc.Stream] = []

    async def dial(self, address: Address) -> trio.abc.Stream:
        self.tried.send_nowait(None)
        if self.state == "nobody":
            raise ConnectionRefusedError("Connection refused")
        if self.state == "hangs up":
            ours, theirs = trio.testing.memory_stream_pair()
            await theirs.aclose()
            return ours
        self.streams.append(await self._server.stream())
        return self.streams[-1]

    async def shut(self, state: str) -> None:
        """Cut what is there and let the session come often enough."""
        self.state = state
        for stream in self.streams:
            await stream.aclose()
        self.streams.clear()
        with trio.fail_after(30):
            for _ in range(TRIES):
                await self.turn.receive()


@asynccontextmanager
async def session_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Door, ServerSession]]:
    monkeypatch.setattr(sessions, "LONGEST_RETRY_S", 0.05)

    async def acknowledge(request: Any, bulk: bytes | None, context: int) -> Any:
        return Empty(), None

    async def nothing() -> None:
        pass

    async with running_cell(tmp_path) as server:
        door = Door(server)
        keys, now = Keyring(0, lambda *_: server.server_token()), trio.current_time
        session = ServerSession(
            Server("x"), Address("x", 1), bytes(16), "test", keys, 30.0, acknowledge, nothing, door.dial, now
        )
        yield door, session


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [
        (record.levelno, record.getMessage())
        for record in caplog.records
        if record.name == "promisefs_client.network.session"
    ]


async def test_an_outage_is_logged_once_for_each_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with session_of(tmp_path, monkeypatch) as (door, session), trio.open_nursery() as nursery:
        await nursery.start(session.run)
        for _ in range(2):
            caplog.clear()
            await door.shut("hangs up")
            await door.shut("nobody")
            assert said(caplog) == [
                (logging.WARNING, "connection to x:1 lost"),
                (logging.INFO, "x:1: x:1 closed the connection"),
                (logging.INFO, "x:1: Connection refused"),
            ]
            door.state = "open"
            with trio.fail_after(30):
                await session.call(GetEntryByName("root"))
        nursery.cancel_scope.cancel()


async def test_a_stranger_that_hangs_up_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing says that it is a promisefs server."""
    async with session_of(tmp_path, monkeypatch) as (door, session):
        door.state = "hangs up"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.keep_trying)
            await door.shut("hangs up")
            nursery.cancel_scope.cancel()
        text = "x:1: x:1 closed the connection: is a promisefs server there? If it speaks TLS: -o tls"
        assert said(caplog) == [(logging.ERROR, text)]
        with pytest.raises(Refused, match="is a promisefs server there"):
            await session.run()
