"""Stores of released versions under today's server: all of them become today's, and not a byte is lost."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from promisefs_protocol.ids import Fid
from promisefs_server.errors import StoreError
from promisefs_server.store import copying, migrations
from promisefs_server.store.migrations import FIRST_VERSION, copy_path, schema_version
from promisefs_server.store.store import Store
from server_cell import running_cell
from store_fixtures import HOST, ORPHAN_BYTES, RELEASED, contents, thaw

FIXTURES = sorted(RELEASED.glob("version-*"))
FIRST = RELEASED / f"version-{FIRST_VERSION}"


def version_of(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def schema_of(database: Path) -> dict[str, Any]:
    """Columns, keys and indices: what SQL can tell apart."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'")
        schema: dict[str, Any] = {}
        for kind, name, table, sql in rows:
            schema[f"{kind} {name}"] = (
                connection.execute(f"PRAGMA table_xinfo({name})").fetchall(),
                connection.execute(f"PRAGMA index_list({name})").fetchall(),
                "WITHOUT ROWID" in sql,
                "AUTOINCREMENT" in sql,
            ) if kind == "table" else (table, " ".join(sql.split()))  # fmt: skip
    return schema


def make_note(connection: sqlite3.Connection) -> None:
    """What a later version may do: a column more, and another value in every row."""
    connection.execute("ALTER TABLE volumes ADD COLUMN note TEXT NOT NULL DEFAULT ''")
    connection.execute("UPDATE volumes SET note = 'of ' || name")


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.name)
async def test_a_released_store_is_served_byte_by_byte(fixture: Path, folder: Path, tmp_path: Path) -> None:
    thaw(fixture, folder)
    seen = json.loads((fixture / "contents.json").read_text())
    orphan = Fid(*seen.pop("orphan"))
    async with running_cell(folder) as cell:
        client = cell.client(HOST)
        client.open_fids.add(orphan)
        await client.connect()
        for volume, was in seen.items():
            now = await contents(client, volume)
            assert now.keys() == was.keys()
            for path, what in was.items():
                assert {field: now[path].get(field) for field in what} == what, path
        assert await client.fetch(orphan) == ORPHAN_BYTES
        cell.server.check_store_invariants()
        other = await cell.connected()
        await other.store((await other.create(b"new")).fid, b"new", sync=True)
    Store.open(tmp_path / "fresh", time.time_ns()).close(clean=True)
    assert schema_of(folder / "store.sqlite") == schema_of(tmp_path / "fresh" / "store.sqlite")
    assert version_of(folder / "store.sqlite") == schema_version()


def test_there_is_a_store_of_the_first_release() -> None:
    assert FIRST in FIXTURES and version_of_dump(FIRST) == FIRST_VERSION


def version_of_dump(fixture: Path) -> int:
    line = (fixture / "store.sql").read_text().splitlines()[1]
    return int(line.removeprefix("PRAGMA user_version=").removesuffix(";"))


def test_a_copy_is_kept_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thaw(FIRST, folder)
    database = folder / "store.sqlite"
    with closing(sqlite3.connect(database)) as connection:
        before = list(connection.iterdump())
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, make_note))
    Store.open(folder, time.time_ns()).close(clean=True)
    kept = copy_path(database, FIRST_VERSION)
    assert version_of(database) == schema_version() and version_of(kept) == FIRST_VERSION
    assert kept.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(kept)) as connection:
        assert list(connection.iterdump()) == before
    with closing(sqlite3.connect(database)) as connection:
        notes = connection.execute("SELECT name, note FROM volumes").fetchall()
    assert notes == [("root", "of root"), ("projects", "of projects")]


def test_steps_are_taken_in_order_and_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thaw(FIRST, folder)

    def add(connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE volumes SET note = note || '!'")

    for steps in ((make_note, add), (make_note, add), (make_note, add, add)):
        monkeypatch.setattr(migrations, "STEPS", (*STEPS, *steps))
        Store.open(folder, time.time_ns()).close(clean=True)
    with closing(sqlite3.connect(folder / "store.sqlite")) as connection:
        assert connection.execute("SELECT note FROM volumes WHERE name = 'root'").fetchone() == ("of root!!",)


STEPS = migrations.STEPS


def test_a_command_migrates_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thaw(FIRST, folder)
    monkeypatch.setattr(migrations, "STEPS", (*STEPS, make_note))
    Store.open_stopped(folder).close(clean=False)
    assert version_of(folder / "store.sqlite") == schema_version()


def test_what_ends_a_migration_in_the_middle_leaves_the_old_version(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also kill -9 or power loss: what is on disk then is what is copied here."""
    thaw(FIRST, folder)
    killed = tmp_path / "killed"

    def interrupted(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA cache_size=0")
        make_note(connection)
        connection.execute("UPDATE vnodes SET size = 0")
        shutil.copytree(folder, killed)
        raise sqlite3.OperationalError("something failed")

    monkeypatch.setattr(migrations, "STEPS", (*STEPS, interrupted))
    with pytest.raises(StoreError, match="something failed"):
        Store.open(folder, time.time_ns())
    for left in (folder, killed):
        (left / "store.sqlite-shm").unlink(missing_ok=True)
        assert version_of(left / "store.sqlite") == FIRST_VERSION
        monkeypatch.setattr(migrations, "STEPS", (*STEPS, make_note))
        store = Store.open(left, time.time_ns())
        assert store.database.rows("SELECT count(*) FROM vnodes WHERE size = 10240") == [(1,)]
        store.close(clean=True)
        assert version_of(left / "store.sqlite") == schema_version()


@pytest.mark.parametrize("how", [Store.open_stopped, lambda folder: Store.open(folder, time.time_ns())])
def test_a_newer_store_is_refused_and_left_alone(folder: Path, how: Any) -> None:
    Store.open(folder, time.time_ns()).close(clean=True)
    database = folder / "store.sqlite"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(f"PRAGMA user_version={schema_version() + 1}")
    before = database.read_bytes()
    with pytest.raises(StoreError, match=rf"version {schema_version() + 1}, made by a newer promisefsd.*use the newer"):
        how(folder)
    assert database.read_bytes() == before


def test_a_store_from_before_the_first_release_is_refused(folder: Path) -> None:
    Store.open(folder, time.time_ns()).close(clean=True)
    with closing(sqlite3.connect(folder / "store.sqlite")) as connection:
        connection.execute(f"PRAGMA user_version={FIRST_VERSION - 1}")
    with pytest.raises(StoreError, match="from before the first release"):
        Store.open(folder, time.time_ns())


def test_without_room_for_the_copy_nothing_is_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thaw(FIRST, folder)
    monkeypatch.setattr(migrations, "STEPS", (*STEPS, make_note))

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copying, "sync_path", full)
    with pytest.raises(StoreError, match="No space left on device"):
        Store.open(folder, time.time_ns())
    assert version_of(folder / "store.sqlite") == FIRST_VERSION
    assert not list(folder.glob("*.new"))
