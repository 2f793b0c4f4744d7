"""Schema versions of the store, and how an older store becomes one of today's.

Version FIRST_VERSION is the layout of the first release. Each step leads from one version to the next, so today's is
FIRST_VERSION + len(STEPS). A new store is made from schema.sql at once; an older one is migrated by whoever opens it
first, `serve` or a command, while it has the store's lock. A newer one is refused: an older server would not keep
what it does not know of.

All steps that a store needs, and the note of its new version, are one transaction, so whatever ends a migration in
the middle, power loss included, leaves the old version, and the next start begins again. Before it a copy of the
database is made beside it (`copy_path`). It lets people go back if a new version turns out to be bad before anything
was written under it; nothing here ever reads or deletes it.

To change the schema:
1. Change schema.sql. New columns go to the end of their table, for that is where ALTER TABLE puts them.
2. Append a step to STEPS: a function that makes the same change to the version before, rows included. It is within a
   transaction, so it uses neither `executescript` nor `commit`. It may read data files but not change them, for they
   are not part of the transaction.
3. Never change a step that has been released.
tests/server/test_migrations.py migrates a store of each released version and compares its schema and every file.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

from promisefs_server.errors import StoreError

from .copying import copy_database

log = logging.getLogger(__name__)

Step = Callable[[sqlite3.Connection], None]

FIRST_VERSION = 3
"""Stores of versions before were never released."""


def _give_lists(connection: sqlite3.Connection) -> None:
    """Version 4: access control lists. What there is belongs to the administrators until they say otherwise."""
    for statement in (
        "CREATE TABLE acls (acl INTEGER PRIMARY KEY, packed BLOB NOT NULL UNIQUE)",
        "CREATE TABLE places (vnode INTEGER NOT NULL, directory INTEGER NOT NULL, names INTEGER NOT NULL,"
        " PRIMARY KEY (vnode, directory)) WITHOUT ROWID",
        "ALTER TABLE vnodes ADD COLUMN acl INTEGER NOT NULL DEFAULT 0",
        "UPDATE vnodes SET acl = 1 WHERE mode & 0xF000 = 0x4000 OR nlink = 0",
        "CREATE INDEX acl_users ON vnodes (acl) WHERE acl <> 0",
        "UPDATE vnodes SET parent = entries.directory FROM entries"
        " WHERE entries.vnode = vnodes.vnode AND vnodes.parent = 0",
        "INSERT INTO places SELECT entries.vnode, directory, count(*) FROM entries JOIN vnodes USING (vnode)"
        " WHERE nlink > 1 AND mode & 0xF000 <> 0x4000 GROUP BY entries.vnode, directory",
        "DELETE FROM places WHERE vnode IN (SELECT vnode FROM places GROUP BY vnode HAVING count(*) = 1)",
        # Their clients spoke another version of the protocol, and cannot come back.
        "DELETE FROM replies",
    ):
        connection.execute(statement)
    # [[[-204, 127]], []]: system:administrators rlidwka. Not from `access.acl`, which may change.
    connection.execute("INSERT INTO acls VALUES (1, x'929192d1ff347f90')")


def _count_usage(connection: sqlite3.Connection) -> None:
    """Version 5: quotas, read-only volumes."""
    connection.execute("ALTER TABLE volumes ADD COLUMN quota INTEGER NOT NULL DEFAULT 0")
    connection.execute("ALTER TABLE volumes ADD COLUMN read_only INTEGER NOT NULL DEFAULT 0")
    connection.execute("CREATE TABLE usage (volume INTEGER PRIMARY KEY, bytes INTEGER NOT NULL)")
    connection.execute("INSERT INTO usage SELECT vnode >> 40, sum(size + 1024) FROM vnodes GROUP BY 1")
    for trigger in (
        """CREATE TRIGGER made AFTER INSERT ON vnodes BEGIN
    INSERT INTO usage VALUES (NEW.vnode >> 40, NEW.size + 1024)
        ON CONFLICT (volume) DO UPDATE SET bytes = bytes + excluded.bytes;
END""",
        """CREATE TRIGGER resized AFTER UPDATE OF size ON vnodes WHEN NEW.size <> OLD.size BEGIN
    UPDATE usage SET bytes = bytes + NEW.size - OLD.size WHERE volume = NEW.vnode >> 40;
END""",
        """CREATE TRIGGER deleted AFTER DELETE ON vnodes BEGIN
    UPDATE usage SET bytes = bytes - OLD.size - 1024 WHERE volume = OLD.vnode >> 40;
END""",
        """CREATE TRIGGER bounded AFTER UPDATE OF bytes ON usage WHEN NEW.bytes > OLD.bytes BEGIN
    SELECT RAISE(ABORT, 'over quota') FROM volumes
        WHERE volume = NEW.volume AND quota > 0 AND NEW.bytes > quota AND state = 'here';
END""",
    ):
        connection.execute(trigger)


STEPS: tuple[Step, ...] = (_give_lists, _count_usage)


def schema_version() -> int:
    """The version that this server makes and uses."""
    return FIRST_VERSION + len(STEPS)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the database at `path`, one of ours, to today's version. Raise StoreError, sqlite3.Error, OSError."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    today = schema_version()
    if version == today:
        return
    if version > today:
        raise StoreError(
            f"{path} has schema version {version}, made by a newer promisefsd; this one knows versions up to {today}: "
            "use the newer one"
        )
    if version < FIRST_VERSION:
        raise StoreError(
            f"{path} has schema version {version}, from before the first release: use the promisefsd that wrote it"
        )
    kept = copy_path(path, version)
    # One from before is replaced: the store went back to that version since.
    copy_database(connection, kept)
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in STEPS[version - FIRST_VERSION :]:
            step(connection)
        connection.execute(f"PRAGMA user_version={today}")
        connection.execute("COMMIT")
    except BaseException:
        # After some errors (disk full, I/O) SQLite has rolled back by itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    log.info("migrated %s from schema version %d to %d; %s is as it was before", path, version, today, kept)


def copy_path(path: Path, version: int) -> Path:
    """Where the database is kept as it was before its migration from that version."""
    return path.with_name(f"{path.name}.version-{version}")
