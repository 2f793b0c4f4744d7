"""A server's machine: the real Fileserver on a real store in memory, which may be killed at any moment.

kill -9 leaves the files as they are at that moment: they are copied, and the next start opens the copy, while what
is left of the killed server works on the old files, cut off from everyone, until it has ended.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import trio
from promisefs_server.service import Fileserver
from promisefs_server.store.membership import ALONE, Membership, membership_in
from promisefs_server.store.store import Store

from .layout import Layout
from .network import Network


def membership_of(layout: Layout, number: int) -> Membership:
    """As what a server serves its store."""
    return membership_in(layout.cell_file, number) if layout.is_cell else ALONE


class ServerMachine:
    def __init__(
        self, number: int, layout: Layout, folder: Path, network: Network, nursery: trio.Nursery, lease_s: float
    ) -> None:
        """`folder` holds one folder for each time the store was copied; `0` must be there."""
        self.name = layout.names[number]
        self._membership = membership_of(layout, number)
        self.lease_s = lease_s
        self._folder = folder
        self._network = network
        self._nursery = nursery
        self._copies = 0
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self.server: Fileserver | None = None

    @property
    def running(self) -> bool:
        return self.server is not None

    @property
    def store_folder(self) -> Path:
        return self._folder / str(self._copies)

    async def start(self) -> None:
        """Start, and return when connections are accepted."""
        store = Store.open(self.store_folder, time.time_ns(), self._membership)
        server = Fileserver(store, self.lease_s)
        self._scope, self._ended = trio.CancelScope(), trio.Event()
        await self._nursery.start(self._run, server, self._scope, self._ended)
        self.server = server

        def accept(stream: trio.abc.Stream, client: str) -> None:
            server._connections.start_soon(server.serve_connection, stream, client)

        self._network.local_tokens[store.uuid] = server.registry.authority.server_token()
        self._network.listen(self.name, accept)

    @staticmethod
    async def _run(
        server: Fileserver, scope: trio.CancelScope, ended: trio.Event, task_status: trio.TaskStatus[None]
    ) -> None:
        with scope:
            await server.run((), task_status)
        ended.set()

    def kill(self) -> None:
        """kill -9."""
        assert self.server is not None
        self.server = None
        old = self.store_folder
        self._copies += 1
        shutil.copytree(old, self.store_folder, ignore=shutil.ignore_patterns("*-shm", "lock", "control"))
        self._network.server_gone(self.name, suddenly=True)
        self._scope.cancel()

    async def stop(self) -> None:
        """A clean shutdown, as by SIGTERM."""
        assert self.server is not None
        server, self.server = self.server, None
        self._network.server_gone(self.name, suddenly=False)
        server.stop()
        await self._ended.wait()

    def forget_callbacks(self) -> None:
        """The saved callback state is lost while the server is down."""
        (self.store_folder / "callback-state").unlink(missing_ok=True)
