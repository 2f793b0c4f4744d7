"""Data files of vnodes that are gone are deleted, all of them, while more go and after a crash."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio
from promisefs_server.store.datafiles import DataFiles
from promisefs_server.store.vnodes import key_of
from server_cell import Cell, running_cell, settled


def data_files(folder: Path) -> list[Path]:
    return [path for path in (folder / "data").rglob("*") if path.is_file()]


async def test_what_is_added_during_a_batch_is_deleted_too(
    cell: Cell, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    real = DataFiles.delete

    def slow(files: DataFiles, key: int) -> None:
        assert go_on.wait(10)
        real(files, key)

    monkeypatch.setattr(DataFiles, "delete", slow)
    a = await cell.connected()
    for i in range(4):
        await a.store((await a.create(b"%d" % i)).fid, b"x")
    await a.unlink(b"0")
    await trio.testing.wait_all_tasks_blocked()
    for i in range(1, 4):
        await a.unlink(b"%d" % i)
    go_on.set()
    with trio.fail_after(10):
        while cell.server.deletions._pending:
            await settled()
    assert data_files(folder) == []


async def test_after_a_crash_only_files_of_ours_that_nobody_owns_are_swept(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_cell(folder, clean=False) as cell:
        a = await cell.connected()
        f = (await a.create(b"f")).fid
        await a.store(f, b"mine")
        inner = cell.server.store.files.path(key_of(f)).parent
    strange = [inner / name for name in ("0x7", "00000ff", "+1", "f" * 20, "note")]
    for path in (*strange, inner / "fff"):
        path.write_bytes(b"?")
    (inner.parent / "file").write_bytes(b"?")
    async with running_cell(folder) as cell:
        with trio.fail_after(10):
            while (inner / "fff").exists():
                await settled()
        a = await cell.connected(a.uuid)
        assert await a.fetch(f) == b"mine"
    assert all(path.exists() for path in strange)
    assert "cannot look for data files" in caplog.text
