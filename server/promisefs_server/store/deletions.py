"""Deleting the data files of vnodes that are gone, in a thread, some time after their rows.

Not before the rows' going is durable: else power loss could bring back a file that was removed, or replaced by a
rename, without its bytes. What a crash keeps from being deleted is found by `sweep` at the next start.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from .deletion_hold import are_deletions_held
from .store import Store

log = logging.getLogger(__name__)

MAX_PENDING = 10_000
"""Beyond this, removals wait until some are done; not while a backup holds deletions."""
BATCH = 256
HOLD_POLL_S = 1.0
"""How often it is looked whether a backup still holds deletions."""
GATHER_S = 0.2
"""Deletions wait so long for others to go with them, since each batch syncs the WAL."""


class Deletions:
    def __init__(self, store: Store, make_durable: Callable[[], Awaitable[None]]) -> None:
        """`make_durable` returns when everything committed is on disk, or raises OSError."""
        self._store = store
        self._make_durable = make_durable
        self._pending: list[int] = []
        self._deleting = trio.Lock()
        self._wake = trio.Event()
        self._done = trio.Event()
        self.on_gone: Callable[[Sequence[int]], None] = lambda keys: None

    def add(self, keys: Iterable[int]) -> None:
        """These vnodes' rows are gone."""
        gone = list(keys)
        self.on_gone(gone)
        for key in gone:
            self._store.files.discard(key)
            self._pending.append(key)
        if self._pending:
            self._wake.set()

    @property
    def has_room(self) -> bool:
        return len(self._pending) < MAX_PENDING or are_deletions_held(self._store.folder)

    async def wait_room(self) -> None:
        while not self.has_room:
            await self._done.wait()

    async def run(self) -> None:
        """Delete what is added, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            await trio.sleep(GATHER_S)
            while are_deletions_held(self._store.folder):  # noqa: ASYNC110 (another process does)
                await trio.sleep(HOLD_POLL_S)
            await self.finish()

    async def finish(self) -> None:
        """Delete what there is now, and what is added meanwhile."""
        async with self._deleting:
            while self._pending:
                batch = self._pending[:BATCH]
                try:
                    await self._make_durable()
                    await trio.to_thread.run_sync(self._delete, batch)
                except OSError as error:
                    # The store will not be marked clean, so they are swept then.
                    log.error("%d data files are deleted only at the next start: %s", len(batch), error)
                # More may have been added meanwhile.
                del self._pending[: len(batch)]
                self._done.set()
                self._done = trio.Event()

    def _delete(self, keys: list[int]) -> None:
        for key in keys:
            try:
                self._store.files.delete(key)
            except OSError as error:
                log.error("cannot delete %s: %s", self._store.files.path(key), error.strerror)

    async def sweep(self) -> None:
        """Delete data files that no vnode owns any more. After an unclean start."""
        files = self._store.files
        count = 0
        try:
            folders = await trio.to_thread.run_sync(files.folders)
        except OSError as error:
            log.error("cannot look for data files that a crash left behind: %s", error)
            return
        for folder in folders:
            try:
                gone = self._unowned(await trio.to_thread.run_sync(files.keys_in, folder))
            except FileNotFoundError:
                # Its volume has been removed meanwhile.
                continue
            except (OSError, sqlite3.Error) as error:
                log.error("cannot look for data files that a crash left behind in %s: %s", folder, error)
                continue
            count += len(gone)
            await self.wait_room()
            self.add(gone)
        if count:
            log.info("deleted %d data files that a crash had left behind", count)

    def _unowned(self, keys: list[int]) -> set[int]:
        if not keys:
            return set()
        rows = self._store.database.rows("SELECT vnode FROM vnodes WHERE vnode BETWEEN ? AND ?", (min(keys), max(keys)))
        return set(keys).difference(key for (key,) in rows)

    def __len__(self) -> int:
        """Data files that are still to be deleted."""
        return len(self._pending)

    def check_invariants(self) -> None:
        """What is going to be deleted is nobody's."""
        for key in self._pending:
            assert self._store.vnodes.find(key) is None, "a data file is to be deleted whose vnode is there"
