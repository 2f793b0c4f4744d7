"""The kernel's request that a task is carrying out: what the kernel said with it, and how a signal ends it.

A signal for the process that waits for a request makes the kernel send an interrupt. It cancels no handler: what a
handler was doing at that moment might be half done. It ends the waits that say so, by `interruptible`, with
`Interrupted`, which is a ServerUnavailable: whoever made a call treats its outcome as unknown, as after a timeout. Then
the handler answers EINTR.

A process that catches the signal goes on and may try again, one that is killed (`fatal`) does not. So a fatal signal
may also end a wait of which it is not known whether something has been done, a caught one must not.

Tasks that a handler starts in a nursery of its own are part of the request; what outlives it (`Cell.start`) is not.
"""

from __future__ import annotations

import math
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Protocol

import trio

from promisefs_client.errors import ServerUnavailable

SIGNAL_PATIENCE_S = 2.0
"""A process that catches signals (of timers, of children that end) expects none of them to make file operations fail.
So a server that is away has this long to come back after one; who presses Ctrl-C waits as long."""
ONLY_IF_KILLED = math.inf
"""As the patience of a wait: a signal that is caught does not end it."""


class Interrupted(ServerUnavailable):
    """The process that waited for the request got a signal."""


class Request:
    """One request. Without the FUSE extension nothing is known of it, and nothing interrupts it."""

    __slots__ = ("_fatal", "_signalled_at", "_waits", "from_page_cache", "lock_owner", "releases_flock")

    def __init__(
        self, from_page_cache: bool | None = None, lock_owner: int | None = None, releases_flock: bool = False
    ) -> None:
        self.from_page_cache = from_page_cache
        """Of a write: whether the kernel writes back what was stored into a mapping. None: not known."""
        self.lock_owner = lock_owner
        """Of a flush: whose byte-range locks end with it. Of a release: whose flock does, if `releases_flock`."""
        self.releases_flock = releases_flock
        self._waits: set[interruptible] | None = None
        self._signalled_at: float | None = None
        self._fatal = False

    @property
    def interrupted(self) -> bool:
        """Whether a signal has come."""
        return self._signalled_at is not None

    def raise_if_interrupted(self) -> None:
        if self.interrupted:
            raise Interrupted("interrupted by a signal")

    def interrupt(self, now: float, fatal: bool) -> None:
        """A signal came, at `now` of trio's clock. May be called again."""
        if self._signalled_at is None:
            self._signalled_at = now
        self._fatal |= fatal
        for wait in self._waits or ():
            wait.limit(self._signalled_at, self._fatal)

    def enter(self, wait: interruptible) -> None:
        if self._waits is None:
            self._waits = set()
        self._waits.add(wait)
        if self._signalled_at is not None:
            wait.limit(self._signalled_at, self._fatal)

    def leave(self, wait: interruptible) -> None:
        assert self._waits is not None
        self._waits.discard(wait)


_UNKNOWN = Request()
_current: ContextVar[Request] = ContextVar("request", default=_UNKNOWN)


def current_request() -> Request:
    """The request that this task is part of; one of which nothing is known if there is none."""
    return _current.get()


def outlive_request() -> None:
    """This task is not part of the request that started it."""
    _current.set(_UNKNOWN)


class RequestSource(Protocol):
    """Who knows which request the kernel has just made."""

    def take(self) -> Request | None:
        """The request that begins to be handled in this very step, once; None if there is none."""

    def done(self, request: Request) -> None:
        """It is answered."""


class handling:
    """Context manager: this task carries out a request, by default the one that the kernel has just made."""

    __slots__ = ("_request", "_token")

    _token: Token[Request]
    source: RequestSource | None = None

    def __init__(self, request: Request | None = None) -> None:
        self._request = request

    def __enter__(self) -> None:
        if self._request is None and handling.source is not None:
            self._request = handling.source.take()
        if self._request is not None:
            self._token = _current.set(self._request)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._request is not None:
            if handling.source is not None:
                handling.source.done(self._request)
            _current.reset(self._token)


class interruptible:
    """Context manager: a signal for the process that waits ends this block at its next checkpoint with Interrupted.

    A fatal signal does so at once. A caught one when `patience_s` has passed since it came, or never if that is
    infinite. What the block was waiting for must be none the worse for it, or count as unknown.
    """

    __slots__ = ("_patience_s", "_request", "_scope")

    _request: Request
    _scope: trio.CancelScope

    def __init__(self, patience_s: float = 0.0) -> None:
        self._patience_s = patience_s

    def limit(self, signalled_at: float, fatal: bool) -> None:
        if fatal:
            self._scope.cancel()
        else:
            self._scope.deadline = signalled_at + self._patience_s

    def __enter__(self) -> None:
        self._request = _current.get()
        if self._request is not _UNKNOWN:
            self._scope = trio.CancelScope()
            self._scope.__enter__()
            self._request.enter(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._request is _UNKNOWN:
            return None
        self._request.leave(self)
        swallowed = self._scope.__exit__(kind, error, trace)
        if self._scope.cancelled_caught:
            raise Interrupted("interrupted by a signal")
        return swallowed
