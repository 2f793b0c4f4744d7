"""In which directories the names of a file are, where they are in several; which of those a file uses the list of.

A file uses the access control list of one directory, its `parent`: the one where it was made, or to which the name
there was moved last. Whoever can neither put names into that directory nor take any away changes nothing about it, so
another name elsewhere gives nobody rights. When the last name there goes and others remain, the file goes with one of
those.

Rows are kept only of files whose names are in more than one directory. Every method runs within a transaction of the
caller's.
"""

from __future__ import annotations

from .database import Database
from .vnodes import Vnode


class Places:
    def __init__(self, database: Database) -> None:
        self._database = database

    def added(self, vnode: Vnode, directory: int) -> None:
        """A file, as it was before, has another name in this directory."""
        if not self._directories(vnode.key):
            if directory == vnode.parent:
                return
            self._database.execute("INSERT INTO places VALUES (?, ?, ?)", (vnode.key, vnode.parent, vnode.nlink))
        self._database.execute(
            "INSERT INTO places VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET names = names + 1", (vnode.key, directory)
        )

    def removed(self, vnode: Vnode, directory: int) -> int:
        """A file has lost a name in this directory. Return its parent from now on."""
        if not self._directories(vnode.key):
            return vnode.parent
        of_it = (vnode.key, directory)
        self._database.execute("UPDATE places SET names = names - 1 WHERE vnode = ? AND directory = ?", of_it)
        self._database.execute("DELETE FROM places WHERE vnode = ? AND directory = ? AND names = 0", of_it)
        left = self._directories(vnode.key)
        if len(left) == 1:
            self._database.execute("DELETE FROM places WHERE vnode = ?", (vnode.key,))
        return vnode.parent if vnode.parent in left else left[0]

    def moved(self, vnode: Vnode, old: int, new: int) -> int:
        """One of a file's names has moved. Return its parent from now on."""
        if old == new:
            return vnode.parent
        if vnode.nlink > 1:
            self.added(vnode, new)
            there = vnode._replace(parent=new) if vnode.parent == old else vnode
            return self.removed(there, old)
        return new

    def _directories(self, key: int) -> list[int]:
        rows = self._database.rows("SELECT directory FROM places WHERE vnode = ? ORDER BY directory", (key,))
        return [directory for (directory,) in rows]

    def check_invariants(self) -> None:
        """Assert that the rows are what the names say."""
        there = set(self._database.rows("SELECT vnode, directory, names FROM places"))
        counted: dict[int, list[tuple[int, int, int]]] = {}
        for row in self._database.rows("SELECT vnode, directory, count(*) FROM entries GROUP BY vnode, directory"):
            counted.setdefault(row[0], []).append(row)
        assert there == {row for rows in counted.values() if len(rows) > 1 for row in rows}
        parents = dict(self._database.rows("SELECT vnode, parent FROM vnodes"))
        assert all(parents[key] in {row[1] for row in rows} for key, rows in counted.items())
