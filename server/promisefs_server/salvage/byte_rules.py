"""Rules about data files: each regular file has the bytes that its row says, and nobody else has any.

A crash may leave data files that are longer than their vnode's size, or shorter, or that nobody owns any more: see
`store.datafiles` and `store.deletions`. So these are damage only in a store that was shut down cleanly; a short one
only if there was never a crash, for that is not mended by a start.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

from promisefs_server.store.datafiles import FOLDER_BITS, DataFiles
from promisefs_server.store.volumes import VNODE_BITS, VNODE_MASK

from .findings import Finding
from .problems import Problem, Severity
from .tree_rules import found_file

_REGULAR = "(mode & 61440) = 32768"
_HERE = f">> {VNODE_BITS} IN (SELECT volume FROM volumes WHERE state IN ('here', 'leaving'))"


class ByteRules:
    def __init__(self, connection: sqlite3.Connection, files: DataFiles, *, clean: bool) -> None:
        """`clean`: the store was shut down cleanly."""
        self._connection = connection
        self._files = files
        self._clean = clean
        (crashes,) = connection.execute("SELECT coalesce(max(incarnation), 1) - 1 FROM volumes").fetchone()
        self._crashed = not clean or crashes > 0

    def surplus(self) -> Iterator[Finding]:
        """Data files that no regular file owns."""
        live = {v for (v,) in self._connection.execute("SELECT volume FROM volumes WHERE state IN ('here', 'leaving')")}
        known = {v for (v,) in self._connection.execute("SELECT volume FROM volumes")}
        for folder in sorted(self._files.folders()):
            for key in self._unowned(self._files.keys_in(folder)):
                volume = key >> VNODE_BITS
                if volume in live:
                    yield self._surplus(key)
                elif volume not in known:
                    text = f"data file {self._files.path(key)} is of a volume that the store does not know"
                    yield Finding(Problem("data-of-unknown-volume", Severity.NOTE, 0, text))

    def _unowned(self, keys: list[int]) -> list[int]:
        if not keys:
            return []
        rows = self._connection.execute("SELECT vnode FROM vnodes WHERE vnode BETWEEN ? AND ?", (min(keys), max(keys)))
        return sorted(set(keys).difference(key for (key,) in rows))

    def _surplus(self, key: int) -> Finding:
        path = self._files.path(key)
        if not self._clean:
            text = f"data file {path} is left over from a crash; the next start deletes it"
            return Finding(Problem("data-left-over", Severity.NOTE, 0, text))
        text = f"data file {path} is nobody's; it becomes a file of mode 0600"
        return Finding(Problem("data-of-nobody", Severity.DAMAGE, 0, text), (found_file(key, path.lstat().st_size),))

    def lengths(self) -> Iterator[Finding]:
        """Regular files whose data file is missing or has another length."""
        there: dict[int, os.stat_result] = {}
        folder: Path | None = None
        rows = self._connection.execute(
            f"SELECT vnode, size, sparse FROM vnodes WHERE {_REGULAR} AND vnode {_HERE} ORDER BY vnode"
        )
        for key, size, sparse in rows:
            if self._files.path(key).parent != folder:
                folder = self._files.path(key).parent
                there = _stats(folder, key & ~((1 << FOLDER_BITS) - 1))
            found = self._compare(key, size, bool(sparse), there.get(key))
            if found is not None:
                yield found

    def _compare(self, key: int, size: int, sparse: bool, found: os.stat_result | None) -> Finding | None:
        path = self._files.path(key)
        if found is None:
            if not size or sparse:
                return None
            text = f"its {size} bytes are lost: data file {path} is missing; bring it back, or remove the file"
            return Finding(Problem("data-missing", Severity.LOSS, key, text))
        if not stat.S_ISREG(found.st_mode):
            text = f"{path} is no regular file; bring its data file back, or remove the file"
            return Finding(Problem("data-missing", Severity.LOSS, key, text))
        if found.st_size > size:
            text = f"data file {path} is {found.st_size - size} bytes longer than the file; nobody sees them"
            return Finding(Problem("data-long", Severity.NOTE, key, text))
        if found.st_size < size and not sparse:
            text = f"data file {path} ends {size - found.st_size} bytes short; they read as zeros"
            if self._crashed:
                return Finding(Problem("data-short", Severity.NOTE, key, text))
            as_hole = "UPDATE vnodes SET sparse = 1, ctime_ns = ctime_ns + 1 WHERE vnode = :vnode"
            return Finding(Problem("data-short", Severity.DAMAGE, key, text), ((as_hole, {"vnode": key}),))
        return None


def _stats(folder: Path, first: int) -> dict[int, os.stat_result]:
    """The data files in a folder by vnode; `first` is the vnode that the folder begins with."""
    found: dict[int, os.stat_result] = {}
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return found
    for entry in entries:
        try:
            number = int(entry.name, 16)
        except ValueError:
            continue
        if number >> FOLDER_BITS == (first & VNODE_MASK) >> FOLDER_BITS and f"{number:x}" == entry.name:
            found[first & ~VNODE_MASK | number] = entry.stat(follow_symlinks=False)
    return found
