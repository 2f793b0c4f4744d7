"""Locks of a mount: passed on with the data, kept over outages and restarts, given up for lost when they are."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio
from client_mount import ClientMount, World, settled
from promisefs_client.fuse.requests import Request, handling
from promisefs_client.locks.file_lock import TO_THE_END, FileLock, LockKind
from promisefs_client.locks.held_locks import HeldLocks
from promisefs_client.names.namespace import Owner
from promisefs_client.vnodes.vnode import Vnode
from promisefs_protocol.abort import Aborted
from promisefs_protocol.locks import Lock
from promisefs_protocol.messages import (
    AppendData,
    CancelLock,
    ExtendLock,
    Fallocate,
    FallocateMode,
    StoreData,
    StoreStatus,
)
from promisefs_server.locks.lock_table import Owner as TableOwner
from server_cell import running_cell

READ, WRITE, UNLOCK = LockKind.READ, LockKind.WRITE, LockKind.UNLOCK
OWNERS = itertools.count(1)


class Process:
    """Has a file open on one mount, and locks it."""

    def __init__(self, mount: ClientMount, vnode: Vnode, handle: int) -> None:
        self.mount = mount
        self.vnode = vnode
        self.handle = handle
        self.owner = next(OWNERS)

    async def lock(self, kind: LockKind = WRITE, start: int = 0, end: int = TO_THE_END, *, wait: bool = True) -> None:
        lock = FileLock(kind, start, end, 1)
        await self.mount.operations.setlk(self.vnode.ino, self.handle, self.owner, lock, wait)

    async def flock(self, kind: LockKind, *, wait: bool = True) -> None:
        await self.mount.operations.flock(self.vnode.ino, self.handle, self.owner, kind, wait)

    async def write(self, data: bytes, offset: int = 0) -> None:
        await self.mount.operations.write(self.handle, offset, data)

    async def read(self) -> bytes:
        return bytes(await self.mount.operations.read(self.handle, 0, 100))

    async def flush(self) -> None:
        await self.mount.operations.flush(self.handle)

    async def release(self) -> None:
        await self.mount.operations.release(self.handle)


async def open_on(mount: ClientMount, name: bytes = b"f") -> Process:
    vnode = await mount.names.lookup(mount.root, name)
    if vnode is None:
        vnode = await mount.names.create(mount.root, name, 0o100644, Owner(0, 0))
    mount.table.add_lookup(vnode)
    return Process(mount, vnode, await mount.open_handle(vnode, os.O_RDWR))


async def pair(world: World) -> tuple[Process, Process]:
    return await open_on(await world.mount()), await open_on(await world.mount())


def table_of(world: World) -> Any:
    return world.server.server.lock_keeper.table


class Doing:
    def __init__(self) -> None:
        self.done = False
        self.errno: int | None = None

    async def run(self, awaitable: Any) -> None:
        try:
            await awaitable
        except (pyfuse3.FUSEError, Aborted) as error:
            self.errno = error.errno
        self.done = True


@asynccontextmanager
async def doing(awaitable: Any) -> AsyncIterator[Doing]:
    async with trio.open_nursery() as nursery:
        task = Doing()
        nursery.start_soon(task.run, awaitable)
        await settled()
        yield task
        nursery.cancel_scope.cancel()


class Signals:
    """For one process, whose requests begin within `interruptible`."""

    def __init__(self) -> None:
        self._request = Request()

    def take(self) -> Request | None:
        return None

    def done(self, request: Request) -> None:
        pass

    async def interruptible(self, awaitable: Any) -> None:
        with handling(self._request):
            await awaitable

    def send(self) -> None:
        self._request.interrupt(trio.current_time(), False)


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Signals:
    made = Signals()
    monkeypatch.setattr(handling, "source", made)
    return made


def refused(number: int) -> Any:
    return pytest.raises(pyfuse3.FUSEError, check=lambda error: error.errno == number)


# What is held, in the order of the server's changes


def test_changes_take_effect_in_the_order_that_the_server_made_them_in() -> None:
    held = HeldLocks()
    a, b = Lock(WRITE, 0, 9, 1), Lock(READ, 0, 4, 1)
    held.granted(1, a)
    held.granted(3, b)
    held.released(2, 0, 9)
    assert held.pieces == [b]
    held.released(5, 0, 9)
    held.granted(4, a)
    assert held.pieces == []
    held.settle()
    held.granted(1, a)
    assert held.pieces == [a], "a server that was restarted counts anew"


def test_what_to_go_back_to() -> None:
    held = HeldLocks()
    held.granted(1, Lock(READ, 2, 4, 1))
    held.granted(2, Lock(WRITE, 6, 7, 1))
    assert held.differences(Lock(WRITE, 0, 9, 1)) == [
        (0, 1, None), (2, 4, Lock(READ, 2, 4, 1)), (5, 5, None), (8, 9, None),
    ]  # fmt: skip
    assert held.differences(Lock(READ, 2, 4, 1)) == []


# Passing on


async def test_what_was_written_under_a_lock_is_seen_by_the_next(world: World) -> None:
    a, b = await pair(world)
    await a.lock()
    async with doing(b.lock()) as waiting:
        await a.write(b"under the lock")
        assert a.vnode.is_dirty and not waiting.done
        await a.lock(UNLOCK)
        assert not a.vnode.is_dirty
        await settled()
        assert waiting.done and waiting.errno is None
    assert await b.read() == b"under the lock"
    assert (b.mount.locks.held, a.mount.locks.held) == (1, 0)


async def test_a_downgrade_stores_too(world: World) -> None:
    a, b = await pair(world)
    await a.lock()
    await a.write(b"x")
    await a.lock(READ)
    assert not a.vnode.is_dirty
    await b.lock(READ, wait=False)
    assert await b.read() == b"x"


async def test_mapped_pages_are_asked_for_before_a_write_lock_is_released(world: World) -> None:
    a, _ = await pair(world)
    await a.lock()
    before = a.mount.drops_of_pages(a.vnode)
    await a.lock(UNLOCK)
    assert a.mount.drops_of_pages(a.vnode) == before + 1
    await a.lock(READ)
    await a.lock(UNLOCK)
    assert a.mount.drops_of_pages(a.vnode) == before + 1


async def test_a_lock_that_cannot_be_had(world: World) -> None:
    a, b = await pair(world)
    await a.lock(WRITE, 10, 19)
    with refused(errno.EAGAIN):
        await b.lock(READ, 19, 30, wait=False)
    await b.lock(WRITE, 20, 29)
    async with doing(a.lock(WRITE, 20, 20)):
        with refused(errno.EDEADLK):
            await b.lock(WRITE, 10, 10)
    found = await b.mount.operations.getlk(b.vnode.ino, b.handle, b.owner, FileLock(READ, 0, 100, 1))
    assert found == FileLock(WRITE, 10, 19, 0)
    assert await b.mount.operations.getlk(b.vnode.ino, b.handle, b.owner, FileLock(READ, 20, 100, 1)) is None


async def test_flock_and_fcntl_do_not_see_each_other(world: World) -> None:
    a, b = await pair(world)
    await a.flock(WRITE)
    await b.lock(WRITE, wait=False)
    with refused(errno.EAGAIN):
        await b.flock(READ, wait=False)
    await a.flock(READ)
    await b.flock(READ, wait=False)
    with refused(errno.EAGAIN):
        await a.flock(WRITE, wait=False)
    assert a.mount.locks.held == 0, "a conversion that is refused has lost the lock"
    await b.flock(WRITE, wait=False)


async def test_locks_end_with_the_last_handle_that_they_were_taken_through(world: World) -> None:
    a, b = await pair(world)
    await a.write(b"left")
    await a.lock()
    await a.flock(WRITE)
    await a.flush()
    with refused(errno.EAGAIN):
        await b.lock(READ, wait=False)
    await a.release()
    await b.lock(READ, wait=False)
    await b.flock(READ, wait=False)
    assert await b.read() == b"left"


async def test_a_process_that_closes_any_descriptor_loses_its_locks(world: World) -> None:
    a, b = await pair(world)
    await a.lock()
    await a.mount.locks.flushed(a.vnode, a.owner + 1000)
    with refused(errno.EAGAIN):
        await b.lock(READ, wait=False)
    await a.mount.locks.flushed(a.vnode, a.owner)
    await b.lock(READ, wait=False)


# Requests that are interrupted, or lose their connection


async def test_an_interrupted_wait_takes_nothing(world: World, signals: Signals) -> None:
    a, b = await pair(world)
    await a.lock()
    async with doing(signals.interruptible(b.lock())) as waiting:
        signals.send()
        await settled()
        assert waiting.errno == errno.EINTR and b.mount.locks.waiting == 0
    await a.lock(UNLOCK)
    await settled()
    await a.lock(wait=False)


async def test_a_lock_that_is_granted_while_it_is_withdrawn_is_held(world: World, signals: Signals) -> None:
    a, b = await pair(world)
    await a.lock()
    hold = b.mount.session.hold_before[CancelLock] = trio.Event()
    async with doing(signals.interruptible(b.lock())) as waiting:
        signals.send()
        await settled()
        await a.lock(UNLOCK)
        await settled()
        hold.set()
        await settled()
        assert waiting.done and waiting.errno is None and b.mount.locks.held == 1


async def test_an_upgrade_interrupted_without_a_server_is_undone_later(world: World, signals: Signals) -> None:
    a, b = await pair(world)
    await a.lock(READ)
    await b.lock(READ, 0, 9)
    async with doing(signals.interruptible(a.lock(WRITE, 0, 19))) as waiting:
        await cut_off(a.mount)
        signals.send()
        await settled()
        assert waiting.errno == errno.EINTR
    await b.lock(UNLOCK)  # the server gives the lock to nobody who waits
    assert table_of(world).conflicting(key(a), stranger(), Lock(READ, 0, 0, 1)) is not None
    await reconnect(world, a.mount)
    await trio.sleep(2.2)
    await settled()
    await b.lock(READ, wait=False)
    with refused(errno.EAGAIN):
        await b.lock(WRITE, 15, 15, wait=False)


async def test_a_wait_goes_on_over_a_lost_connection(world: World) -> None:
    a, b = await pair(world)
    await a.lock()
    async with doing(b.lock()) as waiting:
        await cut_off(b.mount)
        await a.lock(UNLOCK)
        await settled()
        assert not waiting.done
        await reconnect(world, b.mount)
        assert waiting.done and waiting.errno is None
    assert b.mount.locks.held == 1 and b.mount.locks.losses == 0
    with refused(errno.EAGAIN):
        await a.lock(READ, wait=False)


async def test_a_lock_is_released_at_last_when_the_server_is_back(world: World) -> None:
    a, b = await pair(world)
    await a.lock()
    await cut_off(a.mount)
    await a.release()
    await reconnect(world, a.mount)
    await trio.sleep(2.2)
    await b.lock(wait=False)


# Leases


async def test_a_lock_lasts_over_a_short_outage(world: World) -> None:
    a, b = await pair(world)
    await a.lock()
    await cut_off(a.mount)
    await a.write(b"x")
    await reconnect(world, a.mount)
    assert len(a.mount.session.sent_of(ExtendLock)) == 0 and a.mount.locks.losses == 0
    with refused(errno.EAGAIN):
        await b.lock(READ, wait=False)


async def test_a_lock_is_unsure_when_the_lease_is_over_and_kept_if_the_server_says_so(world: World) -> None:
    a, _ = await pair(world)
    await a.lock()
    await cut_off(a.mount)
    a.mount.session.server.lease_until = 0.0
    async with doing(a.write(b"x")) as write:
        assert not write.done, "who knows whether it is still ours"
        await reconnect(world, a.mount)
        assert write.done and write.errno is None
    assert a.mount.locks.losses == 0


async def test_a_lost_lock_is_never_assumed(world: World, caplog: pytest.LogCaptureFixture) -> None:
    a, b = await pair(world)
    await a.lock()
    await a.write(b"old")
    await cut_off(a.mount)
    a.mount.session.server.lease_until = 0.0
    end_lease(world, a.mount)
    await b.lock(wait=False)
    await b.write(b"new")
    await b.lock(UNLOCK)
    await reconnect(world, a.mount)
    assert a.mount.locks.losses == 1 and a.mount.files.bytes_voided == 3
    for io in (a.write(b"y"), a.read(), a.lock(READ), a.mount.operations.fsync(a.handle, False)):
        with refused(errno.EIO):
            await io
    with refused(errno.EIO):
        await a.flush()
    assert await b.read() == b"new"
    await a.lock(UNLOCK)
    assert await a.read() == b"new"
    await a.lock(wait=False)
    await a.write(b"again")
    await a.flush()
    assert "locks are lost" in caplog.text


@pytest.mark.parametrize("change", [StoreData, StoreStatus, AppendData, Fallocate])
async def test_a_change_under_way_is_not_repeated_when_its_lock_is_lost(world: World, change: type) -> None:
    a, b = await pair(world)
    await b.write(b"stored")
    await b.flush()
    await a.lock()
    files, vnode, hold = a.mount.files, a.vnode, a.mount.session.hold_before
    if change is StoreData:
        await a.write(b"old")
        doer = a.flush()
    elif change is StoreStatus:
        doer = files.truncate(vnode, StoreStatus(vnode.fid, None, None, None, 0, None, None))
    elif change is AppendData:
        doer = files.append(vnode, b"more")
    else:
        doer = a.mount.operations.fallocate(vnode.ino, a.handle, int(FallocateMode.ZERO_RANGE), 0, 6)
    hold[change] = trio.Event()
    async with doing(doer) as doing_it:
        assert not doing_it.done
        await cut_off(a.mount)
        hold[change].set()  # from here on it waits for the server
        await settled()
        a.mount.session.server.lease_until = 0.0
        end_lease(world, a.mount)
        await b.lock()
        await reconnect(world, a.mount)
        assert doing_it.done and doing_it.errno == errno.EIO
    assert await b.read() == b"stored"


async def test_read_locks_that_are_lost_take_no_bytes_with_them(world: World) -> None:
    a, b = await pair(world)
    await a.lock(READ)
    await a.write(b"kept")
    await cut_off(a.mount)
    a.mount.session.server.lease_until = 0.0
    end_lease(world, a.mount)
    await b.lock(wait=False)
    await reconnect(world, a.mount)
    await a.flush()
    assert await b.read() == b"kept" and a.mount.locks.losses == 1


# Restarts of the server


@pytest.mark.parametrize("clean", [True, False])
async def test_locks_survive_a_restart(tmp_path: Path, clean: bool) -> None:
    folder = tmp_path / "store"
    async with trio.open_nursery() as nursery:
        async with running_cell(folder, clean=clean) as server:
            mounts = [ClientMount(server, ack_wait_s=1.0, timeout_s=30.0, now=trio.current_time) for _ in range(2)]
            for mount in mounts:
                await mount.connect(nursery)
            a, b = [await open_on(mount) for mount in mounts]
            await a.lock(WRITE, 0, 9)
            await b.lock(WRITE, 10, 19)
            waiting = Doing()
            nursery.start_soon(waiting.run, b.lock(WRITE, 0, 0))
            await settled()
            for mount in mounts:
                mount.server = None
        async with running_cell(folder) as server:
            for mount in mounts:
                mount.server = server
            await connected(mounts[1])
            async with doing(b.lock(READ, 5, 5, wait=False)) as trying:
                await connected(mounts[0])
                assert trying.errno == errno.EAGAIN and not waiting.done
            assert [mount.locks.losses for mount in mounts] == [0, 0]
            await a.lock(UNLOCK)
            await settled()
            assert waiting.done and waiting.errno is None
            server.server.lock_keeper.table.check_invariants()
            for mount in mounts:
                mount.check_invariants()
                mount.server = None
        nursery.cancel_scope.cancel()


async def test_a_later_run_is_not_asked_for_a_lock_that_an_earlier_one_may_have_given_away(tmp_path: Path) -> None:
    """It waits for this client to say what it held, and could not know."""
    async with trio.open_nursery() as nursery:
        async with running_cell(tmp_path / "store", clean=False) as server:
            mount = ClientMount(server, ack_wait_s=1.0, timeout_s=30.0, now=trio.current_time)
            await mount.connect(nursery)
            process = await open_on(mount)
            await process.lock()
            mount.server = None
        mount.session.server.lease_until = 0.0
        async with running_cell(tmp_path / "store") as server:
            mount.server = server
            await connected(mount)
            assert mount.locks.losses == 1 and not server.server.lock_keeper.table.files()
            with refused(errno.EIO):
                await process.write(b"x")
            mount.check_invariants()
            mount.server = None
        nursery.cancel_scope.cancel()


def key(process: Process) -> int:
    fid = process.vnode.fid
    return fid.volume << 40 | fid.vnode


def stranger() -> TableOwner:
    return TableOwner(10**6, False, 1)


async def cut_off(mount: ClientMount) -> None:
    mount.server = None
    calls = mount.session._calls
    assert calls is not None
    await calls.close()
    await settled()
    assert not mount.session.connected


async def reconnect(world: World, mount: ClientMount) -> None:
    mount.server = world.server
    await connected(mount)


async def connected(mount: ClientMount) -> None:
    with trio.fail_after(10):
        while not mount.session.connected:  # noqa: ASYNC110 (it has no event for it)
            await trio.sleep(0.05)
    await settled()


def end_lease(world: World, mount: ClientMount) -> None:
    """As if the server had waited for it."""
    server = world.server.server
    host = server.hosts.by_uuid(mount.session._client)
    assert host is not None
    host.lease_end_s = trio.current_time()
    server.lock_keeper._drop(host)
