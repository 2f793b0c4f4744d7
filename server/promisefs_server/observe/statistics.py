"""What a server says of itself: FS.GetStatistics, `promisefsd top --json`, and what its metrics are made of.

Names and units are stable; new ones may come. Times are in seconds, sizes in bytes; counters count from the server's
start. docs/observing.md says what each means.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
from promisefs_protocol.abort import name_of
from promisefs_protocol.observe.timings import BOUNDS_S

from promisefs_server.administration.administration import sizes
from promisefs_server.promises.breaker import NOT_ACKNOWLEDGED, Contact
from promisefs_server.store.store import Store
from promisefs_server.store.volumes import VolumeState

if TYPE_CHECKING:
    from promisefs_server.service import Fileserver

log = logging.getLogger(__name__)

MAX_CLIENTS_LISTED = 500
"""Those that changes wait for first, then those that were active last. More are counted, not listed."""
SIZES_EVERY_S = 60.0
"""Counting files and bytes reads every row of the store."""


class VolumeSizes:
    """How many files and bytes each volume has, counted now and then, in a thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sizes: dict[int, tuple[int, int]] = {}
        self._counted_s = -SIZES_EVERY_S
        self._counting = trio.Lock()

    async def report(self) -> list[dict[str, Any]]:
        """As of SIZES_EVERY_S ago at most."""
        volumes = self._store.volumes.in_state(VolumeState.HERE)
        async with self._counting:
            if trio.current_time() - self._counted_s >= SIZES_EVERY_S:
                try:
                    self._sizes = await trio.to_thread.run_sync(sizes, self._store.database.path, volumes)
                except sqlite3.Error as error:
                    log.warning("the files of volumes cannot be counted: %s", error)
                self._counted_s = trio.current_time()
        counted = ((volume, self._sizes.get(volume.volume, (0, 0))) for volume in volumes)
        return [
            {
                "name": volume.name,
                "number": volume.volume,
                "files": files,
                "bytes": size,
                "used_bytes": self._store.volumes.usage_bytes(volume.volume),
                "quota_bytes": volume.quota_bytes,
                "read_only": volume.read_only,
            }
            for volume, (files, size) in counted
        ]


class Statistics:
    """Answers for one server that runs."""

    def __init__(self, server: Fileserver) -> None:
        self._server = server
        self._started_at = time.time()
        self._volumes = VolumeSizes(server.store)

    async def report(self) -> dict[str, Any]:
        volumes = await self._volumes.report()
        server, now_s = self._server, trio.current_time()
        breaker, keeper = server.breaker, server.lock_keeper
        contacts = [breaker.contact(host) for host in server.hosts]
        contacts.sort(key=lambda contact: (-contact.longest_break_s(now_s), -contact.host.active_s))
        listed = contacts[:MAX_CLIENTS_LISTED]
        return {
            "pid": os.getpid(),
            "up_s": round(time.time() - self._started_at, 1),
            "directory": str(server.store.folder),
            "lease_s": server.lease_s,
            "clients_known": len(contacts),
            "clients_connected": sum(contact.connected for contact in contacts),
            "clients_in_doubt": sum(contact.host.in_doubt(now_s) for contact in contacts),
            "clients": [self._client(contact, now_s) for contact in listed],
            "clients_omitted": len(contacts) - len(listed),
            "connections": server.connections,
            "promises": len(server.promises),
            "locks_held": keeper.table.held,
            "locks_waiting": keeper.table.waiting,
            "calls_waiting": server.calls_served,
            "breaks_waiting": sum(contact.breaks_owed for contact in contacts),
            "longest_break_s": round(max((contact.longest_break_s(now_s) for contact in contacts), default=0.0), 3),
            "breaks": breaker.breaks_sent,
            "resets": breaker.resets_sent,
            "leases_ended": breaker.leases_ended,
            "store": _store_report(server, volumes),
            "bucket_bounds_s": list(BOUNDS_S),
            "call_latency": server.calls.as_json(name_of),
            "break_latency": breaker.deliveries.as_json(_why_not_delivered),
            "wait_latency": breaker.waits.as_json(),
            "commit_latency": server.durability.commits_synced.as_json(os.strerror),
            "file_sync_latency": server.durability.files_synced.as_json(os.strerror),
        }

    def _client(self, contact: Contact, now_s: float) -> dict[str, Any]:
        host = contact.host
        return {
            "name": host.description,
            "uuid": host.uuid.hex(),
            "connected": contact.connected,
            "stale": host.stale,
            "in_doubt": host.in_doubt(now_s),
            "lease_left_s": round(max(0.0, host.lease_end_s - now_s), 1),
            "promises": self._server.promises.count_of(host.number),
            "breaks_waiting": contact.breaks_owed,
            "longest_break_s": round(contact.longest_break_s(now_s), 3),
        }


def _store_report(server: Fileserver, volumes: list[dict[str, Any]]) -> dict[str, Any]:
    store = server.store
    disk = os.statvfs(store.folder)
    return {
        "volumes": volumes,
        "transactions": store.database.commits,
        "database_bytes": _size_of(store.database.path),
        "wal_bytes": _size_of(store.database.wal_path),
        "disk_bytes": disk.f_blocks * disk.f_frsize,
        "disk_free_bytes": disk.f_bavail * disk.f_frsize,
        "deletions_waiting": len(server.deletions),
    }


def _size_of(path: Path) -> int:
    """Of a file that may not be there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _why_not_delivered(code: int) -> str:
    return "not acknowledged" if code == NOT_ACKNOWLEDGED else name_of(code)
