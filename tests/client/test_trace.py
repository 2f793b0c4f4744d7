"""`promisefs trace`: filters, a reader that is too slow, and what the events of a mount are."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from client_mount import World, settled
from promisefs_client.control.trace import EventQueue, trace
from promisefs_client.errors import UserError
from promisefs_protocol.observe.tracing import tracing

ALL: frozenset[str] = frozenset()


def record(event: str, fid: str | None = None) -> dict[str, Any]:
    return {"event": event} if fid is None else {"event": event, "fid": fid}


async def test_a_filter_passes_what_it_names() -> None:
    queue = EventQueue(frozenset({"call", "abort"}), frozenset({"1.2.3"}))
    for one in (record("call", "1.2.3"), record("call", "1.2.4"), record("set_dv", "1.2.3"), record("abort")):
        queue(one)
    assert queue.take(10) == [record("call", "1.2.3")]
    everything = EventQueue(ALL, ALL)
    everything(record("abort"))
    assert everything.take(10) == [record("abort")]


async def test_a_slow_reader_keeps_the_oldest_and_is_told_how_many_it_lost() -> None:
    queue = EventQueue(ALL, ALL, most=3)
    for number in range(5):
        queue(record("call", str(number)))
    assert queue.filled.is_set()
    assert queue.take(2) == [record("call", "0"), record("call", "1")]
    assert queue.take(2) == [record("call", "2"), {"event": "lost", "count": 2}]
    assert not queue.filled.is_set() and queue.take(2) == []
    queue(record("call", "5"))
    assert queue.filled.is_set() and queue.take(2) == [record("call", "5")]


@pytest.mark.parametrize("args", [{"events": ["cb_brake"]}, {"fids": ["1.2"]}, {"fids": ["/x"]}])
async def test_filters_that_nothing_passes_are_refused(args: dict[str, Any]) -> None:
    async def send(item: Any) -> None:
        raise AssertionError(item)

    with pytest.raises(UserError, match=r"there is no event|is no fid"):
        await trace(args, send)
    assert not tracing.on


async def test_what_becomes_of_a_file(world: World) -> None:
    mount = await world.mount()
    other = await world.server.connected()
    fid = (await other.create(b"f")).fid
    told: list[dict[str, Any]] = []

    async def send(items: list[dict[str, Any]]) -> None:
        told.extend(items)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trace, {"fids": [str(fid)]}, send)
        await settled()
        vnode = await mount.open(b"f")
        await mount.read(vnode)
        await other.store(fid, b"1")
        await mount.read(vnode)
        await other.unlink(b"f")
        await settled()
        nursery.cancel_scope.cancel()
    assert not tracing.on
    events = [one["event"] for one in told]
    assert events.index("cb_promise") < events.index("cb_break") < events.index("set_dv")
    breaks = [one["changed"] for one in told if one["event"] == "cb_break"]
    assert breaks[0] == "status|data" and "deleted" in breaks[-1]
    assert {one["dv"] for one in told if one["event"] == "set_dv"} == {2}
    assert any(one.get("method") == "FS.FetchData" for one in told if one["event"] == "call")
