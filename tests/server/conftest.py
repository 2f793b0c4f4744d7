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
