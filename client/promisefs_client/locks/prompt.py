"""Taking a lock without passing through the scheduler when it is free, with waits that signals end.

trio's own `acquire` is a checkpoint then too: one needless round of the scheduler in every call to a server.
"""

from __future__ import annotations

from types import TracebackType

import trio

from promisefs_client.fuse.requests import SIGNAL_PATIENCE_S, interruptible


class Promptly:
    """Context manager: hold the lock, or a place of the semaphore. Whoever waits already goes first.

    Entering raises Interrupted after a signal.
    """

    __slots__ = ("_lock",)

    def __init__(self, lock: trio.Lock | trio.Semaphore) -> None:
        self._lock = lock

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            with interruptible(SIGNAL_PATIENCE_S):
                await self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
