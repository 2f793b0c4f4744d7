"""Access control lists in the store: each distinct one once, by number, and which one a directory has.

Most directories have the list that their parent had when they were made, so there are few lists, and what one gives
somebody is worked out once (`access_control`).
"""

from __future__ import annotations

from promisefs_server.access.acl import NO_ENTRIES, Acl

from .database import Database

MAX_KEPT = 100_000
"""Most directories whose list is kept in memory; then all are looked up anew."""


class Acls:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._acls: dict[int, Acl] = {}
        self._of_directory: dict[int, int] = {}

    def get(self, number: int) -> Acl:
        acl = self._acls.get(number)
        if acl is None:
            row = self._database.execute("SELECT packed FROM acls WHERE acl = ?", (number,)).fetchone()
            acl = NO_ENTRIES if row is None else Acl.unpacked(row[0])
            if row is not None:
                self._acls[number] = acl
        return acl

    def of_directory(self, key: int) -> int:
        """The number of a directory's list; 0 if there is no such directory."""
        number = self._of_directory.get(key)
        if number is None:
            row = self._database.execute("SELECT acl FROM vnodes WHERE vnode = ?", (key,)).fetchone()
            number = 0 if row is None else int(row[0])
            if len(self._of_directory) >= MAX_KEPT:
                self._of_directory.clear()
            self._of_directory[key] = number
        return number

    def changed(self, directory: int) -> None:
        """The directory's list is another one. After the commit: until then nothing may look it up."""
        self._of_directory.pop(directory, None)


def number_of(database: Database, acl: Acl) -> int:
    """The number of a list, which is added if it is new. Within a transaction."""
    packed = acl.packed()
    row = database.execute("SELECT acl FROM acls WHERE packed = ?", (packed,)).fetchone()
    if row is None:
        row = database.execute("INSERT INTO acls (packed) VALUES (?) RETURNING acl", (packed,)).fetchone()
    number: int = row[0]
    return number


def forget_unused(database: Database) -> None:
    """Delete lists that no directory has any more; at the start, when no number is in memory. Within a transaction."""
    used = "SELECT 1 FROM vnodes WHERE vnodes.acl = acls.acl AND vnodes.acl <> 0"  # as index acl_users has it
    database.execute(f"DELETE FROM acls WHERE NOT EXISTS ({used})")
