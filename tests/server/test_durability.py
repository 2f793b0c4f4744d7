"""The WAL stays small however busy the server is."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from promisefs_server.store import database, durability
from server_cell import Client, running_cell


async def test_the_wal_begins_anew_though_commits_never_pause(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "WAL_BYTES", 256 << 10)
    monkeypatch.setattr(durability, "CHECKPOINT_POLL_S", 0.001)

    # The thread is overtaken by other commits every time: at the worst that comes to nothing.
    monkeypatch.setattr(durability, "_checkpoint", lambda path: None)

    async def create(client: Client, task: int) -> None:
        for i in range(100):
            await client.create(b"%d-%d" % (task, i))

    async with running_cell(folder, limit_s=20) as cell:
        a = await cell.connected()
        wal = cell.server.store.database.wal_path
        async with trio.open_nursery() as creating:
            for task in range(8):
                creating.start_soon(create, a, task)
            shrunk = largest = 0
            while not shrunk and creating.child_tasks:
                await trio.sleep(0.001)
                size = wal.stat().st_size
                shrunk, largest = largest - size if size < largest else 0, max(largest, size)
            creating.cancel_scope.cancel()
        assert shrunk
