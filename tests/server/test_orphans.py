"""Unlinked, still open: kept for exactly those who have it open."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import GiveUpAllCallBacks, GiveUpOpen
from promisefs_server.promises.hosts import FORGOTTEN_AFTER_S, RECALL_S
from promisefs_server.store.vnodes import key_of
from server_cell import LEASE_S, Cell, Client, Pending, in_background, running_cell, settled
from trio.testing import MockClock


async def is_gone(client: Client, fid: Fid) -> bool:
    try:
        await client.stat(fid)
    except Aborted as refusal:
        assert refusal.code == AbortCode.VNOVNODE
        return True
    return False


async def test_kept_for_the_caller(cell: Cell) -> None:
    a = await cell.connected()
    f = (await a.create(b"f")).fid
    reply = await a.unlink(b"f", keep_open=True)
    assert reply.entry.status.nlink == 0 and reply.entry.promise_s > 0
    await a.store(f, b"still here")
    assert await a.fetch(f) == b"still here"
    assert await a.lookup(b"f") is None
    with pytest.raises(Aborted) as refusal:
        await a.link(f, b"again")
    assert refusal.value.code == AbortCode.NOENT
    await a.call(GiveUpOpen((f,)))
    assert await is_gone(a, f)


async def test_kept_for_others_who_say_so(cell: Cell) -> None:
    a, b, c = [await cell.connected() for _ in range(3)]
    f = (await a.create(b"f")).fid
    await b.stat(f)
    await c.stat(f)
    b.open_fids.add(f)
    await a.unlink(b"f")
    assert not await is_gone(b, f)
    await b.store(f, b"mine")
    assert await b.fetch(f) == b"mine"
    await c.call(GiveUpOpen((f,)))
    assert not await is_gone(b, f)
    await b.call(GiveUpOpen((f,)))
    assert await is_gone(b, f)


async def test_gone_if_nobody_has_it_open(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = (await a.create(b"f")).fid
    await b.stat(f)
    await a.unlink(b"f")
    assert await is_gone(b, f)


async def test_renamed_over(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = (await a.create(b"f")).fid
    await a.create(b"n")
    await b.stat(f)
    b.open_fids.add(f)
    reply = await a.rename((a.root, b"n"), (a.root, b"f"), keep_open=True)
    assert reply.replaced.fid == f and reply.replaced.status.nlink == 0
    await b.call(GiveUpOpen((f,)))
    assert not await is_gone(a, f)
    await a.call(GiveUpOpen((f,)))
    assert await is_gone(a, f)


async def test_goes_with_its_host(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = (await a.create(b"f")).fid
    await a.unlink(b"f", keep_open=True)
    await a.call(GiveUpAllCallBacks())
    assert await is_gone(b, f)


async def test_a_silent_host_keeps_it_for_a_day(mock_clock: MockClock, cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = (await a.create(b"f")).fid
    await a.unlink(b"f", keep_open=True)
    cell.server.note_silence(FORGOTTEN_AFTER_S)
    assert not await is_gone(b, f), "it has a lease"
    mock_clock.jump(LEASE_S + 0.1)
    await b.renew()
    cell.server.note_silence(FORGOTTEN_AFTER_S - 1)
    assert not await is_gone(b, f)
    await a.renew()
    cell.server.note_silence(FORGOTTEN_AFTER_S - 1)
    mock_clock.jump(LEASE_S + 0.1)
    await b.renew()
    cell.server.note_silence(FORGOTTEN_AFTER_S - 1)
    assert not await is_gone(b, f), "it was heard of in between"
    cell.server.note_silence(1)
    assert await is_gone(b, f), "though its connections look alive"


async def test_connections_on_which_nobody_is_heard_of_are_closed(mock_clock: MockClock, cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    mock_clock.jump(2 * LEASE_S - 0.1)
    await b.renew()
    await cell.server.close_dead()
    await settled()
    assert not a.calls.closed and not b.calls.closed
    mock_clock.jump(0.2)
    await cell.server.close_dead()
    await settled()
    assert a.calls.closed and a.callbacks.closed
    assert not b.calls.closed and not b.callbacks.closed


async def test_survives_a_restart(folder: Path) -> None:
    for clean in (True, False):
        async with running_cell(folder, clean=clean) as cell:
            a = await cell.connected()
            f = (await a.create(b"f")).fid
            await a.store(f, b"bytes")
            await a.unlink(b"f", keep_open=True)
            uuid = a.uuid
        async with running_cell(folder) as cell:
            a = cell.client(uuid)
            a.open_fids.add(f)
            await a.connect()
            await settled()
            assert await a.fetch(f) == b"bytes"
            await a.call(GiveUpOpen((f,)))
            assert await is_gone(a, f)
            await a.call(GiveUpAllCallBacks())


async def test_who_did_not_acknowledge_is_taken_to_have_it_and_asked_later(mock_clock: MockClock, folder: Path) -> None:
    async with running_cell(folder) as cell:
        a, b, c = [await cell.connected() for _ in range(3)]
        f, g = [(await a.create(name)).fid for name in (b"f", b"g")]
        for client in (b, c):
            await client.stat(f)
            await client.stat(g)
        await b.callbacks.close()
        await settled()
        async with in_background(a.unlink(b"f")) as unlink:
            mock_clock.jump(LEASE_S + 0.1)
            await settled()
            assert unlink.done
        # b is stale; it may have g open too, though it has no promise any more.
        await a.unlink(b"g")
        assert not await is_gone(a, f) and not await is_gone(a, g)
        b.open_fids.add(g)
        b.breaks.clear()
        await b.connect_callbacks()
        await settled()
        assert b.broken() == {f, g}
        assert await is_gone(a, f) and not await is_gone(a, g)


async def test_an_open_file_whose_promise_was_broken_is_asked_about(mock_clock: MockClock, folder: Path) -> None:
    """Its client has not got round to taking a new promise."""
    async with running_cell(folder, limit_s=1000) as cell:
        a, b = await cell.connected(), await cell.connected()
        f, g = [(await a.create(name)).fid for name in (b"f", b"g")]
        for fid in (f, g):
            await b.stat(fid)
            await a.chmod(fid, 0o600)
        b.open_fids = {f, g}
        await a.unlink(b"f")
        assert not await is_gone(b, f)
        mock_clock.jump(RECALL_S)
        await a.unlink(b"g")
        assert await is_gone(b, g), "long ago: it would have taken a new promise"


async def test_a_host_that_is_gone_keeps_only_what_it_had_promises_on(mock_clock: MockClock, folder: Path) -> None:
    async with running_cell(folder) as cell:
        a, b = await cell.connected(), await cell.connected()
        f = (await a.create(b"f")).fid
        await b.stat(f)
        await b.callbacks.close()
        await settled()
        async with in_background(a.chmod(f, 0o600)):
            mock_clock.jump(LEASE_S + 0.1)
            await settled()
        g = (await a.create(b"g")).fid
        await a.unlink(b"g")
        assert await is_gone(a, g)
        await a.unlink(b"f")
        assert not await is_gone(a, f)


async def test_a_host_that_has_just_forgotten_its_promises_is_asked_too(mock_clock: MockClock, folder: Path) -> None:
    """Between InitCallBackState3 and its next promise on an open file, nobody knows that it has it open."""
    async with running_cell(folder, clean=False) as cell:
        a, b = await cell.connected(), await cell.connected()
        f = (await a.create(b"f")).fid
        uuids = a.uuid, b.uuid
    async with running_cell(folder) as cell:
        a, b = cell.client(uuids[0]), cell.client(uuids[1])
        b.open_fids.add(f)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.connect)
            nursery.start_soon(b.connect)
        await a.unlink(b"f")
        assert not await is_gone(b, f)


async def test_a_removal_that_waited_until_its_host_was_gone_does_not_happen(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = (await a.create(b"f")).fid
    unlink = Pending()
    async with trio.open_nursery() as nursery:
        async with cell.server.locks.hold(key_of(f)):
            nursery.start_soon(unlink.run, a.unlink(b"f", keep_open=True))
            await settled()
            await a.call(GiveUpAllCallBacks())
            assert not unlink.done
    assert isinstance(unlink.error, Aborted) and unlink.error.code == AbortCode.NOT_INTRODUCED
    assert await b.lookup(b"f") is not None
    assert cell.server.store.database.rows("SELECT * FROM orphan_holders") == []


async def test_what_is_kept_for_hosts_that_are_not_known_goes_at_the_start(folder: Path) -> None:
    async with running_cell(folder) as cell:
        a = await cell.connected()
        f = (await a.create(b"f")).fid
        await a.unlink(b"f", keep_open=True)
        database = cell.server.store.database
        with database.transaction():
            database.execute("UPDATE orphan_holders SET host = 99")
            database.execute("UPDATE replies SET host = 99")
    async with running_cell(folder) as cell:
        a = await cell.connected(a.uuid)
        assert await is_gone(a, f)
        assert cell.server.store.database.rows("SELECT * FROM replies") == []


async def test_an_open_file_whose_promise_was_broken_before_a_planned_restart_is_asked_about(folder: Path) -> None:
    async with running_cell(folder) as cell:
        a, b = await cell.connected(), await cell.connected()
        f = (await a.create(b"f")).fid
        await b.stat(f)
        await a.chmod(f, 0o600)
    for _ in range(2):
        async with running_cell(folder):
            pass
    async with running_cell(folder) as cell:
        a = await cell.connected(a.uuid)
        b = cell.client(b.uuid)
        b.open_fids.add(f)
        await b.connect()
        await a.unlink(b"f")
        assert b.inits == 0 and not await is_gone(b, f)
