"""What vnodes are called, for people: volume:/path, as far as the store has it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from promisefs_server.store.volumes import VNODE_BITS, VNODE_MASK

from .findings import printable

_BATCH = 500
_MAX_DEPTH = 4096


class Paths:
    def __init__(self, connection: sqlite3.Connection, keys: Iterable[int]) -> None:
        """Look for names of these in one pass over all names, for there is no index of what they stand for."""
        self._connection = connection
        self._volumes: dict[int, str] = dict(connection.execute("SELECT volume, name FROM volumes"))
        self._roots = {root for (root,) in connection.execute("SELECT root FROM volumes")}
        self._names: dict[int, tuple[int, bytes]] = {}
        wanted = sorted(set(keys))
        for start in range(0, len(wanted), _BATCH):
            batch = wanted[start : start + _BATCH]
            marks = ", ".join("?" * len(batch))
            rows = connection.execute(f"SELECT vnode, directory, name FROM entries WHERE vnode IN ({marks})", batch)
            self._names.update({key: (directory, name) for key, directory, name in rows})

    def __getitem__(self, key: int) -> str:
        """The path of a vnode, or its numbers if it has none."""
        volume = self._volumes.get(key >> VNODE_BITS, str(key >> VNODE_BITS))
        names: list[str] = []
        at = key
        while at not in self._roots:
            found = self._names.get(at) or self._named_by_parent(at)
            if found is None or len(names) > _MAX_DEPTH:
                return f"{volume}:vnode {key & VNODE_MASK}"
            at = found[0]
            names.append(printable(found[1])[1:-1])
        return f"{volume}:/{'/'.join(reversed(names))}"

    def _named_by_parent(self, key: int) -> tuple[int, bytes] | None:
        row = self._connection.execute(
            "SELECT e.directory, e.name FROM vnodes AS v"
            " JOIN entries AS e ON e.directory = v.parent AND e.vnode = v.vnode WHERE v.vnode = ?",
            (key,),
        ).fetchone()
        return None if row is None else (row[0], row[1])
