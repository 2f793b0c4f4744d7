"""Under whose credentials calls are made.

Every local user of a mount has a key: the token to present to servers, if there is one. A handler's calls go under the
key of the process that the kernel speaks for; an open file pins the key that it was opened with, since the kernel does
not say who reads and writes through it. What nobody asked for (promises that are renewed, say) goes under the mount's
own.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from types import TracebackType


class Key:
    """The credentials of one local user. Compared by identity: whoever has another token has another key."""

    __slots__ = ("uid",)

    def __init__(self, uid: int) -> None:
        self.uid = uid

    def __repr__(self) -> str:
        return f"<key of uid {self.uid}>"


_current: ContextVar[Key | None] = ContextVar("key", default=None)


def current_key() -> Key | None:
    """The key of whoever this task works for; None if that is nobody but the mount itself."""
    return _current.get()


def act_with(key: Key) -> None:
    """From here on this task, and tasks that it starts, work for the holder of this key. Inside `acting_with` only."""
    _current.set(key)


class acting_with:
    """Context manager: what this task does, and tasks that it starts, is done for the holder of this key."""

    __slots__ = ("_key", "_token")

    _token: Token[Key | None]

    def __init__(self, key: Key | None) -> None:
        self._key = key

    def __enter__(self) -> None:
        self._token = _current.set(self._key)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.reset(self._token)


class Keyring:
    """The keys of a mount: one for each local user."""

    def __init__(self, owner: int) -> None:
        self._keys: dict[int, Key] = {}
        self.own = self.of(owner)
        """The mount's own: that of whom its process runs as."""

    def of(self, uid: int) -> Key:
        key = self._keys.get(uid)
        if key is None:
            key = self._keys[uid] = Key(uid)
        return key
