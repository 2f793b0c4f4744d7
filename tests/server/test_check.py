"""promisefsd check: each kind of damage is found, repaired, and then not found any more; what is sound is let be."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
from promisefs_protocol.ids import Fid
from promisefs_server.salvage import salvager
from promisefs_server.salvage.problems import Report, Severity
from promisefs_server.salvage.row_rules import AFTER_TREE, ROW_RULES
from promisefs_server.store.store import Store
from server_cell import running_cell
from server_daemon import COMMAND
from store_fixtures import HOST, contents, fill

V = 1 << 40
"""Key of the root volume's vnode 0."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one of everything, shut down cleanly."""
    folder = tmp_path_factory.mktemp("sound") / "store"

    async def make() -> None:
        async with running_cell(folder) as cell:
            await fill(cell)
            a = await cell.connected()
            outer = await a.lookup(b"d")
            assert outer is not None
            inner = await a.lookup(b"inner", outer.fid)
            assert inner is not None
            await a.mkdir(b"deep", inner.fid)

    trio.run(make)
    return folder


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "store", ignore=shutil.ignore_patterns("control"))
    return tmp_path / "store"


def check(folder: Path) -> Report:
    opened = Store.open_stopped(folder)
    try:
        return salvager.check(opened.database.connection, opened.files, clean=opened.was_clean)
    finally:
        opened.close(clean=False)


def repair(folder: Path) -> Report:
    opened = Store.open_stopped(folder)
    try:
        return salvager.repair(opened)
    finally:
        opened.close(clean=False)


def sql(*statements: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "store.sqlite")) as database:
            for statement in statements:
                assert database.execute(statement).rowcount != 0, "the statement changes nothing"
            database.commit()

    return damage


def data(folder: Path, vnode: int) -> Path:
    return folder / "data" / "1" / "0" / f"{vnode:x}"


class Damage(NamedTuple):
    rule: str
    do: Callable[[Path], Any]
    severity: Severity = Severity.DAMAGE


