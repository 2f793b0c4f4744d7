"""promisefsd backup: a copy that can be served, made while everything goes on."""

from __future__ import annotations

import random
import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import trio
from promisefs_server.administration import backup
from promisefs_server.administration.backup import MARK, back_up
from promisefs_server.errors import StoreError
from promisefs_server.store import deletions
from promisefs_server.store.deletion_hold import are_deletions_held, deletions_held
from promisefs_server.store.vnodes import key_of
from server_cell import running_cell
from server_daemon import COMMAND
from store_fixtures import HOST, contents, fill
from test_crashes import Expected, Worker

PATIENT = 120.0


def ignore(done: int, total: int) -> None:
    pass


async def test_a_copy_of_a_store_in_use_is_the_same_store(folder: Path, tmp_path: Path) -> None:
    async with running_cell(folder) as cell:
        await fill(cell)
        a = await cell.connected(HOST)
        seen = [await contents(a, volume) for volume in ("root", "projects")]
        report = await trio.to_thread.run_sync(back_up, folder, tmp_path / "copy", ignore)
        assert report.is_sound
        incarnation = (await a.stat(a.root)).status.incarnation
    assert (tmp_path / "copy" / "identity.sqlite").is_file() == (folder / "identity.sqlite").is_file()
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "copy").rglob("*")} == {0}, "nobody else can read it"
    async with running_cell(tmp_path / "copy") as cell:
        a = await cell.connected(HOST)
        assert [await contents(a, volume) for volume in ("root", "projects")] == seen
        assert a.inits == 1 and (await a.stat(a.root)).status.incarnation > incarnation


@pytest.mark.parametrize("seed", range(3))
async def test_what_was_synced_before_is_in_a_copy_made_under_load(folder: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    before = Expected()
    async with running_cell(folder, limit_s=PATIENT) as cell:
        a = await cell.connected()
        for number in range(20):
            fid = (await a.create(b"kept%d" % number)).fid
            data = chance.randbytes(4096)
            await a.store(fid, data, sync=True)
            before.synced(fid, {0: data})
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                worker = Worker(await cell.connected(), random.Random(chance.getrandbits(32)), Expected())
                nursery.start_soon(worker.run, 100_000)
            await trio.sleep(0.3)
            report = await trio.to_thread.run_sync(back_up, folder, tmp_path / "copy", ignore)
            nursery.cancel_scope.cancel()
    assert report.is_sound, report.problems
    async with running_cell(tmp_path / "copy", lease_s=0.2) as cell:
        assert await before.assert_there(await cell.connected()) == 20


async def test_a_file_removed_meanwhile_is_in_the_copy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletions, "GATHER_S", 0.001)
    monkeypatch.setattr(deletions, "HOLD_POLL_S", 0.01)
    go_on, at_work = trio.Event(), trio.Event()

    def progress(done: int, total: int) -> None:
        if not done:
            trio.from_thread.run_sync(at_work.set)
            trio.from_thread.run(go_on.wait)

    async with running_cell(folder) as cell:
        a = await cell.connected()
        f = (await a.create(b"f")).fid
        await a.store(f, b"precious")
        path = cell.server.store.files.path(key_of(f))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, partial(back_up, folder, tmp_path / "copy", progress))
            await at_work.wait()
            await a.unlink(b"f")
            await trio.sleep(0.1)
            assert path.exists()
            go_on.set()
        with trio.fail_after(10):
            while path.exists():  # noqa: ASYNC110
                await trio.sleep(0.01)
    async with running_cell(tmp_path / "copy") as cell:
        a = await cell.connected()
        found = await a.lookup(b"f")
        assert found is not None and await a.fetch(found.fid) == b"precious"


def test_deletions_are_held_as_long_as_somebody_wants(folder: Path) -> None:
    folder.mkdir()
    assert not are_deletions_held(folder)
    with ExitStack() as stack:
        stack.enter_context(deletions_held(folder))
        with deletions_held(folder):
            assert are_deletions_held(folder)
        assert are_deletions_held(folder)
    assert not are_deletions_held(folder)


async def test_a_backup_that_was_interrupted_begins_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_cell(folder) as cell:
        await fill(cell)
    monkeypatch.setattr(backup, "_copy_file", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        back_up(folder, tmp_path / "copy", ignore)
    assert not (tmp_path / "copy").exists() and (tmp_path / "copy.unfinished" / MARK).exists()
    monkeypatch.undo()
    assert back_up(folder, tmp_path / "copy", ignore).is_sound
    assert not (tmp_path / "copy.unfinished").exists() and not (tmp_path / "copy" / MARK).exists()
    with pytest.raises(StoreError, match="exists: give the name of a new directory"):
        back_up(folder, tmp_path / "copy", ignore)
    (tmp_path / "other.unfinished").mkdir()
    with pytest.raises(StoreError, match="is in the way"):
        back_up(folder, tmp_path / "other", ignore)


async def test_the_command(folder: Path, tmp_path: Path) -> None:
    async with running_cell(folder) as cell:
        await fill(cell)
        path = cell.server.store.files.path(1 << 40 | 3)

    def run(target: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "backup", str(folder), str(tmp_path / target)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = await trio.to_thread.run_sync(run, "copy")
    assert (done.returncode, done.stderr) == (0, "") and "is a sound copy" in done.stdout
    again = await trio.to_thread.run_sync(run, "copy")
    assert again.returncode == 3 and again.stderr.count("\n") == 1 and "exists" in again.stderr
    path.unlink()
    lossy = await trio.to_thread.run_sync(run, "lossy")
    assert lossy.returncode == 6 and "is made, but has 1 problems" in lossy.stderr
