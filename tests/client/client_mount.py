"""Everything of a mount but the kernel, joined to a real server over memory streams.

A call can be held before it is sent or after it was answered, and its reply can be lost: see `ScriptedSession`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyfuse3
import trio
from promisefs_client.data.contents import PageCache
from promisefs_client.data.filestore import FileStore
from promisefs_client.data.readahead import Readahead
from promisefs_client.errors import ServerUnavailable
from promisefs_client.fuse.kernel import KernelCaches
from promisefs_client.fuse.lock_handlers import CellLocks
from promisefs_client.identity.key import Key, Keyring
from promisefs_client.locks.lock_manager import LockManager
from promisefs_client.names.mount_points import MountPoints
from promisefs_client.names.namespace import Namespace
from promisefs_client.names.xattrs import Xattrs
from promisefs_client.network.callbacks import CallbackService
from promisefs_client.network.cell import Cell
from promisefs_client.network.clock import Clock
from promisefs_client.network.locator import Locator
from promisefs_client.network.servers import Server
from promisefs_client.network.session import ServerSession
from promisefs_client.rejects.keeper import RejectKeeper
from promisefs_client.rejects.quarantine import Quarantine
from promisefs_client.vnodes.vnode import Vnode
from promisefs_client.vnodes.vnode_table import KernelWork, VnodeTable
from promisefs_client.vnodes.volumes import Volumes
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.address import Address
from promisefs_protocol.connection import Piece
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import FetchStatus
from server_cell import Cell as ServerCell
from server_cell import Client, running_cell, settled

CACHE_BYTES = 16 << 20


class ScriptedSession(ServerSession):
    """A session whose calls, by type of request, tests hold up, lose or look at."""

    def script(self) -> None:
        self.sent: list[Any] = []
        self.hold_before: dict[type, trio.Event] = {}
        """A call of this type is sent when the event is set."""
        self.hold_after: dict[type, trio.Event] = {}
        """Its answer arrives when the event is set."""
        self.lose_reply: set[type] = set()
        """Carried out, but the answer never comes."""
        self.refuse: dict[type, AbortCode] = {}
        """Not carried out."""
        self.refuses: Callable[[Any], AbortCode | None] = lambda request: None
        """The same, for some of a type."""

    async def call(
        self, request: Any, bulk: Piece | None = None, timeout_s: float | None = None, key: Key | None = None
    ) -> tuple[Any, bytes | None]:
        kind = type(request)
        if kind in self.hold_before:
            await self.hold_before[kind].wait()
        self.sent.append(request)
        if kind in self.refuse:
            raise Aborted(self.refuse[kind], "refused by the test")
        if (code := self.refuses(request)) is not None:
            raise Aborted(code, "refused by the test")
        answer = await super().call(request, bulk, timeout_s, key)
        if kind in self.hold_after:
            await self.hold_after[kind].wait()
        if kind in self.lose_reply:
            raise ServerUnavailable("the test lost this reply")
        return answer

    def sent_of(self, kind: type) -> list[Any]:
        return [request for request in self.sent if type(request) is kind]


class RecordingNotifier:
    """Stands for /dev/fuse, which no test without a mount has: says what the kernel would have been told."""

    def __init__(self) -> None:
        self.dropped: list[KernelWork] = []
        self.bytes_shown: list[tuple[int, int, bytes]] = []
        self.asked: list[int] = []
        """Inodes whose attributes the kernel was made to ask for."""
        self.believed_size: int | None = None
        """What it then believes in; None: it cannot be made to."""
        self.drops_end = trio.Event()
        """Drops of pages return when it is set: else the kernel still waits for a READ or a writeback."""
        self.drops_end.set()
        self.stores_end = trio.Event()
        """The same for bytes put into its cache."""
        self.stores_end.set()

    def increment_epoch(self) -> bool:
        return True

    async def invalidate(self, items: Sequence[KernelWork]) -> list[KernelWork]:
        self.dropped += items
        if any(item.pages for item in items):
            await self.drops_end.wait()
        return []

    async def store(self, ino: int, offset: int, data: bytes) -> None:
        self.bytes_shown.append((ino, offset, data))
        await self.stores_end.wait()

    async def ask(self, ino: int, generation: int) -> int | None:
        self.asked.append(ino)
        return self.believed_size


class ClientMount:
    """One mount."""

    def __init__(self, server: ServerCell, ack_wait_s: float, timeout_s: float, now: Clock) -> None:
        self.server: ServerCell | None = server
        """Where it is reached; None: nowhere."""
        folder = server.server.store.folder
        self.rejects = folder.with_name(f"{folder.name}-rejects")
        """The directory of its quarantine."""
        self._now = now
        self.pages = PageCache(CACHE_BYTES)
        core = Server("memory")
        self.callbacks = CallbackService(core, ack_wait_s)
        self.kernel = RecordingNotifier()
        self.session = ScriptedSession(
            core,
            Address("memory", 0),
            os.urandom(16),
            "test",
            Keyring(0, self._local_token),
            timeout_s,
            self.callbacks.serve,
            self.callbacks.reset,
            self._dial_server,
            now,
        )
        self.session.script()
        self.cell: Cell
        self.files: FileStore
        self.names: Namespace
        self.mount_points: MountPoints
        self.locks: LockManager
        self.operations: CellLocks
        """Handlers, as the kernel would call them."""

    def _local_token(self, store: bytes, stream: trio.abc.Stream) -> bytes | None:
        return None if self.server is None else self.server.server_token()

    async def _dial_server(self, address: Address) -> trio.abc.Stream:
        if self.server is None:
            raise ConnectionRefusedError
        return await self.server.stream()

    async def connect(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.session.run)
        nursery.start_soon(self.session.watch_lease)
        volumes = Volumes()
        locator = Locator([self.session], volumes)
        volume = await locator.by_name("root")
        root, _ = await self.session.call(FetchStatus(volume.root))
        table = VnodeTable(self.pages, volumes, volume, root.entry.status, 100)
        kernel = KernelCaches(self.kernel, self._references)
        self.cell = self.callbacks.cell = Cell(
            {self.session.server: self.session}, locator, table, kernel, nursery, self._now
        )
        self.cell.kernel.initialised()
        table.names_can_be_dropped = True
        rejects = RejectKeeper(self.cell, Quarantine(self.rejects, "memory/root"), "memory/root")
        self.files = FileStore(self.cell, self.pages, self.session.timeout_s, rejects)
        self.names = Namespace(self.cell)
        self.mount_points = MountPoints(self.cell, self.names)
        self.locks = LockManager(self.cell, self.files)
        self.callbacks.on_lock_answers = self.locks.answered
        self.session.before_calls = partial(self.locks.reclaim, self.session.server)
        self.operations = CellLocks(
            self.cell, self.files, self.locks, self.names, self.mount_points, Xattrs(self.cell, "memory"), lambda: None
        )

    def _references(self, ino: int) -> int:
        vnode = self.table.by_ino(ino)
        return 0 if vnode is None else vnode.lookups

    @property
    def table(self) -> VnodeTable:
        return self.cell.table

    @property
    def root(self) -> Vnode:
        root = self.table.get(self.table.root_fid)
        assert root is not None
        return root

    async def open(self, name: bytes) -> Vnode:
        """Look a file up and open it, as the kernel would: it may have pages of it from now on."""
        vnode = await self.names.lookup(self.root, name)
        assert vnode is not None
        vnode = self.table.add_open(self.table.add_lookup(vnode))
        vnode.kernel_pages = True
        vnode.kernel_size.believes(vnode.size)
        return vnode

    async def open_handle(self, vnode: Vnode, flags: int) -> int:
        """OPEN of a file that the kernel knows. Return the handle, for `operations`."""
        info = await self.operations.open(vnode.ino, flags, pyfuse3.RequestContext())
        return int(info.fh)

    def drops_of_pages(self, vnode: Vnode) -> int:
        return sum(item.pages for item in self.kernel.dropped if item.ino == vnode.ino)

    def close(self, vnode: Vnode) -> None:
        self.cell.close_handle(vnode)
        self.files.released(vnode)

    async def read(self, vnode: Vnode, offset: int = 0, length: int = 1 << 20) -> bytes:
        return bytes(await self.files.read(vnode, offset, length, Readahead(0)))

    def check_invariants(self) -> None:
        self.table.check_invariants()
        self.pages.check_invariants()
        self.locks.check_invariants()
        for vnode in self.table:
            if vnode.contents is not None:
                vnode.contents.check_invariants()


class World:
    """A server and its mounts."""

    def __init__(self, server: ServerCell) -> None:
        self.server = server
        self.mounts: list[ClientMount] = []

    async def mount(
        self, *, ack_wait_s: float = 1.0, timeout_s: float = 30.0, now: Clock = trio.current_time
    ) -> ClientMount:
        mount = ClientMount(self.server, ack_wait_s, timeout_s, now)
        await mount.connect(self.server.nursery)
        self.mounts.append(mount)
        return mount


@asynccontextmanager
async def running_world(folder: Path) -> AsyncIterator[World]:
    async with running_cell(folder, clean=False) as server:
        world = World(server)
        yield world
        for mount in world.mounts:
            mount.check_invariants()


async def new_file(world: World, content: bytes) -> tuple[Client, Fid]:
    """Another mount, shown as the bare client it is to the server, and a file that it made."""
    other = await world.server.connected()
    made = await other.create(b"file")
    if content:
        await other.store(made.fid, content)
    return other, made.fid


__all__ = ["ClientMount", "World", "new_file", "running_world", "settled"]
