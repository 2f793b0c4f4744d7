"""Locks of vnodes: who changes a regular file's bytes holds its lock; who changes its row otherwise waits for that.
What is one synchronous step needs no lock of its own: it only sees that nobody has it (`any_held`).

Only tasks that change bytes keep a lock across a checkpoint, so directories need none: changes of names are one
synchronous step. Locks are taken in ascending order of keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable

import trio


class VnodeLocks:
    def __init__(self) -> None:
        self._locks: dict[int, trio.Lock] = {}

    def __len__(self) -> int:
        return len(self._locks)

    def any_held(self, keys: Iterable[int]) -> bool:
        """Whether the bytes of one of these are being changed, or are going to be."""
        return any(key in self._locks for key in keys)

    async def _acquire(self, key: int) -> None:
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = trio.Lock()
        await lock.acquire()

    def _release(self, key: int) -> None:
        lock = self._locks[key]
        lock.release()
        if not lock.locked():
            del self._locks[key]

    @contextlib.asynccontextmanager
    async def hold(self, key: int) -> AsyncIterator[None]:
        await self._acquire(key)
        try:
            yield
        finally:
            self._release(key)

    @contextlib.asynccontextmanager
    async def settled(self, find: Callable[[], Iterable[int]]) -> AsyncIterator[None]:
        """Within the context, and until its next checkpoint, nobody is changing the bytes of what `find` returns.

        `find` is called again after waiting, since names may stand for other files by then.
        """
        held: list[int] = []
        try:
            while True:
                busy = sorted({key for key in find() if key in self._locks and key not in held})
                if not busy:
                    break
                if held and busy[0] < max(held):
                    busy = sorted([*busy, *held])
                    while held:
                        self._release(held.pop())
                for key in busy:
                    await self._acquire(key)
                    held.append(key)
            yield
        finally:
            for key in held:
                self._release(key)

    def check_invariants(self) -> None:
        """There are only locks that somebody holds."""
        assert all(lock.locked() for lock in self._locks.values())
