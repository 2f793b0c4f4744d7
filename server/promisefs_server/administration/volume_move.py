"""Moving a volume from one stopped server's store to another's, so that an interruption at any point loses nothing.

Both stores are locked, of one cell and cleanly shut down; every commit is durable when it returns. The steps:

1. target: the volume is noted as ARRIVING; what an earlier attempt left is deleted
2. its rows and data files are copied and made durable
3. the leases that the source's server gave have ended, so that no client trusts what it has of it any more
4. source: LEAVING; saved promises are deleted, so that every client is told at the next start
5. target: HERE, with a new incarnation
6. source: MOVED; its rows and data files are deleted

Until 4 the source serves it, from 5 on the target does, and between them nobody does: then `move` has to be called
again. In every case it goes on from what it finds, or begins anew if nothing but a copy was made. That the target
ever had it is to be seen there (I3 of `volumes`), so what arrived and was removed or moved on since is not copied
again.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import trio
from promisefs_protocol.abort import AbortCode, Aborted

from promisefs_server.errors import VolumeError
from promisefs_server.promises import callback_state
from promisefs_server.store.acls import number_of
from promisefs_server.store.store import Store
from promisefs_server.store.vnodes import COLUMNS, Vnode
from promisefs_server.store.volume_remains import VolumeRemains
from promisefs_server.store.volumes import LIVE, Volume, VolumeState, check_free

BATCH_ROWS = 500
COPY_BYTES = 1 << 20
_ROWS = {
    "vnodes": (f"{COLUMNS}, target", "vnode"),
    "entries": ("directory, name, vnode", "directory"),
    "places": ("vnode, directory, names", "vnode"),
    "xattrs": ("vnode, name, value", "vnode"),
}
"""What is copied: columns of each table, and the one with the vnode key."""

Progress = Callable[[int, int], None]
"""Told how many of how many rows have been copied, with their files."""


class VolumeMove:
    def __init__(self, source: Store, target: Store, name: str) -> None:
        """Check that it can be done. Raise VolumeError."""
        self._source = source
        self._target = target
        self._check_stores()
        self.volume = self._find(name)
        self._there = target.volumes.record(self.volume.volume)
        if not self.arrived:
            self._check_movable()

    @property
    def arrived(self) -> bool:
        """An earlier move, which was interrupted or not, has made the target its server."""
        return (
            self.volume.state is not VolumeState.HERE
            and self.volume.other_store == self._target.uuid
            and self._there is not None
            and self._there.state is not VolumeState.ARRIVING
        )

    async def run(self, wait_for_leases: Callable[[], Awaitable[None]], progress: Progress) -> None:
        """Do what is left to do. Raise OSError, sqlite3.Error; then `move` can be called again."""
        source, target = self._source, self._target
        if not self.arrived:
            copied = await self._copy(progress)
            await wait_for_leases()
            callback_state.forget(source.folder)
            source.volumes.set_state(self.volume, VolumeState.LEAVING, target.uuid, target.membership.number)
            target.volumes.set_state(copied, VolumeState.HERE)
        if self.volume.state is VolumeState.LEAVING:
            source.volumes.set_state(self.volume, VolumeState.MOVED, target.uuid, target.membership.number)
        await VolumeRemains(source).delete(self.volume)

    @property
    def situation(self) -> str:
        """What to do if `run` did not end, for people."""
        match self.volume.state:
            case VolumeState.HERE:
                return f"The volume is still in {self._source.folder}, and the command can be run again"
            case VolumeState.LEAVING:
                return "No server has the volume until the same command, run again, has finished it"
        return f"The volume is in {self._target.folder}; the command, run again, deletes what is left in the other"

    # Checks

    def _check_stores(self) -> None:
        source, target = self._source, self._target
        for store in (source, target):
            if not store.membership.cell:
                raise VolumeError(f"{store.folder} belongs to no cell: volumes move only between servers of one cell")
            if not store.was_clean:
                raise VolumeError(
                    f"the server of {store.folder} has not ended cleanly: start it, and stop it with SIGTERM, first"
                )
        if source.membership.cell != target.membership.cell or source.membership.number == target.membership.number:
            raise VolumeError(
                f"{source.folder} belongs to {source.membership}, {target.folder} to {target.membership}:"
                " volumes move only between two servers of one cell"
            )

    def _find(self, name: str) -> Volume:
        """The volume of that name: one that is here or has begun to leave, else one that has gone to the target."""
        volumes = self._source.volumes
        for volume in volumes.in_state(*LIVE):
            if volume.name == name:
                return volume
        moved = [volume for volume in volumes.in_state(VolumeState.MOVED) if volume.name == name]
        for volume in moved:
            if volume.other_store == self._target.uuid:
                return volume
        if moved:
            raise VolumeError(f"volume {name!r} has moved to server {moved[-1].other_number}: move it from there")
        raise VolumeError(f"{self._source.folder} has no volume {name!r}")

    def _check_movable(self) -> None:
        volume, target = self.volume, self._target
        if self._there is not None and self._there.state in LIVE:
            raise VolumeError(
                f"volume {volume.name!r}, number {volume.volume}, is in {target.folder} too: one of the two stores is"
                " an old copy. Do not serve both; nothing is changed"
            )
        if volume.state is VolumeState.MOVED:
            raise VolumeError(f"{target.folder} has lost volume {volume.name!r}, which has moved there")
        if volume.state is VolumeState.LEAVING and volume.other_store != target.uuid:
            raise VolumeError(
                f"volume {volume.name!r} has begun to move to server {volume.other_number}: finish that, with the"
                " directory of that server's store, before it can move on"
            )
        orphans = self._source.database.rows(
            "SELECT 1 FROM vnodes WHERE nlink = 0 AND vnode BETWEEN ? AND ?", volume.keys
        )
        if orphans:
            raise VolumeError(
                f"{len(orphans)} removed files of volume {volume.name!r} are still open on clients: start the server,"
                " have them closed or the clients unmounted, and try again"
            )
        try:
            check_free(volume.name, target.volumes.in_state(*LIVE))
        except Aborted as refusal:
            assert refusal.code == AbortCode.EXIST
            raise VolumeError(f"{target.folder}: {refusal.message}; rename one of the two first") from None

    # Copying

    async def _copy(self, progress: Progress) -> Volume:
        """Copy rows and data files, durably. Return the volume as the target has noted it, ARRIVING."""
        source, target, volume = self._source, self._target, self.volume
        if self._there is not None:
            # Its rows and files are from before it left, or from an attempt that was interrupted.
            await VolumeRemains(target).delete(self._there)
        arriving = replace(
            volume,
            incarnation=volume.incarnation + 1,
            state=VolumeState.ARRIVING,
            other_store=source.uuid,
            other_number=source.membership.number,
        )
        target.volumes.expect(arriving)
        try:
            await self._copy_rows(progress)
        except (OSError, sqlite3.Error):
            with contextlib.suppress(OSError, sqlite3.Error):
                await VolumeRemains(target).delete(arriving)
            raise
        await trio.to_thread.run_sync(target.files.sync_all)
        target.database.sync_commits()
        # With this commit all before it are on disk.
        target.volumes.set_state(arriving, VolumeState.ARRIVING, source.uuid, source.membership.number)
        return arriving

    async def _copy_rows(self, progress: Progress) -> None:
        """Copy rows, and data files before theirs."""
        source, target = self._source, self._target
        target.database.relax()
        total = sum(self._count(table) for table in _ROWS)
        done = 0
        for table, (columns, key) in _ROWS.items():
            rows = source.database.execute(
                f"SELECT {columns} FROM {table} WHERE {key} BETWEEN ? AND ?", self.volume.keys
            )
            insert = f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(columns.split(',')))})"
            while batch := rows.fetchmany(BATCH_ROWS):
                if table == "vnodes":
                    vnodes = [Vnode._make(row[:-1]) for row in batch]
                    await trio.to_thread.run_sync(self._copy_files, vnodes)
                    batch = self._with_acls_there(vnodes, [row[-1] for row in batch])
                with target.database.transaction():
                    target.database.execute_many(insert, batch)
                done += len(batch)
                progress(done, total)
                await trio.lowlevel.checkpoint()

    def _with_acls_there(self, vnodes: list[Vnode], targets: list[bytes | None]) -> list[tuple[object, ...]]:
        """The rows, with the numbers that their access control lists have in the target."""
        lists = {vnode.acl: self._source.acls.get(vnode.acl) for vnode in vnodes if vnode.acl}
        with self._target.database.transaction():
            there = {number: number_of(self._target.database, acl) for number, acl in lists.items()}
        return [
            (*vnode._replace(acl=there.get(vnode.acl, 0)), target)
            for vnode, target in zip(vnodes, targets, strict=True)
        ]

    def _count(self, table: str) -> int:
        key = _ROWS[table][1]
        ((count,),) = self._source.database.rows(
            f"SELECT count(*) FROM {table} WHERE {key} BETWEEN ? AND ?", self.volume.keys
        )
        return int(count)

    def _copy_files(self, vnodes: list[Vnode]) -> None:
        for vnode in vnodes:
            if stat.S_ISREG(vnode.mode):
                copy_data(self._source.files.path(vnode.key), self._target.files.path(vnode.key), vnode.size)


def copy_data(source: Path, target: Path, size: int) -> None:
    """Copy the first `size` bytes of a data file, if there is one, holes as holes. Raise OSError."""
    try:
        read_from = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_to = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            end = min(size, os.fstat(read_from).st_size)
            offset = 0
            while (begin := _next_data(read_from, offset)) < end:
                offset = min(os.lseek(read_from, begin, os.SEEK_HOLE), end)
                _copy_range(read_from, write_to, begin, offset)
            os.ftruncate(write_to, end)
        finally:
            os.close(write_to)
    finally:
        os.close(read_from)


def _next_data(descriptor: int, offset: int) -> int:
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError:
        # There is none any more.
        return os.fstat(descriptor).st_size


def _copy_range(read_from: int, write_to: int, begin: int, end: int) -> None:
    while begin < end:
        data = os.pread(read_from, min(COPY_BYTES, end - begin), begin)
        if not data:
            raise OSError(f"a data file ends at {begin} bytes instead of {end}")
        view = memoryview(data)
        while view:
            written = os.pwrite(write_to, view, begin)
            view, begin = view[written:], begin + written
