"""`promisefs trace`: a mount's events, sent to who asked as they happen.

A reader that is slower than the events loses some: at most MAX_QUEUED wait for it, and where some are missing it is
told how many. Nobody but the reader's own task waits for it.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any

import trio
from promisefs_protocol.observe.tracing import Event, Record, tracing

from promisefs_client.errors import ExitCode, UserError

from .control_server import Send

MAX_QUEUED = 10_000
"""Events that wait for one reader, some 2 MB; what comes then is lost, the oldest stay."""
MAX_SENT = 200
"""Events that are sent together."""
_FID = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")


class EventQueue:
    """A listener that keeps what passes its filter. Core: no I/O."""

    def __init__(self, events: frozenset[str], fids: frozenset[str], most: int = MAX_QUEUED) -> None:
        """An empty set lets everything pass."""
        self._events = events
        self._fids = fids
        self._most = most
        self._queue: deque[Record] = deque()
        self._lost = 0
        self.filled = trio.Event()

    def __call__(self, record: Record) -> None:
        if self._events and record["event"] not in self._events:
            return
        if self._fids and record.get("fid") not in self._fids:
            return
        if len(self._queue) >= self._most:
            self._lost += 1
            return
        self._queue.append(record)
        self.filled.set()

    def take(self, most: int) -> list[Record]:
        """The oldest ones; after the last of them, where the queue was full, how many were `lost`."""
        taken = [self._queue.popleft() for _ in range(min(most, len(self._queue)))]
        if not self._queue:
            self.filled = trio.Event()
            if self._lost:
                taken.append({"event": "lost", "count": self._lost})
                self._lost = 0
        return taken


async def trace(args: dict[str, Any], send: Send) -> None:
    """Send events until cancelled; first an empty one, when it has begun. `events` and `fids`: only these, if any."""
    queue = EventQueue(_chosen_events(args.get("events", [])), _chosen_fids(args.get("fids", [])))
    tracing.listen(queue)
    try:
        await send([])
        while True:
            await queue.filled.wait()
            while records := queue.take(MAX_SENT):
                await send(records)
    finally:
        tracing.ignore(queue)


def _chosen_events(names: list[str]) -> frozenset[str]:
    for name in names:
        if name not in tuple(Event):
            raise UserError(f"there is no event {name!r}; there are {', '.join(sorted(Event))}", ExitCode.USAGE)
    return frozenset(names)


def _chosen_fids(texts: list[str]) -> frozenset[str]:
    for text in texts:
        if not _FID.fullmatch(text):
            raise UserError(f"{text!r} is no fid like 1.23.4567; 'promisefs fs examine PATH' tells it", ExitCode.USAGE)
    return frozenset(texts)
