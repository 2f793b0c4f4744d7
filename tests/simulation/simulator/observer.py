"""The end of a history: every mount, and one that has just been made, looks at everything; the store is looked into."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from .plan import DIRECTORIES, LOOK_BYTES, Step
from .processes import Process

if TYPE_CHECKING:
    from .client_machine import ClientMachine
    from .run import Cell


async def observe_everything(cell: Cell) -> None:
    async with trio.open_nursery() as nursery:
        for machine in cell.clients:
            if machine.alive:
                nursery.start_soon(_observe, cell, machine)


async def _observe(cell: Cell, machine: ClientMachine) -> None:
    process = Process(f"{machine.name}/end", machine, cell.history)
    for directory in DIRECTORIES:
        listing = await process.perform(Step("list", (directory,), 0.0))
        assert listing is not None
        for name in sorted(listing.result or ()):
            path = (*directory, name)
            await process.perform(Step("stat", (path,), 0.0))
            await process.perform(Step("reopen", (path, os.O_RDONLY), 0.0))
            await process.perform(Step("read", (0, LOOK_BYTES), 0.0))
            await process.perform(Step("close", (), 0.0))
