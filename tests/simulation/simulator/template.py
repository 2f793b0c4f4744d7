"""The stores that a history begins with, one for each server: made once for each layout by a real cell, then copied."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import trio
from promisefs_client.control.fs_commands import FsCommands
from promisefs_server.store.store import Store

from .client_machine import ClientMachine
from .history import History
from .layout import DIRECTORIES, ROOT, Layout
from .layout import Path as CellPath
from .network import Network
from .plan import FILE_BYTES, FILES, LOG
from .server_machine import ServerMachine, membership_of
from .world import World, simulated

MEMORY = Path("/dev/shm")
AGE_NS = 3600 * 10**9
"""How long before a history its stores were made."""


@dataclass(frozen=True)
class Template:
    folder: Path
    """Has a folder for each server."""
    initial: dict[CellPath, int]
    """The inode numbers that clients give to what is there."""

    def copy(self, server: str, to: Path) -> None:
        """Make a server's store."""
        shutil.copytree(self.folder / server / "0", to, ignore=shutil.ignore_patterns("lock", "*-shm"))


def scratch_folder(prefix: str) -> Path:
    """A new folder, in memory where that is possible."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=MEMORY if MEMORY.is_dir() else None))


@functools.cache
def template(layout: Layout) -> Template:
    """The first call makes it: call it while no history runs, whose chances it would change."""
    made = Template(scratch_folder("simulation-template-"), {})
    weakref.finalize(template, shutil.rmtree, made.folder, ignore_errors=True)
    with simulated(0) as world:
        world.wall_offset_ns = -AGE_NS
        for number, name in enumerate(layout.names):
            _make_store(made.folder / name, layout, number)
        trio.run(_fill, world, layout, made, clock=world.clock)
    return made


def _make_store(folder: Path, layout: Layout, number: int) -> None:
    folder.mkdir()
    store = Store.open(folder / "0", time.time_ns(), membership_of(layout, number))
    for name in layout.volumes_of(number):
        store.volumes.create(name, 0, 0, time.time_ns())
    store.close(clean=True)


async def _fill(world: World, layout: Layout, template: Template) -> None:
    """Have a client make what every history begins with."""
    async with trio.open_nursery() as nursery:
        network = Network(world)
        servers = [
            ServerMachine(number, layout, template.folder / name, network, nursery, lease_s=3.0)
            for number, name in enumerate(layout.names)
        ]
        for server in servers:
            await server.start()
        client = ClientMachine("template", network, History(world), nursery, layout.source, timeout_s=8.0, rate=1.0)
        await client.start()
        await _make_files(client, layout, template.initial)
        await client.unmount()
        for server in servers:
            await server.stop()
        nursery.cancel_scope.cancel()


async def _make_files(client: ClientMachine, layout: Layout, initial: dict[CellPath, int]) -> None:
    commands = FsCommands(client.mount_points)
    for path, home in zip(DIRECTORIES, layout.homes, strict=True):
        if home.volume == ROOT:
            await client.names.mkdir(path)
        else:
            await commands.mkmount({"path": os.fsdecode(b"/".join(path)), "volume": home.volume})
    for path in (*FILES, LOG):
        file = await client.names.open(path, os.O_RDWR | os.O_CREAT)
        if path != LOG:
            await client.names.truncate(file, FILE_BYTES)
        client.names.put(file)
    for path in (*DIRECTORIES, *FILES, LOG):
        initial[path] = (await client.names.stat(path)).ino
