"""Copying a whole store, also while its server runs, to a folder from which a server can be started.

The database is copied first, as it is at one moment; deletions of data files are held from before that, so that every
file in the copy still has its bytes. Then each data file is copied, and what the server has of its vnode now takes the
place of what the copy says. A file that is being written to is copied again; one that never rests is taken as it is.

So names are those of one moment, and each file is what a crash at some moment after it would have left. The copy is
marked as not shut down cleanly: served, it gets new incarnations, and clients go by nothing that they knew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from promisefs_server.errors import StoreError
from promisefs_server.identity.identity_file import IDENTITY_NAME
from promisefs_server.salvage import salvager
from promisefs_server.salvage.problems import Report
from promisefs_server.store.copying import copy_database
from promisefs_server.store.database import DATABASE_NAME, open_for_reading
from promisefs_server.store.datafiles import DataFiles
from promisefs_server.store.deletion_hold import deletions_held
from promisefs_server.store.store import DATA_NAME
from promisefs_server.store.syncing import sync_path

from .volume_move import copy_data

MARK = "unfinished-backup"
"""A file in the folder of a backup that is not finished."""
TRIES = 5
"""How often a file that is being written to is copied."""
_FICLONE = 0x40049409
_ROW = "size, sparse, data_version, mtime_ns, ctime_ns"
_FILES = (
    "SELECT vnode, size FROM vnodes WHERE (mode & 61440) = 32768 AND size > 0"
    " AND vnode >> 40 IN (SELECT volume FROM volumes WHERE state IN ('here', 'leaving')) ORDER BY vnode"
)

Progress = Callable[[int, int], None]
"""Told how many of how many files have been copied."""
Row = tuple[int, int, int, int, int]


def back_up(folder: Path, target: Path, progress: Progress) -> Report:
    """Copy the store to `target`, which must not be there. Return what a check of the copy finds.

    Raise StoreError, OSError, sqlite3.Error: then `target` is not there. What an earlier attempt left is deleted.
    """
    unfinished = _begin(target)
    with deletions_held(folder), closing(open_for_reading(folder / DATABASE_NAME)) as live:
        with closing(sqlite3.connect(folder / DATABASE_NAME, isolation_level=None)) as source:
            copy_database(source, unfinished / DATABASE_NAME)
        if (folder / IDENTITY_NAME).is_file():
            with closing(sqlite3.connect(folder / IDENTITY_NAME, isolation_level=None)) as identity:
                copy_database(identity, unfinished / IDENTITY_NAME)
        with closing(sqlite3.connect(unfinished / DATABASE_NAME, isolation_level=None)) as copy:
            copy.execute("PRAGMA synchronous=OFF")
            _copy_files(live, DataFiles(folder / DATA_NAME), copy, DataFiles(unfinished / DATA_NAME), progress)
    with closing(sqlite3.connect(unfinished / DATABASE_NAME, isolation_level=None)) as copy:
        files = DataFiles(unfinished / DATA_NAME)
        report = salvager.check(copy, files, clean=False)
    files.sync_all()
    (unfinished / MARK).unlink()
    sync_path(unfinished)
    unfinished.rename(target)
    sync_path(target.parent)
    return report


def _begin(target: Path) -> Path:
    """Make the folder in which the copy is made."""
    if target.exists():
        raise StoreError(f"{target} exists: give the name of a new directory")
    unfinished = target.with_name(target.name + ".unfinished")
    if unfinished.exists():
        if not (unfinished / MARK).exists():
            raise StoreError(f"{unfinished} is in the way, and no unfinished backup: move it elsewhere")
        shutil.rmtree(unfinished)
    unfinished.mkdir(mode=0o700)
    (unfinished / MARK).touch()
    (unfinished / DATA_NAME).mkdir(mode=0o700)
    return unfinished


def _copy_files(
    live: sqlite3.Connection, source: DataFiles, copy: sqlite3.Connection, target: DataFiles, progress: Progress
) -> None:
    rows = copy.execute(_FILES).fetchall()
    copy.execute("BEGIN")
    copy.execute(salvager.NO_QUOTAS)
    for done, (key, size) in enumerate(rows):
        progress(done, len(rows))
        row = _copy_file(live, source.path(key), target.path(key), key, size)
        if row is None:
            # Removed meanwhile, and perhaps cut before: what it was then is not to be had any more.
            there = _stamp(target.path(key))
            copy.execute(
                "UPDATE vnodes SET size = ? WHERE vnode = ? AND NOT sparse AND size > ?",
                (there[0] if there else size, key, there[0] if there else size),
            )
        else:
            copy.execute(f"UPDATE vnodes SET ({_ROW}) = (?, ?, ?, ?, ?) WHERE vnode = ?", (*row, key))
    copy.execute(salvager.NO_QUOTAS)
    copy.execute("UPDATE store SET clean = 0")
    copy.execute("COMMIT")
    progress(len(rows), len(rows))


def _copy_file(live: sqlite3.Connection, source: Path, target: Path, key: int, size: int) -> Row | None:
    """Copy a data file. Return what the row has to say then; None: what it says already."""
    for _ in range(TRIES):
        before, stamp = _row(live, key), _stamp(source)
        wanted = size if before is None else before[0]
        _copy_bytes(source, target, wanted)
        after = _row(live, key)
        if after == before and _stamp(source) == stamp:
            break
    return after


def _row(live: sqlite3.Connection, key: int) -> Row | None:
    found: Row | None = live.execute(f"SELECT {_ROW} FROM vnodes WHERE vnode = ?", (key,)).fetchone()
    return found


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a data file is written to."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _copy_bytes(source: Path, target: Path, size: int) -> None:
    """Share them where the disk's file system can do that."""
    for folder in (target.parent.parent, target.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
    with suppress(OSError), open(source, "rb") as read_from:
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as write_to:
            fcntl.ioctl(write_to, _FICLONE, read_from.fileno())
            if os.fstat(write_to.fileno()).st_size > size:
                os.ftruncate(write_to.fileno(), size)
            return
    copy_data(source, target, size)
