"""Decides whether appenders on several mounts kept each other's data (G6)."""

from __future__ import annotations

from collections.abc import Iterator

from .history import NEVER, Call, History
from .layout import Path
from .plan import LOG


def check_appends(history: History, initial: dict[Path, int]) -> Iterator[str]:
    """In the log, which is only appended to, each confirmed append is in every later read, all of it, once.

    Not in one piece: one write(2) becomes several WRITEs where it crosses pages.
    """
    ino = initial[LOG]
    appends = [c for c in history.calls if c.kind == "append" and c.ino == ino]
    syncs = [c for c in history.calls if c.kind in ("fsync", "close") and c.succeeded and c.ino == ino]

    def confirmed(call: Call) -> float:
        return min((s.end for s in syncs if s.client == call.client and s.begin > call.end), default=NEVER)

    for read in history.calls:
        if read.kind != "read" or read.ino != ino or not read.succeeded or read.args[0] != 0:
            continue
        data: bytes = read.result
        if garbage := set(data) - {call.args[1] for call in appends if call.begin < read.end} - {0}:
            yield f"garbage: in the log: {read}: {sorted(garbage)}"
        for call in appends:
            length, value = call.args
            visible = confirmed(call) < read.begin or (call.client == read.client and call.end < read.begin)
            if call.succeeded and visible and data.count(value) < length:
                yield f"lost append: {read} lacks all or some of {call}"
            if data.count(value) > length:
                yield f"repeated append: {read} has {data.count(value)} bytes of {call}"
