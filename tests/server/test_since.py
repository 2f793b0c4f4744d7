"""StoreData's `since`: bytes that are only presumed are stored if nobody else has changed the file meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid, Status
from promisefs_protocol.messages import FileVersion, StoreData
from promisefs_server.promises.writers import MAX_RUNS, Writers
from server_cell import Cell, Client, running_cell


async def store_since(client: Client, fid: Fid, since: Status, data: bytes = b"x") -> Status:
    version = FileVersion(since.incarnation, since.data_version)
    reply = await client.call(StoreData(fid, 0, None, False, version), data)
    status = reply.entry.status
    assert isinstance(status, Status)
    return status


async def refused_since(client: Client, fid: Fid, since: Status) -> None:
    with pytest.raises(Aborted) as refusal:
        await store_since(client, fid, since, b"never")
    assert refusal.value.code == AbortCode.CHANGED


async def test_since_the_version_that_is_current(cell: Cell) -> None:
    a = await cell.connected()
    f = await a.create(b"f")
    await store_since(a, f.fid, f.status)
    assert await a.fetch(f.fid) == b"x"


async def test_own_stores_and_truncations_do_not_count_anothers_do(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = await a.create(b"f")
    await a.store(f.fid, b"abc")
    await a.truncate(f.fid, 2)
    await store_since(a, f.fid, f.status)
    before = (await a.stat(f.fid)).status
    await b.store(f.fid, b"B", 1)
    await refused_since(a, f.fid, f.status)
    await refused_since(a, f.fid, before)
    await a.store(f.fid, b"c", 2)
    await refused_since(a, f.fid, before)
    assert await a.fetch(f.fid) == b"xBc"


async def test_a_chmod_does_not_count(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = await a.create(b"f")
    await b.chmod(f.fid, 0o600)
    await store_since(a, f.fid, f.status)


async def test_a_restart_forgets_who_made_which_version(folder: Path) -> None:
    async with running_cell(folder) as cell:
        a = await cell.connected()
        f = await a.create(b"f")
        now = await a.store(f.fid, b"abc")
    async with running_cell(folder, clean=False) as cell:
        again = await cell.connected(a.uuid)
        await refused_since(again, f.fid, f.status)
        await store_since(again, f.fid, now.status)
        now = await again.stat(f.fid)
    async with running_cell(folder) as cell:  # after a crash no version is equal to one from before
        again = await cell.connected(a.uuid)
        await refused_since(again, f.fid, now.status)


def test_runs_are_bounded() -> None:
    writers = Writers()
    for key in range(MAX_RUNS + 1):
        writers.changed(key, 1, 2)
    assert not writers.only(0, 1, 1, 2)
    assert writers.only(MAX_RUNS, 1, 1, 2)
