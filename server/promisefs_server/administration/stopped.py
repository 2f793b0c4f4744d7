"""Administering stores whose servers do not run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import trio
from promisefs_protocol.messages import METHOD_OF_REQUEST, RemoveVolume, RenameVolume

from promisefs_server.identity.calls import Asker, IdentityCalls
from promisefs_server.identity.contexts import Contexts
from promisefs_server.identity.identity import SERVER
from promisefs_server.identity.registry import Registry
from promisefs_server.promises import callback_state
from promisefs_server.store.store import Store
from promisefs_server.store.volume_remains import VolumeRemains

from .administration import Administration


class StoppedServer:
    """The locked store of a server that does not run. A context manager; inside, no server can be started on it."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """Raise StoreError. `say` is told what takes time."""
        self.store = Store.open_stopped(folder)
        self._locked_s = trio.current_time()
        self._say = say

    def __enter__(self) -> StoppedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.files.close()
        self.store.close(clean=False)

    async def carry_out(self, request: Any) -> Any:
        """Do what the server would do if it ran. Raise Aborted, OSError, sqlite3.Error."""
        if METHOD_OF_REQUEST[type(request)].name.startswith(("SEC.", "PT.")):
            return await self._carry_out_on_identities(request)
        if isinstance(request, RemoveVolume | RenameVolume):
            # Before the change: whatever happens, no host then goes by what it knew.
            callback_state.forget(self.store.folder)
        remains = VolumeRemains(self.store)
        administration = Administration(self.store, remains, self.wait_for_leases, self._is_durable)
        reply = await administration.carry_out(request)
        if isinstance(request, RemoveVolume):
            await remains.delete_all()
        return reply

    async def _carry_out_on_identities(self, request: Any) -> Any:
        """As whoever runs the server."""
        registry = Registry(self.store.folder, self.store.uuid, run=0)
        try:
            calls = IdentityCalls(registry, self._forget_callbacks)
            return await calls.carry_out(Asker(SERVER, Contexts(), "command"), request)
        finally:
            registry.close()

    async def _forget_callbacks(self) -> None:
        """Have no client go by what it knew."""
        callback_state.forget(self.store.folder)
        await self.wait_for_leases()

    async def wait_for_leases(self) -> None:
        """Return when every lease that the server may have given has ended."""
        count = len(self.store.hosts.all())
        left_s = self._locked_s + self.store.lease_ms / 1000 - trio.current_time()
        if count and left_s > 0:
            self._say(f"waiting {math.ceil(left_s)} s, until the leases of {count} clients have certainly ended")
            await trio.sleep(left_s)

    async def _is_durable(self) -> None:
        """Commits are, here."""
        await trio.lowlevel.checkpoint()