# In the root volume: 2 empty-then-short, 3 long (also d/linked), 4 hole, 6 d, 7 d/inner, 8 symlink, 9 p, a orphan
DAMAGES = (
    Damage("volume-unknown", sql("UPDATE volumes SET volume = 7 WHERE volume = 2"), Severity.LOSS),
    Damage("type-unknown", sql(f"UPDATE vnodes SET mode = 4096 | 420 WHERE vnode = {V | 2}")),
    Damage("target-missing", sql(f"UPDATE vnodes SET target = NULL WHERE vnode = {V | 8}")),
    Damage("target-surplus", sql(f"UPDATE vnodes SET target = x'61' WHERE vnode = {V | 2}")),
    Damage("root-missing", sql(f"DELETE FROM vnodes WHERE vnode = {V | 1}")),
    Damage("root-wrong", sql(f"UPDATE volumes SET root = {V | 8} WHERE volume = 1")),
    Damage("root-no-directory", sql(f"UPDATE vnodes SET mode = 33188 WHERE vnode = {V | 1}")),
    Damage("directory-missing", sql(f"DELETE FROM vnodes WHERE vnode = {V | 6}")),
    Damage("entry-in-no-directory", sql(f"INSERT INTO entries VALUES ({V | 2}, x'61', {V | 3})")),
    Damage("name-impossible", sql(f"UPDATE entries SET name = x'612f62' WHERE vnode = {V | 2}")),
    Damage("name-impossible", sql(f"UPDATE entries SET name = x'2e2e' WHERE vnode = {V | 7}")),
    Damage("entry-of-other-volume", sql(f"INSERT INTO entries VALUES ({V | 1}, x'6161', {2 * V | 2})")),
    Damage("parent-of-file-wrong", sql(f"UPDATE vnodes SET parent = 5 WHERE vnode = {V | 2}")),
    Damage("parent-of-file-wrong", sql(f"UPDATE vnodes SET parent = {V | 7} WHERE vnode = {V | 3}")),
    Damage("places-missing", sql(f"DELETE FROM places WHERE vnode = {V | 3}")),
    Damage("places-missing", sql(f"UPDATE places SET names = 5 WHERE vnode = {V | 3}")),
    Damage("places-surplus", sql(f"INSERT INTO places VALUES ({V | 2}, {V | 1}, 1)")),
    Damage("places-surplus", sql(f"INSERT INTO places VALUES ({V | 3}, {V | 7}, 1)")),
    Damage("list-missing", sql(f"UPDATE vnodes SET acl = 99 WHERE vnode = {V | 6}")),
    Damage("list-missing", sql("DELETE FROM acls")),
    Damage("list-surplus", sql(f"UPDATE vnodes SET acl = 1 WHERE vnode = {V | 2}")),
    Damage("size-impossible", sql(f"UPDATE vnodes SET size = -1 WHERE vnode = {V | 4}")),
    Damage("size-wrong", sql(f"UPDATE vnodes SET size = 5 WHERE vnode = {V | 6}")),
    Damage("size-wrong", sql(f"UPDATE vnodes SET size = 5 WHERE vnode = {V | 8}")),
    Damage("xattrs-of-nothing", sql(f"INSERT INTO xattrs VALUES ({V | 99}, x'757365722e61', x'')")),
    Damage("xattr-count-wrong", sql(f"UPDATE vnodes SET xattr_count = 0 WHERE vnode = {V | 3}")),
    Damage("vnode-number-wrong", sql("UPDATE volumes SET next_vnode = 4 WHERE volume = 1")),
    Damage("volume-number-wrong", sql("UPDATE store SET next_volume = 2")),
    Damage("usage-wrong", sql("UPDATE usage SET bytes = bytes + 1")),
    Damage("host-unknown", sql("DELETE FROM hosts")),
    Damage("name-of-nothing", sql(f"INSERT INTO entries VALUES ({V | 1}, x'6161', {V | 99})")),
    Damage("directory-named-twice", sql(f"INSERT INTO entries VALUES ({V | 1}, x'6161', {V | 7})")),
    Damage("directory-named-twice", sql(f"INSERT INTO entries VALUES ({V | 7}, x'6161', {V | 1})")),
    Damage("parent-wrong", sql(f"UPDATE vnodes SET parent = {V | 1} WHERE vnode = {V | 7}")),
    Damage("parent-wrong", sql(f"UPDATE vnodes SET parent = {V | 6} WHERE vnode = {V | 1}")),
    Damage("directory-unreachable", sql(f"DELETE FROM entries WHERE vnode = {V | 6}")),
    Damage(
        "directories-in-circle",
        sql(
            f"UPDATE entries SET directory = {V | 7} WHERE vnode = {V | 6}",
            f"UPDATE vnodes SET parent = {V | 7} WHERE vnode = {V | 6}",
        ),
    ),
    Damage("file-unreachable", sql(f"DELETE FROM entries WHERE vnode = {V | 2}")),
    Damage("links-wrong", sql(f"UPDATE vnodes SET nlink = 7 WHERE vnode = {V | 3}")),
    Damage("links-wrong", sql(f"UPDATE vnodes SET nlink = 0 WHERE vnode = {V | 2}")),
    Damage("subdirectories-wrong", sql(f"UPDATE vnodes SET nlink = 2 WHERE vnode = {V | 1}")),
    Damage("holder-surplus", sql(f"INSERT INTO orphan_holders VALUES ({V | 2}, 1)")),
    Damage("removed-and-not-open", sql("DELETE FROM orphan_holders"), Severity.NOTE),
    Damage("data-of-nobody", lambda folder: data(folder, 0x77).write_bytes(b"found")),
    Damage("data-short", lambda folder: data(folder, 3).write_bytes(bytes(range(256)))),
    Damage("data-missing", lambda folder: data(folder, 3).unlink(), Severity.LOSS),
    Damage("data-missing", lambda folder: (data(folder, 3).unlink(), data(folder, 3).mkdir()), Severity.LOSS),
    Damage("type-wrong", sql(f"UPDATE vnodes SET uid = 'root' WHERE vnode = {V | 2}"), Severity.LOSS),
)


