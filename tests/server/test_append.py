"""AppendData: the server picks the offset, once, and tells others without being waited for."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import AppendData, AppendDataReply, Operation, Sync
from server_cell import Cell, Client, in_background, running_cell, settled


async def append(client: Client, fid: Fid, data: bytes, operation: Operation | None = None) -> AppendDataReply:
    reply, _ = await client.calls.call(AppendData(operation or client.op(), fid, None), data)
    assert isinstance(reply, AppendDataReply)
    return reply


async def test_appends_of_several_clients_never_overwrite_each_other(cell: Cell) -> None:
    clients = [await cell.connected() for _ in range(3)]
    f = await clients[0].create(b"f")
    records = [b"<%d:%d:%s>" % (n, step, b"x" * (step * 977 % 40_000)) for n in range(3) for step in range(20)]
    offsets: dict[bytes, int] = {}

    async def appender(n: int) -> None:
        for record in records[n * 20 : n * 20 + 20]:
            offsets[record] = (await append(clients[n], f.fid, record)).offset

    async with trio.open_nursery() as nursery:
        for n in range(3):
            nursery.start_soon(appender, n)
    size = (await clients[0].stat(f.fid)).status.size
    assert size == sum(map(len, records))
    for record, offset in offsets.items():
        assert await clients[1].fetch(f.fid, offset, len(record)) == record


async def test_a_repeated_append_is_not_made_again(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = await a.create(b"f")
    operation = a.op()
    first = await append(a, f.fid, b"one", operation)
    await append(b, f.fid, b"two")
    again = await append(a, f.fid, b"one", operation._replace(repeated=True))
    assert (first.offset, again.offset) == (0, 0)
    assert await a.fetch(f.fid) == b"onetwo"


@pytest.mark.parametrize("clean", [True, False])
async def test_a_repeated_append_is_not_made_again_after_a_restart(folder: Path, clean: bool) -> None:
    async with running_cell(folder, clean=clean, lease_s=0.2) as cell:
        a = await cell.connected()
        f = await a.create(b"f")
        operation = a.op()
        await append(a, f.fid, b"one", operation)
    async with running_cell(folder) as cell:
        a = await cell.connected(a.uuid)
        assert (await append(a, f.fid, b"one", operation._replace(repeated=True))).offset == 0
        assert (await append(a, f.fid, b"two")).offset == 3
        assert await a.fetch(f.fid) == b"onetwo"


async def test_the_reply_does_not_wait_for_others_but_sync_does(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = await a.create(b"f")
    await b.stat(f.fid)
    b.acknowledge = trio.Event()
    with trio.fail_after(5):
        await append(a, f.fid, b"x")
    await settled()
    assert b.broken() == {f.fid}
    async with in_background(a.call(Sync((f.fid,), durable=False, seen=True))) as sync:
        assert not sync.done
        b.acknowledge.set()
        await settled()
        assert sync.done


async def test_what_cannot_be_appended(cell: Cell) -> None:
    a = await cell.connected()
    folder = await a.mkdir(b"d")
    f = await a.create(b"f")
    for fid, data, code in (
        (folder.fid, b"x", AbortCode.ISDIR),
        (f.fid, b"", AbortCode.BAD_MESSAGE),
        (Fid(f.fid.volume, 999, 1), b"x", AbortCode.VNOVNODE),
    ):
        with pytest.raises(Aborted) as refusal:
            await append(a, fid, data)
        assert refusal.value.code == code
    assert (await a.stat(f.fid)).status.size == 0
