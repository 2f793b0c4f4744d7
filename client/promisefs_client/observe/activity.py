"""What a mount has done between two of its reports: `promisefs top`. Core: no I/O.

Names are stable; rates are per second, times in seconds. Of the first report alone: since the mount began.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promisefs_protocol.observe.timings import pace, paces

_BYTES = ("read_bytes", "written_bytes", "fetched_bytes", "stored_bytes")
_AS_THEY_ARE = (
    "mountpoint",
    "source",
    "mounted_s",
    "connected",
    "waiting",
    "dirty_bytes",
    "dirty_files",
    "cache_bytes",
    "cache_limit_bytes",
    "promises",
    "open_files",
    "open_mmaps",
    "locks",
    "resets",
    "early_acks",
    "overdue",
    "leases_lost",
    "timeouts",
    "store_failures",
    "files_lost",
    "bytes_voided",
    "bytes_refused",
    "bytes_in_quarantine",
    "quarantine_failures",
    "closes_owed",
)
_OF_SERVERS = ("address", "connected", "disconnected_s", "connects", "lease_left_s", "waiting", "longest_wait_s")

NEEDED = frozenset((*_AS_THEY_ARE, *_BYTES, "servers", "upcall_latency", "rpc_latency", "break_latency", "caches"))
"""What a report has to have; those of older versions do not."""
_NOTHING: dict[str, Any] = {"upcall_latency": {}, "rpc_latency": {}, "break_latency": None, "caches": {}, "breaks": 0}


def activity(before: Mapping[str, Any] | None, after: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """`seconds` have passed between the two."""
    seconds = max(seconds, 1e-3)
    past: Mapping[str, Any] = before or {**_NOTHING, **dict.fromkeys(_BYTES, 0)}
    return {
        "interval_s": round(seconds, 3),
        **{name: after[name] for name in _AS_THEY_ARE},
        "servers": [{name: server[name] for name in _OF_SERVERS} for server in after["servers"]],
        "operations": paces(past["upcall_latency"], after["upcall_latency"], seconds),
        "calls": paces(past["rpc_latency"], after["rpc_latency"], seconds),
        "breaks_per_s": (after["breaks"] - past["breaks"]) / seconds,
        "acknowledgements": pace(past["break_latency"], after["break_latency"], seconds),
        "caches": {
            name: _hits(past["caches"].get(name), counted, seconds) for name, counted in after["caches"].items()
        },
        **{f"{name}_per_s": (after[name] - past[name]) / seconds for name in _BYTES},
    }


def _hits(before: Mapping[str, int] | None, after: Mapping[str, int], seconds: float) -> dict[str, float | None]:
    """`hit_rate` is None if nothing was asked."""
    hits = after["hits"] - (before["hits"] if before else 0)
    asked = hits + after["misses"] - (before["misses"] if before else 0)
    return {"asked_per_s": asked / seconds, "hit_rate": hits / asked if asked else None}
