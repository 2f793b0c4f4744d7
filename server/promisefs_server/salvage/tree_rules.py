"""Rules about the tree: names stand for something, directories have one name, everything is reached from a root.

What is reached from nowhere gets a name in the directory lost+found of its volume's root, "#" and its vnode number, as
fsck does it. Directories are planned for in memory, a few hundred bytes each; files are left to SQL.
"""

from __future__ import annotations

import secrets
import sqlite3
import stat
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

from promisefs_server.store.datafiles import DataFiles
from promisefs_server.store.volumes import DIRECTORY_SIZE_BYTES, VNODE_BITS, VNODE_MASK

from .findings import Finding, Statement, printable
from .problems import Problem, Severity

LOST_AND_FOUND = b"lost+found"
_DIR = "(mode & 61440) = 16384"
_HERE = f">> {VNODE_BITS} IN (SELECT volume FROM volumes WHERE state IN ('here', 'leaving'))"
_INSERT = (
    "INSERT INTO vnodes (vnode, uniquifier, mode, uid, gid, nlink, size, sparse, data_version,"
    " atime_ns, mtime_ns, ctime_ns, xattr_count, parent, target)"
    " VALUES (:vnode, :uniquifier, :mode, :uid, :gid, :nlink, :size, 0, 1, :now, :now, :now, 0, :parent, NULL)"
)
_NAME = "INSERT INTO entries (directory, name, vnode) VALUES (:directory, :name, :vnode)"
_UNNAME = "DELETE FROM entries WHERE directory = :directory AND name = :name"
_CHANGED = (
    "UPDATE vnodes SET data_version = data_version + 1, mtime_ns = :now, ctime_ns = max(ctime_ns + 1, :now)"
    " WHERE vnode = :directory"
)

Name = tuple[int, bytes]
"""Key of a directory, and a name in it."""


def names_of_nothing(connection: sqlite3.Connection, files: DataFiles) -> Iterator[Finding]:
    """Names whose vnode is not there. One whose data file is still there becomes a file again."""
    made: set[int] = set()
    query = (
        f"SELECT directory, name, vnode FROM entries WHERE vnode NOT IN (SELECT vnode FROM vnodes) AND vnode {_HERE}"
    )
    for directory, name, key in connection.execute(query).fetchall():
        path = files.path(key)
        repair: tuple[Statement, ...]
        if path.is_file():
            text = (
                f"the name {printable(name)} in it stands for a lost vnode whose bytes are there: a file of mode 0600"
            )
            repair = () if key in made else (found_file(key, path.stat().st_size, directory),)
            made.add(key)
        else:
            text = f"the name {printable(name)} in it stands for nothing; it is removed"
            repair = _unnamed((directory, name))
        yield Finding(Problem("name-of-nothing", Severity.DAMAGE, directory, text), repair)


def found_file(key: int, size: int, parent: int = 0) -> Statement:
    """The row of a regular file of which only the bytes were found."""
    return _INSERT, {
        "vnode": key,
        "uniquifier": secrets.randbits(32),
        "mode": stat.S_IFREG | 0o600,
        "uid": 0,
        "gid": 0,
        "nlink": 1,
        "size": size,
        "parent": parent,
        "now": time.time_ns(),
    }


