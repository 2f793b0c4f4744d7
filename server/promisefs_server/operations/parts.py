"""What all operations share: the server's parts, and statuses with promises."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid, PromisedStatus
from promisefs_protocol.messages import Break, Changed, VolumeEntry
from promisefs_protocol.rights import Rights
from promisefs_protocol.transport import Reply

from promisefs_server.access.access_control import AccessControl
from promisefs_server.identity.caller import Caller
from promisefs_server.identity.principals import Principals
from promisefs_server.promises.breaker import Breaker
from promisefs_server.promises.vnode_locks import VnodeLocks
from promisefs_server.promises.writers import Writers
from promisefs_server.store.datafiles import DataFile
from promisefs_server.store.deletions import Deletions
from promisefs_server.store.durability import Durability
from promisefs_server.store.store import Store
from promisefs_server.store.vnodes import Vnode
from promisefs_server.store.volumes import Volume

Later = Callable[[], Awaitable[Reply]]
"""What is left of a call that has to wait."""
Operation = Callable[[Caller, Any, bytes | None], Reply | Later]
"""Carries out one call: (who, request, bulk) to (reply, bulk). What can be done without waiting is done at
once, in one step that no other task sees half done. It, or what it leaves, raises Aborted, OSError, sqlite3.Error."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What operations work on."""

    store: Store
    access: AccessControl
    principals: Principals
    breaker: Breaker
    durability: Durability
    deletions: Deletions
    locks: VnodeLocks
    writers: Writers = field(default_factory=Writers)


class Operations:
    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._access = parts.access
        self._principals = parts.principals
        self._vnodes = parts.store.vnodes
        self._database = parts.store.database
        self._breaker = parts.breaker
        self._durability = parts.durability
        self._deletions = parts.deletions
        self._locks = parts.locks

    def promised(self, caller: Caller, vnode: Vnode) -> PromisedStatus:
        """What a caller may be told of a vnode now, and the promise that goes with it, in one step."""
        vnode = self._vnodes.shown(vnode)
        return PromisedStatus(
            vnode.fid,
            self._vnodes.status(vnode),
            self._breaker.grant(caller.host, vnode.key),
            self._access.rights(caller.identity, vnode),
            self._access.rights_of_anyone(vnode),
        )

    def directory(self, caller: Caller, fid: Fid, needed: Rights) -> Vnode:
        """A directory on which the caller has these rights. Abort VNOVOL, VMOVED, VNOVNODE, NOTDIR, ACCES."""
        directory = self._vnodes.directory(fid)
        self._access.need(caller.identity, directory, needed)
        return directory

    @contextlib.contextmanager
    def data_file(self, vnode: Vnode, *, create: bool) -> Iterator[DataFile | None]:
        """Have a vnode's data file open within the context; None if it has none yet and it is not to be made.

        Raise OSError: EIO if it must have had one. Without this its bytes would read as zeros, and be zeros once
        something is stored beside them. Removing it, and truncation to nothing, go without.
        """
        stored = bool(vnode.size and not vnode.sparse)
        with self._store.files.pin(vnode.key, create=create and not stored) as file:
            if file is None and stored:
                path = self._store.files.path(vnode.key)
                raise OSError(errno.EIO, f"data file {path} is missing: bring it back, or remove the file", str(path))
            yield file

    def settled(self, events: Sequence[trio.Event], reply: Any) -> Reply | Later:
        """The reply to a mutation, when the others have acknowledged it."""
        return partial(self._settle, events, reply) if events else (reply, None)

    async def _settle(self, events: Sequence[trio.Event], reply: Any) -> Reply:
        await self._breaker.settle(events)
        return reply, None

    def unpromised(self, vnode: Vnode) -> PromisedStatus:
        return PromisedStatus(vnode.fid, self._vnodes.status(vnode), 0)


def break_of(vnode: Vnode, what: Changed) -> Break:
    """What others are to be told of a vnode after a change."""
    return Break(vnode.fid, what, vnode.data_version, vnode.size)


def volume_entry(store: Store, volume: Volume) -> VolumeEntry:
    """What a client is told of a volume that is here."""
    root = store.vnodes.find(volume.root)
    if root is None:
        raise Aborted(AbortCode.IO, f"volume {volume.name} has lost its root directory")
    return VolumeEntry(volume.name, volume.volume, root.fid)


def now_ns() -> int:
    """The time that changes are stamped with: wall clock."""
    return time.time_ns()
