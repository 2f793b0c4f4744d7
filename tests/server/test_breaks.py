"""Who is told of a change, when the caller gets its reply, and what becomes of hosts that do not answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import Changed, GiveUpAllCallBacks, GiveUpCallBacks, Role, SetXattr
from server_cell import LEASE_S, Cell, Client, in_background, running_cell, settled
from trio.testing import MockClock

STATUS, DATA, DELETED = Changed.STATUS, Changed.DATA, Changed.DELETED


# The table of what breaks what


async def both(cell: Cell) -> tuple[Client, Client, Fid, Fid]:
    """Two clients; the second holds promises on a directory, a file in it, and the root."""
    a, b = await cell.connected(), await cell.connected()
    d = (await a.mkdir(b"d")).fid
    f = (await a.create(b"f", d)).fid
    for fid in (b.root, d, f):
        await b.stat(fid)
    return a, b, d, f


CASES: dict[str, tuple[Callable[[Client, Fid, Fid], Awaitable[Any]], dict[str, int]]] = {
    "StoreData": (lambda a, d, f: a.store(f, b"x"), {"f": STATUS | DATA}),
    "StoreStatus": (lambda a, d, f: a.chmod(f, 0o600), {"f": STATUS}),
    "truncate": (lambda a, d, f: a.truncate(f, 100), {"f": STATUS | DATA}),
    "SetXattr": (lambda a, d, f: a.call(SetXattr(f, b"user.x", 0), b"1"), {"f": STATUS}),
    "CreateFile": (lambda a, d, f: a.create(b"n", d), {"d": STATUS | DATA}),
    "MakeDir": (lambda a, d, f: a.mkdir(b"n", d), {"d": STATUS | DATA}),
    "Symlink": (lambda a, d, f: a.symlink(b"n", b"t"), {"root": STATUS | DATA}),
    "Link": (lambda a, d, f: a.link(f, b"n"), {"root": STATUS | DATA, "f": STATUS}),
    "RemoveFile": (lambda a, d, f: a.unlink(b"f", d), {"d": STATUS | DATA, "f": STATUS | DELETED}),
    "Rename": (
        lambda a, d, f: a.rename((d, b"f"), (a.root, b"n")),
        {"d": STATUS | DATA, "root": STATUS | DATA, "f": STATUS},
    ),
    "Rename of a directory": (
        lambda a, d, f: a.rename((a.root, b"d"), (a.root, b"e")),
        {"root": STATUS | DATA, "d": STATUS},
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_what_breaks_what(cell: Cell, name: str) -> None:
    a, b, d, f = await both(cell)
    mutate, expected = CASES[name]
    fids = {"root": a.root, "d": d, "f": f}
    await mutate(a, d, f)
    assert {b_.fid: b_.changed for b_ in b.breaks} == {fids[key]: what for key, what in expected.items()}
    assert a.breaks == []
    for one in b.breaks:
        if not one.changed & DELETED:
            status = (await b.stat(one.fid)).status
            assert (one.data_version, one.size) == (status.data_version, status.size)


async def test_removal_of_one_of_two_names_and_of_directories(cell: Cell) -> None:
    a, b, d, f = await both(cell)
    await a.link(f, b"g", d)
    await b.stat(f)
    b.breaks.clear()
    await a.unlink(b"g", d)
    assert {x.fid: x.changed for x in b.breaks} == {f: STATUS}, "b had no promise on d any more"
    await a.unlink(b"f", d)
    await b.stat(d)
    b.breaks.clear()
    await a.rmdir(b"d")
    assert {x.fid: x.changed for x in b.breaks} == {d: STATUS | DATA | DELETED, a.root: STATUS | DATA}


async def test_replaced_file_is_told_deleted(cell: Cell) -> None:
    a, b, d, f = await both(cell)
    await a.create(b"n")
    await b.stat(b.root)
    b.breaks.clear()
    await a.rename((a.root, b"n"), (d, b"f"))
    assert {x.fid: x.changed for x in b.breaks} == {d: STATUS | DATA, a.root: STATUS | DATA, f: STATUS | DELETED}


async def test_a_break_ends_the_promise(cell: Cell) -> None:
    a, b, _, f = await both(cell)
    await a.store(f, b"1")
    await a.store(f, b"2")
    assert len(b.breaks) == 1, "without a promise nobody is told"
    await b.stat(f)
    await a.store(f, b"3")
    assert len(b.breaks) == 2


async def test_promises_given_up_are_not_broken(cell: Cell) -> None:
    a, b, d, f = await both(cell)
    await b.call(GiveUpCallBacks((f,)))
    await a.store(f, b"1")
    assert b.breaks == []
    await b.call(GiveUpAllCallBacks())
    await a.create(b"n", d)
    assert b.breaks == []
    with pytest.raises(Aborted) as refusal:
        await b.stat(f)
    assert refusal.value.code == AbortCode.NOT_INTRODUCED


async def test_the_callers_promise_outlives_its_own_change(cell: Cell) -> None:
    a, b, _, f = await both(cell)
    assert (await a.store(f, b"1")).promise_s > 0
    await b.store(f, b"2")
    assert a.broken() == {f}


# Order


async def test_the_reply_waits_for_the_acknowledgement_and_reads_do_not(cell: Cell) -> None:
    a, b, _, f = await both(cell)
    b.acknowledge = trio.Event()
    async with in_background(a.store(f, b"new")) as store:
        assert b.broken() == {f} and not store.done
        assert await b.fetch(f) == b"new"
        assert await a.fetch(f) == b"new"
        c = await cell.connected()
        assert await c.fetch(f) == b"new"
        b.acknowledge.set()
        await settled()
        assert store.done and store.error is None


async def test_a_later_change_waits_for_an_earlier_break_of_the_same_fid(cell: Cell) -> None:
    """W2: b lost its promise with the first break, but may still show what is older until it acknowledges."""
    a, b, _, f = await both(cell)
    c = await cell.connected()
    b.acknowledge = trio.Event()
    async with in_background(a.chmod(f, 0o600)) as first, in_background(c.store(f, b"x")) as second:
        assert not first.done and not second.done
        assert [x.changed for x in b.breaks] == [STATUS, STATUS | DATA]
        b.acknowledge.set()
        await settled()
        assert first.done and second.done


async def test_changes_of_other_things_do_not_wait(cell: Cell) -> None:
    a, b, d, f = await both(cell)
    g = (await a.create(b"g", d)).fid
    b.acknowledge = trio.Event()
    async with in_background(a.store(f, b"x")) as store:
        with trio.fail_after(5):
            await a.chmod(g, 0o600)
        assert not store.done


async def test_two_that_change_what_the_other_holds_do_not_deadlock(cell: Cell) -> None:
    a, b, d, _ = await both(cell)
    await a.stat(d)
    with trio.fail_after(10):
        for i in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.create, b"a%d" % i, d)
                nursery.start_soon(b.create, b"b%d" % i, d)
            await a.stat(d)
            await b.stat(d)


async def test_many_breaks_go_in_few_calls(cell: Cell) -> None:
    a, b, d, _ = await both(cell)
    fids = [(await a.create(b"%d" % i, d)).fid for i in range(100)]
    for fid in fids:
        await b.stat(fid)
    b.breaks.clear()
    async with trio.open_nursery() as nursery:
        for fid in fids:
            nursery.start_soon(a.chmod, fid, 0o600)
    assert b.broken() == set(fids)


# Leases. The clock moves only when the test moves it.


async def test_a_host_that_does_not_answer_is_waited_for_until_its_lease_ends(
    mock_clock: MockClock, folder: Path
) -> None:
    async with running_cell(folder) as cell:
        a, b, _, f = await both(cell)
        mock_clock.jump(5)
        await b.renew()
        mock_clock.jump(5)
        b.acknowledge = trio.Event()
        async with in_background(a.store(f, b"x")) as store:
            mock_clock.jump(LEASE_S - 5 - 0.1)
            await settled()
            assert not store.done
            mock_clock.jump(0.2)
            await settled()
            assert store.done and store.error is None


async def test_a_host_that_comes_back_while_its_old_connection_is_closed_is_waited_for_no_longer_than_its_lease(
    mock_clock: MockClock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_cell(folder) as cell:
        a, b, _, f = await both(cell)
        b.acknowledge = trio.Event()
        host = cell.server.hosts.by_uuid(b.uuid)
        assert host is not None
        old = cell.server.breaker.contact(host).callbacks
        assert old is not None
        closing = trio.Event()
        monkeypatch.setattr(old, "close", closing.wait)
        async with in_background(a.store(f, b"x")):
            mock_clock.jump(LEASE_S + 0.1)
            await settled()
        assert not host.stale, "it acknowledged InitCallBackState3 meanwhile"
        await b.stat(f)
        async with in_background(a.store(f, b"y")) as store:
            closing.set()
            await settled()
            cell.server.check_invariants()
            mock_clock.jump(LEASE_S + 0.1)
            await settled()
            assert store.done and store.error is None


async def test_renewing_without_acknowledging_does_not_help(mock_clock: MockClock, folder: Path) -> None:
    async with running_cell(folder) as cell:
        a, b, _, f = await both(cell)
        b.acknowledge = trio.Event()
        async with in_background(a.store(f, b"x")) as store:
            mock_clock.jump(LEASE_S / 2)
            async with in_background(b.renew()) as renewal:
                assert not renewal.done, "the renewal was granted over an unacknowledged break"
                mock_clock.jump(LEASE_S / 2 + 0.1)
                await settled()
                assert store.done
                assert renewal.done and renewal.error is not None


async def test_a_lost_connection_is_waited_for_until_the_lease_ends(mock_clock: MockClock, folder: Path) -> None:
    async with running_cell(folder) as cell:
        a, b, _, f = await both(cell)
        await b.callbacks.close()
        await settled()
        async with in_background(a.store(f, b"x")) as store, in_background(a.create(b"other")) as other:
            mock_clock.jump(LEASE_S - 0.1)
            await settled()
            # W3: b's promises are forgotten now, so nothing may be answered, whatever it is about.
            assert not store.done and not other.done
            mock_clock.jump(0.2)
            await settled()
            assert store.done and other.done
            await a.create(b"after that nobody waits")


async def test_a_host_that_comes_back_ends_the_wait_by_forgetting(mock_clock: MockClock, folder: Path) -> None:
    async with running_cell(folder) as cell:
        a, b, _, f = await both(cell)
        await b.callbacks.close()
        await settled()
        async with in_background(a.store(f, b"x")) as store:
            inits = b.inits
            b.acknowledge_init = trio.Event()
            async with in_background(b.connect_callbacks()) as connecting:
                assert b.inits == inits + 1
                assert not connecting.done, "the lease was granted before InitCallBackState3 was acknowledged"
                assert not store.done
                async with in_background(b.stat(f)) as gated:
                    assert not gated.done, "a stale host was served"
                    b.acknowledge_init.set()
                    await settled()
                    assert gated.done and gated.error is None
                assert store.done and connecting.done


async def test_a_host_whose_breaks_were_lost_with_its_connection_is_stale(cell: Cell) -> None:
    """The new connection replaces the old before the server noticed that it had ended."""
    a, b, _, f = await both(cell)
    b.acknowledge = trio.Event()
    async with in_background(a.store(f, b"x")) as store:
        inits = b.inits
        await b.connect_callbacks()
        assert b.inits == inits + 1, "the lease was granted before the loss was noticed"
        await settled()
        assert store.done


async def test_a_reconnection_without_loss_keeps_the_promises(cell: Cell) -> None:
    a, b, _, f = await both(cell)
    inits = b.inits
    await b.callbacks.close()
    await b.calls.close()
    await settled()
    await b.connect()
    assert b.inits == inits
    await a.store(f, b"x")
    assert b.broken() == {f}


async def test_calls_of_a_host_without_callbacks_are_refused_in_time(mock_clock: MockClock, folder: Path) -> None:
    async with running_cell(folder) as cell:
        with pytest.raises(Aborted) as refusal:
            await cell.client().connect_calls()
        assert refusal.value.code == AbortCode.NO_CALLBACKS
        a, b, _, f = await both(cell)
        await b.callbacks.close()
        await settled()
        async with in_background(a.store(f, b"x")), in_background(b.stat(f)) as call:
            assert not call.done
            mock_clock.jump(11)
            await settled()
            assert isinstance(call.error, Aborted) and call.error.code == AbortCode.NO_CALLBACKS
            mock_clock.jump(LEASE_S)


async def test_a_full_table_costs_the_least_active_its_promises(folder: Path) -> None:
    async with running_cell(folder, max_promises=20) as cell:
        a, b = await cell.connected(), await cell.connected()
        fids = [(await a.create(b"%d" % i)).fid for i in range(12)]
        a_inits, b_inits = a.inits, b.inits
        for fid in fids:
            await b.stat(fid)
        await settled()
        assert (a.inits, b.inits) == (a_inits + 1, b_inits)
        assert len(cell.server.promises) <= 20
        await a.stat(fids[0])
        await b.store(fids[0], b"x")
        assert fids[0] in a.broken()


async def test_a_peer_that_does_not_read_holds_up_nobody_for_longer(mock_clock: MockClock, folder: Path) -> None:
    async with running_cell(folder) as cell:
        a, b = await cell.connected(), await cell.connected()
        # b's receiving side stands still: what the server sends to it is never taken.
        contact = cell.server.breaker.contact(cell.server.hosts.by_uuid(b.uuid))  # type: ignore[arg-type]
        f = (await a.create(b"f")).fid
        await b.stat(f)
        stuck = trio.Event()

        async def send_all(data: bytes) -> None:
            await stuck.wait()
            raise trio.ClosedResourceError

        async def aclose() -> None:
            stuck.set()

        contact.callbacks._stream.send_all = send_all  # type: ignore[union-attr, method-assign]
        contact.callbacks._stream.aclose = aclose  # type: ignore[union-attr, method-assign]
        async with in_background(a.store(f, b"x")) as store:
            assert not store.done
            mock_clock.jump(LEASE_S + 0.1)
            await settled()
            assert store.done


async def test_only_calls_and_callbacks(cell: Cell) -> None:
    a = await cell.connected()
    with pytest.raises(Aborted) as refusal:
        await a.callbacks.call(GiveUpAllCallBacks())
    assert refusal.value.code == AbortCode.NOT_INTRODUCED
    with pytest.raises(Aborted) as refusal:
        await a.calls.call(a.hello_as(Role.CALLS))
    assert refusal.value.code == AbortCode.NOT_INTRODUCED
