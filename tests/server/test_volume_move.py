"""`promisefsd volume move`: everything arrives; an interruption at any point loses nothing, serves nothing twice."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import time
from pathlib import Path

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid, Status
from promisefs_protocol.messages import (
    CreateVolume,
    FetchDirectory,
    GetEntryByID,
    GetEntryByName,
    GetXattr,
    GiveUpAllCallBacks,
    Link,
    MakeMountPoint,
    RemoveVolume,
    SetXattr,
)
from promisefs_server.administration.volume_move import copy_data
from promisefs_server.store.membership import Membership
from server_cell import Cell, Client, running_cell
from volume_commands import run, run_and_die

ALPHA, BETA, GAMMA = (Membership("example.org", number, number == 0) for number in range(3))
LEASE_S = 2.0
NAME = "projects"
VOLUME = 2
TREE = {b"a": b"bytes of a", b"b": os.urandom(300_000), b"empty": b"", b"d/c": b"below"}


async def client_of(cell: Cell, uuid: bytes | None = None) -> Client:
    client = cell.client(uuid)
    client.volume = ""
    return await client.connect()


async def fill(client: Client, root: Fid) -> None:
    d = await client.mkdir(b"d", root)
    for name, data in TREE.items():
        directory = d.fid if b"/" in name else root
        f = await client.create(name.split(b"/")[-1], directory)
        if data:
            await client.store(f.fid, data)
        if name == b"a":
            await client.call(SetXattr(f.fid, b"user.x", 0), b"value")
            await client.call(Link(client.op(), f.fid, d.fid, b"link"))
    await client.call(MakeMountPoint(client.op(), root, b"mnt", "elsewhere"))


async def contents(client: Client, root: Fid) -> dict[bytes, tuple[Fid, Status, bytes | None]]:
    """Everything in a volume, by its path."""
    found: dict[bytes, tuple[Fid, Status, bytes | None]] = {}
    directories = [(b"", root)]
    while directories:
        path, fid = directories.pop()
        for name, entry in (await client.call(FetchDirectory(fid, b"", 1000))).entries:
            data = None if entry.status.is_dir else await client.fetch(entry.fid)
            found[path + name] = (entry.fid, entry.status, data)
            if entry.status.is_dir:
                directories.append((path + name + b"/", entry.fid))
            if entry.status.xattr_count:
                _, value = await client.calls.call(GetXattr(entry.fid, b"user.x"))
                found[path + name + b"@x"] = (entry.fid, entry.status, value)
    return found


class Pair:
    """Two stores of one cell, the first with a volume in it; no server runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.alpha, self.beta = folder / "alpha", folder / "beta"
        self.before: dict[bytes, tuple[Fid, Status, bytes | None]] = {}
        self.root: Fid

    async def fill(self) -> None:
        async with running_cell(self.alpha, membership=ALPHA, lease_s=LEASE_S) as cell:
            a = await client_of(cell)
            self.root = (await cell.administer(CreateVolume(NAME))).root
            await fill(a, self.root)
            self.before = await contents(a, self.root)
            await a.call(GiveUpAllCallBacks())
        async with running_cell(self.beta, membership=BETA):
            pass

    def copy(self, folder: Path) -> Pair:
        pair = Pair(folder)
        pair.before, pair.root = self.before, self.root
        shutil.copytree(self.folder, folder)
        return pair

    def states(self) -> tuple[str | None, str | None]:
        """What the two stores say of the volume."""
        found = []
        for store in (self.alpha, self.beta):
            database = sqlite3.connect(store / "store.sqlite")
            row = database.execute("SELECT state FROM volumes WHERE volume = ?", (VOLUME,)).fetchone()
            found.append(None if row is None else row[0])
            database.close()
        return found[0], found[1]

    def move(self) -> tuple[int, str, str]:
        return run("volume", "move", str(self.alpha), NAME, str(self.beta))

    def move_and_die(self, module: str, name: str, number: int) -> bool:
        """Move, but die at the end of the n-th call of a function. Return whether it came to that."""
        return run_and_die(module, name, number, "volume", "move", str(self.alpha), NAME, str(self.beta))

    async def start_and_stop_both(self) -> list[str]:
        """Which of the two servers have the volume."""
        serving = []
        for folder, membership in ((self.alpha, ALPHA), (self.beta, BETA)):
            async with running_cell(folder, membership=membership) as cell:
                client = await client_of(cell)
                try:
                    await client.call(GetEntryByName(NAME))
                    serving.append(folder.name)
                    assert (await contents(client, self.root)).keys() == self.before.keys()
                except Aborted as refusal:
                    assert refusal.code == AbortCode.VNOVOL
                await client.call(GiveUpAllCallBacks())
        return serving

    async def check_moved(self) -> None:
        assert self.states() == ("moved", "here")
        async with running_cell(self.alpha, membership=ALPHA) as cell:
            client = await client_of(cell)
            for request in (GetEntryByID(VOLUME), FetchDirectory(self.root, b"", 1)):
                with pytest.raises(Aborted) as refusal:
                    await client.call(request)
                assert refusal.value.code == AbortCode.VMOVED
            left = [path for path in (self.alpha / "data").rglob("*") if f"data/{VOLUME:x}/" in str(path)]
            ((rows,),) = cell.server.store.database.rows("SELECT count(*) FROM vnodes WHERE vnode >> 40 = 2")
            assert (left, rows) == ([], 0)
            await client.call(GiveUpAllCallBacks())
        async with running_cell(self.beta, membership=BETA) as cell:
            client = await client_of(cell)
            assert (await client.call(GetEntryByName(NAME))).root == self.root
            after = await contents(client, self.root)
            incarnation = self.before[b"a"][1].incarnation
            assert after[b"a"][1].incarnation > incarnation
            same = {
                path: (fid, status._replace(incarnation=incarnation, allocated=self.before[path][1].allocated), data)
                for path, (fid, status, data) in after.items()
            }
            assert same == self.before
            await client.store(self.before[b"a"][0], b"goes on")
            new = await client.create(b"new", self.root)
            assert new.fid.vnode > max(fid.vnode for fid, _, _ in self.before.values())
            await client.call(GiveUpAllCallBacks())


