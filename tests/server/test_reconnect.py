"""A host that comes back on new connections: what it did on the old ones comes before what it does on the new."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import trio
import trio.testing
from promisefs_protocol.transport import MAX_CALLS_SERVED, ConnectionLost
from promisefs_server.store.datafiles import DataFile
from server_cell import Cell, settled


async def unless_lost(call: Any, *arguments: Any) -> None:
    try:
        await call(*arguments)
    except ConnectionLost:
        return


async def test_a_store_that_waited_on_the_old_connection_does_not_overwrite_a_newer_one(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = (await a.create(b"f")).fid
    busy = [(await a.create(b"%d" % i)).fid for i in range(MAX_CALLS_SERVED)]
    for fid in busy:
        await b.stat(fid)
    b.acknowledge = trio.Event()
    for fid in busy:
        cell.nursery.start_soon(unless_lost, a.chmod, fid, 0o600)
    await settled()
    cell.nursery.start_soon(unless_lost, a.store, f, b"old")
    await settled()
    assert cell.server.store.vnodes.get(f).size == 0, "it was to wait for its turn"
    await a.connect_calls()
    await a.store(f, b"old")
    await a.store(f, b"new", sync=True)
    b.acknowledge.set()
    await settled()
    assert await a.fetch(f) == b"new"


async def test_the_new_connection_waits_for_what_is_being_written_on_the_old(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    real = DataFile.write

    def slow(file: DataFile, data: bytes, offset: int) -> None:
        assert go_on.wait(10)
        real(file, data, offset)

    a = await cell.connected()
    f = (await a.create(b"f")).fid
    monkeypatch.setattr(DataFile, "write", slow)
    cell.nursery.start_soon(unless_lost, a.store, f, b"x" * (1 << 20))
    await trio.testing.wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.connect_calls)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert nursery.child_tasks, "HELLO was answered before the old connection had ended"
        go_on.set()
    assert len(await a.fetch(f)) == 1 << 20


async def test_a_new_host_is_on_disk_before_it_is_promised_anything(cell: Cell) -> None:
    """A start after power loss waits for the hosts that the store knows."""
    durability, database = cell.server.durability, cell.server.store.database
    before = database.commits
    a = cell.client()
    await a.connect_callbacks()
    assert durability._durable_commits == database.commits == before + 1
    await a.connect_callbacks()
    assert database.commits == before + 1
