"""What a mount says of itself: `promisefs status --json`. Names and units are stable; new ones may come.

Times are in seconds, sizes in bytes; counters count from the mount's beginning. Of coherency tell: `early_acks`, breaks
and resets that were acknowledged before the kernel had dropped everything (`overdue`: those for which it has not yet);
`leases_lost`; `timeouts`, operations that failed because a server was away; `store_failures`, stores that failed and
are tried again; `bytes_refused`, by servers, for good; `files_lost`, files whose last bytes had no place to go to;
`bytes_voided`, bytes that were thrown away since the lock under which they were written was lost. What of all these was
put into the quarantine is `bytes_in_quarantine`; `quarantine_failures` counts what could not be. `closes_owed`: removed
files that were closed here, which a server still keeps until it can be told. `open_mmaps`: open files, and those of
them that outlive their last close, so are mapped, most likely. `caches`: see `observe.counters`. `..._latency`: see
`observe.timings`; with `bucket_bounds_s`.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import trio
from promisefs_protocol.abort import name_of
from promisefs_protocol.observe.timings import BOUNDS_S, total

from promisefs_client.data.filestore import FileStore
from promisefs_client.data.pagecache import PageCache
from promisefs_client.fuse.handlers import UPCALLS
from promisefs_client.identity.key import Keyring
from promisefs_client.network.callbacks import CallbackService
from promisefs_client.network.cell import Cell
from promisefs_client.network.session import NO_ANSWER, ServerSession
from promisefs_client.vnodes.vnode_table import VnodeTable

VNODES_AT_A_TIME = 5000
"""Looked at in one step, about a millisecond."""


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
        "rpcs": session.calls_made.counts(),
        "rpc_latency": session.calls_made.as_json(_name_of_failure),
        "break_latency": callbacks.acknowledgements.as_json(),
    }


def _tokens_report(keys: Keyring, wall_clock_s: float) -> dict[str, int]:
    """Of all local users; `expired`: those of them that are of no use any more."""
    expiries_s = [token.expires_s for token in keys.all_tokens()]
    return {"held": len(expiries_s), "expired": sum(expiry_s <= wall_clock_s for expiry_s in expiries_s)}


def _name_of_failure(code: int) -> str:
    return "no answer" if code == NO_ANSWER else name_of(code)


def _name_of_errno(number: int) -> str:
    return errno.errorcode.get(number, str(number))


async def count_promises(table: VnodeTable, now: float) -> int:
    """The vnodes that may be served without asking; in steps, for there may be hundreds of thousands."""
    count = 0
    vnodes = list(table)
    for start in range(0, len(vnodes), VNODES_AT_A_TIME):
        count += sum(table.valid(vnode, now) for vnode in vnodes[start : start + VNODES_AT_A_TIME])
        await trio.lowlevel.checkpoint()
    return count


def mount_report(
    cell: Cell,
    files: FileStore,
    pages: PageCache,
    callbacks: Iterable[CallbackService],
    promises: int,
    mounted_s: float,
    now: float,
) -> dict[str, Any]:
    """Everything but where it is mounted, which the kernel knows better. `promises` as counted."""
    table, counters = cell.table, cell.counters
    open_files = list(table.open_mmaps.files(now))
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
        "promises": promises,
        "open_files": len(table.open_mmaps),
        "open_mmaps": {"files": len(open_files), "outlive_close": sum(file.outlives_close for file in open_files)},
        "cache_bytes": pages.clean_bytes,
        "cache_limit_bytes": pages.limit_bytes,
        "dirty_bytes": pages.dirty_bytes,
        "dirty_files": files.dirty_files,
        "store_failures": files.store_failures,
        "files_lost": files.refuser.files_lost,
        "bytes_refused": files.refuser.bytes_refused,
        "quarantine": str(files.refuser.rejects.quarantine.directory),
        "quarantine_source": files.refuser.rejects.source,
        "bytes_in_quarantine": files.refuser.rejects.bytes_kept,
        "quarantine_failures": files.refuser.rejects.failures,
        "bytes_voided": files.bytes_voided,
        "closes_owed": len(cell.closings),
        **{name: _total(servers, name) for name in _SUMMED},
        "tokens": _tokens_report(cell.keys, time.time()),
        "kernel_epochs": cell.kernel.has_epochs,
        "upcalls": UPCALLS.counts(),
        "rpcs": dict(sorted(rpcs.items())),
        "caches": counters.caches_as_json(),
        **{name: getattr(counters, name) for name in _BYTES},
        "bucket_bounds_s": list(BOUNDS_S),
        "upcall_latency": UPCALLS.as_json(_name_of_errno),
        "rpc_latency": {
            method: total([s["rpc_latency"][method] for s in servers if method in s["rpcs"]]) for method in sorted(rpcs)
        },
        "break_latency": total([server["break_latency"] for server in servers]),
    }


_BYTES = ("read_bytes", "written_bytes", "fetched_bytes", "stored_bytes")
_SUMMED = ("breaks", "resets", "early_acks", "overdue", "leases_lost", "timeouts")


def is_away(server: dict[str, Any]) -> bool:
    """Whether a server that is needed is not there. One that nothing has been asked yet is not missed."""
    return not server["connected"] and bool(server["connects"] or server["waiting"])


def _total(servers: Iterable[dict[str, Any]], name: str) -> int:
    return sum(server[name] for server in servers)
