"""Passwords: hashed with Argon2id, in threads, since a hash takes tens of milliseconds and 64 MiB by design."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import trio
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from promisefs_protocol.abort import AbortCode, Aborted

R = TypeVar("R")

MAX_HASHING = 2
"""Hashes computed at a time."""
MAX_WAITING = 32
"""Logins that may wait for that; further ones are refused."""


class Passwords:
    def __init__(self) -> None:
        self._hasher = PasswordHasher()
        self._limiter = trio.CapacityLimiter(MAX_HASHING)
        self._waiting = 0

    async def hashed(self, password: str) -> str:
        return await self._in_thread(self._hasher.hash, password)

    async def matches(self, password: str, hashed: str | None) -> bool:
        """Whether it is the password; takes as long if there is none to compare with."""
        return await self._in_thread(self._matches, password, hashed) and hashed is not None

    def _matches(self, password: str, hashed: str | None) -> bool:
        try:
            return self._hasher.verify(_nobodys(self._hasher) if hashed is None else hashed, password)
        except (VerificationError, InvalidHashError):
            return False

    async def _in_thread(self, function: Callable[..., R], *args: object) -> R:
        if self._waiting >= MAX_WAITING:
            raise Aborted(AbortCode.TOO_MANY, "too many people are logging in: try again")
        self._waiting += 1
        try:
            return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)
        finally:
            self._waiting -= 1


@functools.cache
def _nobodys(hasher: PasswordHasher) -> str:
    """A hash that nobody's password is compared with but by chance."""
    return hasher.hash("nobody's")