@pytest.fixture
async def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setattr("promisefs_server.service.FLUSH_S", 0)
    pair = Pair(tmp_path / "pair")
    pair.folder.mkdir()
    await pair.fill()
    return pair


async def test_everything_arrives_and_nothing_is_left(pair: Pair) -> None:
    status, stdout, stderr = pair.move()
    assert (status, stderr) == (0, "") and "is on server 1 now" in stdout
    await pair.check_moved()
    status, stdout, _ = pair.move()
    assert status == 0 and "had moved to server 1" in stdout


async def test_there_and_back_and_there_again(pair: Pair) -> None:
    assert pair.move()[0] == 0
    assert run("volume", "move", str(pair.beta), NAME, str(pair.alpha))[0] == 0
    assert pair.states() == ("here", "moved")
    assert pair.move()[0] == 0
    await pair.check_moved()


COMMITS = ("store.database", "_Transaction.__exit__")
POINTS = [
    COMMITS,
    ("administration.volume_move", "copy_data"),
    ("store.datafiles", "DataFiles.delete"),
    ("store.datafiles", "DataFiles.sync_all"),
    ("promises.callback_state", "forget"),
]
SOUND = {("here", None), ("here", "arriving"), ("leaving", "arriving"), ("leaving", "here"), ("moved", "here")}


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point[1])
async def test_kill_9_at_every_step(pair: Pair, tmp_path: Path, point: tuple[str, str]) -> None:
    """The command, run again, finishes it; until then one server has it, or none and it is said how to go on."""
    number = 1
    servers_start = point == COMMITS
    while (victim := pair.copy(tmp_path / str(number))).move_and_die(*point, number):
        states = victim.states()
        assert states in SOUND
        if states[0] == "leaving":
            status, listed, _ = run("volume", "list", str(victim.alpha))
            assert status == 0 and "unfinished: move it again" in listed
        if servers_start:
            copy = victim.copy(tmp_path / f"{number} at once")
            assert copy.move()[0] == 0
            await copy.check_moved()
            serving = await victim.start_and_stop_both()
            assert (
                serving
                == {"here": ["alpha"], "leaving": ["beta"] if states[1] == "here" else [], "moved": ["beta"]}[
                    states[0] or ""
                ]
            )
        status, stdout, stderr = victim.move()
        assert status == 0, (number, states, stdout, stderr)
        await victim.check_moved()
        number += 1
    assert number > (8 if point == COMMITS else 1), "it died at too few points"


