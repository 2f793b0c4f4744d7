"""The store: one directory on local disk, opened by one server at a time.

DIR/lock             locked (flock) by the server that uses it
DIR/store.sqlite     metadata, see schema.sql
DIR/data/            data files, see datafiles
DIR/callback-state   promises, between a clean shutdown and the next start
DIR/ballast          room for removals, when the disk is filling, see ballast
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import uuid
from pathlib import Path

from .ballast import BALLAST_NAME, Ballast
from .callback_state import STATE_NAME
from .database import DATABASE_NAME, Database, is_full
from .datafiles import DataFiles
from .directories import Directories
from .errors import StoreError
from .host_records import HostRecords
from .orphans import Orphans
from .replies import Replies
from .vnodes import VnodeTable
from .volumes import VolumeTable, make_root_volume
from .xattrs import Xattrs

LOCK_NAME = "lock"
SKIPPED_VNODES = 1 << 20
"""Vnode numbers left out after an unclean start. They are below 2**40, so a million such starts can be afforded."""
DATA_NAME = "data"
OWN_NAMES = frozenset({DATABASE_NAME, LOCK_NAME, DATA_NAME, STATE_NAME, BALLAST_NAME})


class Store:
    """Everything that lasts. `open` it, `close` it; the parts are its attributes."""

    def __init__(self, folder: Path, lock: int, now_ns: int) -> None:
        self.folder = folder
        self._lock = lock
        self.ballast = Ballast(folder)
        if self.ballast.is_full:
            self.ballast.release()
        self.database = database = Database(folder / DATABASE_NAME)
        try:
            self._start(now_ns)
            self.files = DataFiles(folder / DATA_NAME)
            self.volumes = VolumeTable(database)
            self.vnodes = VnodeTable(database, self.volumes, self.files.allocated_bytes)
            self.directories = Directories(database, self.vnodes)
            self.xattrs = Xattrs(database, self.vnodes)
            self.orphans = Orphans(database, self.vnodes)
            self.hosts = HostRecords(database)
            self.replies = Replies(database)
        except BaseException:
            database.close(clean=False)
            raise

    def _start(self, now_ns: int) -> None:
        database = self.database
        row = database.execute("SELECT uuid, starts, clean, lease_ms FROM store").fetchone()
        with database.transaction():
            if row is None:
                row = (uuid.uuid4().bytes, 0, 1, 0)
                database.execute("INSERT INTO store VALUES (1, ?, 0, 0, 0)", row[:1])
                make_root_volume(database, os.getuid(), os.getgid(), now_ns)
            self.uuid: bytes = row[0]
            self.starts: int = row[1] + 1
            self.was_clean = bool(row[2])
            self.lease_ms: int = row[3]
            """No lease that has not ended is longer."""
            database.execute("UPDATE store SET starts = ?, clean = 0", (self.starts,))
            if not self.was_clean:
                # Numbers that were reserved in what may be lost of the WAL may have data files; see `Deletions.sweep`.
                database.execute(
                    "UPDATE volumes SET incarnation = incarnation + 1, next_vnode = next_vnode + ?", (SKIPPED_VNODES,)
                )
        database.relax()

    @classmethod
    def open(cls, folder: Path, now_ns: int) -> Store:
        """Open the store, or make one in an empty or new folder. Raise StoreError."""
        try:
            _check_folder(folder)
            lock = _lock(folder / LOCK_NAME)
        except OSError as error:
            raise StoreError(f"cannot use {folder}: {error.strerror}") from None
        try:
            (folder / DATA_NAME).mkdir(mode=0o700, exist_ok=True)
            return cls(folder, lock, now_ns)
        except OSError as error:
            os.close(lock)
            raise StoreError(f"cannot use {folder}: {error.strerror}") from None
        except sqlite3.Error as error:
            os.close(lock)
            if is_full(error):
                raise StoreError(f"cannot use {folder}: the disk is full; make room on it") from None
            raise StoreError(f"{folder / DATABASE_NAME} is damaged: {error}") from None
        except BaseException:
            os.close(lock)
            raise

    def set_lease(self, lease_ms: int) -> None:
        """Note `lease_ms`; if it is longer than before, durably when this returns: for the start only."""
        if lease_ms > self.lease_ms:
            self.database.execute("PRAGMA synchronous=FULL")
        with self.database.transaction():
            self.database.execute("UPDATE store SET lease_ms = ?", (lease_ms,))
        self.database.relax()
        self.lease_ms = lease_ms

    def close(self, *, clean: bool) -> None:
        """Close everything; `clean` promises that all data files are on disk and nothing is going on."""
        try:
            self.files.close()
            self.database.close(clean=clean)
        finally:
            os.close(self._lock)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        if not folder.parent.is_dir():
            raise StoreError(f"cannot make {folder}: its parent directory does not exist; make that first")
        folder.mkdir(mode=0o700)
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a directory")
    names = {entry.name for entry in os.scandir(folder)}
    database = folder / DATABASE_NAME
    if DATABASE_NAME in names and database.stat().st_size:
        return
    if names - OWN_NAMES:
        raise StoreError(f"{folder} is not empty and no promisefs store: give an empty or new directory")
    data = folder / DATA_NAME
    if DATA_NAME in names and any(data.iterdir()):
        raise StoreError(
            f"{database} is missing or empty, but {data} is not: restore it from a backup, or give a new directory"
        )


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(f"{path.parent} is in use by another promisefsd: stop that one first") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
