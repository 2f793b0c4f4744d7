"""Locks at a running server: who waits is told at once; what ends with a lease, a goodbye, a file; restarts."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import MAX_FILE_BYTES, Fid
from promisefs_protocol.locks import HeldLock, Lock, LockKind, LockOwner
from promisefs_protocol.messages import (
    CancelLock,
    CreateVolume,
    ExtendLock,
    GetEntryByName,
    GetLock,
    GiveUpAllCallBacks,
    GiveUpOpen,
    ReleaseLock,
    RemoveVolume,
    SetLock,
)
from promisefs_protocol.transport import ConnectionLost
from server_cell import LEASE_S, Cell, Client, in_background, running_cell, settled
from trio.testing import MockClock

READ, WRITE = LockKind.READ, LockKind.WRITE
OWNER = LockOwner(False, 2**64 - 1)
NUMBERS = itertools.count(1)


def lock(kind: int = WRITE, start: int = 0, end: int = MAX_FILE_BYTES, pid: int = 7) -> Lock:
    return Lock(kind, start, end, pid)


async def take(
    client: Client, fid: Fid, what: Lock | None = None, *, wait: bool = True, owner: LockOwner = OWNER
) -> int | None:
    """Ask for a lock. Return None if it is granted, else the request's number."""
    number = next(NUMBERS)
    reply = await client.call(SetLock(fid, owner, what or lock(), number, wait))
    return None if reply.granted else number


async def release(client: Client, fid: Fid, owner: LockOwner = OWNER) -> None:
    await client.call(ReleaseLock(fid, owner, 0, MAX_FILE_BYTES))


async def extend(client: Client, *fids: Fid, reclaim: bool = True, done: bool = True) -> tuple[int, ...]:
    """Say that write locks on all of these are held. Return which are not."""
    held = tuple(HeldLock(fid, OWNER, lock()) for fid in fids)
    lost: tuple[int, ...] = (await client.call(ExtendLock(held, reclaim, done))).lost
    return lost


def granted(client: Client) -> list[int]:
    return [answer.request for answer in client.lock_answers if answer.code == 0]


@pytest.fixture
async def pair(cell: Cell) -> AsyncIterator[tuple[Client, Client, Fid]]:
    a, b = await cell.connected(), await cell.connected()
    yield a, b, (await a.create(b"f")).fid
    cell.server.lock_keeper.table.check_invariants()


async def test_a_lock_passes_on_when_it_is_released(pair: tuple[Client, Client, Fid]) -> None:
    a, b, fid = pair
    assert await take(a, fid) is None
    with pytest.raises(Aborted) as caught:
        await take(b, fid, wait=False)
    assert caught.value.code == AbortCode.AGAIN
    number = await take(b, fid)
    assert number is not None
    await settled()
    assert granted(b) == []
    await release(a, fid)
    await settled()
    assert granted(b) == [number]
    assert (await b.call(GetLock(fid, LockOwner(False, 1), lock(READ)))).lock == lock()
    assert (await a.call(GetLock(fid, OWNER, lock(READ)))).lock == lock(pid=0), "another machine's process"
    assert (await b.call(GetLock(fid, OWNER, lock(READ)))).lock is None


async def test_waiting_takes_none_of_the_calls_that_can_be_served(pair: tuple[Client, Client, Fid]) -> None:
    a, b, fid = pair
    await take(a, fid)
    for number in range(400):
        await take(b, fid, owner=LockOwner(False, number))
    assert (await b.stat(fid)).fid == fid
    await release(a, fid)
    await settled()
    assert len(granted(b)) == 1


async def test_who_cancels_is_not_granted_anything_later(pair: tuple[Client, Client, Fid]) -> None:
    a, b, fid = pair
    await take(a, fid)
    number = await take(b, fid)
    assert number is not None
    assert not (await b.call(CancelLock(fid, OWNER, lock(), number))).granted
    await release(a, fid)
    await settled()
    assert granted(b) == [] and await take(a, fid) is None


