"""Exactly once: the replies to operations on names, kept until their client needs them no longer.

Saved in the transaction of the operation itself, so either both happened or neither.
"""

from __future__ import annotations

import sqlite3
from typing import Any

import msgpack
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.fields import FieldError
from promisefs_protocol.messages import Method, Operation

from .database import Database

MAX_NUMBER = 2**63 - 1
DONE_BATCH = 64
"""Replies are deleted only when so many are done with: one statement for many."""
MAX_KEPT = 65_536
"""Replies kept for one host. It gets there if one of its operations takes long and it goes on with others meanwhile."""


class Replies:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._deleted_below: dict[int, int] = {}
        self._kept: dict[int, int] = {}
        """How many are kept for a host, or more: what has been deleted is not subtracted. Counted at MAX_KEPT."""

    def find(self, host: int, operation: Operation, method: Method) -> Any | None:
        """The reply given before to this operation, or None. Abort INVAL if it was another method's."""
        if operation.number > MAX_NUMBER:
            raise Aborted(AbortCode.INVAL, f"operation numbers end at {MAX_NUMBER}")
        if not operation.repeated:
            return None
        row = self._database.execute(
            "SELECT method, reply FROM replies WHERE host = ? AND number = ?", (host, operation.number)
        ).fetchone()
        if row is None:
            return None
        name, packed = row
        if name != method.name:
            raise Aborted(AbortCode.INVAL, f"operation {operation.number} was {name}")
        try:
            return method.decode_reply(msgpack.unpackb(packed, use_list=False))
        except (FieldError, ValueError) as error:
            raise Aborted(AbortCode.IO, f"the saved reply of operation {operation.number}: {error}") from None

    def save(self, host: int, operation: Operation, method: Method, reply: Any) -> None:
        """Within the operation's transaction. Abort INVAL if the number was used before, TOO_MANY at MAX_KEPT."""
        self._delete_done(host, operation)
        row = (host, operation.number, method.name, msgpack.packb(reply))
        try:
            self._database.execute("INSERT INTO replies VALUES (?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            raise Aborted(AbortCode.INVAL, f"operation {operation.number} has happened before") from None
        self._kept[host] += 1

    def _delete_done(self, host: int, operation: Operation) -> None:
        """Make room for one more."""
        done_below = min(operation.done_below, MAX_NUMBER)
        if done_below >= self._deleted_below.get(host, 0) + DONE_BATCH:
            self._database.execute("DELETE FROM replies WHERE host = ? AND number < ?", (host, done_below))
            self._deleted_below[host] = done_below
        if self._kept.get(host, MAX_KEPT) >= MAX_KEPT:
            ((self._kept[host],),) = self._database.rows("SELECT count(*) FROM replies WHERE host = ?", (host,))
            if self._kept[host] >= MAX_KEPT:
                raise Aborted(AbortCode.TOO_MANY, f"{MAX_KEPT} replies are kept, none of which this host is done with")

    def forget(self, host: int) -> None:
        """Within a transaction."""
        self._database.execute("DELETE FROM replies WHERE host = ?", (host,))
        self._deleted_below.pop(host, None)
        self._kept.pop(host, None)

    def check_invariants(self) -> None:
        """What is kept for a host is never more than is counted."""
        for host, count in self._database.rows("SELECT host, count(*) FROM replies GROUP BY host"):
            assert count <= self._kept.get(host, MAX_KEPT), "replies that are not counted"
