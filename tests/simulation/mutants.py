"""Rules of promisefs, each switched off by itself: the simulation must find every one within so many histories.

A mutant that survives is a hole in the checker, or in the model. Names of the rules' places are in the patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import trio
from promisefs_client.data.contents import FileContents
from promisefs_client.data.dirty import DirtyBytes
from promisefs_client.data.filestore import FileStore
from promisefs_client.data.refusing import Refuser
from promisefs_client.data.whole_pages import Twins
from promisefs_client.fuse.kernel import KernelCaches
from promisefs_client.fuse.listings import ListingsInFlight
from promisefs_client.identity.key import Key
from promisefs_client.names.namespace import Namespace
from promisefs_client.network.callbacks import CallbackService
from promisefs_client.network.cell import Cell
from promisefs_client.network.servers import Server
from promisefs_client.network.session import ServerSession
from promisefs_client.rejects.refusals import Refusals
from promisefs_client.vnodes.vnode_table import KernelWork, VnodeTable
from promisefs_server.promises.breaker import Breaker, Contact
from promisefs_server.promises.hosts import Host
from promisefs_server.promises.promises import PromiseTable
from promisefs_server.sessions import Session
from promisefs_server.store.datafiles import DataFile, DataFiles
from promisefs_server.store.orphans import Orphans
from promisefs_server.store.replies import Replies
from promisefs_server.store.vnodes import VnodeTable as ServerVnodes
from simulator.client_machine import KeptInMemory

Patches = Callable[[], Sequence[AbstractContextManager[Any]]]


@dataclass(frozen=True)
class Mutant:
    name: str
    rule: str
    """What is not done."""
    histories: int
    """So many must be enough to find it."""
    profile: str | None
    patches: Patches

    @contextmanager
    def active(self) -> Iterator[None]:
        """The rule is off within the block, in this process."""
        with ExitStack() as stack:
            for each in self.patches():
                stack.enter_context(each)
            yield


MUTANTS: list[Mutant] = []


def mutant(name: str, rule: str, histories: int, profile: str | None = None) -> Callable[[Patches], Patches]:
    def register(patches: Patches) -> Patches:
        MUTANTS.append(Mutant(name, rule, histories, profile, patches))
        return patches

    return register


# Breaks and promises


@mutant("ack-before-drop", "a break is acknowledged only when the kernel has dropped what it names", 200)
def _() -> Sequence[AbstractContextManager[Any]]:
    async def bounded(self: CallbackService, work: Any) -> None:
        assert self.cell is not None
        self.cell.start(work)

    return [patch.object(CallbackService, "_bounded", bounded)]


@mutant("kernel-keeps-pages", "a break of data has the kernel drop the pages", 100)
def _() -> Sequence[AbstractContextManager[Any]]:
    original = VnodeTable.break_promises

    def break_promises(self: VnodeTable, *args: Any) -> Any:
        work, still_open = original(self, *args)
        return [item._replace(pages=False) for item in work], still_open

    return [patch.object(VnodeTable, "break_promises", break_promises)]


@mutant("kernel-keeps-names", "a break of a directory has the kernel look every name up again", 100, "names")
def _() -> Sequence[AbstractContextManager[Any]]:
    async def drop_names(self: KernelCaches, directories: set[int]) -> None:
        return

    return [patch.object(KernelCaches, "_drop_names_by_epoch", drop_names)]


# Status and promise leave the server, another client changes the file, its break comes first, on the other connection.
@mutant(
    "promise-though-broken", "a promise is not installed if a break came while its reply was under way", 100, "rush"
)
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(Server, "still_promises", lambda self, fid, mark: True)]


# The answer to an own store waits for a third client; meanwhile another one stores, the break comes, and what was
# asked for then: now comes the answer, with the status from before.
@mutant("old-statuses", "a status older than the one that is known is dropped", 500, "rush")
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(VnodeTable, "_is_newer", staticmethod(lambda known, new: True))]


@mutant("no-wait-for-acknowledgements", "a mutation is answered when all have acknowledged its breaks", 300)
def _() -> Sequence[AbstractContextManager[Any]]:
    original = Breaker.begin

    def begin(self: Breaker, *args: Any) -> list[trio.Event]:
        original(self, *args)
        return []

    return [patch.object(Breaker, "begin", begin)]


# Two clients store at the same time, the first one's break is under way to a reader: the second one is answered at
# once, and the reader goes on as before.
@mutant(
    "second-break-not-sent",
    "a host that owes an acknowledgement for a fid gets further breaks of it (W2)",
    300,
    "scenes",
)
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(Contact, "has_outstanding", lambda self, fid: False)]


# A LOOKUP's answer is with the kernel, not parsed yet, when a chmod is told: the inode is not known, nothing is
# dropped; then the old mode is taken in, for as long as the promise was.
@mutant(
    "lookup-race-not-retried", "an inode that the kernel does not know yet is invalidated when it does", 600, "scenes"
)
def _() -> Sequence[AbstractContextManager[Any]]:
    async def invalidate(self: KernelCaches, items: Sequence[KernelWork]) -> None:
        if items:
            await self._notifier.invalidate(items)

    return [patch.object(KernelCaches, "_invalidate", invalidate)]


# A listing is with the kernel, not parsed yet, when another client renames: the epoch goes up, then the listing is
# parsed and its names pass for new.
@mutant("no-second-epoch", "a READDIRPLUS reply that the epoch overtook costs another epoch", 800, "scenes")
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(ListingsInFlight, "overtake", lambda self, inodes: set())]


# Leases and restarts


# A reader is cut off: a writer is answered before the reader has stopped.
@mutant("no-wait-for-lease", "what a host did not acknowledge is waited for until its lease ends", 100, "scenes")
def _() -> Sequence[AbstractContextManager[Any]]:
    original = Breaker.settle

    async def settle(self: Breaker, events: Any) -> None:
        with trio.move_on_after(0.3):
            await original(self, events)

    return [patch.object(Breaker, "settle", settle)]


# The server is killed, one client cannot reach the new run: others store there, and are answered while it still reads
# by its promises of before.
@mutant("no-grace-period", "after an unclean restart mutations wait for hosts that may use old promises", 200, "scenes")
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(Host, "in_doubt", lambda self, now_s: False)]


# The answer to a renewal takes long, then the reader is cut off: its lease outlasts that at the server.
@mutant("lease-from-reply", "a client counts its lease from when it sent the request", 400, "scenes")
def _() -> Sequence[AbstractContextManager[Any]]:
    original = ServerSession._extend_lease

    def extend(self: ServerSession, sent_at: float, lease_s: float) -> None:
        original(self, self._now(), lease_s)

    return [
        patch.object(ServerSession, "_extend_lease", extend),
        patch("promisefs_client.network.session.TRUSTED_SHARE", 1.0),
    ]


@mutant("lease-ignored", "without a lease no promise is worth anything", 500)
def _() -> Sequence[AbstractContextManager[Any]]:
    async def watch(self: ServerSession) -> None:
        await trio.sleep_forever()

    return [
        patch.object(VnodeTable, "valid", lambda self, vnode, now: vnode.promise_until > now),
        patch.object(ServerSession, "watch_lease", watch),
    ]


@mutant("reset-forgets-nothing", "InitCallBackState3 and a lost lease take every promise", 500)
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(VnodeTable, "reset", lambda self, server: ([], []))]


# A connection breaks at the client, which stores again on the next one, then something else; then what it had sent on
# the first one comes out of the network.
@mutant("old-connection-goes-on", "a HELLO ends the connection that it replaces", 600, "scenes")
def _() -> Sequence[AbstractContextManager[Any]]:
    async def take_over(self: Session, contact: Contact) -> None:
        contact.calls = self._peer

    return [patch.object(Session, "_take_over_calls", take_over)]


# Contents


@mutant("fill-after-break", "bytes whose fetch began before a break, a truncation or a store are not taken in", 1000)
def _() -> Sequence[AbstractContextManager[Any]]:
    original = FileContents.fill

    def fill(self: FileContents, index: int, data: Any, epoch: int, version: Any) -> bool:
        return self.version is not None and original(self, index, data, self.fill_epoch, self.version)

    async def fetch(self: FileStore, vnode: Any, contents: FileContents, run: range, event: trio.Event) -> None:
        from promisefs_protocol.messages import FetchData

        state = self._state(vnode)
        size = 131072
        try:
            async with self._cell.ask(FetchData(vnode.fid, run.start * size, len(run) * size)) as answer:
                self._cell.table.install(answer.reply.entry, answer.mark)
                contents.fill(run.start, answer.bulk or b"", 0, None)  # type: ignore[arg-type]
        finally:
            for index in run:
                del state.fetching[index]
            event.set()

    return [patch.object(FileContents, "fill", fill), patch.object(FileStore, "_fetch_and_fill", fetch)]


@mutant("clean-before-stored", "bytes on their way to the server count as dirty until it has them", 300)
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(FileContents, "is_dirty", property(lambda self: self._dirty.size_bytes > 0))]


@mutant("failed-store-dropped", "bytes of a store that failed are dirty again", 2000)
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(DirtyBytes, "write_under", lambda self, offset, data: None)]


@mutant("no-twins", "of a page that the kernel writes back for a break only what differs from its twin is dirty", 500)
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(Twins, "keep", lambda self, index, data: None)]


@mutant("close-stores-nothing", "close stores what is dirty", 100, "contents")
def _() -> Sequence[AbstractContextManager[Any]]:
    original = FileStore.store

    async def store(self: FileStore, vnode: Any, *, sync: bool) -> None:
        if sync:
            await original(self, vnode, sync=True)

    return [patch.object(FileStore, "store", store)]


# A reader fetches in the middle of a store: old bytes under the new version. Its break is lost with the connection;
# after InitCallBackState3 the version is found to be current.
@mutant("new-status-too-early", "while bytes are being written readers are told the old status", 600, "scenes")
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(ServerVnodes, "shown", lambda self, vnode: vnode)]


@mutant("garbage-shown", "what a data file has beyond the size is cut before the size goes over it", 1000, "contents")
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(DataFile, "cut", lambda self, size: None)]


# Refused stores


@mutant("refused-bytes-in-kernel", "refused bytes leave the kernel's pages", 300, "refusals")
def _() -> Sequence[AbstractContextManager[Any]]:
    async def show(self: Refuser, vnode: Any, shown: trio.Event) -> None:
        shown.set()

    return [patch.object(Refuser, "_show_servers_bytes", show)]


@mutant("refused-bytes-stay-dirty", "refused bytes are not stored later", 100, "refusals")
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(FileContents, "refused", lambda self, extent: self.store_failed(extent))]


@mutant("too-much-excised", "bytes that were not refused stay when others are", 300, "refusals")
def _() -> Sequence[AbstractContextManager[Any]]:
    original = FileContents.refused

    def refused(self: FileContents, extent: Any) -> None:
        original(self, extent)
        self.discard_dirty(0, None)

    return [patch.object(FileContents, "refused", refused)]


@mutant("refusal-swallowed", "fsync, msync or close tell of what was refused", 100, "refusals")
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(Refusals, "note", lambda self, key, refusal: None)]


# Two processes of one mount write to a file; both writes are refused together, and one of them is told.
@mutant("one-writer-is-told", "every open file that may have written what was refused is told", 300, "refusals")
def _() -> Sequence[AbstractContextManager[Any]]:
    original = Refusals.tell

    def tell(self: Refusals, writer: Any) -> Any:
        refusal = original(self, writer)
        if refusal is not None:
            self._last.clear()
        return refusal

    return [patch.object(Refusals, "tell", tell)]


@mutant("refused-bytes-not-kept", "refused bytes are kept in the quarantine", 100, "refusals")
def _() -> Sequence[AbstractContextManager[Any]]:
    async def keep(self: KeptInMemory, *args: Any) -> None:
        return

    return [patch.object(KeptInMemory, "keep", keep)]


# Names


@mutant(
    "names-edited-blindly", "own changes edit a directory's names only if the version is the next one", 1000, "names"
)
def _() -> Sequence[AbstractContextManager[Any]]:
    original = VnodeTable.own_change

    def own_change(self: VnodeTable, entry: Any, mark: Any, changes: Any) -> Any:
        directory = self._by_fid.get(entry.fid)
        if directory is not None and directory.names is not None:
            version = entry.status.version
            directory.names.version = (version[0], version[1] - 1)
        return original(self, entry, mark, changes)

    return [patch.object(VnodeTable, "own_change", own_change)]


@mutant("not-exactly-once", "the reply to a change of names is given again when the call is repeated", 3000)
def _() -> Sequence[AbstractContextManager[Any]]:
    def save(self: Replies, *args: Any) -> None:
        return

    return [
        patch.object(Replies, "find", lambda self, host, operation, method: None),
        patch.object(Replies, "save", save),
    ]


@mutant("orphans-not-held", "a file that loses its last name is kept for hosts that may have it open", 300, "orphans")
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(Breaker, "may_have_open", lambda self, fid, caller: set())]


@mutant("open-files-not-reported", "a break of a deleted file is acknowledged with what is open here", 300, "orphans")
def _() -> Sequence[AbstractContextManager[Any]]:
    original = VnodeTable.break_promises

    def break_promises(self: VnodeTable, *args: Any) -> Any:
        return original(self, *args)[0], []

    return [patch.object(VnodeTable, "break_promises", break_promises)]


# A process removes a file, another one of its mount opens it before the server has answered: the server deletes a file
# that is open.
@mutant("open-during-removal", "an open waits for a removal that took the file for not open", 100, "scenes")
def _() -> Sequence[AbstractContextManager[Any]]:
    async def settled(self: Namespace, vnode: Any) -> None:
        return

    return [patch.object(Namespace, "settled", settled)]


# Several servers, and progress


@mutant("reset-touches-all-servers", "what ends one server's promises leaves files of others alone", 300)
def _() -> Sequence[AbstractContextManager[Any]]:
    original = VnodeTable.reset

    def reset(self: VnodeTable, server: Server) -> Any:
        every = {volume.server for volume in self.volumes} | {server}
        parts = [original(self, each) for each in every]
        return [item for urgent, _ in parts for item in urgent], [item for _, rest in parts for item in rest]

    return [patch.object(VnodeTable, "reset", reset)]


@mutant("one-server-holds-up-all", "a call waits for no server but the one that it goes to", 1000)
def _() -> Sequence[AbstractContextManager[Any]]:
    original = Cell._call_there

    async def call_there(self: Cell, *args: Any) -> Any:
        with trio.move_on_after(self.timeout_s):
            for session in self.sessions.values():
                await session._wait_connected()
        return await original(self, *args)

    return [patch.object(Cell, "_call_there", call_there)]


@mutant("writers-wait-for-the-absent", "a mutation waits for a host no longer than until its lease has ended", 500)
def _() -> Sequence[AbstractContextManager[Any]]:
    async def mind(self: Breaker, contact: Contact) -> None:
        return

    async def end_doubt(contact: Contact, doubt: trio.Event, lost: Any) -> None:
        await doubt.wait()
        for batch in lost:
            batch.settled.set()

    return [patch.object(Breaker, "_mind", mind), patch.object(Breaker, "_end_doubt", staticmethod(end_doubt))]


@mutant("calls-without-end", "a call that a server does not answer fails after `timeout`", 1000)
def _() -> Sequence[AbstractContextManager[Any]]:
    original = ServerSession.call

    async def call(
        self: ServerSession, request: Any, bulk: Any = None, timeout_s: float | None = None, key: Key | None = None
    ) -> Any:
        return await original(self, request, bulk, math.inf, key)

    return [patch.object(ServerSession, "call", call)]


# What is left, and invariants


@mutant("closed-files-not-given-up", "a server is told of removed files that were closed", 300, "orphans")
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(Cell, "give_up_open", lambda self, fids: None)]


@mutant("data-files-stay", "the data file of a vnode that is gone is deleted", 100, "orphans")
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(DataFiles, "delete", lambda self, key: None)]


@mutant("stale-hosts-keep-promises", "a host that becomes stale loses all promises (hosts I1)", 300)
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(PromiseTable, "delete_host", lambda self, host: list(self._expiry.get(host, ())))]


@mutant("orphans-without-holders", "who takes an orphan's last holder away deletes it", 300, "orphans")
def _() -> Sequence[AbstractContextManager[Any]]:
    return [patch.object(Orphans, "_purge_if_unheld", lambda self, key: False)]
