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


class Replies:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._deleted_below: dict[int, int] = {}

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
        """Within the operation's transaction. Abort INVAL if the number was used before."""
        row = (host, operation.number, method.name, msgpack.packb(reply))
        try:
            self._database.execute("INSERT INTO replies VALUES (?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            raise Aborted(AbortCode.INVAL, f"operation {operation.number} has happened before") from None
        done_below = min(operation.done_below, MAX_NUMBER)
        if done_below >= self._deleted_below.get(host, 0) + DONE_BATCH:
            self._database.execute("DELETE FROM replies WHERE host = ? AND number < ?", (host, done_below))
            self._deleted_below[host] = done_below

    def forget(self, host: int) -> None:
        """Within a transaction."""
        self._database.execute("DELETE FROM replies WHERE host = ?", (host,))
        self._deleted_below.pop(host, None)
