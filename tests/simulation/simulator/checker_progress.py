"""Decides whether every system call ended in time, and waited for no server but those that it needs.

A call needs the server that has its file; one that goes by a path needs the first server too, which has the root
volume. By the design it waits for
    - messages to and fro, and, if it changes something, for other clients' acknowledgements or the end of their leases:
      HEALTHY_ROUND_TRIPS and one lease;
    - a server that is away: `timeout` for each outage of one that it needs, until that is over and the client is back;
    - what its mount has locked: calls of other processes there about the same file or directory. Its time begins when
      the last of those that ended before it has ended.
"""

from __future__ import annotations

from collections.abc import Iterator

from .history import NEVER, Call, History
from .layout import server_of
from .network import LONGEST_DELAY_S
from .plan import Plan

HEALTHY_ROUND_TRIPS = 2
"""Most calls need one or two of the server, and hardly ever is each message late."""
RECONNECT_S = 1.0
RECONNECT_ROUND_TRIPS = 3
"""After an outage a client tries again at least every second: two HELLOs, and InitCallBackState3."""


def check_progress(history: History, plan: Plan) -> Iterator[str]:
    healthy_s = plan.lease_s + HEALTHY_ROUND_TRIPS * 2 * LONGEST_DELAY_S
    for call in history.calls:
        if call.end == NEVER or call.end_s - call.begin_s <= healthy_s:
            continue
        begin_s = max([call.begin_s, *(c.end_s for c in history.calls if _was_in_the_way(c, call))])
        bound_s = healthy_s + plan.timeout_s * _outages(history, plan, call)
        if call.end_s - begin_s > bound_s:
            yield f"late: {call} took {call.end_s - begin_s:.1f} s, when {bound_s:.1f} s would do"


def has_met_outage(history: History, plan: Plan, call: Call) -> bool:
    """Whether a server that the call needs had been away, so that it may fail. Maybe long before: errors of pages that
    were written back are told later."""
    needed = _needed(plan, call)
    return any(o.concerns(call.client, needed) and o.begin_s < call.end_s for o in history.outages)


def _outages(history: History, plan: Plan, call: Call) -> int:
    """How many outages of servers that it needs fall into the call, or the return from them."""
    needed = _needed(plan, call)
    return_s = plan.lease_s + RECONNECT_S + RECONNECT_ROUND_TRIPS * 2 * LONGEST_DELAY_S
    return sum(
        o.concerns(call.client, needed) and o.begin_s < call.end_s and call.begin_s < o.end_s + return_s
        for o in history.outages
    )


def _needed(plan: Plan, call: Call) -> set[int]:
    paths = _paths(call)
    needed = {plan.layout.home(path).server for path in paths}
    if paths:
        needed.add(0)
    if call.ino:
        needed.add(server_of(call.ino))
    return needed


def _was_in_the_way(other: Call, call: Call) -> bool:
    if other.client != call.client or other is call or not call.begin < other.end < call.end:
        return False
    directories = {path[:1] for path in _paths(call)}
    return (call.ino and call.ino == other.ino) or any(path[:1] in directories for path in _paths(other))


def _paths(call: Call) -> list[tuple[bytes, ...]]:
    return [argument for argument in call.args if isinstance(argument, tuple)]
