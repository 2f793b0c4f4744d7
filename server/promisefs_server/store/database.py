"""The SQLite connection that all metadata goes through, and its transactions.

Durability: `synchronous=NORMAL` in WAL mode, so a commit is a write to the WAL without a sync. It survives the end
of this process however it ends; `durability` makes it survive power loss when somebody asks. Only opening and
closing run with `synchronous=FULL`: the note that the store is in use must be on disk before it is used.

Invariants
I1  One thread uses the connection: the trio thread. The checkpointer has a connection of its own.
I2  A transaction is begun and ended without a checkpoint of trio's in between, so it is atomic to every other task.
I3  No code here opens the main database file by itself: closing such a descriptor would drop SQLite's locks.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any

from promisefs_server.errors import StoreError

from .migrations import migrate, schema_version

DATABASE_NAME = "store.sqlite"
APPLICATION_ID = 0x70667364  # "pfsd"
CACHE_KIB = 16384
BUSY_TIMEOUT_S = 5.0
OVER_QUOTA = "over quota"
"""What the trigger `bounded` says."""
WAL_BYTES = 32 << 20
"""Beyond this the WAL is made to begin anew, and is cut to this then."""
_NO_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
    }
)
"""Primary result codes that say nothing against what the file holds."""


class Database:
    """An open store database. `execute` runs one prepared statement; `transaction` groups several."""

    def __init__(self, path: Path) -> None:
        """Open or make the file, and migrate it if it is older.

        Raise StoreError if it is no database of ours or a newer one, sqlite3.Error if the disk is full.
        """
        self.path = path
        self.commits = 0
        """Transactions committed since it was opened; what `durability` compares."""
        try:
            self._connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, cached_statements=256
            )
        except sqlite3.Error as error:
            raise StoreError(f"cannot open {path}: {error}") from None
        self.execute = self._connection.execute
        self.execute_many = self._connection.executemany
        self._transaction = _Transaction(self)
        try:
            self._configure()
            self._check_schema()
        except sqlite3.Error as error:
            self._connection.close()
            if is_full(error):
                raise
            raise StoreError(described(error, path)) from None
        except BaseException:
            self._connection.close()
            raise

    def _configure(self) -> None:
        self.execute("PRAGMA journal_mode=WAL").fetchall()
        self.sync_commits()
        self.execute("PRAGMA wal_autocheckpoint=0").fetchall()
        self.execute(f"PRAGMA journal_size_limit={WAL_BYTES}").fetchall()
        self.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        self.execute("PRAGMA temp_store=MEMORY")
        self.execute("PRAGMA trusted_schema=OFF")

    def _check_schema(self) -> None:
        (application,) = self.execute("PRAGMA application_id").fetchone()
        (tables,) = self.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables == 0:
            self._make_schema()
        elif application != APPLICATION_ID:
            raise StoreError(f"{self.path} is a database of some other program")
        else:
            migrate(self._connection, self.path)

    def _make_schema(self) -> None:
        script = resources.files(__package__).joinpath("schema.sql").read_text("utf-8")
        with self.transaction():
            for statement in _statements(script):
                self.execute(statement)
            self.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self.execute(f"PRAGMA user_version={schema_version()}")

    @property
    def connection(self) -> sqlite3.Connection:
        """For reading at leisure; changes go through `transaction`."""
        return self._connection

    @property
    def wal_path(self) -> Path:
        return self.path.with_name(self.path.name + "-wal")

    def transaction(self) -> _Transaction:
        """Context manager: commit at its end, roll back if it raises. Not nested."""
        return self._transaction

    def rows(self, sql: str, arguments: tuple[object, ...] = ()) -> list[Any]:
        return self.execute(sql, arguments).fetchall()

    def sync_commits(self) -> None:
        """From now on each commit is on disk when it returns, and with it all before it."""
        self.execute("PRAGMA synchronous=FULL")

    def relax(self) -> None:
        """From now on commits are not synced each; see the module's text."""
        self.execute("PRAGMA synchronous=NORMAL")

    @property
    def wal_is_large(self) -> bool:
        return self.wal_path.stat().st_size > WAL_BYTES

    def restart_wal(self) -> None:
        """Move what is left in the WAL into the database, so that the next transaction begins it anew.

        Not for a thread: only here can nothing be committed meanwhile. Short if a checkpoint has just ended.
        """
        self.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self, *, clean: bool) -> None:
        """Close; with `clean`, note durably that nothing is missing."""
        try:
            if clean:
                self.sync_commits()
                self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                with self.transaction():
                    self.execute("UPDATE store SET clean = 1")
        finally:
            self._connection.close()

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a database of today's schema version beside whoever else uses it. Raise StoreError, sqlite3.Error."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("PRAGMA query_only=1")
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise StoreError(f"{path} is no database of a promisefs store")
        if version != schema_version():
            raise StoreError(
                f"{path} has schema version {version}, and this promisefsd works with {schema_version()}: use another"
                " promisefsd, or start this one's server once if that is to migrate the store"
            )
    except BaseException:
        connection.close()
        raise
    return connection


def is_over_quota(error: sqlite3.Error) -> bool:
    """Whether the volume's quota is why: a trigger of schema.sql has said so."""
    return isinstance(error, sqlite3.IntegrityError) and str(error) == OVER_QUOTA


def is_full(error: sqlite3.Error) -> bool:
    """Whether the disk's being full is why."""
    return getattr(error, "sqlite_errorcode", 0) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)


def described(error: sqlite3.Error, path: Path) -> str:
    """What to tell people about a failure of the database at `path`, the disk's being full apart."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NO_DAMAGE:
        return f"cannot use {path}: {error}"
    return f"{path} is damaged or is no promisefs store: {error}"


class _Transaction:
    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        database = self._database
        if kind is None:
            try:
                database.execute("COMMIT")
            except sqlite3.Error:
                self._roll_back()
                raise
            database.commits += 1
        else:
            self._roll_back()

    def _roll_back(self) -> None:
        # After some errors (disk full, I/O) SQLite has rolled back by itself.
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines():
        if not line.startswith("--"):
            statement += line + "\n"
            if sqlite3.complete_statement(statement):
                yield statement.strip().rstrip(";")
                statement = ""
