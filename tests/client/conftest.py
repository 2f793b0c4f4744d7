"""Fixtures: mounts without a kernel, joined to a real server in the test's own process."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from client_mount import ClientMount, World, running_world


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with running_world(tmp_path / "store") as running:

        async def connect(host: str, port: int) -> trio.abc.Stream:
            return await running.server.stream()

        monkeypatch.setattr("promisefs_client.session.connect", connect)
        yield running


@pytest.fixture
async def mount(world: World) -> ClientMount:
    return await world.mount()
