"""The file of users, groups, password hashes and signing keys: DIR/identity.sqlite.

Apart from the store's other metadata, so that what holds secrets is one small file, which only the server's user can
read and which can be backed up, and kept out of backups, by itself. Changes are rare: one is made on the trio thread,
which takes microseconds in WAL mode, and is durable when `sync`, in a thread, has returned.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from promisefs_protocol.principals import ADMINISTRATORS, ANONYMOUS, ANYUSER, AUTHUSER

from promisefs_server.errors import StoreError

IDENTITY_NAME = "identity.sqlite"
OWN_NAMES = frozenset({IDENTITY_NAME, IDENTITY_NAME + "-wal", IDENTITY_NAME + "-shm"})
APPLICATION_ID = 0x70667369  # "pfsi"
SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 5.0
FIRST_USER, FIRST_GROUP = 1000, -205
_BUILT_IN = (
    (ANONYMOUS, "anonymous"),
    (ANYUSER, "system:anyuser"),
    (AUTHUSER, "system:authuser"),
    (ADMINISTRATORS, "system:administrators"),
)


class IdentityFile:
    def __init__(self, folder: Path) -> None:
        """Open or make it. Raise StoreError, sqlite3.Error, OSError."""
        self.path = folder / IDENTITY_NAME
        # Made beforehand so that it, and what SQLite makes beside it, is never readable for others.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self._connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        self.execute = self._connection.execute
        try:
            self.execute("PRAGMA journal_mode=WAL").fetchall()
            self.execute("PRAGMA synchronous=NORMAL")
            self.execute("PRAGMA trusted_schema=OFF")
            self._check_schema()
        except BaseException:
            self._connection.close()
            raise

    def _check_schema(self) -> None:
        (application,) = self.execute("PRAGMA application_id").fetchone()
        (version,) = self.execute("PRAGMA user_version").fetchone()
        (tables,) = self.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables == 0:
            self._make_schema()
        elif application != APPLICATION_ID:
            raise StoreError(f"{self.path} is a database of some other program")
        elif version != SCHEMA_VERSION:
            raise StoreError(f"{self.path} has version {version}, this promisefsd knows {SCHEMA_VERSION}")

    def _make_schema(self) -> None:
        script = resources.files(__package__).joinpath("identity.sql").read_text("utf-8")
        lines = [line for line in script.splitlines() if not line.startswith("--")]
        with self.transaction():
            for statement in "\n".join(lines).split(";"):
                self.execute(statement)
            self.execute("INSERT INTO next_ids VALUES (?, ?)", (FIRST_USER, FIRST_GROUP))
            for number, name in _BUILT_IN:
                self.execute(
                    "INSERT INTO principals VALUES (?, ?, ?, ?, 0, 0, NULL)",
                    (number, name, ADMINISTRATORS, ADMINISTRATORS),
                )
            self.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit at the end, roll back if it raises. Not nested."""
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self.execute("ROLLBACK")
            raise

    def rows(self, sql: str, arguments: tuple[object, ...] = ()) -> list[Any]:
        return self.execute(sql, arguments).fetchall()

    def sync(self) -> None:
        """Have all commits on disk. For threads. Raise OSError."""
        descriptor = os.open(f"{self.path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        self._connection.close()
