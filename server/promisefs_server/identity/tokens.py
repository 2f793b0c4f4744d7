"""Tokens: what is in them, signing, checking. Core: no I/O; the time is an argument.

A token is a JSON Web Token (RFC 7519), signed with HMAC-SHA-256: only servers that have the key, which are those that
gave the token, have to check it. `kid` says which key.

    iss  the store that it is for: another server's token is rejected, whatever its key
    sub  PT id of the user; 0 for whoever runs the server
    jti  serial number
    exp  when it ends, by the server's clock
    gen  the user's generation when it was given; all older tokens are revoked by raising that
    run  of the server's own tokens: at which run of the server it is good
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jwt
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.identity_messages import MAX_TOKEN_BYTES

ALGORITHM = "HS256"
SECRET_BYTES = 32


class Claims(NamedTuple):
    user: int
    serial: str
    expires_s: int
    generation: int
    run: int  # 0: at every run


class SigningKey(NamedTuple):
    number: int
    secret: bytes
    verify_until_s: int | None  # None: it signs

    def __repr__(self) -> str:
        return f"SigningKey({self.number}, ...)"


def sign(key: SigningKey, issuer: str, claims: Claims) -> bytes:
    payload = {
        "iss": issuer,
        "sub": str(claims.user),
        "jti": claims.serial,
        "exp": claims.expires_s,
        "gen": claims.generation,
        "run": claims.run,
    }
    return jwt.encode(payload, key.secret, ALGORITHM, headers={"kid": str(key.number)}).encode()


def verify(keys: Mapping[int, SigningKey], issuer: str, token: bytes, now_s: float) -> Claims:
    """What a token says. Abort KEYREJECTED if it is none of ours, KEYEXPIRED."""
    if len(token) > MAX_TOKEN_BYTES:
        raise Aborted(AbortCode.KEYREJECTED, "that is no token")
    try:
        key = keys.get(int(jwt.get_unverified_header(token).get("kid", "-1")))
        if key is None or (key.verify_until_s is not None and key.verify_until_s <= now_s):
            raise Aborted(AbortCode.KEYREJECTED, "the token was signed with a key that is not known here")
        said = jwt.decode(
            token,
            key.secret,
            algorithms=[ALGORITHM],
            issuer=issuer,
            options={"require": ["iss", "sub", "jti", "exp"], "verify_exp": False, "verify_iat": False},
        )
        claims = Claims(int(said["sub"]), str(said["jti"]), int(said["exp"]), int(said["gen"]), int(said["run"]))
    except (jwt.InvalidTokenError, ValueError, KeyError, TypeError, RecursionError):
        raise Aborted(AbortCode.KEYREJECTED, "the token was not made by this server") from None
    check_expiry(claims, now_s)
    return claims


def check_expiry(claims: Claims, now_s: float) -> None:
    if claims.expires_s <= now_s:
        raise Aborted(AbortCode.KEYEXPIRED, "the token has expired: log in again")
