"""Decides whether what befell one server left the files of others alone.

A client drops bytes of a file from its kernel only
    - if the server that has the file has just taken back its promise on it, by a break or InitCallBackState3, or the
      lease from that server has just ended;
    - if that server was away;
    - if it has been changed, which may be found out before the answer to that change, or when it is asked for again.
So files that nobody changes tell the most. That other servers go on being usable is for `checker_progress`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from .history import Call, Drop, History
from .layout import server_of
from .network import LONGEST_DELAY_S

SOON_S = 1.0 + 2 * LONGEST_DELAY_S
"""An open file is asked for again after a break, and dropped once more if that fails."""
_CHANGING = {"write", "append", "truncate", "punch", "store"}


def check_separation(history: History) -> Iterator[str]:
    for drop in history.drops:
        if not _has_reason(history, drop):
            yield (
                f"touched: {drop.client} dropped bytes of inode {drop.ino:x} at {drop.at_s - history.begin_s:.4f},"
                f" for no reason of server{server_of(drop.ino)}'s, which has it"
            )


def _has_reason(history: History, drop: Drop) -> bool:
    server = server_of(drop.ino)
    return (
        any(
            taken.at < drop.at
            and drop.at_s < taken.at_s + SOON_S
            and taken.client == drop.client
            and taken.server == server
            and (taken.inos is None or drop.ino in taken.inos)
            for taken in history.taken_back
        )
        or any(o.concerns(drop.client, {server}) and o.begin_s < drop.at_s for o in history.outages)
        or any(c.begin < drop.at and c.ino in (drop.ino, 0) and _may_change_bytes(c) for c in history.calls)
    )


def _may_change_bytes(call: Call) -> bool:
    return call.kind in _CHANGING or (call.kind == "reopen" and bool(call.args[1] & os.O_TRUNC))
