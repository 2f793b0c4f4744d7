"""A client's machine: a real client, put together as `mount` does it, under a model kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
from promisefs_client.data.contents import PageCache
from promisefs_client.data.filestore import FileStore
from promisefs_client.fuse.kernel import KernelCaches
from promisefs_client.fuse.range_handlers import RangeHandlers
from promisefs_client.identity.key import Key
from promisefs_client.locks.lock_manager import LockManager
from promisefs_client.names.mount_points import MountPoints
from promisefs_client.names.namespace import Namespace
from promisefs_client.names.xattrs import Xattrs
from promisefs_client.network.cell import Cell
from promisefs_client.network.connections import Connections
from promisefs_client.network.session import ServerSession
from promisefs_client.options import MountOptions, Source
from promisefs_client.rejects.keeper import Event, Piece, RejectKeeper
from promisefs_client.rejects.quarantine import Quarantine
from promisefs_client.vnodes.vnode import Vnode, ino_of
from promisefs_client.vnodes.vnode_table import KernelWork, VnodeTable
from promisefs_protocol.abort import Aborted
from promisefs_protocol.address import Address
from promisefs_protocol.messages import CallBack, InitCallBackState3

from .history import History
from .kernel_inodes import KernelCore
from .kernel_names import DentryCacheModel
from .kernel_pages import PageCacheModel
from .network import Network

if TYPE_CHECKING:
    from .plan import Step
    from .processes import Process


class KeptInMemory(RejectKeeper):
    """The quarantine of one machine. It takes a moment, as a disk does, but no thread."""

    def __init__(self, cell: Cell, note: Callable[[int, int, bytes], None]) -> None:
        """`note` is told of the inode, the offset, and the bytes that are kept."""
        super().__init__(cell, Quarantine(Path("/nonexistent"), "simulated"), "simulated")
        self._note = note

    async def keep(self, vnode: Vnode, event: Event, pieces: Sequence[Piece], key: Key | None, why: Aborted) -> None:
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
        for offset, data in pieces:
            self._note(vnode.ino, offset, bytes(data))


class _Notifier:
    """`kernel.Notifier` for the model kernel."""

    core: KernelCore
    pages: PageCacheModel

    def __init__(self, dropped: Callable[[int], None]) -> None:
        """`dropped` is told the inodes whose pages are dropped."""
        self._dropped = dropped

    def increment_epoch(self) -> bool:
        self.core.epoch += 1
        return True

    async def invalidate(self, items: Sequence[KernelWork]) -> list[KernelWork]:
        for item in items:
            if item.pages:
                self._dropped(item.ino)
        await self.core.pace.pause()
        unknown = await self.pages.notify_invalidate(items)
        await self.core.pace.pause()
        return unknown

    async def store(self, ino: int, offset: int, data: bytes) -> None:
        await self.core.pace.pause()
        await self.pages.notify_store(ino, offset, data)

    async def ask(self, ino: int, generation: int) -> int | None:
        await self.core.pace.pause()
        inode = self.core.inodes.get(ino)
        if inode is None:
            return None
        inode.busy += 1
        try:
            await self.core.ask_attributes(inode)
            return inode.size
        except OSError:
            return None
        finally:
            inode.busy -= 1


class ClientMachine:
    """One mount. `start` it; then `names` and `pages` are its system calls; `crash` ends it without a word."""

    def __init__(
        self,
        name: str,
        network: Network,
        history: History,
        nursery: trio.Nursery,
        source: Source,
        timeout_s: float,
        rate: float,
    ) -> None:
        """It mounts `source`. `rate`: how fast its clock runs."""
        self.name = name
        self.world = network.world
        self.alive = False
        self._history = history
        self._network = network
        self._parent = nursery
        self._source = source
        self._options = MountOptions(1 << 24, timeout_s, max_idle=10_000)
        self._rate = rate
        self._scope = trio.CancelScope()
        self.nursery: trio.Nursery
        """Everything of the machine's runs in it, processes too."""
        self.core: KernelCore
        self.pages: PageCacheModel
        self.names: DentryCacheModel
        self.cell: Cell
        self.files: FileStore
        self.rejects: KeptInMemory
        self.mount_points: MountPoints
        self.connections: Connections
        self.cache: PageCache

    async def start(self) -> None:
        """Mount; return when it is ready. Raise what mounting raises."""
        await self._parent.start(self._run)
        self.alive = True

    def now(self) -> float:
        """The machine's clock."""
        return self.world.now_s * self._rate

    @property
    def calm(self) -> bool:
        """It is connected, and nothing is left that it could not store before."""
        connected = all(session.connected for session in self.connections.sessions.values())
        return connected and not self.files.dirty_files

    def crash(self) -> None:
        """The machine is gone, with all that its kernel and its processes knew."""
        self.alive = False
        self._network.client_gone(self.name)
        self._scope.cancel()

    async def unmount(self) -> None:
        """End in good order; everything has been closed and stored."""
        self.alive = False
        await self.connections.say_goodbye()
        self._scope.cancel()

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                await self._mount(nursery)
                task_status.started()
                await trio.sleep_forever()

    async def _mount(self, nursery: trio.Nursery) -> None:
        """As Mount._connect and Mount._serve."""
        self.cache = PageCache(self._options.cache_bytes)
        dial = self._network.dialler(self.name)

        async def connect(address: Address) -> trio.abc.Stream:
            return await dial(address.host)

        def local_token(store: bytes, stream: trio.abc.Stream) -> bytes | None:
            return self._network.local_tokens.get(store)

        self.connections = connections = Connections(
            self._source, self._options, self.name, connect, self.now, local_token
        )
        for number, session in enumerate(connections.sessions.values()):
            self._note_what_ends(number, session)
        await connections.open(nursery)
        volume, root = await connections.find_root()
        table = VnodeTable(self.cache, connections.volumes, volume, root, self._options.max_idle)

        def references(ino: int) -> int:
            vnode = table.by_ino(ino)
            return 0 if vnode is None else vnode.lookups

        notifier = _Notifier(self._note_drop)
        kernel = KernelCaches(notifier, references)
        self.cell = cell = Cell(connections.sessions, connections.locator, table, kernel, nursery, self.now)
        self.rejects = KeptInMemory(cell, partial(self._history.keeps, self.name))
        self.files = FileStore(cell, self.cache, self._options.timeout_s, self.rejects)
        names = Namespace(cell)
        self.mount_points = MountPoints(cell, names)
        locks = LockManager(cell, self.files)
        operations = RangeHandlers(
            cell, self.files, locks, names, self.mount_points, Xattrs(cell, "simulated"), lambda: None
        )
        self.core = notifier.core = KernelCore(self.world, self.now, operations, nursery)
        self.pages = notifier.pages = PageCacheModel(self.core)
        self.names = DentryCacheModel(self.core, self.pages)
        connections.attach(cell, locks)
        cell.kernel.initialised()
        table.names_can_be_dropped = cell.kernel.has_epochs
        for server in connections.sessions:
            nursery.start_soon(cell.renew_promises, server)
            nursery.start_soon(self.files.store_in_time, server)

    def _note_drop(self, ino: int) -> None:
        if self.alive:  # what its daemon begins while it is being ended reaches no kernel
            self._history.dropped(self.name, ino)

    def _note_what_ends(self, number: int, session: ServerSession) -> None:
        """Have the history know when promises of server `number` end here. Before it is met there are none."""
        serve, lease_lost = session._on_callback, session._on_lease_lost

        def noted_serve(request: Any, bulk: bytes | None, context: int) -> Any:
            if isinstance(request, CallBack):
                inos = tuple(ino_of(item.fid) for item in request.breaks)
                self._history.promises_end(self.name, number, inos)
            elif isinstance(request, InitCallBackState3) and session.connects:
                self._history.promises_end(self.name, number, None)
            return serve(request, bulk, context)

        async def noted_lease_lost() -> None:
            self._history.promises_end(self.name, number, None)
            await lease_lost()

        session._on_callback, session._on_lease_lost = noted_serve, noted_lease_lost

    def check_invariants(self) -> None:
        """Assert what must hold between any two steps."""
        self.cell.table.check_invariants()
        self.connections.volumes.check_invariants()
        self.cache.check_invariants()
        for vnode in self.cell.table:
            if vnode.contents is not None:
                vnode.contents.check_invariants()

    async def run_process(self, process: Process, steps: tuple[Step, ...]) -> None:
        """Run a process to its end, or to the machine's."""
        done = trio.Event()

        async def run() -> None:
            try:
                await process.run(steps)
            finally:
                done.set()

        self.nursery.start_soon(run)
        await done.wait()