class TreeRules:
    """Plans for the directories as they are now. Rules about rows have been applied."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._roots = {
            root: number
            for number, root in connection.execute(
                "SELECT volume, root FROM volumes WHERE state IN ('here', 'leaving')"
            )
        }
        self._parents: dict[int, int] = dict(
            connection.execute(f"SELECT vnode, parent FROM vnodes WHERE {_DIR} AND vnode {_HERE}")
        )
        self._names: dict[int, list[Name]] = defaultdict(list)
        for key, directory, name in connection.execute(
            f"SELECT e.vnode, directory, name FROM entries AS e JOIN vnodes AS v ON v.vnode = e.vnode WHERE {_DIR}"
            f" AND e.vnode {_HERE} ORDER BY directory, name"
        ):
            self._names[key].append((directory, name))
        self._lost_and_found: dict[int, int] = {}
        self._taken: dict[int, set[bytes]] = {}

    def findings(self) -> Iterator[Finding]:
        yield from self._surplus_names()
        yield from self._wrong_parents()
        yield from self._unreachable_directories()
        yield from self._unreachable_files()

    def _surplus_names(self) -> Iterator[Finding]:
        """Directories have one name, roots have none."""
        for key, names in self._names.items():
            if key in self._roots:
                kept = []
            else:
                kept = [name for name in names if name[0] == self._parents[key]][:1] or names[:1]
            for name in names:
                if name not in kept:
                    text = f"a directory that has the name {printable(name[1])} besides its own"
                    yield Finding(Problem("directory-named-twice", Severity.DAMAGE, key, text), _unnamed(name))
            self._names[key] = kept

    def _wrong_parents(self) -> Iterator[Finding]:
        for key, parent in self._parents.items():
            names = self._names.get(key)
            right = key if key in self._roots else names[0][0] if names else parent
            if parent != right:
                yield Finding(
                    Problem("parent-wrong", Severity.DAMAGE, key, "it is in another directory than it says"),
                    (_with_parent(key, right),),
                )

    def _unreachable_directories(self) -> Iterator[Finding]:
        below: dict[int, list[int]] = defaultdict(list)
        for key, names in self._names.items():
            if names:
                below[names[0][0]].append(key)
        lost = set(self._parents)
        lost.difference_update(_subtrees(self._roots, below))
        for key in sorted(key for key in lost if not self._names.get(key)):
            lost.difference_update(_subtrees([key], below))
            yield self._found("directory-unreachable", "a directory without a name", key)
        while lost:
            key = min(lost)
            lost.difference_update(_subtrees([key], below))
            name = self._names[key][0]
            found = self._found("directories-in-circle", "a directory that is below itself", key)
            yield found._replace(repair=_unnamed(name) + found.repair)

    def _unreachable_files(self) -> Iterator[Finding]:
        rows = self._connection.execute(
            f"SELECT vnode FROM vnodes WHERE NOT {_DIR} AND nlink != 0 AND vnode {_HERE}"
            " AND vnode NOT IN (SELECT vnode FROM entries) AND vnode NOT IN (SELECT vnode FROM orphan_holders)"
        )
        for (key,) in rows.fetchall():
            yield self._found("file-unreachable", "a file without a name", key)

    # lost+found

    def _found(self, rule: str, text: str, key: int) -> Finding:
        """Something that is to get a name in lost+found."""
        root = next(root for root, number in self._roots.items() if number == key >> VNODE_BITS)
        repair: tuple[Statement, ...] = ()
        if root not in self._lost_and_found:
            repair = self._make_lost_and_found(root)
        directory = self._lost_and_found[root]
        name = _free(b"#%d" % (key & VNODE_MASK), self._taken[directory])
        self._taken[directory].add(name)
        repair += ((_NAME, {"directory": directory, "name": name, "vnode": key}), _changed(directory))
        repair += (_with_parent(key, directory),)
        return Finding(Problem(rule, Severity.DAMAGE, key, f"{text}; it goes to lost+found"), repair)

    def _make_lost_and_found(self, root: int) -> tuple[Statement, ...]:
        names = dict(self._connection.execute("SELECT name, vnode FROM entries WHERE directory = ?", (root,)))
        there = names.get(LOST_AND_FOUND)
        if there in self._parents:
            assert there is not None
            self._lost_and_found[root] = there
            taken = self._connection.execute("SELECT name FROM entries WHERE directory = ?", (there,))
            self._taken[there] = {name for (name,) in taken}
            return ()
        volume = self._roots[root]
        (number,) = self._connection.execute("SELECT next_vnode FROM volumes WHERE volume = ?", (volume,)).fetchone()
        key = volume << VNODE_BITS | number
        self._lost_and_found[root] = key
        self._taken[key] = set()
        row = {
            "vnode": key,
            "uniquifier": secrets.randbits(32),
            "mode": stat.S_IFDIR | 0o700,
            "uid": 0,
            "gid": 0,
            "nlink": 2,
            "size": DIRECTORY_SIZE_BYTES,
            "parent": root,
            "now": time.time_ns(),
        }
        name = _free(LOST_AND_FOUND, set(names))
        return (
            ("UPDATE volumes SET next_vnode = next_vnode + 1 WHERE volume = :volume", {"volume": volume}),
            (_INSERT, row),
            (_NAME, {"directory": root, "name": name, "vnode": key}),
            _changed(root),
        )


def _subtrees(tops: Iterable[int], below: dict[int, list[int]]) -> set[int]:
    found: set[int] = set()
    pending = list(tops)
    while pending:
        key = pending.pop()
        if key not in found:
            found.add(key)
            pending += below.get(key, ())
    return found


def _free(name: bytes, taken: set[bytes]) -> bytes:
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = b"%s-%d" % (name, number)
    return candidate


def _unnamed(name: Name) -> tuple[Statement, ...]:
    return (_UNNAME, {"directory": name[0], "name": name[1]}), _changed(name[0])


def _changed(directory: int) -> Statement:
    return _CHANGED, {"directory": directory, "now": time.time_ns()}


def _with_parent(key: int, parent: int) -> Statement:
    return "UPDATE vnodes SET parent = :parent, ctime_ns = ctime_ns + 1 WHERE vnode = :vnode", {
        "parent": parent,
        "vnode": key,
    }
