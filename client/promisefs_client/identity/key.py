"""Under whose credentials calls are made.

Every local user of a mount has a key: the tokens to present to servers, if there are any. A handler's calls go under
the key of the process that the kernel speaks for; an open file pins the key that it was opened with, since the kernel
does not say who reads and writes through it. What nobody asked for (promises that are renewed, say) goes under the
mount's own, if it has a token.

A fresh token for the same user goes into the key that there is, so what was opened under an expired one goes on.
Logging in as somebody else makes another key, and what is open keeps the old one: nothing is ever stored in the name
of somebody who did not write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from types import TracebackType
from typing import NamedTuple

import trio


class UserToken(NamedTuple):
    """What a server has given to somebody who logged in."""

    token: bytes
    user: int  # PT id
    name: str
    serial: str
    server: str  # the address that it was got from, and is given to
    expires_s: int
    tls: bool = False  # it was got over TLS, and goes nowhere else

    def may_go_to(self, address: str, tls: bool) -> bool:
        """Whether the server at that address, over TLS or not, may be given it."""
        return self.server == address and (tls or not self.tls)

    def __repr__(self) -> str:
        return f"UserToken(..., {self.name!r} at {self.server})"


class Credentials:
    """What a key's holder is to servers between two changes of its tokens. What servers say of their rights is kept by
    these, so it ends with them. Compared by identity."""

    __slots__ = ()


class Key:
    """The tokens of one local user. Compared by identity."""

    __slots__ = ("credentials", "expired", "local", "tokens", "uid")

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.credentials = Credentials()
        self.expired: frozenset[bytes] = frozenset()  # stores whose token has expired, as was seen last
        self.tokens: dict[bytes, UserToken] = {}  # by the server's store
        self.local: dict[bytes, bytes] = {}  # tokens of servers that this user runs on this machine

    def __repr__(self) -> str:
        return f"<key of uid {self.uid}>"

    def changed(self) -> None:
        """The holder may be somebody else to servers than before."""
        self.credentials = Credentials()

    def token_for(self, store: bytes) -> bytes | None:
        """Who has logged in is that user, also at a server of their own."""
        token = self.tokens.get(store)
        return self.local.get(store) if token is None else token.token


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


LocalToken = Callable[[bytes, trio.abc.Stream], bytes | None]
"""The token of a server on this machine that the mount's owner runs: of that store, at the end of that stream."""
SavedToken = Callable[[bytes], UserToken | None]
"""The token that the mount's owner has for a store from an earlier login."""


class Keyring:
    """The keys of a mount: one for each local user."""

    def __init__(self, owner: int, local_token: LocalToken, saved_token: SavedToken = lambda store: None) -> None:
        self._keys: dict[int, Key] = {}
        self._local_token = local_token
        self._saved_token = saved_token
        self.owner = owner
        self.own = self.of(owner)
        """The mount's own: that of whom its process runs as."""

    def of(self, uid: int) -> Key:
        key = self._keys.get(uid)
        if key is None:
            key = self._keys[uid] = Key(uid)
            if uid == self.owner:
                self.own = key
        return key

    def connected(self, store: bytes, stream: trio.abc.Stream, address: str) -> None:
        """A connection to a server begins: take what its owner has for it, as who runs it and as who has logged in."""
        saved = self._saved_token(store)
        if saved is not None and saved.may_go_to(address, isinstance(stream, trio.SSLStream)):
            self.log_in(self.owner, store, saved)
        token = self._local_token(store, stream)
        if token == self.own.local.get(store):
            return
        if token is None:
            del self.own.local[store]
        else:
            self.own.local[store] = token
        self.own.changed()

    def for_upkeep(self, store: bytes) -> Key:
        """Whose key to use for what nobody asked for: the mount's own, or if it has no token one that has."""
        if self.own.token_for(store) is not None:
            return self.own
        return next((key for key in self._keys.values() if key.token_for(store) is not None), self.own)

    # Logging in and out

    def log_in(self, uid: int, store: bytes, token: UserToken) -> None:
        """What is known of the rights of a key is of its user, so another user is another key."""
        key = self.of(uid)
        before = key.tokens.get(store)
        if before is None or before.user != token.user:
            key = self._replace(uid)
        key.tokens[store] = token
        key.changed()

    def log_out(self, uid: int) -> list[UserToken]:
        """Forget a user's tokens. What is open is not used in their name any more. Return them."""
        old = self.of(uid)
        gone = list(old.tokens.values())
        if gone:
            self._replace(uid).tokens.clear()
            old.tokens.clear()
            old.local = {}  # what was opened as somebody must not go on as whoever runs the server
            old.changed()
        return gone

    def note_expired(self, now_s: float) -> None:
        """See to it that nobody goes on by rights that an expired token has given; `now_s` since the epoch."""
        for key in self._keys.values():
            expired = frozenset(store for store, token in key.tokens.items() if token.expires_s <= now_s)
            if expired != key.expired:
                key.expired = expired
                key.changed()

    def _replace(self, uid: int) -> Key:
        old = self._keys.pop(uid)
        key = self.of(uid)
        key.tokens |= old.tokens
        key.local = old.local  # one for all, for each run of a server brings another token
        return key

    def all_tokens(self) -> Iterator[UserToken]:
        """Those of every local user."""
        return (token for key in self._keys.values() for token in key.tokens.values())

    def tokens_of(self, uid: int) -> Iterator[UserToken]:
        key = self._keys.get(uid)
        return iter(()) if key is None else iter(list(key.tokens.values()))
