"""A full disk: what adds to it is refused, what frees space works, and the server starts and ends."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_server.errors import StoreError
from promisefs_server.store import ballast
from promisefs_server.store.ballast import Ballast
from promisefs_server.store.store import Store
from server_cell import Cell, running_cell

KIB = 1024


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ballast, "BALLAST_BYTES", 64 * KIB)
    monkeypatch.setattr(ballast, "POLL_S", 0.01)


def full_error() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


def fill(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every commit fail as long as the ballast is there."""
    database = cell.server.store.database
    real = database.execute

    def execute(sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql == "COMMIT" and ballast_of(cell).exists():
            real("ROLLBACK")
            raise full_error()
        return real(sql, *arguments)

    monkeypatch.setattr(database, "execute", execute)


def ballast_of(cell: Cell) -> Path:
    return cell.server.store.folder / ballast.BALLAST_NAME


async def wait_ballast(cell: Cell) -> None:
    with trio.fail_after(5):
        while not ballast_of(cell).exists():  # noqa: ASYNC110
            await trio.sleep(0.005)


async def test_a_full_disk_can_be_emptied(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ballast, "available_bytes", lambda self: 2 * ballast.BALLAST_BYTES)
    a = await cell.connected()
    big = (await a.create(b"big")).fid
    await a.store(big, b"x" * 1000)
    await wait_ballast(cell)
    assert ballast_of(cell).stat().st_blocks * 512 >= ballast.BALLAST_BYTES
    monkeypatch.setattr(Ballast, "available_bytes", lambda self: 0)
    fill(cell, monkeypatch)
    with pytest.raises(Aborted) as refusal:
        await a.create(b"more")
    assert refusal.value.code == AbortCode.NOSPC and ballast_of(cell).exists()
    assert (await a.truncate(big, 0)).status.size == 0
    assert not ballast_of(cell).exists()
    await a.unlink(b"big")
    assert await a.lookup(b"big") is None
    monkeypatch.setattr(Ballast, "available_bytes", lambda self: 2 * ballast.BALLAST_BYTES)
    await wait_ballast(cell)


async def test_bytes_are_refused_before_the_disk_is_full(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await cell.connected()
    f = (await a.create(b"f")).fid
    available = ballast.BALLAST_BYTES + 1000
    monkeypatch.setattr(Ballast, "available_bytes", lambda self: available)
    monkeypatch.setattr(ballast, "CHECK_BYTES", 1)
    await a.store(f, b"x" * 1000)
    with pytest.raises(Aborted) as refusal:
        await a.store(f, b"y" * 1001)
    assert refusal.value.code == AbortCode.NOSPC
    assert await a.fetch(f) == b"x" * 1000
    await a.store(f, b"y" * 1000)


async def test_a_store_opens_on_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cell(folder):
        pass
    (folder / ballast.BALLAST_NAME).write_bytes(b"\0" * ballast.BALLAST_BYTES)
    monkeypatch.setattr(Ballast, "available_bytes", lambda self: 0)
    async with running_cell(folder) as cell:
        assert not ballast_of(cell).exists()


def test_a_disk_too_full_to_open_the_store_is_not_called_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise full_error()

    monkeypatch.setattr(Store, "_start", fails)
    with pytest.raises(StoreError, match="the disk is full"):
        Store.open(folder, time.time_ns())
