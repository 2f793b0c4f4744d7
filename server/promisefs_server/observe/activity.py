"""What a server has done between two of its reports: `promisefsd top`. Core: no I/O.

Names are stable; rates are per second, times in seconds. Of the first report alone: since the server started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promisefs_protocol.observe.timings import pace, paces

_COUNTED = ("breaks", "resets", "leases_ended")
_TIMED = ("break_latency", "wait_latency", "commit_latency", "file_sync_latency")
_DERIVED = {*_COUNTED, *_TIMED, "call_latency", "bucket_bounds_s"}

_NOTHING: dict[str, Any] = {
    "call_latency": {},
    "store": {"transactions": 0},
    **dict.fromkeys(_COUNTED, 0),
    **dict.fromkeys(_TIMED),
}


def activity(before: Mapping[str, Any] | None, after: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """`seconds` have passed between the two. What is no counter is in it as it is in the report."""
    seconds = max(seconds, 1e-3)
    past: Mapping[str, Any] = before or _NOTHING
    return {
        "interval_s": round(seconds, 3),
        **{name: value for name, value in after.items() if name not in _DERIVED},
        "calls": paces(past["call_latency"], after["call_latency"], seconds),
        **{f"{name}_per_s": (after[name] - past[name]) / seconds for name in _COUNTED},
        "transactions_per_s": (after["store"]["transactions"] - past["store"]["transactions"]) / seconds,
        **{name.removesuffix("_latency"): pace(past[name], after[name], seconds) for name in _TIMED},
    }