async def test_what_arrived_and_was_removed_there_is_not_moved_again(pair: Pair) -> None:
    number = 1
    while pair.states() != ("leaving", "here"):
        spare = pair.copy(pair.folder.with_name(f"spare{number}"))
        assert spare.move_and_die(*COMMITS, number)
        number += 1
        if spare.states() == ("leaving", "here"):
            pair = spare
    async with running_cell(pair.beta, membership=BETA) as cell:
        await cell.administer(RemoveVolume(NAME))
    assert pair.states() == ("leaving", "removed")
    status, stdout, _ = pair.move()
    assert status == 0 and "had moved" in stdout
    assert pair.states() == ("moved", "removed")


async def test_half_moved_it_goes_on_to_that_server_only(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    gamma = pair.folder / "gamma"
    async with running_cell(gamma, membership=GAMMA):
        pass
    # It has been there before, which must not be taken for its having arrived.
    assert run("volume", "move", str(pair.alpha), NAME, str(gamma))[0] == 0
    assert run("volume", "move", str(gamma), NAME, str(pair.alpha))[0] == 0
    while pair.states()[0] != "leaving":
        assert pair.move_and_die("promises.callback_state", "forget", 1)
        assert pair.states() == ("here", "arriving")
        assert pair.move_and_die("store.volumes", "VolumeTable.set_state", 2)
    assert pair.states() == ("leaving", "arriving")
    status, _, stderr = run("volume", "move", str(pair.alpha), NAME, str(gamma))
    assert status == 5 and "has begun to move to server 1" in stderr
    assert await pair.start_and_stop_both() == []
    assert "its move to server 1 was interrupted" in caplog.text and "did not arrive" in caplog.text
    assert run("volume", "create", str(pair.alpha), NAME)[0] == 5, "the name is taken until it has left"
    assert run("volume", "remove", str(pair.alpha), NAME, "--yes")[0] == 5
    assert pair.move()[0] == 0
    await pair.check_moved()


async def test_clients_cannot_trust_what_they_had_when_it_arrives(pair: Pair) -> None:
    """The move waits for the leases of the server that was stopped, and that one tells everybody at its next start."""
    async with running_cell(pair.alpha, membership=ALPHA, lease_s=LEASE_S) as cell:
        a = await client_of(cell)
        await a.stat(pair.root)
    began = time.monotonic()
    status, _, stderr = pair.move()
    assert status == 0 and "leases of 1 clients" in stderr
    assert time.monotonic() - began > LEASE_S
    async with running_cell(pair.alpha, membership=ALPHA) as cell:
        a = await client_of(cell, a.uuid)
        assert a.inits == 1


# Refusals, which change nothing


async def test_refused_while_removed_files_are_open(pair: Pair) -> None:
    async with running_cell(pair.alpha, membership=ALPHA) as cell:
        a = await client_of(cell)
        f = pair.before[b"a"][0]
        a.open_fids.add(f)
        await a.unlink(b"link", pair.before[b"d"][0])
        await a.unlink(b"a", pair.root, keep_open=True)
    status, _, stderr = pair.move()
    assert status == 5 and "1 removed files of volume 'projects' are still open" in stderr
    assert pair.states() == ("here", None)
    async with running_cell(pair.alpha, membership=ALPHA) as cell:
        a = await client_of(cell, a.uuid)
        assert await a.fetch(f) == TREE[b"a"]
        await a.call(GiveUpAllCallBacks())
    assert pair.move()[0] == 0


async def test_refused_after_an_unclean_end(pair: Pair) -> None:
    for store, membership in ((pair.alpha, ALPHA), (pair.beta, BETA)):
        async with running_cell(store, membership=membership, clean=False):
            pass
        status, _, stderr = pair.move()
        assert status == 5 and f"the server of {store} has not ended cleanly" in stderr
        assert pair.states() == ("here", None)
        async with running_cell(store, membership=membership):
            pass
    assert pair.move()[0] == 0


async def test_refused_between_stores_that_are_not_of_one_cell(pair: Pair) -> None:
    others = [
        ("alone", None, "belongs to no cell"),
        ("foreign", Membership("example.net", 1, False), "only between two servers of one cell"),
        ("same", Membership("example.org", 0, True), "only between two servers of one cell"),
    ]
    for name, membership, words in others:
        folder = pair.folder / name
        options = {} if membership is None else {"membership": membership}
        async with running_cell(folder, **options):  # type: ignore[arg-type]
            pass
        status, _, stderr = run("volume", "move", str(pair.alpha), NAME, str(folder))
        assert (status, words in stderr, stderr.count("\n")) == (5, True, 1), stderr
    assert pair.states() == ("here", None)


async def test_refused_if_the_name_is_taken_there(pair: Pair) -> None:
    assert run("volume", "create", str(pair.beta), NAME)[0] == 0
    status, _, stderr = pair.move()
    assert status == 5 and "rename one of the two first" in stderr
    assert run("volume", "rename", str(pair.beta), NAME, "other")[0] == 0
    assert pair.move()[0] == 0


async def test_refused_if_the_other_store_has_it_too(pair: Pair) -> None:
    """One of the two is an old copy: moving would destroy the other."""
    shutil.copytree(pair.alpha, pair.folder / "old")
    assert pair.move()[0] == 0
    status, _, stderr = run("volume", "move", str(pair.folder / "old"), NAME, str(pair.beta))
    assert status == 5 and "is an old copy" in stderr
    await pair.check_moved()


async def test_a_full_disk_undoes_the_copy(pair: Pair) -> None:
    code = (
        "import promisefs_server.administration.volume_move as m\n"
        "def full(*arguments): raise OSError(28, 'No space left on device')\n"
        "m._copy_range = full\n"
        "from promisefs_server.cli import main\nmain(prog_name='promisefsd')"
    )
    command = [sys.executable, "-c", code, "volume", "move", str(pair.alpha), NAME, str(pair.beta)]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    stderr = done.stderr.decode()
    assert done.returncode == 5 and "No space left" in stderr and "is still in" in stderr
    assert pair.states() == ("here", None) and not (pair.beta / "data" / "2").exists()
    assert pair.move()[0] == 0
    await pair.check_moved()


def test_holes_stay_holes_and_garbage_stays_behind(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "x" / "target"
    with open(source, "wb") as file:
        file.write(b"begin")
        file.seek(64 << 20)
        file.write(b"end" + b"garbage")
    copy_data(source, target, (64 << 20) + 3)
    assert target.stat().st_size == (64 << 20) + 3 and target.stat().st_blocks * 512 < 1 << 20
    with open(target, "rb") as file:
        assert file.read(10) == b"begin" + bytes(5)
        file.seek(64 << 20)
        assert file.read() == b"end"
    copy_data(source, target, 3)
    assert target.read_bytes() == b"beg"
    copy_data(tmp_path / "none", tmp_path / "y", 5)
    assert not (tmp_path / "y").exists()
    copy_data(source, target, 1 << 30)
    assert target.stat().st_size == source.stat().st_size


async def test_the_root_volume_can_move(pair: Pair) -> None:
    assert run("volume", "move", str(pair.alpha), "root", str(pair.beta))[0] == 0
    async with running_cell(pair.beta, membership=BETA) as cell:
        a = await cell.connected()
        assert a.root.volume == 1
        await a.create(b"f")
    async with running_cell(pair.alpha, membership=ALPHA) as cell:
        b = await client_of(cell)
        with pytest.raises(Aborted):
            await b.call(GetEntryByName("root"))
