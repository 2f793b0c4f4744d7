"""What a mount says of itself: `promisefs status --json`. Names and units are stable; new ones may come.

Times are in seconds, sizes in bytes; counters count from the mount's beginning. Of coherency tell: `early_acks`, breaks
and resets that were acknowledged before the kernel had dropped everything (`overdue`: those for which it has not yet);
`leases_lost`; `timeouts`, operations that failed because a server was away; `store_failures`, stores that failed and
are tried again; `files_lost`, files whose last bytes had no place to go to; `bytes_voided`, bytes that were thrown away
since the lock under which they were written was lost. `closes_owed`: removed files that were closed here, which a
server still keeps until it can be told.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from promisefs_client.data.filestore import FileStore
from promisefs_client.data.pagecache import PageCache
from promisefs_client.fuse.handlers import UPCALLS
from promisefs_client.network.callbacks import CallbackService
from promisefs_client.network.cell import Cell
from promisefs_client.network.session import ServerSession


def server_report(session: ServerSession, callbacks: CallbackService, now: float) -> dict[str, Any]:
    """One server, as this mount sees it. `waiting`: operations that wait for it now."""
    return {
        "address": str(session.address),
        "connected": session.connected,
        "disconnected_s": 0.0 if session.lost_at is None else round(now - session.lost_at, 1),
        "connects": session.connects,
        "lease_left_s": round(max(0.0, session.server.lease_until - now), 1),
        "waiting": session.waiting,
        "longest_wait_s": round(session.longest_wait_s(now), 1),
        **{name: getattr(callbacks, name) for name in ("breaks", "resets", "early_acks", "overdue")},
        "leases_lost": session.leases_lost,
        "timeouts": session.timeouts,
        "rpcs": dict(sorted(session.call_counts.items())),
    }


def mount_report(
    cell: Cell, files: FileStore, pages: PageCache, callbacks: Iterable[CallbackService], mounted_s: float, now: float
) -> dict[str, Any]:
    """Everything but where it is mounted, which the kernel knows better."""
    table = cell.table
    services = {service.server: service for service in callbacks}
    servers = [server_report(session, services[server], now) for server, session in cell.sessions.items()]
    rpcs = sum((Counter(server["rpcs"]) for server in servers), Counter[str]())
    return {
        "pid": os.getpid(),
        "mounted_s": round(mounted_s, 1),
        "connected": not any(is_away(server) for server in servers),
        "waiting": _total(servers, "waiting"),
        "servers": servers,
        "vnodes": len(table),
        "promises": sum(table.valid(vnode, now) for vnode in table),
        "open_files": sum(vnode.opens for vnode in table if not vnode.status.is_dir),
        "cache_bytes": pages.clean_bytes,
        "cache_limit_bytes": pages.limit_bytes,
        "dirty_bytes": pages.dirty_bytes,
        "dirty_files": files.dirty_files,
        "store_failures": files.store_failures,
        "files_lost": files.files_lost,
        "bytes_voided": files.bytes_voided,
        "closes_owed": len(cell.closings),
        **{name: _total(servers, name) for name in _SUMMED},
        "kernel_epochs": cell.kernel.has_epochs,
        "upcalls": dict(sorted(UPCALLS.counts.items())),
        "rpcs": dict(sorted(rpcs.items())),
    }


_SUMMED = ("breaks", "resets", "early_acks", "overdue", "leases_lost", "timeouts")


def is_away(server: dict[str, Any]) -> bool:
    """Whether a server that is needed is not there. One that nothing has been asked yet is not missed."""
    return not server["connected"] and bool(server["connects"] or server["waiting"])


def _total(servers: Iterable[dict[str, Any]], name: str) -> int:
    return sum(server[name] for server in servers)
