"""What a server counts, and whom it says that it waits for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from promisefs_protocol.abort import Aborted
from promisefs_protocol.messages import GetStatistics
from server_cell import Cell, in_background, settled


async def report(cell: Cell) -> dict[str, Any]:
    return await cell.server.statistics.report()


async def test_calls_are_counted_with_their_failures(cell: Cell) -> None:
    a = await cell.connected()
    made = await a.create(b"f")
    await a.stat(made.fid)
    with pytest.raises(Aborted):
        await a.create(b"f")
    calls = (await report(cell))["call_latency"]
    assert calls["FS.CreateFile"]["started"] == sum(calls["FS.CreateFile"]["buckets"]) == 2
    assert calls["FS.CreateFile"]["failures"] == {"EXIST": 1}
    assert calls["FS.FetchStatus"]["started"] >= 1 and not calls["FS.FetchStatus"]["failures"]


async def test_breaks_wait_on_whom(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    fid = (await a.create(b"f")).fid
    await b.stat(fid)
    b.acknowledge = trio.Event()
    async with in_background(a.store(fid, b"x")) as storing:
        await trio.sleep(0.05)
        state = await report(cell)
        waited_for, other = state["clients"]
        assert (waited_for["uuid"], waited_for["breaks_waiting"]) == (b.uuid.hex(), 1)
        assert waited_for["longest_break_s"] >= 0.05
        assert (other["uuid"], other["breaks_waiting"], other["longest_break_s"]) == (a.uuid.hex(), 0, 0)
        assert (state["breaks_waiting"], state["calls_waiting"]) == (1, 1)
        b.acknowledge.set()
        await settled()
        assert storing.done
    state = await report(cell)
    assert (state["breaks_waiting"], state["calls_waiting"], state["breaks"]) == (0, 0, 1)
    for latency in ("break_latency", "wait_latency"):
        assert sum(state[latency]["buckets"]) == 1 and state[latency]["total_s"] >= 0.05


async def test_the_store_and_its_volumes(cell: Cell) -> None:
    a = await cell.connected()
    fid = (await a.create(b"f")).fid
    await a.store(fid, b"12345", sync=True)
    state = await report(cell)
    (volume,) = state["store"]["volumes"]
    assert (volume["name"], volume["files"], volume["bytes"]) == ("root", 2, 5)
    assert state["store"]["transactions"] > 2 and state["store"]["wal_bytes"] > 0
    assert state["commit_latency"]["started"] >= 1 and state["file_sync_latency"]["started"] == 1
    assert state["clients_known"] == state["clients_connected"] == 1 and state["promises"] >= 1


async def test_asked_through_the_control_socket_only(cell: Cell) -> None:
    a = await cell.connected()
    with pytest.raises(Aborted):
        await a.call(GetStatistics())
    _, statistics = await cell.administer_with_bulk(GetStatistics())
    assert statistics is not None and json.loads(statistics)["clients_known"] == 1
