"""Gives tokens, checks them at every call, revokes them; keeps the keys that they are signed with.

A call names a context, and that stands for a token that was checked when it was presented. At each call what can have
changed since is looked at again, in constant time (`check`): has it expired, was it or its user revoked, who is the
user now. So a revocation counts from the next call on.

Keys. One signs. `rotate` makes another one, and the old one goes on verifying until the last token that it may have
signed has expired. Nothing has to be stopped, and nobody has to log in again.
"""

from __future__ import annotations

import os
import secrets

from promisefs_protocol.abort import AbortCode, Aborted

from .identity import SERVER_USER, Identity
from .identity_file import IdentityFile
from .principals import Principals, Record
from .tokens import SECRET_BYTES, Claims, SigningKey, check_expiry, sign, verify

DEFAULT_LIFETIME_S = 10 * 3600
"""A working day. As long as AFS's."""
LONGEST_LOGIN_S = 30 * 86400
"""Of a token that was got with a password."""
LONGEST_LIFETIME_S = 366 * 86400
"""Of any other: no token but the server's own is good for longer, so nothing about it has to be kept for longer."""
FOR_EVER_S = 2**40
"""When a token ends that ends with the run of the server."""


class Authority:
    def __init__(self, file: IdentityFile, principals: Principals, issuer: str, run: int) -> None:
        """`issuer` names the store, `run` this run of the server. Raise sqlite3.Error."""
        self._file = file
        self._principals = principals
        self._issuer = issuer
        self._run = run
        self._keys: dict[int, SigningKey] = {}
        self._load_keys()
        if not self._keys:
            self._new_key()
        self._revoked: dict[str, int] = dict(file.rows("SELECT serial, expires_s FROM revoked"))

    # Tokens

    def issue(self, user: Record, lifetime_s: int, now_s: float) -> tuple[bytes, Claims]:
        """`lifetime_s` 0: the usual one. Abort KEYREVOKED if the user is disabled."""
        self._principals.identity(user.id)
        lifetime_s = min(lifetime_s or DEFAULT_LIFETIME_S, LONGEST_LIFETIME_S)
        claims = Claims(user.id, secrets.token_hex(8), int(now_s) + lifetime_s, user.generation, 0)
        return sign(self._signing_key, self._issuer, claims), claims

    def server_token(self) -> bytes:
        """That of whoever runs the server: good until this run ends."""
        claims = Claims(SERVER_USER, secrets.token_hex(8), FOR_EVER_S, 0, self._run)
        return sign(self._signing_key, self._issuer, claims)

    def accept(self, token: bytes, now_s: float) -> Claims:
        """A token that is presented. Abort KEYREJECTED, KEYEXPIRED, KEYREVOKED."""
        claims = verify(self._keys, self._issuer, token, now_s)
        self.check(claims, now_s)
        return claims

    def check(self, claims: Claims, now_s: float) -> Identity:
        """Who the holder of an accepted token is now. Abort KEYEXPIRED, KEYREVOKED."""
        check_expiry(claims, now_s)
        if claims.user == SERVER_USER:
            if claims.run != self._run:
                raise Aborted(AbortCode.KEYEXPIRED, "the token is of an earlier run of the server")
        else:
            record = self._principals.by_id(claims.user)
            if claims.serial in self._revoked or record is None or record.generation != claims.generation:
                raise Aborted(AbortCode.KEYREVOKED, "the token was revoked: log in again")
        return self._principals.identity(claims.user)

    def revoke(self, user: Record, serial: str | None, now_s: float) -> None:
        """One token of a user, known by its serial number to who was given it; or all."""
        if serial is None:
            self._principals.next_generation(user.id)
            return
        self._prune(now_s)
        expires_s = int(now_s) + LONGEST_LIFETIME_S
        with self._file.transaction():
            self._file.execute("INSERT OR REPLACE INTO revoked VALUES (?, ?)", (serial, expires_s))
        self._revoked[serial] = expires_s

    def _prune(self, now_s: float) -> None:
        with self._file.transaction():
            self._file.execute("DELETE FROM revoked WHERE expires_s <= ?", (int(now_s),))
            self._file.execute("DELETE FROM signing_keys WHERE verify_until_s <= ?", (int(now_s),))
        self._revoked = {serial: expires_s for serial, expires_s in self._revoked.items() if expires_s > now_s}

    # Keys

    @property
    def _signing_key(self) -> SigningKey:
        return self._keys[max(self._keys)]

    def rotate(self, now_s: float) -> None:
        self._prune(now_s)
        with self._file.transaction():
            self._file.execute(
                "UPDATE signing_keys SET verify_until_s = ? WHERE verify_until_s IS NULL",
                (int(now_s) + LONGEST_LIFETIME_S,),
            )
            self._insert_key(max(self._keys) + 1)
        self._load_keys()

    def _new_key(self) -> None:
        with self._file.transaction():
            self._insert_key(1)
        self._load_keys()

    def _insert_key(self, number: int) -> None:
        self._file.execute("INSERT INTO signing_keys VALUES (?, ?, NULL)", (number, os.urandom(SECRET_BYTES)))

    def _load_keys(self) -> None:
        rows = self._file.rows("SELECT number, secret, verify_until_s FROM signing_keys")
        self._keys = {row[0]: SigningKey(*row) for row in rows}
