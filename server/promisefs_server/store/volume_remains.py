"""Deleting what is left of volumes that are not here: removed ones, moved ones, copies that were not finished.

Data files go first, then rows, then the note of a volume that did not arrive. Whatever ends this in the middle, the
next start finds what is left by the rows of table volumes (I2 there) and goes on. In small steps: of files by the
folder in a thread, of rows by the batch on the trio thread, so that a server goes on serving meanwhile.
"""

from __future__ import annotations

import logging
import sqlite3

import trio

from .store import Store
from .volumes import Volume, VolumeState

log = logging.getLogger(__name__)

BATCH_ROWS = 200
_OF_VOLUME = {
    "entries": ("(directory, name)", "directory, name", "directory"),
    "xattrs": ("(vnode, name)", "vnode, name", "vnode"),
    "places": ("(vnode, directory)", "vnode, directory", "vnode"),
    "orphan_holders": ("(vnode, host)", "vnode, host", "vnode"),
    "vnodes": ("vnode", "vnode", "vnode"),
}
"""Tables with rows of volumes: primary key as a row value, as columns, and the column with the vnode key."""


class VolumeRemains:
    """`run` deletes what there is and what is added. `delete` does it for one volume."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending = store.volumes.in_state(VolumeState.REMOVED, VolumeState.ARRIVING, VolumeState.MOVED)
        self._wake = trio.Event()
        self._wake.set()

    def add(self, volume: Volume) -> None:
        """It is not here any more."""
        self._pending.append(volume)
        self._wake.set()

    async def run(self) -> None:
        """Delete until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            await self.delete_all()

    async def delete_all(self) -> None:
        """Delete what has been added so far."""
        while self._pending:
            volume = self._pending.pop(0)
            try:
                await self.delete(volume)
            except (OSError, sqlite3.Error) as error:
                log.error("what is left of volume %s is deleted only after the next start: %s", volume.name, error)

    async def delete(self, volume: Volume) -> None:
        """Delete all that is left of a volume. Raise OSError, sqlite3.Error."""
        files = self._store.files
        files.discard_volume(volume.volume)
        for folder in await trio.to_thread.run_sync(files.volume_folders, volume.volume):
            await trio.to_thread.run_sync(files.delete_folder, folder)
        if await trio.to_thread.run_sync(files.delete_volume_folder, volume.volume):
            log.info("deleted the data files of volume %s, number %d", volume.name, volume.volume)
        # Calls that had begun may have opened more; what they commit yet goes to rows that are deleted here.
        files.discard_volume(volume.volume)
        while self._delete_some_rows(volume):
            await trio.lowlevel.checkpoint()
        if volume.state is VolumeState.ARRIVING:
            self._store.volumes.forget(volume)

    def _delete_some_rows(self, volume: Volume) -> bool:
        """Delete a batch of rows; return whether there were any."""
        database = self._store.database
        for table, (key, columns, vnode) in _OF_VOLUME.items():
            some = f"SELECT {columns} FROM {table} WHERE {vnode} BETWEEN ? AND ? LIMIT {BATCH_ROWS}"
            if database.execute(some, volume.keys).fetchone() is not None:
                with database.transaction():
                    database.execute(f"DELETE FROM {table} WHERE {key} IN ({some})", volume.keys)
                return True
        return False