async def test_a_goodbye_and_a_lost_answer(pair: tuple[Client, Client, Fid]) -> None:
    a, b, fid = pair
    await take(a, fid)
    number = await take(b, fid)
    assert number is not None
    await b.callbacks.close()
    await a.call(GiveUpAllCallBacks())
    await settled()
    assert granted(b) == []
    await b.connect()
    assert (await b.call(SetLock(fid, OWNER, lock(), number, True))).granted, "it was granted when nobody could be told"


async def test_locks_end_with_the_lease_and_not_before(mock_clock: MockClock, pair: tuple[Client, Client, Fid]) -> None:
    a, b, fid = pair
    await take(a, fid)
    number = await take(b, fid)
    mock_clock.jump(LEASE_S - 0.1)
    await b.renew()
    await settled()
    assert granted(b) == []
    mock_clock.jump(0.2)
    await settled()
    assert granted(b) == [number]
    with pytest.raises(ConnectionLost):
        await a.stat(fid)  # nothing of what it did while it held the lock may come any more
    await a.connect()
    assert await extend(a, fid, reclaim=False) == (0,)


async def test_a_store_that_is_being_made_ends_before_the_lock_passes_on(
    mock_clock: MockClock, pair: tuple[Client, Client, Fid]
) -> None:
    a, b, fid = pair
    await take(a, fid)
    await take(b, fid)
    await b.stat(fid)
    b.acknowledge = trio.Event()  # so the store cannot be answered
    async with in_background(a.store(fid, b"x")) as store:
        mock_clock.jump(LEASE_S - 0.1)
        await settled()
        b.acknowledge.set()
        await b.renew()
        await settled()
        assert store.done
    mock_clock.jump(0.2)
    await settled()
    assert len(granted(b)) == 1


async def test_who_has_no_lease_gets_no_lock(mock_clock: MockClock, pair: tuple[Client, Client, Fid]) -> None:
    a, _, fid = pair
    mock_clock.jump(LEASE_S + 0.1)
    with pytest.raises(Aborted) as caught:
        await take(a, fid)
    assert caught.value.code == AbortCode.NO_CALLBACKS
    await a.renew()
    assert await take(a, fid) is None


async def test_a_stale_host_keeps_its_locks(cell: Cell, pair: tuple[Client, Client, Fid]) -> None:
    a, b, fid = pair
    await take(a, fid)
    await take(b, fid)
    server, inits = cell.server, a.inits
    host = server.hosts.by_uuid(a.uuid)
    assert host is not None
    server.breaker.mark_stale(server.breaker.contact(host))
    await settled()
    assert a.inits == inits + 1 and granted(b) == [] and await extend(a, fid, reclaim=False) == ()


async def test_who_waits_for_a_file_that_goes_is_told(pair: tuple[Client, Client, Fid]) -> None:
    a, b, fid = pair
    await take(a, fid)
    number = await take(b, fid)
    await a.unlink(b"f")
    await b.call(GiveUpOpen((fid,)))
    await settled()
    assert [(answer.request, answer.code) for answer in b.lock_answers] == [(number, AbortCode.VNOVNODE)]
    with pytest.raises(Aborted):
        await take(a, fid)


async def test_who_waits_in_a_volume_that_is_removed_is_told(cell: Cell, pair: tuple[Client, Client, Fid]) -> None:
    a, b, _ = pair
    await cell.administer(CreateVolume("v"))
    root = (await a.call(GetEntryByName("v"))).root
    fid = (await a.create(b"g", root)).fid
    await take(a, fid)
    await take(b, fid)
    await cell.administer(RemoveVolume("v"))
    await settled()
    assert [answer.code for answer in b.lock_answers] == [AbortCode.VNOVOL]
    assert not cell.server.lock_keeper.table.files()


