"""Opening a store: never a new one over an old one's bytes, never a vnode number twice."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.messages import AppendData
from promisefs_server.errors import StoreError
from promisefs_server.store.store import Store
from promisefs_server.store.vnodes import key_of
from server_cell import running_cell


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def paths(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("spoil", [remove, empty])
async def test_bytes_without_a_database_are_not_made_a_new_store(folder: Path, spoil: Callable[[Path], None]) -> None:
    async with running_cell(folder) as cell:
        a = await cell.connected()
        await a.store((await a.create(b"f")).fid, b"precious")
    kept = folder.parent / "kept"
    kept.write_bytes((folder / "store.sqlite").read_bytes())
    spoil(folder / "store.sqlite")
    before = paths(folder)
    with pytest.raises(StoreError, match=r"store\.sqlite is missing or empty, but .*data is not"):
        Store.open(folder, time.time_ns())
    assert paths(folder) == before
    kept.rename(folder / "store.sqlite")
    async with running_cell(folder) as cell:
        a = await cell.connected()
        found = await a.lookup(b"f")
        assert found is not None and await a.fetch(found.fid) == b"precious"


async def test_a_database_without_its_bytes_is_not_served_as_zeros(folder: Path) -> None:
    async with running_cell(folder) as cell:
        a = await cell.connected()
        f = (await a.create(b"f")).fid
        await a.store(f, b"precious")
    (folder / "data").rename(folder.parent / "elsewhere")
    for use in (lambda: Store.open(folder, time.time_ns()), lambda: Store.open_stopped(folder)):
        with pytest.raises(StoreError, match="data is missing"):
            use()
    assert not (folder / "data").exists()
    (folder.parent / "elsewhere").rename(folder / "data")
    async with running_cell(folder) as cell:
        assert await (await cell.connected()).fetch(f) == b"precious"


async def test_a_file_without_its_data_file_is_not_served_as_zeros(folder: Path) -> None:
    """Nor does it become zeros by what is done to it; it can be removed, or be cut to nothing and written anew."""
    async with running_cell(folder) as cell:
        a = await cell.connected()
        f, g, h, empty, hole = [(await a.create(name)).fid for name in (b"f", b"g", b"h", b"empty", b"hole")]
        for fid in (f, g, h):
            await a.store(fid, b"precious")
        await a.truncate(hole, 3)
    (folder / "data").rename(folder.parent / "elsewhere")
    (folder / "data").mkdir()
    async with running_cell(folder) as cell:
        a = await cell.connected()
        for call in (
            lambda: a.fetch(f),
            lambda: a.store(f, b"P"),
            lambda: a.store(f, b"behind", 100),
            lambda: a.call(AppendData(a.op(), f, None), b"more"),
            lambda: a.truncate(f, 3),
            lambda: a.truncate(f, 100),
        ):
            with pytest.raises(Aborted) as refusal:
                await call()
            assert refusal.value.code == AbortCode.IO and "missing" in refusal.value.message
        assert (await a.stat(f)).status.size == 8
        await a.unlink(b"g")
        await a.truncate(h, 0)
        await a.store(h, b"new")
        assert await a.fetch(h) == b"new"
        assert await a.fetch(empty) == b"" and await a.fetch(hole) == bytes(3)
        missing = cell.server.store.files.path(key_of(f))
    missing.parent.mkdir(parents=True, exist_ok=True)
    (folder.parent / "elsewhere" / missing.relative_to(folder / "data")).rename(missing)
    async with running_cell(folder) as cell:
        assert await (await cell.connected()).fetch(f) == b"precious"


def test_a_database_that_is_locked_is_not_called_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promisefs_server.store.database.BUSY_TIMEOUT_S", 0.1)
    Store.open(folder, time.time_ns()).close(clean=True)
    somebody = sqlite3.connect(folder / "store.sqlite", isolation_level=None)
    somebody.execute("PRAGMA locking_mode=EXCLUSIVE")
    somebody.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match=r"cannot use .*locked"):
        Store.open(folder, time.time_ns())
    somebody.close()
    Store.open(folder, time.time_ns()).close(clean=True)


async def test_vnode_numbers_that_power_loss_took_are_not_used_again(folder: Path) -> None:
    async with running_cell(folder, clean=False) as cell:
        a = await cell.connected()
        await a.create(b"before")
        uuid = a.uuid
        database = cell.server.store.database.path
        parts = [database, database.with_name("store.sqlite-wal")]
        survived = [part.read_bytes() for part in parts]
        used = set()
        cell.server.store.volumes.get(1).next_vnode = cell.server.store.volumes.get(1).reserved_below
        for i in range(3):
            used.add((await a.create(b"lost%d" % i)).fid.vnode)
    database.with_name("store.sqlite-shm").unlink(missing_ok=True)
    for part, content in zip(parts, survived, strict=True):
        part.write_bytes(content)
    async with running_cell(folder) as cell:
        a = await cell.connected(uuid)
        assert await a.lookup(b"before") is not None and await a.lookup(b"lost0") is None
        new = [(await a.create(b"new%d" % i)).fid.vnode for i in range(3)]
        assert min(new) > max(used)
    async with running_cell(folder) as cell:
        a = await cell.connected(uuid)
        assert (await a.create(b"next")).fid.vnode < min(new) + (1 << 20), "after a clean end none are skipped"
