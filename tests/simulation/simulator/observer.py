"""The end of a history: every mount, and one that has just been made, looks at everything; all must see the same.

First by the names that the history used, without listing: a listing tells the kernel anew what it may have wrong.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from .history import Call, History
from .layout import DIRECTORIES
from .plan import FILES, LOG, LOOK_BYTES, NAMES, Step
from .processes import Process

if TYPE_CHECKING:
    from .client_machine import ClientMachine
    from .run import Cell

PATHS = (*FILES, LOG, *NAMES)
FRESH = "fresh"
"""The name of the mount made at the end."""
_OBSERVERS = "/end"


async def observe_everything(cell: Cell) -> None:
    async with trio.open_nursery() as nursery:
        for machine in cell.clients:
            if machine.alive:
                nursery.start_soon(_observe, cell, machine)


async def _observe(cell: Cell, machine: ClientMachine) -> None:
    process = Process(f"{machine.name}{_OBSERVERS}", machine, cell.history)
    for path in PATHS:
        await process.perform(Step("stat", (path,), 0.0))
    for directory in DIRECTORIES:
        listing = await process.perform(Step("list", (directory,), 0.0))
        assert listing is not None
        for name in sorted(listing.result or ()):
            path = (*directory, name)
            await process.perform(Step("stat", (path,), 0.0))
            await process.perform(Step("reopen", (path, os.O_RDONLY), 0.0))
            await process.perform(Step("read", (0, LOOK_BYTES), 0.0))
            await process.perform(Step("close", (), 0.0))


def check_agreement(history: History) -> Iterator[str]:
    """What the observers saw must be what the fresh mount saw, which had nothing cached: nothing was going on."""
    told: dict[str, Call] = {}
    seen: dict[str, list[Call]] = defaultdict(list)
    for call in history.calls:
        if not call.process.endswith(_OBSERVERS) or call.kind == "close":
            continue
        subject = f"{call.kind} {call.ino if call.kind == 'read' else call.args[0]}"
        if call.client == FRESH:
            told.setdefault(subject, call)
        else:
            seen[subject].append(call)
    for subject, calls in seen.items():
        fresh = told.get(subject)
        for call in calls:
            if fresh is None or (call.result, call.error, call.ino) != (fresh.result, fresh.error, fresh.ino):
                yield f"apart: {call}, but a fresh mount: {fresh}"
