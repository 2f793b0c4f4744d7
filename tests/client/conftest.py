"""Fixtures: mounts without a kernel, joined to a real server in the test's own process."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from client_mount import ClientMount, World, running_world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running_world(tmp_path / "store") as running:
        yield running


@pytest.fixture
async def mount(world: World) -> ClientMount:
    return await world.mount()
