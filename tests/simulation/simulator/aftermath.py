"""The end of G7: what was removed and closed everywhere is gone from the stores, and only that.

While clients are still mounted a removed file is kept only for those that crashed: the server cannot know that they are
gone. When the others have unmounted and a day has passed, nothing is left of any client.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio
from promisefs_server.promises.hosts import FORGOTTEN_AFTER_S
from promisefs_server.service import Fileserver
from promisefs_server.store.store import Store
from promisefs_server.store.volumes import VolumeState

if TYPE_CHECKING:
    from .run import Cell

LONGEST_TELLING_S = 60.0
"""Until then every client has told of what was closed, and servers have heard it."""
POLL_S = 0.5


async def leave_nothing(cell: Cell) -> list[str]:
    """Have everybody leave. Return what is wrong with the stores then."""
    alive = [client for client in cell.clients if client.alive]
    servers = [machine.server for machine in cell.servers if machine.server is not None]
    names = {client.name for client in alive}
    with trio.move_on_after(LONGEST_TELLING_S):
        while any(len(c.cell.closings) or len(c.cell.table.open_mmaps) for c in alive) or _kept_for(servers, names):  # noqa: ASYNC110 (simulated)
            await trio.sleep(POLL_S)
    problems = [f"kept: {kept}" for kept in _kept_for(servers, names)]
    for client in alive:
        await client.unmount()
    await trio.sleep(cell.plan.lease_s + 1.0)
    for server in servers:
        server.note_silence(FORGOTTEN_AFTER_S)
        await server.deletions.finish()
        problems += [f"left: {text}" for text in _remains(server.store)]
    return problems


def _kept_for(servers: list[Fileserver], clients: set[str]) -> list[str]:
    """Removed files that are kept for these clients."""
    return [
        f"removed file {vnode:x} for {client}, which has closed everything"
        for server in servers
        for vnode, client in server.store.database.rows(
            "SELECT vnode, description FROM orphan_holders JOIN hosts USING (host)"
        )
        if client in clients
    ]


def _remains(store: Store) -> Iterator[str]:
    """What should not be there: nobody uses the store any more."""
    database = store.database
    for table in ("hosts", "orphan_holders", "replies"):
        if count := len(list(database.rows(f"SELECT 1 FROM {table}"))):
            yield f"{count} rows of {table}"
    entries = list(database.rows("SELECT directory, vnode FROM entries"))
    names: dict[int, int] = {}
    for _, vnode in entries:
        names[vnode] = names.get(vnode, 0) + 1
    reached: set[int] = set()
    new = {volume.root for volume in store.volumes.in_state(VolumeState.HERE)}
    while new:
        reached |= new
        new = {vnode for directory, vnode in entries if directory in new} - reached
    files = set()
    for vnode, mode, nlink in database.rows("SELECT vnode, mode, nlink FROM vnodes"):
        if vnode not in reached:
            yield f"vnode {vnode:x}, which has no name"
        if stat.S_ISREG(mode):
            files.add(vnode)
            if nlink != names.get(vnode, 0):
                yield f"vnode {vnode:x} has {names.get(vnode, 0)} names, and says {nlink}"
    for folder in store.files.folders():
        for key in store.files.keys_in(folder):
            if key not in files:
                yield f"data file {store.files.path(key).name} of a vnode that is gone"