async def test_what_cannot_be_locked(pair: tuple[Client, Client, Fid]) -> None:
    a, _, fid = pair
    for bad, what, owner in (
        (a.root, lock(), OWNER),
        (fid, lock(READ, 5, 4), OWNER),
        (fid, lock(READ, 0, 5), LockOwner(True, 1)),
        (fid._replace(uniquifier=fid.uniquifier ^ 1), lock(), OWNER),
    ):
        with pytest.raises(Aborted) as caught:
            await take(a, bad, what, owner=owner)
        assert caught.value.code in (AbortCode.INVAL, AbortCode.VNOVNODE)


# Restarts


@pytest.mark.parametrize("clean", [True, False])
async def test_after_a_restart_locks_go_back_before_anyone_gets_new_ones(folder: Path, clean: bool) -> None:
    async with running_cell(folder, clean=clean) as cell:
        a, b = await cell.connected(), await cell.connected()
        f, g = (await a.create(b"f")).fid, (await a.create(b"g")).fid
        await take(a, f)
        await take(b, g)
        uuids = a.uuid, b.uuid
    async with running_cell(folder) as cell:
        a, b = [await cell.connected(uuid) for uuid in uuids]
        number = await take(b, f)
        tried = await take(b, f, wait=False, owner=LockOwner(False, 5))
        elsewhere = await take(b, g, owner=LockOwner(True, 5))
        assert number is not None and tried is not None and elsewhere is not None
        async with in_background(b.call(GetLock(f, OWNER, lock()))) as get:
            assert await extend(b, g) == ()
            await settled()
            assert not get.done and not b.lock_answers, "a has not said yet what it holds"
            assert await extend(a, f, g) == (1,)
            await settled()
            assert get.done and get.result.lock == lock(pid=0)
        assert {(answer.request, answer.code) for answer in b.lock_answers} == {
            (tried, AbortCode.AGAIN),
            (elsewhere, 0),
        }
        await release(a, f)
        await settled()
        assert granted(b)[-1] == number
        cell.server.lock_keeper.table.check_invariants()


async def test_after_a_clean_shutdown_without_locks_nobody_waits(folder: Path) -> None:
    async with running_cell(folder) as cell:
        a = await cell.connected()
        f = (await a.create(b"f")).fid
        uuid = a.uuid
    async with running_cell(folder) as cell:
        assert await take(await cell.connected(), f) is None
        assert await extend(await cell.connected(uuid), f) == (0,), "it cannot have held any"


async def test_who_does_not_come_back_is_waited_for_as_long_as_its_lease(mock_clock: MockClock, folder: Path) -> None:
    async with running_cell(folder, clean=False) as cell:
        a, b = await cell.connected(), await cell.connected()
        f = (await a.create(b"f")).fid
        await take(a, f)
        uuids = a.uuid, b.uuid
    async with running_cell(folder) as cell:
        b = await cell.connected(uuids[1])
        await extend(b)
        number = await take(b, f)
        mock_clock.jump(LEASE_S - 0.1)
        await b.renew()
        await settled()
        assert granted(b) == []
        mock_clock.jump(0.2)
        await settled()
        assert granted(b) == [number]
        a = await cell.connected(uuids[0])
        assert await extend(a, f) == (0,), "it is late"


async def test_who_comes_back_but_does_not_say_is_not_waited_for_for_ever(mock_clock: MockClock, folder: Path) -> None:
    async with running_cell(folder, clean=False) as cell:
        a = await cell.connected()
        f = (await a.create(b"f")).fid
        uuid = a.uuid
    async with running_cell(folder) as cell:
        a = await cell.connected(uuid)
        b = await cell.connected()
        number = await take(b, f)
        for _ in range(3):
            mock_clock.jump(LEASE_S * 0.7)
            await a.renew()
            await b.renew()
            await settled()
        assert granted(b) == [number]


async def test_a_new_client_cannot_reclaim(folder: Path) -> None:
    async with running_cell(folder, clean=False) as cell:
        a = await cell.connected()
        f = (await a.create(b"f")).fid
    async with running_cell(folder) as cell:
        assert await extend(await cell.connected(), f) == (0,)
