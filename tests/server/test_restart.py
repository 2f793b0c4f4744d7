"""What a restart costs: nothing after a clean shutdown with saved promises, InitCallBackState3 otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from promisefs_server.promises import callback_state
from promisefs_server.promises.callback_state import MAX_AGE_S, STATE_NAME
from server_cell import LEASE_S, in_background, running_cell, settled
from trio.testing import MockClock


async def test_promises_survive_a_planned_restart(folder: Path) -> None:
    async with running_cell(folder) as cell:
        a, b = await cell.connected(), await cell.connected()
        f = await a.create(b"f")
        await b.stat(f.fid)
        start = a.hello.server_start
        uuids = a.uuid, b.uuid
    assert (folder / STATE_NAME).exists()
    async with running_cell(folder) as cell:
        assert not (folder / STATE_NAME).exists(), "it could be used twice"
        a, b = [await cell.connected(uuid) for uuid in uuids]
        assert a.inits == b.inits == 0
        assert a.hello.server_start != start
        assert (await a.stat(f.fid)).status == f.status
        await a.store(f.fid, b"x")
        assert b.broken() == {f.fid}


def remove(path: Path) -> None:
    path.unlink()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [remove, damage, cut, empty])
async def test_without_sound_saved_state_every_host_is_stale(
    mock_clock: MockClock, folder: Path, spoil: Callable[[Path], None]
) -> None:
    async with running_cell(folder) as cell:
        a, b = await cell.connected(), await cell.connected()
        f = await a.create(b"f")
        uuids = a.uuid, b.uuid
    spoil(folder / STATE_NAME)
    async with running_cell(folder) as cell:
        a = await cell.connected(uuids[0])
        assert a.inits == 1
        assert (await a.stat(f.fid)).status == f.status, "a clean shutdown keeps the incarnation"
        async with in_background(a.store(f.fid, b"x")) as store:
            assert not store.done, "b is not back, and may still rely on its promises"
            b = await cell.connected(uuids[1])
            await settled()
            assert store.done and b.inits == 1
        assert not (folder / STATE_NAME).exists()


async def test_old_saved_state_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_cell(folder) as cell:
        uuid = (await cell.connected()).uuid
    now = time.time_ns()
    monkeypatch.setattr("time.time_ns", lambda: now + (MAX_AGE_S + 1) * 1_000_000_000)
    async with running_cell(folder) as cell:
        assert (await cell.connected(uuid)).inits == 1
    assert "saved promises are not used" in caplog.text


async def test_a_clock_set_forward_between_runs_ends_no_promise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client, whose clock was not set, goes on relying on it."""
    monkeypatch.setattr("promisefs_server.promises.promises.LIFETIMES_S", ((7, 600),))
    async with running_cell(folder) as cell:
        a, b = await cell.connected(), await cell.connected()
        f = await a.create(b"f")
        await b.stat(f.fid)
        uuids = a.uuid, b.uuid
    now = time.time_ns()
    monkeypatch.setattr("time.time_ns", lambda: now + (MAX_AGE_S - 60) * 1_000_000_000)
    async with running_cell(folder) as cell:
        a, b = [await cell.connected(uuid) for uuid in uuids]
        assert b.inits == 0
        await a.store(f.fid, b"x")
        assert b.broken() == {f.fid}


async def test_saved_state_of_another_run_is_not_used(folder: Path) -> None:
    async with running_cell(folder) as cell:
        uuid = (await cell.connected()).uuid
    saved = (folder / STATE_NAME).read_bytes()
    async with running_cell(folder):
        pass
    (folder / STATE_NAME).write_bytes(saved)
    async with running_cell(folder) as cell:
        assert (await cell.connected(uuid)).inits == 1


async def test_after_a_crash_mutations_wait_a_lease_for_who_does_not_come_back(
    mock_clock: MockClock, folder: Path
) -> None:
    async with running_cell(folder, clean=False) as cell:
        a = await cell.connected()
        await cell.connected()
        f = await a.create(b"f")
        uuid = a.uuid
    async with running_cell(folder) as cell:
        a = await cell.connected(uuid)
        assert a.inits == 1
        now = (await a.stat(f.fid)).status
        assert now.incarnation == f.status.incarnation + 1
        async with in_background(a.create(b"g")) as create:
            assert not create.done
            with trio.fail_after(5):
                await a.stat(f.fid)
            mock_clock.jump(LEASE_S + 0.1)
            await settled()
            assert create.done and create.error is None
        await a.create(b"h")


async def test_a_longer_lease_of_the_run_before_is_waited_for(mock_clock: MockClock, folder: Path) -> None:
    async with running_cell(folder, lease_s=4 * LEASE_S, clean=False) as cell:
        a = await cell.connected()
        await cell.connected()
        uuid = a.uuid
    for wait_s in (4 * LEASE_S, LEASE_S):
        async with running_cell(folder, lease_s=LEASE_S, clean=False, limit_s=200) as cell:
            a = await cell.connected(uuid)
            async with in_background(a.mkdir(b"%d" % wait_s)) as mkdir:
                mock_clock.jump(wait_s - 0.1)
                await settled()
                assert not mkdir.done
                mock_clock.jump(0.2)
                await settled()
                assert mkdir.done and mkdir.error is None


async def test_a_host_that_broke_off_at_the_shutdown_is_stale_after_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promisefs_server.service.DRAIN_S", 0.1)
    async with running_cell(folder) as cell:
        a, b = await cell.connected(), await cell.connected()
        f = await a.create(b"f")
        await b.stat(f.fid)
        b.acknowledge = trio.Event()
        async with in_background(a.store(f.fid, b"x")) as store:
            assert not store.done
            await cell.shut_down()
        uuids = a.uuid, b.uuid
        cell.nursery.cancel_scope.cancel()
    async with running_cell(folder) as cell:
        a, b = [await cell.connected(uuid) for uuid in uuids]
        assert (a.inits, b.inits) == (0, 1)


async def test_calls_in_flight_finish_before_the_end(folder: Path) -> None:
    async with running_cell(folder) as cell:
        a, b = await cell.connected(), await cell.connected()
        f = await a.create(b"f")
        await b.stat(f.fid)
        b.acknowledge = trio.Event()
        async with in_background(a.store(f.fid, b"x")) as store:
            cell.server.stop()
            await settled()
            async with in_background(a.create(b"too late")) as late:
                assert not late.done and not store.done
                b.acknowledge.set()
                await cell.ended.wait()
                await settled()
                assert store.done and store.error is None
                assert late.error is not None


def test_saved_state_round_trip(tmp_path: Path) -> None:
    path = tmp_path / STATE_NAME
    hosts = [
        callback_state.SavedHost(b"a" * 16, False, False, False, [(1 << 40 | 5, 100), (1 << 62, 2**32 - 1)], [7], True),
        callback_state.SavedHost(b"b" * 16, True, True, True, [], [3, 1 << 62], False),
    ]
    callback_state.save(path, b"s" * 16, 7, 10**18, hosts)
    assert callback_state.take(path, b"s" * 16, 7, 10**18 + 5_000_000_000) == hosts
    assert callback_state.take(path, b"s" * 16, 7, 10**18) is None
