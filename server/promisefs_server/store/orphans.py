"""Orphans: files without a name that some host still has, or may have, open.

Invariant: a vnode with nlink 0 has at least one row in orphan_holders. Who takes the last one away
deletes the vnode with it (`purge_unheld`), in the same transaction, and then its data file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .database import Database
from .vnodes import Vnode, VnodeTable


class Orphans:
    def __init__(self, database: Database, vnodes: VnodeTable) -> None:
        self._database = database
        self._vnodes = vnodes

    # Within a transaction of the caller's

    def hold(self, vnode: Vnode, hosts: Iterable[int]) -> bool:
        """Keep a file without names for these hosts, or delete its row if there are none. Return whether it is kept."""
        assert vnode.nlink == 0 and not vnode.is_dir
        rows = [(vnode.key, host) for host in hosts]
        for row in rows:
            self._database.execute("INSERT OR IGNORE INTO orphan_holders VALUES (?, ?)", row)
        if not rows:
            self._vnodes.delete(vnode.key)
        return bool(rows)

    def release(self, host: int, keys: Sequence[int]) -> list[int]:
        """This host does not have these open. Return the keys of those deleted now."""
        gone = []
        for key in keys:
            deleted = self._database.execute(
                "DELETE FROM orphan_holders WHERE vnode = ? AND host = ?", (key, host)
            ).rowcount
            if deleted and self._purge_if_unheld(key):
                gone.append(key)
        return gone

    def release_all(self, host: int) -> list[int]:
        return self.release(host, self.held_by(host))

    def purge_unheld(self) -> list[int]:
        """Delete every orphan that nobody holds; there should be none. Return their keys."""
        rows = self._database.rows("SELECT vnode FROM vnodes WHERE nlink = 0")
        return [key for (key,) in rows if self._purge_if_unheld(key)]

    def _purge_if_unheld(self, key: int) -> bool:
        held = self._database.execute("SELECT 1 FROM orphan_holders WHERE vnode = ? LIMIT 1", (key,)).fetchone()
        if held is None:
            self._vnodes.delete(key)
        return held is None

    # Reading

    def held_by(self, host: int) -> list[int]:
        return [key for (key,) in self._database.rows("SELECT vnode FROM orphan_holders WHERE host = ?", (host,))]

    def check_invariants(self) -> None:
        """Assert the invariant, and that holders are hosts that are known."""
        unheld = self._database.rows(
            "SELECT vnode FROM vnodes WHERE nlink = 0 AND vnode NOT IN (SELECT vnode FROM orphan_holders)"
        )
        assert not list(unheld), "an orphan that nobody holds"
        unknown = self._database.rows(
            "SELECT vnode, host FROM orphan_holders WHERE host NOT IN (SELECT host FROM hosts)"
            " OR vnode NOT IN (SELECT vnode FROM vnodes WHERE nlink = 0)"
        )
        assert not list(unknown), "held for nobody, or not an orphan"
