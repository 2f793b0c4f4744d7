"""What a mount counts: its caches' hits, bytes, how long calls and acknowledgements take."""

from __future__ import annotations

from typing import Any

import pytest
from client_mount import ClientMount, World
from promisefs_client.control.status import count_promises, mount_report
from promisefs_client.errors import ServerUnavailable
from promisefs_protocol.abort import Aborted
from promisefs_protocol.messages import FetchData, FetchStatus


def report(mount: ClientMount) -> dict[str, Any]:
    return mount_report(mount.cell, mount.files, mount.pages, [mount.callbacks], 0, 1.0, mount.cell.now())


def hits(mount: ClientMount, cache: str) -> tuple[int, int]:
    counted = getattr(mount.cell.counters, cache)
    return counted.hits, counted.misses


async def test_pages_and_attributes(world: World) -> None:
    mount = await world.mount()
    other = await world.server.connected()
    fid = (await other.create(b"f")).fid
    await other.store(fid, b"12345")
    vnode = await mount.open(b"f")
    assert bytes(await mount.read(vnode)) == b"12345"
    assert hits(mount, "pages") == (0, 1)
    assert bytes(await mount.read(vnode)) == b"12345"
    assert hits(mount, "pages") == (1, 1)
    known = hits(mount, "attributes")
    await other.store(fid, b"12346")
    await mount.read(vnode)
    assert hits(mount, "pages") == (1, 2)
    assert hits(mount, "attributes")[1] <= known[1] + 1
    counters = mount.cell.counters
    assert (counters.fetched_bytes, counters.stored_bytes) == (10, 0)
    await mount.files.write(vnode, 0, b"abc")
    await mount.files.store(vnode, sync=False)
    assert counters.stored_bytes == 3


async def test_names_and_listings(world: World) -> None:
    mount = await world.mount()
    other = await world.server.connected()
    await other.create(b"f")
    root = mount.cell.table.by_ino(1)
    assert root is not None
    for expected in ((0, 1), (1, 1)):
        await mount.names.lookup(root, b"f")
        assert hits(mount, "names") == expected
    for expected in ((0, 1), (1, 1)):
        await mount.names.listing(root)
        assert hits(mount, "listings") == expected


async def test_calls_and_breaks_take_time(world: World) -> None:
    mount = await world.mount()
    other = await world.server.connected()
    made = await other.create(b"f")
    await mount.open(b"f")
    await other.store(made.fid, b"one")
    latency = report(mount)["break_latency"]
    assert latency["started"] == sum(latency["buckets"]) >= 1
    state = report(mount)
    assert state["rpcs"]["FS.Lookup"] == sum(state["rpc_latency"]["FS.Lookup"]["buckets"]) == 1
    assert await count_promises(mount.cell.table, mount.cell.now()) == 2


async def test_failures_of_calls_are_counted_by_abort_code(world: World) -> None:
    mount = await world.mount(timeout_s=0.1)
    root = mount.cell.table.root_fid
    with pytest.raises(Aborted):
        await mount.session.call(FetchStatus(root._replace(uniquifier=root.uniquifier ^ 1)))
    assert mount.session.calls_made.as_json()["FS.FetchStatus"]["failures"] == {"102": 1}
    mount.server = None
    mount.session._disconnected()
    with pytest.raises(ServerUnavailable):
        await mount.session.call(FetchData(root, 0, 1))
    assert report(mount)["rpc_latency"]["FS.FetchData"]["failures"] == {"no answer": 1}
