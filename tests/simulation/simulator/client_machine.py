"""A client's machine: a real client, put together as `mount` does it, under a model kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio
from promisefs_client.callbacks import CallbackService
from promisefs_client.cell import Cell
from promisefs_client.contents import PageCache
from promisefs_client.filestore import FileStore
from promisefs_client.fuse_ops import Operations
from promisefs_client.kernel import KernelCaches
from promisefs_client.locator import Locator
from promisefs_client.mount_points import MountPoints
from promisefs_client.namespace import Namespace
from promisefs_client.servers import Server
from promisefs_client.session import ServerSession
from promisefs_client.vnode_table import KernelWork, VnodeTable
from promisefs_client.volumes import Volumes
from promisefs_client.xattrs import Xattrs
from promisefs_protocol.address import Address
from promisefs_protocol.messages import FetchStatus

from .kernel_inodes import KernelCore
from .kernel_names import DentryCacheModel
from .kernel_pages import PageCacheModel
from .network import Network

if TYPE_CHECKING:
    from .plan import Step
    from .processes import Process


class _Notifier:
    """`kernel.Notifier` for the model kernel."""

    core: KernelCore
    pages: PageCacheModel

    def increment_epoch(self) -> bool:
        self.core.epoch += 1
        return True

    async def invalidate(self, items: Sequence[KernelWork]) -> list[KernelWork]:
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
        finally:
            inode.busy -= 1


class ClientMachine:
    """One mount. `start` it; then `names` and `pages` are its system calls; `crash` ends it without a word."""

    def __init__(
        self, name: str, network: Network, nursery: trio.Nursery, server: str, timeout_s: float, rate: float
    ) -> None:
        """`rate`: how fast its clock runs."""
        self.name = name
        self.world = network.world
        self.alive = False
        self._network = network
        self._parent = nursery
        self._server = server
        self._timeout_s = timeout_s
        self._rate = rate
        self._scope = trio.CancelScope()
        self.nursery: trio.Nursery
        """Everything of the machine's runs in it, processes too."""
        self.core: KernelCore
        self.pages: PageCacheModel
        self.names: DentryCacheModel
        self.cell: Cell
        self.files: FileStore
        self.callbacks: CallbackService
        self.session: ServerSession
        self.cache: PageCache

    async def start(self) -> None:
        """Mount; return when it is ready. Raise what mounting raises."""
        await self._parent.start(self._run)
        self.alive = True

    def now(self) -> float:
        """The machine's clock."""
        return self.world.now_s * self._rate

    def crash(self) -> None:
        """The machine is gone, with all that its kernel and its processes knew."""
        self.alive = False
        self._network.client_gone(self.name)
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
        self.cache = PageCache(1 << 24)
        server = Server(self._server)
        self.callbacks = CallbackService(server, ack_wait_s=1.0)
        dial = self._network.dialler(self.name)

        async def connect(address: Address) -> trio.abc.Stream:
            return await dial(address.host)

        self.session = session = ServerSession(
            server,
            Address(self._server, 1),
            self.world.random_bytes(16),
            self.name,
            self._timeout_s,
            self.callbacks.serve,
            self.callbacks.reset,
            connect,
            self.now,
        )
        await nursery.start(session.run)
        nursery.start_soon(session.watch_lease)
        volumes = Volumes()
        locator = Locator([session], volumes)
        volume = await locator.by_name("root")
        root, _ = await session.call(FetchStatus(volume.root))
        table = VnodeTable(self.cache, volumes, volume, root.entry.status, 10_000)

        def references(ino: int) -> int:
            vnode = table.by_ino(ino)
            return 0 if vnode is None else vnode.lookups

        notifier = _Notifier()
        kernel = KernelCaches(notifier, references)
        self.cell = cell = Cell({server: session}, locator, table, kernel, nursery, self.now)
        self.files = FileStore(cell, self.cache, self._timeout_s)
        names = Namespace(cell)
        operations = Operations(cell, self.files, names, MountPoints(cell, names), Xattrs(cell), lambda: None)
        self.core = notifier.core = KernelCore(self.world, self.now, operations, nursery)
        self.pages = notifier.pages = PageCacheModel(self.core)
        self.names = DentryCacheModel(self.core, self.pages)
        self.callbacks.cell = cell
        cell.kernel.initialised()
        table.names_can_be_dropped = cell.kernel.has_epochs
        nursery.start_soon(cell.renew_promises, server)
        nursery.start_soon(self.files.store_in_time, server)

    def check_invariants(self) -> None:
        """Assert what must hold between any two steps."""
        self.cell.table.check_invariants()
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
