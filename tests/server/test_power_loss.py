"""What must be on disk before something else is done, so that power loss takes nothing that anyone relies on.

Power loss is played by bringing back the database and its WAL as they were at the last sync; what was done to data
files since stays done, as it may.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio
import trio.testing
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_server.store import deletions
from promisefs_server.store.vnodes import key_of
from server_cell import Cell, in_background, running_cell, settled

REAL_SYNC = "promisefs_server.store.durability.os.fdatasync"


def fails(descriptor: int) -> None:
    raise OSError(5, "Input/output error")


class OnDisk:
    """The database as the last sync has left it; `bring_back` it when the server has ended."""

    def __init__(self, cell: Cell) -> None:
        database = cell.server.store.database
        self._path = database.path
        self._content = {path: path.read_bytes() for path in (database.path, database.wal_path)}

    def bring_back(self) -> None:
        self._path.with_name(self._path.name + "-shm").unlink(missing_ok=True)
        for path, content in self._content.items():
            path.write_bytes(content)


async def test_a_host_is_known_durably_before_it_is_given_anything(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else mutations would not wait for it after power loss, though it trusts its lease and promises."""
    go_on = threading.Event()
    synced = threading.Event()

    def slow(descriptor: int) -> None:
        assert go_on.wait(10)
        synced.set()

    monkeypatch.setattr(REAL_SYNC, slow)
    a = cell.client()
    async with in_background(a.connect_callbacks()) as hello:
        await trio.testing.wait_all_tasks_blocked()
        assert len(cell.server.hosts) == 1 and a.inits == 0 and not hello.done
        go_on.set()
        with trio.fail_after(10):
            while not hello.done:
                await settled()
        assert hello.error is None and a.inits == 1 and synced.is_set()
    await a.connect_calls()


async def test_also_if_its_first_hello_was_cut_off(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(REAL_SYNC, lambda descriptor: go_on.wait(10))
    a = cell.client()
    for _ in range(2):
        async with in_background(a.connect_callbacks()) as hello:
            await trio.testing.wait_all_tasks_blocked()
            assert len(cell.server.hosts) == 1 and a.inits == 0 and not hello.done
            await a.callbacks.close()
    go_on.set()
    await a.connect()
    assert a.inits == 1


async def test_a_host_that_cannot_be_noted_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cell(folder, clean=False) as cell:
        monkeypatch.setattr(REAL_SYNC, fails)
        a = cell.client()
        with pytest.raises(Aborted) as refusal:
            await a.connect_callbacks()
        assert refusal.value.code == AbortCode.IO and a.inits == 0


@pytest.mark.parametrize("how", ["replaced by a rename", "removed"])
async def test_bytes_are_there_as_long_as_the_file_may_come_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    monkeypatch.setattr(deletions, "GATHER_S", 0.001)
    async with running_cell(folder, clean=False) as cell:
        a = await cell.connected()
        f = await a.create(b"f")
        await a.store(f.fid, b"old bytes", sync=True)
        new = await a.create(b"new")
        await a.store(new.fid, b"new bytes", sync=True)
        on_disk = OnDisk(cell)
        monkeypatch.setattr(REAL_SYNC, fails)
        if how == "removed":
            await a.unlink(b"f")
        else:
            await a.rename((a.root, b"new"), (a.root, b"f"))
        with trio.fail_after(10):
            while "deleted only at the next start" not in caplog.text:
                await settled()
        uuid = a.uuid
    monkeypatch.undo()
    on_disk.bring_back()
    async with running_cell(folder) as cell:
        a = await cell.connected(uuid)
        for name, data in ((b"f", b"old bytes"), (b"new", b"new bytes")):
            found = await a.lookup(name)
            assert found is not None and await a.fetch(found.fid) == data


@pytest.mark.parametrize("then", ["nothing", "written behind the end", "made longer"])
async def test_bytes_are_there_as_long_as_the_old_size_may_come_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    async with running_cell(folder, clean=False) as cell:
        a = await cell.connected()
        f = await a.create(b"f")
        await a.store(f.fid, b"old bytes", sync=True)
        on_disk = OnDisk(cell)
        monkeypatch.setattr(REAL_SYNC, fails)
        assert (await a.truncate(f.fid, 3)).status.size == 3
        if then != "nothing":
            with pytest.raises(Aborted) as refusal:
                await (a.store(f.fid, b"x", 5) if then == "written behind the end" else a.truncate(f.fid, 5))
            assert refusal.value.code == AbortCode.IO
        assert await a.fetch(f.fid) == b"old"
        uuid = a.uuid
    monkeypatch.undo()
    on_disk.bring_back()
    async with running_cell(folder) as cell:
        a = await cell.connected(uuid)
        assert await a.fetch(f.fid) == b"old bytes"


async def test_a_file_is_cut_when_its_new_size_is_durable(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await cell.connected()
    f = await a.create(b"f")
    await a.store(f.fid, b"old bytes")
    path = cell.server.store.files.path(key_of(f.fid))
    go_on = threading.Event()
    monkeypatch.setattr(REAL_SYNC, lambda descriptor: go_on.wait(10))
    async with in_background(a.truncate(f.fid, 3)) as cut:
        assert not cut.done and path.read_bytes() == b"old bytes"
        assert await a.fetch(f.fid) == b"old", "nobody has to wait to read it"
        go_on.set()
        with trio.fail_after(10):
            while not cut.done:
                await settled()
        assert cut.error is None and path.read_bytes() == b"old"
