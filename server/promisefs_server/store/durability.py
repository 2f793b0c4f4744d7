"""Making things durable: group commit, syncing of data files, checkpoints. All of it in threads.

A durable commit is one fdatasync of the WAL file, shared by every caller that was waiting when it began; whoever comes
while it runs waits for the next one. What a data file needs before its durable commit: fdatasync of the file, and of
the folders in which it or its folder is new.

After an fdatasync has failed nothing more is known about what is on disk: the kernel says so once and may take the
lost pages for clean from then on. So every later request concerning that data file, or, if it was the WAL, any later
request, fails too, until the server is started again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import trio
from promisefs_protocol.observe.stopwatch import measuring
from promisefs_protocol.observe.timings import Timing

from .database import BUSY_TIMEOUT_S, Database
from .datafiles import DataFile, DataFiles
from .syncing import sync_path

log = logging.getLogger(__name__)

SYNC_THREADS = 8
CHECKPOINT_COMMITS = 2000
"""Checkpoint after so many transactions; each leaves some 16 KiB in the WAL."""
CHECKPOINT_POLL_S = 1.0
CHECKPOINT_IDLE_S = 60.0
"""Or after so long, if there were any."""


class Durability:
    """`run` has to be running for anything else to finish."""

    def __init__(self, database: Database, files: DataFiles) -> None:
        self._database = database
        self._files = files
        self._wal = os.open(database.wal_path, os.O_RDONLY | os.O_CLOEXEC)
        self._durable_commits = 0
        """So many of the database's commits are known to be on disk."""
        self.commits_synced = Timing()
        """fdatasync calls of the WAL: durable commits, each for all who waited for one."""
        self.files_synced = Timing()
        """fdatasync calls of data files."""
        self._waiting: list[trio.Event] = []
        self._wake = trio.Event()
        self._failure: OSError | None = None
        self._file_failures: dict[int, OSError] = {}
        """Data files that could not be synced, by vnode."""
        self._limiter = trio.CapacityLimiter(SYNC_THREADS)
        self._syncing: dict[int, trio.Event] = {}
        """Data files whose fdatasync is running; set when it is done."""
        self._folder_lock = trio.Lock()

    @property
    def failed(self) -> bool:
        """Whether what is on disk is not known any more."""
        return self._failure is not None or bool(self._file_failures)

    async def run(self) -> None:
        """Serve the group commits until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            waiting, self._waiting = self._waiting, []
            commits = self._database.commits
            if commits > self._durable_commits and self._failure is None:
                try:
                    with measuring(self.commits_synced):
                        await trio.to_thread.run_sync(os.fdatasync, self._wal, limiter=self._limiter)
                    self._durable_commits = commits
                except OSError as error:
                    log.critical("cannot sync %s: %s; nothing can be made durable", self._database.wal_path, error)
                    self._failure = error
            for event in waiting:
                event.set()

    async def commit(self) -> None:
        """Return when everything committed so far is on disk. Raise OSError if it cannot be known to be."""
        commits = self._database.commits
        if self._durable_commits < commits and self._failure is None:
            done = trio.Event()
            self._waiting.append(done)
            self._wake.set()
            await done.wait()
        if self._failure is not None:
            raise OSError(self._failure.errno, self._failure.strerror)

    async def sync(self, keys: Iterable[int]) -> OSError | None:
        """Make the bytes of these vnodes durable, then everything committed. Return why that failed, if it did."""
        failures: list[OSError] = []
        wanted = [key for key in keys if key in self._files.unsynced or key in self._syncing]
        if len(wanted) == 1:
            await self._sync_file(wanted[0], failures)
        elif wanted:
            async with trio.open_nursery() as nursery:
                for key in wanted:
                    nursery.start_soon(self._sync_file, key, failures)
        try:
            if self._files.unsynced_folders or self._folder_lock.locked():
                await self._sync_folders()
            await self.commit()
        except OSError as error:
            failures.append(error)
        return failures[0] if failures else None

    async def _sync_file(self, key: int, failures: list[OSError]) -> None:
        """Sync what was written until now. What is written meanwhile marks the file unsynced again."""
        while key in self._syncing:
            await self._syncing[key].wait()
        if key in self._file_failures:
            failures.append(self._file_failures[key])
        if key in self._file_failures or key not in self._files.unsynced:
            return
        done = self._syncing[key] = trio.Event()
        self._files.unsynced.discard(key)
        synced = False
        try:
            with self._files.pin(key, create=False) as file, trio.CancelScope(shield=True):
                if file is not None:
                    await self._fdatasync(file)
            synced = True
        except OSError as error:
            failures.append(error)
        finally:
            if not synced:
                self._files.unsynced.add(key)
            del self._syncing[key]
            done.set()

    async def _fdatasync(self, file: DataFile) -> None:
        try:
            with measuring(self.files_synced):
                await trio.to_thread.run_sync(file.sync, limiter=self._limiter)
        except OSError as error:
            path = self._files.path(file.key)
            log.critical("cannot sync %s: %s; nothing of it can be made durable", path, error.strerror)
            self._file_failures[file.key] = error
            raise

    async def _sync_folders(self) -> None:
        async with self._folder_lock:
            folders = list(self._files.unsynced_folders)
            self._files.unsynced_folders.clear()
            try:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(_sync_folders, folders, limiter=self._limiter)
            except OSError:
                self._files.unsynced_folders.update(folders)
                raise

    # Checkpoints

    async def run_checkpoints(self) -> None:
        """Move the WAL into the database now and then, until cancelled. Never holds up a transaction for long.

        SQLite reuses the WAL from its start only when all of it has been moved, so the last bit is moved here, between
        transactions, if the WAL is large.
        """
        limiter = trio.CapacityLimiter(1)
        checkpointed, since_s = self._database.commits, 0.0
        while True:
            await trio.sleep(CHECKPOINT_POLL_S)
            since_s += CHECKPOINT_POLL_S
            pending = self._database.commits - checkpointed
            if not pending:
                continue
            if pending >= CHECKPOINT_COMMITS or since_s >= CHECKPOINT_IDLE_S or self._database.wal_is_large:
                commits = self._database.commits
                try:
                    await trio.to_thread.run_sync(_checkpoint, self._database.path, limiter=limiter)
                    if self._database.wal_is_large:
                        # Under load there are always commits that the thread had not seen.
                        self._database.restart_wal()
                except (sqlite3.Error, OSError) as error:
                    log.error("checkpoint of %s: %s", self._database.path, error)
                checkpointed, since_s = commits, 0.0

    def close(self) -> None:
        os.close(self._wal)


def _checkpoint(path: Path) -> None:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        # The second one takes what was committed during the first, so that little is left to do.
        for _ in range(2):
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    finally:
        connection.close()


def _sync_folders(folders: list[Path]) -> None:
    for folder in folders:
        # Those of a removed volume are gone, and with them what was to be synced.
        with contextlib.suppress(FileNotFoundError):
            sync_path(folder)
