"""The store: one directory on local disk, opened by one server at a time.

DIR/lock             locked (flock) by the server that uses it
DIR/store.sqlite     metadata, see schema.sql
DIR/data/            data files, see datafiles
DIR/callback-state   promises, between a clean shutdown and the next start
DIR/ballast          room for removals, when the disk is filling, see ballast
DIR/identity.sqlite  users, groups, password hashes, signing keys, see identity_file
DIR/control          while a server runs: its control socket, see control
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path

from promisefs_protocol.messages import START_ID_BITS

from promisefs_server.administration.control_socket import CONTROL_NAME
from promisefs_server.errors import StoreError, StoreLocked
from promisefs_server.identity import identity_file
from promisefs_server.promises.callback_state import STATE_NAME

from .acls import Acls, forget_unused
from .ballast import BALLAST_NAME, Ballast
from .database import DATABASE_NAME, Database, described, is_full
from .datafiles import DataFiles
from .deletion_hold import HOLD_NAME
from .directories import Directories
from .host_records import HostRecords
from .membership import ALONE, Membership
from .orphans import Orphans
from .replies import Replies
from .vnodes import VnodeTable
from .volumes import ROOT_VOLUME_NAME, SERVER_BITS, VolumeTable, insert_volume
from .xattrs import Xattrs

LOCK_NAME = "lock"
SKIPPED_VNODES = 1 << 20
"""Vnode numbers left out after an unclean start. They are below 2**40, so a million such starts can be afforded."""
DATA_NAME = "data"
OWN_NAMES = identity_file.OWN_NAMES | {
    DATABASE_NAME,
    LOCK_NAME,
    DATA_NAME,
    STATE_NAME,
    BALLAST_NAME,
    CONTROL_NAME,
    HOLD_NAME,
}
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


class Store:
    """Everything that lasts. `open` it, `close` it; the parts are its attributes."""

    def __init__(self, folder: Path, lock: int, now_ns: int, membership: Membership | None) -> None:
        """Use the store in a locked folder: serve it as `membership`, or with None only administer it."""
        self.folder = folder
        self._lock = lock
        self.ballast = Ballast(folder)
        if self.ballast.is_full:
            self.ballast.release()
        self.database = database = Database(folder / DATABASE_NAME)
        try:
            if not (folder / DATA_NAME).is_dir():
                raise StoreError(f"{folder / DATA_NAME} is missing: bring it back, every file would be zeros")
            if membership is not None:
                self._start(now_ns, membership)
            row = database.execute("SELECT uuid, starts, clean, lease_ms, cell, number FROM store").fetchone()
            if row is None:
                raise StoreError(f"{database.path} is an unfinished store: start promisefsd serve on it once")
            self.uuid: bytes = row[0]
            self.starts: int = row[1]
            self.start_id = self.starts << START_ID_BITS | secrets.randbits(START_ID_BITS)
            """Of this run of the server: greater than those before, and unlike that of a run of an older backup."""
            if membership is None:
                self.was_clean = bool(row[2])
            self.lease_ms: int = row[3]
            """No lease that has not ended is longer."""
            self.membership = Membership(row[4], row[5], membership is not None and membership.makes_root)
            self.files = DataFiles(folder / DATA_NAME)
            self.volumes = VolumeTable(database, self.membership.number)
            self.acls = Acls(database)
            self.vnodes = VnodeTable(database, self.volumes, self.files.allocated_bytes)
            self.directories = Directories(database, self.vnodes)
            self.xattrs = Xattrs(database, self.vnodes)
            self.orphans = Orphans(database, self.vnodes)
            self.hosts = HostRecords(database)
            self.replies = Replies(database)
        except BaseException:
            database.close(clean=False)
            raise

    def _start(self, now_ns: int, membership: Membership) -> None:
        """Note durably that the store is in use; make its first rows if it is new."""
        database = self.database
        row = database.execute("SELECT clean, cell, number FROM store").fetchone()
        if row is not None and row[1:] != (membership.cell, membership.number):
            was = Membership(row[1], row[2], False)
            raise StoreError(f"{self.folder} belongs to {was}, and cannot be served as {membership}")
        self.was_clean = row is None or bool(row[0])
        with database.transaction():
            if row is None:
                database.execute(
                    "INSERT INTO store VALUES (1, ?, 0, 0, 0, ?, ?, 1)",
                    (uuid.uuid4().bytes, membership.cell, membership.number),
                )
                if membership.makes_root:
                    number = membership.number << SERVER_BITS | 1
                    insert_volume(database, number, ROOT_VOLUME_NAME, os.getuid(), os.getgid(), now_ns)
                    database.execute("UPDATE store SET next_volume = 2")
            database.execute("UPDATE store SET starts = starts + 1, clean = 0")
            forget_unused(database)
            if not self.was_clean:
                # Numbers that were reserved in what may be lost of the WAL may have data files; see `Deletions.sweep`.
                database.execute(
                    "UPDATE volumes SET incarnation = incarnation + 1, next_vnode = next_vnode + ?", (SKIPPED_VNODES,)
                )
        database.relax()

    @classmethod
    def open(cls, folder: Path, now_ns: int, membership: Membership = ALONE) -> Store:
        """Open the store to serve it, or make one in an empty or new folder. Raise StoreError."""
        with store_errors(folder):
            _check_folder(folder)
            return cls._locked(folder, now_ns, membership)

    @classmethod
    def open_stopped(cls, folder: Path) -> Store:
        """Open the store of a server that does not run, to administer it: every commit is durable at once.

        That is no start: whether it was shut down cleanly, and the promises saved then, stay as they are. Raise
        StoreError.
        """
        with store_errors(folder):
            if _is_new(folder):
                raise StoreError(f"{folder} is no promisefs store")
            return cls._locked(folder, 0, None)

    @classmethod
    def _locked(cls, folder: Path, now_ns: int, membership: Membership | None) -> Store:
        lock = _lock(folder / LOCK_NAME)
        try:
            if _is_new(folder):
                (folder / DATA_NAME).mkdir(mode=0o700, exist_ok=True)
            return cls(folder, lock, now_ns, membership)
        except BaseException:
            os.close(lock)
            raise

    def set_lease(self, lease_ms: int) -> None:
        """Note `lease_ms`; if it is longer than before, durably when this returns: for the start only."""
        if lease_ms > self.lease_ms:
            self.database.sync_commits()
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


@contextlib.contextmanager
def store_errors(folder: Path) -> Iterator[None]:
    """Whatever goes wrong with the store in a folder is a StoreError."""
    try:
        yield
    except OSError as error:
        hint = "; give a directory that may be written to" if error.errno in _UNWRITABLE else ""
        raise StoreError(f"cannot use {folder}: {error.strerror}{hint}") from None
    except sqlite3.Error as error:
        if is_full(error):
            raise StoreError(f"cannot use {folder}: the disk is full; make room on it") from None
        raise StoreError(described(error, folder / DATABASE_NAME)) from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep everybody else from using the store in a folder. Raise StoreLocked, OSError."""
    lock = _lock(folder / LOCK_NAME)
    try:
        yield
    finally:
        os.close(lock)


def _is_new(folder: Path) -> bool:
    database = folder / DATABASE_NAME
    return not database.is_file() or not database.stat().st_size


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        if not folder.parent.is_dir():
            raise StoreError(f"cannot make {folder}: its parent directory does not exist; make that first")
        folder.mkdir(mode=0o700)
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a directory")
    names = {entry.name for entry in os.scandir(folder)}
    if not _is_new(folder):
        return
    if names - OWN_NAMES:
        raise StoreError(f"{folder} is not empty and no promisefs store: give an empty or new directory")
    data = folder / DATA_NAME
    if DATA_NAME in names and any(data.iterdir()):
        raise StoreError(
            f"{folder / DATABASE_NAME} is missing or empty, but {data} is not: "
            "restore it from a backup, or give a new directory"
        )


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreLocked(f"{path.parent} is in use by another promisefsd: stop that one first") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