def names(report: Report) -> set[str]:
    return {rule for (rule, severity) in report.counts if severity is not Severity.NOTE}


def test_what_is_sound_is_found_so_and_not_touched(store: Path) -> None:
    report = check(store)
    assert report.is_sound and not report.problems
    for rule in (*ROW_RULES, *AFTER_TREE):
        assert rule.name in {damage.rule for damage in DAMAGES}, "each rule is tried below"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.rule)
async def test_damage_is_found_and_repaired_and_found_no_more(store: Path, damage: Damage) -> None:
    before = await bytes_seen(store)
    damage.do(store)
    found = check(store)
    assert (damage.rule, damage.severity) in found.counts
    assert found.is_sound == (damage.severity is Severity.NOTE)
    assert (damage.rule, damage.severity) in repair(store).counts
    left = check(store)
    if damage.severity is Severity.LOSS:
        assert (damage.rule, Severity.LOSS) in left.counts and not left.count(Severity.DAMAGE)
        return
    assert left.is_sound, left.problems
    after = await bytes_seen(store)
    gone = before - after
    if damage.rule in ("size-impossible", "data-short", "type-unknown", "target-missing"):
        assert len(gone) <= 1
    else:
        assert not gone, "the bytes of other files are still there"
    if damage.rule == "data-of-nobody":
        assert hashlib.sha256(b"found").hexdigest() in after
    assert check(store).is_sound, "and it can be served"


async def bytes_seen(folder: Path) -> set[str]:
    """Hashes of what every file holds that a client can reach. The store is served for it, and ends cleanly."""
    async with running_cell(folder) as cell:
        a = cell.client(HOST)
        a.open_fids.add(Fid(1, 10, 0))
        await a.connect()
        seen = {**await contents(a, "root"), **await contents(a, "projects")}
    return {described["sha256"] for described in seen.values() if "sha256" in described}


NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    5,
    4096,
    V | 1,
    V | 2,
    V | 3,
    V | 6,
    V | 7,
    V | 8,
    V | 9,
    V | 10,
    2 * V | 1,
    2 * V | 2,
    3 * V,
)
COLUMNS = {
    "vnodes": ("mode", "nlink", "size", "sparse", "data_version", "xattr_count", "parent", "target", "acl"),
    "entries": ("directory", "vnode"),
    "xattrs": ("vnode",),
    "orphan_holders": ("vnode", "host"),
    "places": ("directory", "names"),
    "acls": ("acl",),
    "volumes": ("next_vnode", "root"),
    "store": ("next_volume",),
    "usage": ("bytes",),
}

KEYS = {"entries": "(directory, name)", "orphan_holders": "(vnode, host)", "places": "(vnode, directory)"}


