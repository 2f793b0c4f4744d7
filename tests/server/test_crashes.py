"""kill -9 and power loss under load: nothing is damaged then, and all that was synced is there (G4)."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import AppendData, Fallocate, FallocateMode, SetXattr
from promisefs_protocol.transport import ConnectionLost
from promisefs_server.salvage import salvager
from promisefs_server.salvage.problems import Report, Severity
from promisefs_server.store import durability
from promisefs_server.store.datafiles import DataFiles
from promisefs_server.store.store import Store
from promisefs_server.store.vnodes import key_of
from server_cell import Client, running_cell
from server_daemon import Daemon, client_of, daemon

PAGE = 4096


def check(folder: Path) -> Report:
    opened = Store.open_stopped(folder)
    try:
        return salvager.check(opened.database.connection, opened.files, clean=opened.was_clean)
    finally:
        opened.close(clean=False)


@dataclass
class Expected:
    """What has to be there whatever happens: of each file, bytes that were synced and not written over since."""

    pages: dict[Fid, dict[int, bytes]] = field(default_factory=dict)

    def written(self, fid: Fid, page: int) -> None:
        self.pages.get(fid, {}).pop(page, None)

    def synced(self, fid: Fid, pages: dict[int, bytes]) -> None:
        self.pages.setdefault(fid, {}).update(pages)

    async def assert_there(self, client: Client) -> int:
        count = 0
        for fid, pages in self.pages.items():
            for page, data in pages.items():
                found = await client.fetch(fid, page * PAGE, PAGE)
                assert found == data, f"{fid}, page {page}"
                count += 1
        return count


class Worker:
    """One client that changes everything it has, at random, until its connection is lost."""

    def __init__(self, client: Client, chance: random.Random, expected: Expected) -> None:
        self._client = client
        self._chance = chance
        self._expected = expected
        self._files: dict[bytes, Fid] = {}
        self._count = 0

    async def run(self, steps: int) -> None:
        name = b"%016x" % self._chance.getrandbits(64)
        self._directory = (await self._client.mkdir(name)).fid
        for _ in range(steps):
            await self._step()

    async def _step(self) -> None:
        a, chance = self._client, self._chance
        if len(self._files) < 3:
            self._count += 1
            name = b"f%d" % self._count
            self._files[name] = (await a.create(name, self._directory)).fid
            return
        name = chance.choice(list(self._files))
        fid = self._files[name]
        what = chance.choice(["store"] * 6 + ["append", "rename", "link", "unlink", "xattr", "cut", "punch", "mkdir"])
        if what == "store":
            await self._store(fid)
        elif what == "append":
            self._expected.pages.pop(fid, None)
            await a.call(AppendData(a.op(), fid, None), b"appended" * chance.randint(1, 2000))
        elif what == "rename":
            other = chance.choice(list(self._files))
            if other != name:
                self._expected.pages.pop(self._files[other], None)
                await a.rename((self._directory, name), (self._directory, other), keep_open=chance.random() < 0.3)
                self._files[other] = self._files.pop(name)
        elif what == "link":
            self._count += 1
            await a.link(fid, b"l%d" % self._count, self._directory)
        elif what == "unlink":
            del self._files[name]
            self._expected.pages.pop(fid, None)
            await a.unlink(name, self._directory, keep_open=chance.random() < 0.3)
        elif what == "xattr":
            await a.call(SetXattr(fid, b"user.%d" % chance.randint(0, 5), 0), b"value")
        elif what == "cut":
            self._expected.pages.pop(fid, None)
            await a.truncate(fid, chance.randint(0, 8 * PAGE))
        elif what == "punch":
            self._expected.pages.pop(fid, None)
            mode = FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE
            await a.call(Fallocate(fid, mode, PAGE, chance.randint(1, 2 * PAGE)))
        else:
            self._count += 1
            await a.mkdir(b"d%d" % self._count, self._directory)

    async def _store(self, fid: Fid) -> None:
        first, count = self._chance.randint(0, 4), self._chance.randint(1, 3)
        pages = {page: self._chance.randbytes(PAGE) for page in range(first, first + count)}
        sync = self._chance.random() < 0.5
        for page in pages:
            self._expected.written(fid, page)
        await self._client.store(fid, b"".join(pages.values()), first * PAGE, sync=sync)
        if sync:
            self._expected.synced(fid, pages)


async def test_kill_9_under_load(folder: Path) -> None:
    chance = random.Random(1)
    expected = Expected()

    async def work(server: Daemon, seed: int) -> None:
        try:
            async with client_of(server) as client:
                await Worker(client, random.Random(seed), expected).run(10_000)
        except* (ConnectionLost, OSError):
            pass  # the server was killed

    for _ in range(4):
        with daemon(folder, "--lease", "0.5") as server:
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(work, server, chance.getrandbits(32))
                await trio.sleep(0.7 + chance.random())
                server.process.send_signal(signal.SIGKILL)
        report = check(folder)
        assert report.is_sound, report.problems
        with daemon(folder, "--lease", "0.5") as server:
            async with client_of(server) as client:
                found = await expected.assert_there(client)
    assert found > 20, "enough was synced for this to mean something"


class Disk:
    """What is on disk: of the database what the WAL had at its last sync, of data files what each had at its own.

    After that any page that was written since may be there too, or not, and so may a file that was made or deleted.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._synced: dict[Path, bytes] = {}
        monkeypatch.setattr(durability, "CHECKPOINT_POLL_S", 1e6)
        monkeypatch.setattr(os, "fdatasync", self._sync)
        monkeypatch.setattr(DataFiles, "sync_all", lambda files: self.keep_all())

    def keep_all(self) -> None:
        self._synced = {path: path.read_bytes() for path in self._folder.rglob("*") if self._counts(path)}

    def _sync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        with suppress(FileNotFoundError):  # it is deleted
            self._synced[path] = path.read_bytes()

    def _counts(self, path: Path) -> bool:
        return path.is_file() and path.name not in ("store.sqlite-shm", "lock", "callback-state", "ballast")

    def lose_power(self, chance: random.Random) -> None:
        now = {path: path.read_bytes() for path in self._folder.rglob("*") if self._counts(path)}
        (self._folder / "store.sqlite-shm").unlink(missing_ok=True)
        for path in now.keys() | self._synced.keys():
            old, new = self._synced.get(path), now.get(path)
            if path.parent == self._folder:
                kept = old
            elif old is None or new is None:
                kept = chance.choice((old, new))
            else:
                kept = self._mixed(old, new, chance)
            if kept is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(kept)

    def _mixed(self, old: bytes, new: bytes, chance: random.Random) -> bytes:
        """Each page as it was or as it is, and one length or the other."""
        size = len(chance.choice((old, new)))
        mixed = b""
        for start in range(0, size, PAGE):
            page = chance.choice((old, new))[start : start + PAGE]
            mixed += page.ljust(min(PAGE, size - start), b"\0")[: size - start]
        return mixed


@pytest.mark.parametrize("seed", range(4))
async def test_power_loss_under_load(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    expected = Expected()
    found = 0
    Store.open(folder, 1).close(clean=True)
    for _ in range(3):
        disk = Disk(folder, monkeypatch)
        disk.keep_all()
        async with running_cell(folder, clean=False, lease_s=0.2) as cell:
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    client = await cell.connected()
                    worker = Worker(client, random.Random(chance.getrandbits(32)), expected)
                    nursery.start_soon(worker.run, 60)
        disk.lose_power(chance)
        report = check(folder)
        # What was never synced may have a row and no data file: its bytes are lost, and it is refused with EIO.
        assert all(p.severity is Severity.NOTE or p.rule == "data-missing" for p in report.problems), report.problems
        lost = {p.vnode for p in report.problems if p.rule == "data-missing"}
        assert not lost & {key_of(fid) for fid, pages in expected.pages.items() if pages}
        async with running_cell(folder, clean=False, lease_s=0.2) as cell:
            found += await expected.assert_there(await cell.connected())
    assert found > 10, "enough was synced for this to mean something"
    monkeypatch.undo()
