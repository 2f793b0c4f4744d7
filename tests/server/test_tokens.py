"""Tokens, logins and passwords: the cores, and the calls as a hostile client makes them."""

from __future__ import annotations

import base64
import json
import logging
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.identity_messages import (
    MAX_TOKEN_BYTES,
    CreateUser,
    Examine,
    Forget,
    IssueToken,
    Login,
    Present,
    RevokeTokens,
    RotateKeys,
    SetDisabled,
    SetPassword,
)
from promisefs_protocol.messages import FetchStatus, Role
from promisefs_server.identity import contexts
from promisefs_server.identity.authority import LONGEST_LIFETIME_S
from promisefs_server.identity.login_limits import FORGOTTEN_AFTER_S, FREE, LONGEST_S, MAX_ENTRIES, LoginLimits
from promisefs_server.identity.tokens import Claims, SigningKey, sign, verify
from promisefs_server.service import Fileserver
from promisefs_server.store.store import Store
from server_cell import Cell, Client, TokenPeer, running_cell

KEY = SigningKey(3, b"k" * 32, None)
OLD_KEY = SigningKey(2, b"o" * 32, 2000)
CLAIMS = Claims(1001, "serial", 1000, 0, 0)


def code_of_verifying(token: bytes, now_s: float = 999.0, issuer: str = "store") -> AbortCode | None:
    try:
        verify({3: KEY, 2: OLD_KEY}, issuer, token, now_s)
    except Aborted as refusal:
        return AbortCode(refusal.code)
    return None


def with_payload(token: bytes, **changed: Any) -> bytes:
    """The same token saying something else, with its old signature."""
    head, payload, signature = token.split(b".")
    said = json.loads(base64.urlsafe_b64decode(payload + b"=="))
    new = base64.urlsafe_b64encode(json.dumps(said | changed).encode()).rstrip(b"=")
    return b".".join((head, new, signature))


def test_a_token_says_what_was_signed() -> None:
    token = sign(KEY, "store", CLAIMS)
    assert len(token) < MAX_TOKEN_BYTES
    assert verify({3: KEY}, "store", token, 999.9) == CLAIMS


def test_tokens_that_are_none_of_ours() -> None:
    token = sign(KEY, "store", CLAIMS)
    payload = {"iss": "store", "sub": "1", "jti": "x", "exp": 5000, "gen": 0, "run": 0}
    forged = [
        b"", b"x", b"...", token[:-1], token[:10], token + b"x", b"\xff" * 50, token * 20, b"." * MAX_TOKEN_BYTES,
        with_payload(token, sub="1"), with_payload(token, exp=10**9),
        sign(KEY._replace(secret=b"x" * 32), "store", CLAIMS),
        sign(KEY._replace(number=9), "store", CLAIMS),
        sign(KEY, "another store", CLAIMS),
        jwt.encode(payload, None, "none", headers={"kid": "3"}).encode(),
        jwt.encode(payload, KEY.secret * 2, "HS512", headers={"kid": "3"}).encode(),
        jwt.encode({"sub": "1"}, KEY.secret, "HS256", headers={"kid": "3"}).encode(),
        jwt.encode(payload | {"sub": "root"}, KEY.secret, "HS256", headers={"kid": "3"}).encode(),
        jwt.encode(payload, KEY.secret, "HS256", headers={"kid": "three"}).encode(),
        jwt.encode(payload, KEY.secret, "HS256").encode(),
    ]  # fmt: skip
    for token in forged:
        assert code_of_verifying(token) is AbortCode.KEYREJECTED, token[:60]


def test_tokens_and_keys_end() -> None:
    token = sign(KEY, "store", CLAIMS)
    assert code_of_verifying(token, 999.99) is None
    assert code_of_verifying(token, 1000) is AbortCode.KEYEXPIRED
    old = sign(OLD_KEY, "store", CLAIMS._replace(expires_s=10_000))
    assert code_of_verifying(old, 1999) is None
    assert code_of_verifying(old, 2000) is AbortCode.KEYREJECTED


def test_failed_logins_make_the_next_one_wait() -> None:
    limits = LoginLimits()
    for _ in range(FREE):
        assert limits.wait_s("alice", "host", 100.0) == 0
        limits.failed("alice", "host", 100.0)
    assert limits.wait_s("alice", "elsewhere", 100.0) > 0
    assert limits.wait_s("bob", "host", 100.0) > 0
    assert limits.wait_s("bob", "elsewhere", 100.0) == 0
    for _ in range(1000):
        limits.failed("alice", "host", 100.0)
    assert limits.wait_s("alice", "elsewhere", 100.0) == LONGEST_S
    assert limits.wait_s("alice", "elsewhere", 100.0 + FORGOTTEN_AFTER_S) == 0
    limits.succeeded("alice", "host")
    assert limits.wait_s("alice", "host", 100.0) == 0


