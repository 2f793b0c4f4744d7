"""Fixtures: a store's folder, a running server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from server_cell import Cell, running_cell


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
async def cell(folder: Path) -> AsyncIterator[Cell]:
    async with running_cell(folder) as running:
        yield running
        running.server.promises.check_invariants()


@pytest.fixture(autouse=True)
def no_pause_at_the_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the test moves would never end the pause."""
    if "mock_clock" in request.fixturenames:
        monkeypatch.setattr("promisefs_server.service.FLUSH_S", 0)
