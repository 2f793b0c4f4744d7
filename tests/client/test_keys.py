"""Under whose key a mount's calls go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
from client_mount import ClientMount, ScriptedSession, new_file, running_world
from promisefs_client.identity.key import Key, Keyring, UserToken, acting_with, current_key
from promisefs_protocol.messages import FetchData, Lookup, StoreData


class _Context(pyfuse3.RequestContext):
    """Of a process of this uid."""

    uid = 1234


@pytest.fixture
def keys_used(monkeypatch: pytest.MonkeyPatch) -> dict[type, Key]:
    """The key of the last call of each type."""
    used: dict[type, Key] = {}
    context_of = ScriptedSession._call_repeatedly

    async def noted(self: ScriptedSession, method: Any, request: Any, bulk: Any, key: Key) -> Any:
        used[type(request)] = key
        return await context_of(self, method, request, bulk, key)

    monkeypatch.setattr(ScriptedSession, "_call_repeatedly", noted)
    return used


async def opened_by(mount: ClientMount, uid: int) -> int:
    """Look the file up and open it. Return the handle."""
    store = mount.session.store
    assert store is not None and mount.server is not None
    mount.cell.keys.of(uid).local[store] = mount.server.server_token()
    context = _Context()
    context.uid = uid
    entry = await mount.operations.lookup(mount.root.ino, b"file", context)
    info = await mount.operations.open(entry.st_ino, os.O_RDWR, context)
    return int(info.fh)


async def test_calls_go_under_the_key_of_the_process_that_asks(tmp_path: Path, keys_used: dict[type, Key]) -> None:
    async with running_world(tmp_path) as world:
        await new_file(world, b"content")
        mount = await world.mount()
        await opened_by(mount, 1234)
        assert keys_used[Lookup] is mount.cell.keys.of(1234)
        assert current_key() is None


async def test_an_open_file_pins_the_key_of_its_opener(tmp_path: Path, keys_used: dict[type, Key]) -> None:
    async with running_world(tmp_path) as world:
        await new_file(world, b"content")
        mount = await world.mount()
        handle, other = await opened_by(mount, 1234), await opened_by(mount, 77)
        with acting_with(mount.cell.keys.of(99)):
            await mount.operations.read(handle, 0, 100)
            assert keys_used[FetchData] is mount.cell.keys.of(1234)
            await mount.operations.write(other, 0, b"changed")
            await mount.operations.fsync(other, False)
        assert keys_used[StoreData] is mount.cell.keys.of(77)


STORE, OTHER = b"s" * 16, b"o" * 16


def token_as(user: int, token: bytes = b"token") -> UserToken:
    return UserToken(token, user, f"user{user}", "serial", "host:1", 2**40)


def test_a_fresh_token_goes_into_the_key_and_another_user_is_another_key() -> None:
    keys = Keyring(0, lambda *_: None)
    keys.log_in(5, STORE, token_as(1, b"old"))
    alices = keys.of(5)
    keys.log_in(5, STORE, token_as(1, b"new"))
    assert keys.of(5) is alices and alices.token_for(STORE) == b"new"
    keys.log_in(5, STORE, token_as(2, b"bobs"))
    assert keys.of(5) is not alices
    assert alices.token_for(STORE) == b"new" and keys.of(5).token_for(STORE) == b"bobs"
    assert keys.of(6).token_for(STORE) is None and keys.of(5).token_for(OTHER) is None


def test_who_runs_a_server_is_that_unless_logged_in_and_again_after_logging_out() -> None:
    runs = [b"run 1", b"run 2"]
    keys = Keyring(0, lambda *_: runs[0])
    stream: Any = None
    keys.connected(STORE, stream, "host:1")
    before = keys.own
    keys.log_in(0, STORE, token_as(1))
    as_user = keys.own
    keys.log_out(0)
    assert as_user.token_for(STORE) is None, "not what was opened as the user"
    assert keys.own.token_for(STORE) == before.token_for(STORE) == b"run 1"
    del runs[0]
    keys.connected(STORE, stream, "host:1")
    assert keys.own.token_for(STORE) == before.token_for(STORE) == b"run 2"
    assert keys.log_out(0) == [] and before.token_for(STORE) == b"run 2"


def test_a_token_that_was_got_over_tls_is_not_sent_without() -> None:
    over_tls = token_as(1)._replace(tls=True)
    assert over_tls.may_go_to("host:1", True) and not over_tls.may_go_to("host:1", False)
    assert token_as(1).may_go_to("host:1", False) and token_as(1).may_go_to("host:1", True)
    keys = Keyring(0, lambda *_: None, lambda store: over_tls)
    stream: Any = None
    keys.connected(STORE, stream, "host:1")
    assert keys.own.token_for(STORE) is None


def test_a_saved_token_is_given_only_where_it_was_got() -> None:
    keys = Keyring(0, lambda *_: None, lambda store: token_as(1))
    stream: Any = None
    keys.connected(STORE, stream, "elsewhere:1")
    assert keys.own.token_for(STORE) is None
    keys.connected(STORE, stream, "host:1")
    assert keys.own.token_for(STORE) == b"token"


async def test_what_nobody_asked_for_goes_under_the_key_of_the_mount(
    tmp_path: Path, keys_used: dict[type, Key]
) -> None:
    async with running_world(tmp_path) as world:
        mount = await world.mount()
        assert set(keys_used.values()) == {mount.cell.keys.own}