def test_a_flood_of_logins_takes_no_more_room() -> None:
    limits = LoginLimits()
    for number in range(MAX_ENTRIES):
        limits.failed(f"user{number}", f"host{number}", float(number))
    assert len(limits) == MAX_ENTRIES


# Calls


async def user_of(cell: Cell, name: str, **options: Any) -> None:
    await cell.administer(CreateUser(name, options.get("number")))
    if "password" in options:
        await cell.administer(SetPassword(name, "", options["password"]))


async def token_of(cell: Cell, name: str, lifetime_s: int = 0) -> bytes:
    token: bytes = (await cell.administer(IssueToken(name, lifetime_s))).token
    return token


async def commands(cell: Cell) -> TokenPeer:
    """A connection for commands, without a token."""
    client = cell.client()
    peer = await client.open_peer()
    await peer.call(client.hello_as(Role.COMMANDS))
    return peer


async def code_of(peer: TokenPeer, request: Any, context: int | None = None) -> AbortCode | None:
    try:
        await peer.call(request, context=context)
    except Aborted as refusal:
        return AbortCode(refusal.code)
    return None


async def a_users_mount(cell: Cell, name: str) -> Client:
    """A mount whose calls go under the token of this user, who is made."""
    await user_of(cell, name)
    client = await cell.connected()
    await client.calls.present(await token_of(cell, name))
    return client


async def test_nobody_gets_anything_without_a_token(cell: Cell) -> None:
    client = await cell.connected()
    assert await code_of(client.calls, FetchStatus(client.root), context=0) is AbortCode.ACCES
    assert await code_of(client.calls, FetchStatus(client.root)) is None
    peer = await commands(cell)
    assert await code_of(peer, FetchStatus(client.root)) is AbortCode.NOT_INTRODUCED
    assert await code_of(peer, Examine("system:anyuser")) is AbortCode.ACCES
    assert await code_of(peer, IssueToken("anonymous", 0)) is AbortCode.ACCES


async def test_a_server_that_trusts_everybody(folder: Path) -> None:
    store = Store.open(folder, time.time_ns())
    server = Fileserver(store, trusts_everybody=True)
    assert server.registry.identity(contexts.Contexts(), 0).administrator
    with pytest.raises(Aborted):
        server.registry.identity(contexts.Contexts(), 1)
    server.registry.close()
    server.durability.close()
    store.close(clean=True)


async def test_logging_in(cell: Cell) -> None:
    await user_of(cell, "alice", password="correct horse")
    peer = await commands(cell)
    issued = (await peer.call(Login("alice", "correct horse", 0)))[0]
    assert (issued.name, issued.user) == ("alice", 1000)
    await peer.present(issued.token)
    assert (await peer.call(Examine("alice")))[0].entry.id == 1000
    assert "correct" not in repr(Login("alice", "correct horse", 0)) and issued.token.decode() not in repr(issued)


async def test_wrong_logins_are_all_refused_alike_and_then_slowed_down(cell: Cell) -> None:
    await user_of(cell, "alice", password="right")
    await user_of(cell, "service")
    peer = await commands(cell)
    refusals = set()
    for user in ("alice", "nobody", "service", "system:administrators"):
        with pytest.raises(Aborted) as refusal:
            await peer.call(Login(user, "wrong", 0))
        refusals.add((refusal.value.code, refusal.value.message))
    assert refusals == {(AbortCode.ACCES, "the user or the password is wrong")}
    for _ in range(FREE):
        await code_of(peer, Login("alice", "wrong", 0))
    assert await code_of(peer, Login("alice", "right", 0)) is AbortCode.TOO_MANY