def spoil(folder: Path, chance: random.Random) -> None:
    """Change a few values and delete a few rows, anywhere; lose, cut and add data files."""
    with closing(sqlite3.connect(folder / "store.sqlite")) as database:
        for _ in range(chance.randint(1, 6)):
            table = chance.choice(list(COLUMNS))
            key = KEYS.get(table, "rowid")
            (count,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
            which = chance.randrange(max(1, count))
            one = f"{key} IN (SELECT {key.strip('()')} FROM {table} LIMIT 1 OFFSET {which})"
            column = chance.choice(COLUMNS[table])
            value = "NULL" if column == "target" else chance.choice(NUMBERS)
            if chance.random() < 0.3 and table not in ("volumes", "store"):
                database.execute(f"DELETE FROM {table} WHERE {one}")
            else:
                database.execute(f"UPDATE OR IGNORE {table} SET {column} = {value} WHERE {one}")
        database.commit()
    files = sorted((folder / "data").glob("*/*/*"))
    if chance.random() < 0.3:
        chance.choice(files).write_bytes(b"x" * chance.randint(0, 20_000))
    if chance.random() < 0.3:
        data(folder, chance.randint(1, 5000)).write_bytes(b"x")


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_damage_one_repair_is_enough(store: Path, seed: int) -> None:
    spoil(store, random.Random(seed))
    repair(store)
    left = check(store)
    assert not left.count(Severity.DAMAGE), left.problems
    assert not repair(store).count(Severity.DAMAGE)


def test_a_repair_can_be_undone(store: Path) -> None:
    """The database is kept as it was."""
    sql(f"DELETE FROM entries WHERE vnode = {V | 2}")(store)
    repair(store)
    shutil.copy(store / "store.sqlite.before-repair", store / "store.sqlite")
    assert "file-unreachable" in names(check(store))


def test_an_interrupted_repair_has_changed_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sql(f"DELETE FROM entries WHERE vnode = {V | 2}")(store)
    monkeypatch.setattr(salvager, "AFTER_TREE", (ROW_RULES[0]._replace(query="SELECT nonsense"),))
    with pytest.raises(sqlite3.Error):
        repair(store)
    monkeypatch.undo()
    assert "file-unreachable" in names(check(store))


def test_a_repair_is_not_bound_by_a_quota(store: Path) -> None:
    """It may have to make lost+found, which takes room."""
    sql("UPDATE volumes SET quota = 1", f"DELETE FROM entries WHERE vnode = {V | 2}")(store)
    repair(store)
    assert check(store).is_sound
    with closing(sqlite3.connect(store / "store.sqlite")) as database:
        assert set(database.execute("SELECT quota FROM volumes")) == {(1,)}


async def test_clients_go_by_nothing_that_they_knew_before_a_repair(store: Path) -> None:
    sql(f"UPDATE vnodes SET nlink = 7 WHERE vnode = {V | 2}")(store)
    async with running_cell(store) as cell:
        a = await cell.connected(HOST)
        f = await a.lookup(b"empty-then-short")
        assert f is not None
    repair(store)
    async with running_cell(store) as cell:
        a = await cell.connected(HOST)
        again = (await a.stat(f.fid)).status
    assert a.inits == 1 and again.incarnation > f.status.incarnation and again.ctime_ns > f.status.ctime_ns


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command(store: Path, tmp_path: Path) -> None:
    done = run(store)
    assert (done.returncode, done.stderr) == (0, "") and "is sound" in done.stdout
    sql(f"DELETE FROM entries WHERE vnode = {V | 2}", f"UPDATE vnodes SET nlink = 7 WHERE vnode = {V | 3}")(store)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    found = run(store)
    assert found.returncode == 6 and re.search(
        r"damage: root:/(long|d/linked): it counts 7 names and has 2", found.stdout
    )
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before, "nothing has changed"
    as_json = json.loads(run(store, "--json").stdout)
    assert not as_json["sound"] and {"rule": "links-wrong", "severity": "damage", "count": 2} in as_json["left"]
    repaired = run(store, "--repair")
    assert repaired.returncode == 0 and "root:/lost+found/#2: a file without a name" in repaired.stdout
    assert run(store).returncode == 0
    data(store, 3).unlink()
    lost = run(store, "--repair")
    assert lost.returncode == 6 and "loss: root:/" in lost.stdout and "are lost" in lost.stdout
    missing = run(tmp_path / "nowhere")
    assert missing.returncode == 3 and missing.stderr.count("\n") == 1


async def test_a_running_server_is_checked_and_not_repaired(store: Path) -> None:
    async with running_cell(store) as cell:
        a = await cell.connected(HOST)
        await a.store((await a.create(b"new")).fid, b"unsynced")
        done = await trio.to_thread.run_sync(run, store)
        assert done.returncode == 0 and "is sound" in done.stdout
        refused = await trio.to_thread.run_sync(run, store, "--repair")
        assert refused.returncode == 3 and "in use by another promisefsd" in refused.stderr
