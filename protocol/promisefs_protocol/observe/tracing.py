"""Tracepoints: what becomes of promises, data versions and calls, told to whoever listens, as kAFS's tracepoints do.

Code that has something to tell looks at `tracing.on` first, so that it costs next to nothing when nobody listens.
`tell` is for what matters also to who does not: it goes to the log as well.

One thread tells, trio's; listeners are called in the same step, so they must not wait, and what they keep is bounded by
them.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Event(enum.StrEnum):
    """What can happen; docs/observing.md says what each means, and what is told with it."""

    CALL = "call"
    ABORT = "abort"
    CB_PROMISE = "cb_promise"
    CB_OVERTAKEN = "cb_overtaken"
    CB_BREAK = "cb_break"
    CB_ACK = "cb_ack"
    CB_EARLY_ACK = "cb_early_ack"
    CB_NOT_ACKED = "cb_not_acked"
    CB_RESET = "cb_reset"
    SET_DV = "set_dv"
    DV_MISMATCH = "dv_mismatch"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    LEASE_LOST = "lease_lost"
    STORE_FAILED = "store_failed"
    STORE_REFUSED = "store_refused"
    FILE_LOST = "file_lost"
    LOCK_LOST = "lock_lost"
    UPCALL_FAILED = "upcall_failed"
    CLIENT_GONE = "client_gone"
    LOGIN = "login"
    LOGIN_REFUSED = "login_refused"


Record = dict[str, Any]
"""`time`, seconds since the epoch; `event`; and what is told with it, as JSON has it: `fid`, `client`, `reason`..."""
Listener = Callable[[Record], None]


class Tracepoints:
    """Those of one process."""

    def __init__(self) -> None:
        self.on = False
        """Whether anybody listens."""
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)
        self.on = True

    def ignore(self, listener: Listener) -> None:
        self._listeners.remove(listener)
        self.on = bool(self._listeners)

    def emit(self, event: Event, **about: object) -> None:
        """Tell an event. What JSON has no type for is told as text, None not at all."""
        record: Record = {"time": time.time(), "event": event.value}
        record.update((name, as_json(value)) for name, value in about.items() if value is not None)
        for listener in self._listeners:
            listener(record)


tracing = Tracepoints()


def as_json(value: object) -> Any:
    """Numbers and text stay; everything else, fids and addresses among them, is told as text."""
    if isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum):
        return round(value, 6) if isinstance(value, float) else value
    return str(value)


def tell(logger: logging.Logger, level: int, event: Event, message: str, *args: object, **about: object) -> None:
    """Log a message, with what it is about beside it for those who read JSON, and tell who listens."""
    logger.log(level, message, *args, extra={"event": event, "about": about}, stacklevel=2)
    if tracing.on:
        tracing.emit(event, **about)


def described(record: Record) -> str:
    """One line for people: event, fid, and the rest as name=value."""
    rest = " ".join(
        f"{name}={_quoted(str(value))}" for name, value in record.items() if name not in ("time", "event", "fid")
    )
    return f"{record['event']:<13} {record.get('fid', '-'):<15} {rest}".rstrip()


def _quoted(text: str) -> str:
    plain = text.isprintable() and not any(character in text for character in ' "=')
    return text if plain else '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


def log_every_event(record: Record) -> None:
    """A listener: writes what is told only here to the log. What `tell` tells is there already."""
    if record["event"] in _TRACED_ONLY:
        log.debug("%s", described(record), extra={"event": record["event"], "about": record})


_TRACED_ONLY = frozenset(
    {
        Event.CALL,
        Event.ABORT,
        Event.CB_PROMISE,
        Event.CB_OVERTAKEN,
        Event.CB_BREAK,
        Event.CB_ACK,
        Event.SET_DV,
        Event.DV_MISMATCH,
    }
)
"""Too many for a log that nobody has asked to say more."""
