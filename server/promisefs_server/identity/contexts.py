"""The tokens that were presented on one connection, by the numbers that its calls name them with."""

from __future__ import annotations

from promisefs_protocol.abort import AbortCode, Aborted

from .tokens import Claims

MAX_CONTEXTS = 4096
"""Of one connection: users of one mount with a token."""


class Contexts:
    def __init__(self) -> None:
        self._claims: dict[int, Claims] = {}
        self._last = 0

    def add(self, claims: Claims) -> int:
        """Abort TOO_MANY at MAX_CONTEXTS."""
        if len(self._claims) >= MAX_CONTEXTS:
            raise Aborted(AbortCode.TOO_MANY, f"{MAX_CONTEXTS} tokens were presented on this connection")
        self._last += 1
        self._claims[self._last] = claims
        return self._last

    def forget(self, context: int) -> None:
        self._claims.pop(context, None)

    def claims(self, context: int) -> Claims:
        """Abort KEYREJECTED."""
        claims = self._claims.get(context)
        if claims is None:
            raise Aborted(AbortCode.KEYREJECTED, f"this connection has no context {context}")
        return claims