async def test_logins_are_logged_and_counted(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    """Who tried and from where; never what with."""
    caplog.set_level(logging.INFO)
    await user_of(cell, "alice", password="right")
    peer = await commands(cell)
    assert await code_of(peer, Login("alice\n", "wrong", 0)) is AbortCode.ACCES
    await peer.call(Login("alice", "right", 0))
    refused, accepted = (record for record in caplog.records if hasattr(record, "event") and "log" in record.event)
    assert (refused.event, accepted.event) == ("login_refused", "login")  # type: ignore[attr-defined]
    assert "'alice\\n'" in refused.getMessage() and "alice has logged in from" in accepted.getMessage()
    assert "wrong" not in caplog.text and "right" not in caplog.text
    failures = (await cell.server.statistics.report())["call_latency"]["SEC.Login"]["failures"]
    assert failures == {"ACCES": 1}


async def test_a_context_belongs_to_its_connection(cell: Cell) -> None:
    first, other = await cell.connected(), await cell.client().connect()
    await first.calls.call(Forget(first.calls.context))
    assert await code_of(first.calls, FetchStatus(first.root)) is AbortCode.KEYREJECTED
    assert await code_of(other.calls, FetchStatus(first.root), context=other.calls.context + 1) is AbortCode.KEYREJECTED


async def test_contexts_are_bounded(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "MAX_CONTEXTS", 3)
    client = await cell.connected()
    token = cell.server_token()
    codes = [await code_of(client.calls, Present(token)) for _ in range(4)]
    assert codes == [None, None, AbortCode.TOO_MANY, AbortCode.TOO_MANY]


@pytest.mark.parametrize("how", ["all", "one", "disabled", "expired"])
async def test_a_token_ends_at_once_for_connections_that_use_it(
    cell: Cell, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await a_users_mount(cell, "alice")
    issued = await cell.administer(IssueToken("alice", 60))
    await client.calls.present(issued.token)
    assert await code_of(client.calls, Examine("alice")) is None
    code = AbortCode.KEYREVOKED
    if how == "all":
        await cell.administer(RevokeTokens("alice", None))
    elif how == "one":
        await cell.administer(RevokeTokens("alice", issued.serial))
    elif how == "disabled":
        await cell.administer(SetDisabled("alice", True))
    else:
        later = time.time() + 61
        monkeypatch.setattr(time, "time", lambda: later)
        code = AbortCode.KEYEXPIRED
    assert await code_of(client.calls, Examine("alice")) is code
    assert await code_of(client.calls, FetchStatus(client.root)) is code
    assert await code_of(client.calls, Present(issued.token)) is code


async def test_what_ends_rights_ends_what_clients_cached(cell: Cell) -> None:
    client = await a_users_mount(cell, "alice")
    before = client.inits
    await cell.administer(RevokeTokens("alice", None))
    assert client.inits == before + 1


async def test_keys_are_rotated_without_anybody_having_to_log_in(cell: Cell) -> None:
    client = await a_users_mount(cell, "alice")
    old = await token_of(cell, "alice")
    for _ in range(3):
        await cell.administer(RotateKeys())
    assert await code_of(client.calls, Present(old)) is None
    assert await code_of(client.calls, Present(await token_of(cell, "alice"))) is None
    assert await code_of(client.calls, RotateKeys()) is AbortCode.ACCES


async def test_users_set_their_own_passwords_only(cell: Cell) -> None:
    await user_of(cell, "alice", password="old")
    await user_of(cell, "bob", password="bobs")
    peer = await commands(cell)
    await peer.present(await token_of(cell, "alice"))
    assert await code_of(peer, SetPassword("bob", "", "new")) is AbortCode.ACCES
    assert await code_of(peer, SetPassword("alice", "wrong", "new")) is AbortCode.ACCES
    assert await code_of(peer, SetPassword("alice", "old", "new")) is None
    assert await code_of(peer, Login("alice", "new", 0)) is None
    assert await code_of(peer, RevokeTokens("bob", None)) is AbortCode.ACCES


async def test_a_token_of_an_earlier_run_of_the_server_is_over(folder: Path) -> None:
    async with running_cell(folder) as cell:
        token = cell.server_token()
        await user_of(cell, "alice")
        alices = await token_of(cell, "alice", LONGEST_LIFETIME_S)
    async with running_cell(folder) as cell:
        peer = await commands(cell)
        assert await code_of(peer, Present(token)) is AbortCode.KEYEXPIRED
        assert await code_of(peer, Present(alices)) is None


async def test_a_store_keeps_its_secrets_to_its_owner(cell: Cell) -> None:
    await user_of(cell, "alice", password="correct horse")
    folder = cell.server.store.folder
    for name in ("identity.sqlite", "identity.sqlite-wal", "identity.sqlite-shm"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600, name
        assert b"correct horse" not in (folder / name).read_bytes()
    await trio.lowlevel.checkpoint()
