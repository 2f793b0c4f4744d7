"""Calls that wait for a server which is away: they are counted, and there is a bound."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from promisefs_client.errors import ServerUnavailable
from promisefs_client.identity.key import Keyring
from promisefs_client.network import session as sessions
from promisefs_client.network.servers import Server
from promisefs_client.network.session import ServerSession
from promisefs_protocol.address import Address
from promisefs_protocol.messages import GetEntryByName


async def nothing(*_: Any) -> Any:
    raise AssertionError("nobody calls")


async def test_calls_to_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch, autojump_clock: Any) -> None:
    monkeypatch.setattr(sessions, "MAX_WAITING", 3)
    now = trio.current_time
    keys = Keyring(0, lambda *_: None)
    session = ServerSession(Server("x"), Address("x", 1), bytes(16), "test", keys, 30.0, nothing, nothing, nothing, now)
    failed_at = []

    async def call() -> None:
        with pytest.raises(ServerUnavailable):
            await session.call(GetEntryByName("root"))
        failed_at.append(now())

    begun = now()
    assert session.longest_wait_s(begun) == 0.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.sleep(10)
        nursery.start_soon(call)
        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        assert session.waiting == 3
        assert session.longest_wait_s(now()) == pytest.approx(10)
        await call()  # no room: it does not wait
        assert failed_at == [pytest.approx(begun + 10)]
        assert session.waiting == 3
    assert failed_at[1:] == [pytest.approx(begun + 30), pytest.approx(begun + 40), pytest.approx(begun + 40)]
    assert session.waiting == 0
    assert session.timeouts == 4
