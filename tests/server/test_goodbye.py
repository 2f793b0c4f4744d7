"""A host that says it is gone while its calls are under way: nothing is kept for it, and nobody else suffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import GiveUpAllCallBacks
from server_cell import Cell, Client, in_background, running_cell, settled
from test_data import BIG, HeldWrites


async def both(cell: Cell) -> tuple[Client, Client, Fid]:
    a, b = await cell.connected(), await cell.connected()
    f = (await a.create(b"f")).fid
    await b.stat(f)
    return a, b, f


async def test_a_renewal_that_waited_for_breaks_is_refused(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    a, b, f = await both(cell)
    b.acknowledge = trio.Event()
    async with in_background(a.store(f, b"x")) as store, in_background(b.renew()) as renewal:
        assert not store.done and not renewal.done
        await b.call(GiveUpAllCallBacks())
        await settled()
        assert store.done and store.error is None
        assert isinstance(renewal.error, Aborted) and renewal.error.code == AbortCode.NOT_INTRODUCED
    assert "defect" not in caplog.text


async def test_what_it_had_begun_is_given_no_promise(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A promise of a host that is not known any more could not be broken."""
    a, b, f = await both(cell)
    g = (await a.create(b"g")).fid
    b.acknowledge = trio.Event()
    held = HeldWrites(monkeypatch)
    async with in_background(b.store(g, BIG)):
        await held.wait_begun()
        async with in_background(a.chmod(f, 0o600)) as chmod, in_background(b.renew()):
            assert not chmod.done
            await b.call(GiveUpAllCallBacks())
            await settled()
            assert b.inits == 1, "it was told to forget, though it is not known any more"
            held.go_on.set()
            with trio.fail_after(10):
                while len(cell.server.locks):
                    await settled()
    numbers = {host.number for host in cell.server.hosts}
    assert set(cell.server.promises._expiry) <= numbers
    await a.chmod(g, 0o600)
    assert chmod.done and chmod.error is None


async def test_calls_that_waited_for_its_initialisation_are_refused(folder: Path) -> None:
    """Which of two calls that waited is taken up first is chance, so it is tried until the goodbye was."""
    for attempt in range(30):
        async with running_cell(folder.with_name(f"store{attempt}")) as cell:
            if await _is_refused_after_goodbye(cell):
                return
    raise AssertionError("a call that waited was never refused")


async def _is_refused_after_goodbye(cell: Cell) -> bool:
    """Have a stale host say goodbye and create a file; return whether the creation was refused."""
    a, b, f = await both(cell)
    await b.callbacks.close()
    await settled()
    b.acknowledge_init = trio.Event()
    async with in_background(a.store(f, b"x")), in_background(b.connect_callbacks()):
        async with in_background(b.call(GiveUpAllCallBacks())) as goodbye, in_background(b.create(b"late")) as late:
            assert not goodbye.done and not late.done
            b.acknowledge_init.set()
            with trio.fail_after(30):
                while not (goodbye.done and late.done):
                    await settled()
            assert goodbye.error is None
    refused = late.error is not None
    if refused:
        assert isinstance(late.error, Aborted) and late.error.code == AbortCode.NOT_INTRODUCED
    assert (await a.lookup(b"late") is None) == refused
    return refused
