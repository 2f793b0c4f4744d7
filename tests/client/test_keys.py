"""Under whose key a mount's calls go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
from client_mount import ClientMount, ScriptedSession, new_file, running_world
from promisefs_client.identity.key import Key, acting_with, current_key
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


async def test_what_nobody_asked_for_goes_under_the_key_of_the_mount(
    tmp_path: Path, keys_used: dict[type, Key]
) -> None:
    async with running_world(tmp_path) as world:
        mount = await world.mount()
        assert set(keys_used.values()) == {mount.cell.keys.own}
