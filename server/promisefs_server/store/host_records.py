"""The hosts that the store remembers: who may hold promises or orphans after a crash."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .database import Database


class HostRecord(NamedTuple):
    number: int
    uuid: bytes
    description: str
    silent_s: int


class HostRecords:
    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> list[HostRecord]:
        rows = self._database.rows("SELECT host, uuid, description, silent_s FROM hosts")
        return [HostRecord._make(row) for row in rows]

    # Within a transaction

    def insert(self, uuid: bytes, description: str) -> int:
        """Return the host's number; numbers are never used twice."""
        cursor = self._database.execute(
            "INSERT INTO hosts (uuid, description, silent_s) VALUES (?, ?, 0)", (uuid, description)
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def set_silent(self, silences: Iterable[tuple[int, int]]) -> None:
        """Write (seconds, host number) pairs."""
        for pair in silences:
            self._database.execute("UPDATE hosts SET silent_s = ? WHERE host = ?", pair)

    def delete(self, number: int) -> None:
        self._database.execute("DELETE FROM hosts WHERE host = ?", (number,))

    def purge_unknown(self) -> None:
        """Delete what is kept for hosts that are not there."""
        for table in ("orphan_holders", "replies"):
            self._database.execute(f"DELETE FROM {table} WHERE host NOT IN (SELECT host FROM hosts)")
