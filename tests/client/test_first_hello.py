"""A mount's first HELLO, when the server cannot take it at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from promisefs_client.identity.key import Keyring
from promisefs_client.network import session as sessions
from promisefs_client.network.servers import Server
from promisefs_client.network.session import ServerSession
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.address import Address
from promisefs_protocol.messages import Empty, GetEntryByName
from server_cell import running_cell

LEASE_S = 0.2


class Slow:
    """Acknowledges InitCallBackState3 only from the connection `takes` on."""

    def __init__(self, takes: float) -> None:
        self.takes = takes
        self.asked = 0

    async def serve(self, request: Any, bulk: bytes | None, context: int) -> Any:
        self.asked += 1
        if self.asked < self.takes:
            await trio.sleep_forever()
        return Empty(), None


@asynccontextmanager
async def session_with(slow: Slow, folder: Path) -> AsyncIterator[ServerSession]:
    async def nothing() -> None:
        pass

    async with running_cell(folder, lease_s=LEASE_S) as cell:

        async def dial(address: Address) -> trio.abc.Stream:
            return await cell.stream()

        keys, now = Keyring(0, lambda *_: cell.server_token()), trio.current_time
        yield ServerSession(Server("x"), Address("x", 1), bytes(16), "test", keys, 30.0, slow.serve, nothing, dial, now)


async def test_it_is_repeated_when_the_answer_took_longer_than_a_lease(tmp_path: Path) -> None:
    slow = Slow(3)
    async with session_with(slow, tmp_path / "store") as session, trio.open_nursery() as nursery:
        await nursery.start(session.run)
        assert (await session.call(GetEntryByName("root")))[0].root and slow.asked >= 3
        nursery.cancel_scope.cancel()


async def test_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CONNECT_TIMEOUT_S", LEASE_S * 10)
    slow = Slow(float("inf"))
    async with session_with(slow, tmp_path / "store") as session:
        with pytest.raises(Aborted) as refusal:
            await session.run()
    assert refusal.value.code == AbortCode.NO_CALLBACKS and slow.asked >= 2
