"""Asks servers and installs what they say: the vnode table joined with the sessions and the kernel.

A call goes to the server that has the volume of the first fid in it. Every call that brings statuses goes through
`ask`, which marks its start, so that a promise that was broken while its reply was under way is not installed. After
any await the state may have changed: callers validate again, or take the answer as of a moment after they began.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.connection import Piece
from promisefs_protocol.ids import Fid, PromisedStatus
from promisefs_protocol.messages import (
    MAX_LIST,
    MUTATIONS,
    Break,
    Changed,
    FetchStatus,
    GetVolumeStatus,
    GiveUpCallBacks,
    GiveUpOpen,
    InlineBulkStatus,
    SetVolumeStatus,
    WhoAmI,
    fids_of,
)

from promisefs_client.data.contents import FileContents
from promisefs_client.errors import ServerUnavailable
from promisefs_client.fuse.kernel import KernelCaches
from promisefs_client.fuse.requests import outlive_request
from promisefs_client.identity.key import Key, acting_with
from promisefs_client.observe.counters import Counters
from promisefs_client.vnodes.vnode import Vnode
from promisefs_client.vnodes.vnode_table import KernelWork, VnodeTable
from promisefs_client.vnodes.volumes import Volume

from . import clock
from .clock import Clock
from .closings import Closings
from .locator import Locator
from .servers import CallMark, Server
from .session import ServerSession

log = logging.getLogger(__name__)

RENEW_EVERY_S = 30.0
RENEW_BEFORE_S = 90.0
"""Promises on open files are renewed when less than this is left: a mapping has no other moment to ask."""

PROMISE_TRIES = 5
"""How often a promise is asked for when a file is opened."""

GIVE_UP_RETRY_S = 5.0
"""A server that could not be told of closed files is tried again after this."""


class Answer(NamedTuple):
    reply: Any
    bulk: bytes | None
    mark: CallMark


def volume_of(request: Any) -> int:
    """The number of the volume that a call concerns: that of its first fid."""
    of_volume = isinstance(request, GetVolumeStatus | SetVolumeStatus | WhoAmI)
    return request.volume if of_volume else next(fids_of(request)).volume


class Asking:
    """Context manager of one call that brings statuses, see `Cell.ask`."""

    __slots__ = ("_bulk", "_cell", "_key", "_mark", "_request")

    def __init__(self, cell: Cell, request: Any, bulk: Piece | None, key: Key | None) -> None:
        self._cell = cell
        self._request = request
        self._bulk = bulk
        self._key = key
        self._mark: CallMark

    async def __aenter__(self) -> Answer:
        answer = await self._cell.begin_asking(self._request, self._bulk, self._key)
        self._mark = answer.mark
        return answer

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mark.server.end_call(self._mark)


class VolumeGone(Aborted):
    """No server has the volume. Whatever was open in it is stale; nothing is thrown away: it may come back."""

    @property
    def errno(self) -> int:
        return errno.ESTALE


class _NotThere(Aborted):
    """The server that was thought to have the volume does not."""


class Cell:
    """The servers' vnodes, as this mount knows them. `nursery` runs what outlives the call that began it."""

    def __init__(
        self,
        sessions: Mapping[Server, ServerSession],
        locator: Locator,
        table: VnodeTable,
        kernel: KernelCaches,
        nursery: trio.Nursery,
        now: Clock = clock.now,
    ) -> None:
        self.sessions = sessions
        self.keys = next(iter(sessions.values())).keys
        self.locator = locator
        self.timeout_s = next(iter(sessions.values())).timeout_s
        """How long an operation waits for servers."""
        self.table = table
        self.kernel = kernel
        self.now = now
        """The clock of promises and leases."""
        self.counters = Counters()
        self.closings = Closings()
        self._telling: set[int] = set()  # volumes whose server is being told of them
        self._dropping: Counter[int] = Counter()
        """How often the kernel is being told to drop the pages of an inode."""
        self._nursery = nursery

    def start(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run something in the background. A defect in it is logged; it does not end the mount."""
        self._nursery.start_soon(self._guarded, function, args)

    @staticmethod
    async def _guarded(function: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
        outlive_request()
        try:
            await function(*args)
        except Exception:
            log.exception("%s failed: a defect here", getattr(function, "__name__", function))

    def valid(self, vnode: Vnode) -> bool:
        return self.table.valid(vnode, self.now())

    def rights(self, vnode: Vnode) -> int | None:
        """What whoever this task works for may do with the vnode; None if the server has to be asked."""
        if not self.valid(vnode):
            return None
        return vnode.rights_of(self.sessions[vnode.server].current_key().credentials)

    def connected(self, vnode: Vnode) -> bool:
        """Whether the vnode's server can be asked at this moment."""
        return self.sessions[vnode.server].connected

    async def call(self, request: Any, bulk: Piece | None = None, key: Key | None = None) -> tuple[Any, bytes | None]:
        """Make a call that brings no status. Raise Aborted, ServerUnavailable. `key`: as of ServerSession.call."""
        answer = await self.begin_asking(request, bulk, key)
        answer.mark.server.end_call(answer.mark)
        return answer.reply, answer.bulk

    def ask(self, request: Any, bulk: Piece | None = None, key: Key | None = None) -> Asking:
        """Make a call; inside the block, without awaiting, install what the Answer brings. `key`: as of `call`.

        Raise Aborted, VolumeGone if it concerns a volume that no server has, ServerUnavailable.
        """
        return Asking(self, request, bulk, key)

    async def begin_asking(self, request: Any, bulk: Piece | None, key: Key | None) -> Answer:
        """Call the server that has the volume; once more if it is found to be on another one. `end_call` follows."""
        volume = self.table.volumes[volume_of(request)]
        refused = False
        if volume.located:
            try:
                return await self._call_there(volume, request, bulk, key)
            except _NotThere:
                refused = True
        with trio.move_on_after(self.timeout_s):
            while True:
                await self._locate(volume, refused)
                try:
                    return await self._call_there(volume, request, bulk, key)
                except _NotThere as refusal:
                    if refused:
                        raise VolumeGone(refusal.code, refusal.message) from None
                    refused = True
        raise ServerUnavailable(f"{type(request).__name__}: volume {volume.name!r} was not found in time")

    async def _call_there(self, volume: Volume, request: Any, bulk: Piece | None, key: Key | None) -> Answer:
        """Call the server where we believe the volume to be. Raise _NotThere."""
        server = volume.server
        key = key or self.sessions[server].current_key()
        mark = server.begin_call(self.now(), key.credentials)
        try:
            reply, data = await self.sessions[server].call(request, bulk, key=key)
        except BaseException as error:
            server.end_call(mark)
            if not isinstance(error, Aborted):
                if isinstance(request, MUTATIONS):
                    self.forget_changed(server, request)
            elif error.code in (AbortCode.VMOVED, AbortCode.VNOVOL):
                self._lose_location(volume)
                raise _NotThere(error.code, error.message) from None
            raise
        if not volume.located:
            self.table.volumes.confirm(volume, mark)
        return Answer(reply, data, mark)

    async def _locate(self, volume: Volume, refused: bool) -> None:
        """Find out where a volume is that may have moved, unless the server that had it is there to say so itself."""
        if not refused and (len(self.sessions) == 1 or self.sessions[volume.server].connected):
            return
        try:
            await self.locator.by_number(volume.number)
        except Aborted as refusal:
            raise VolumeGone(refusal.code, refusal.message) from None

    def _lose_location(self, volume: Volume) -> None:
        urgent, rest = self.table.lose_location(volume)
        if self.kernel.has_epochs:
            self.kernel.drop_every_name()
        self.start(self.drop, urgent + rest)

    def forget_changed(self, server: Server, request: Any) -> None:
        """A change may or may not have been made, and the server breaks no promise of who made it: do it ourselves."""
        changed = Changed.STATUS | Changed.DATA
        work, _ = self.table.break_promises(server, [Break(fid, changed, 0) for fid in fids_of(request)])
        self.start(self.drop, work)

    async def validate(self, vnode: Vnode) -> int:
        """Return when the vnode's status is that of a moment after this was called, with the caller's rights then.

        Raise Aborted: VNOVNODE if it is gone, ACCES if the caller may not look at it; ServerUnavailable.
        """
        rights = self.rights(vnode)
        self.counters.attributes.count(rights is not None)
        if rights is None:
            rights = (await self.fetch_status(vnode)).rights
            self.drop_stale_later()
        return rights

    async def validate_open(self, vnode: Vnode) -> int:
        """The same, and with a promise if the server makes one: the file may be mapped, and then nobody will ask again.

        A break may have overtaken the reply, and the next may be; whoever breaks that often makes us renew it, too.
        """
        rights = self.rights(vnode)
        self.counters.attributes.count(rights is not None)
        tries = 0
        while rights is None:
            entry = await self.fetch_status(vnode)
            tries += 1
            rights = self.rights(vnode)
            if rights is None and (not entry.promise_s or tries == PROMISE_TRIES):
                rights = entry.rights
        self.drop_stale_later()
        return rights

    async def fetch_status(self, vnode: Vnode) -> PromisedStatus:
        """Return what the server says; its promise may be broken already."""
        try:
            async with self.ask(FetchStatus(vnode.fid)) as answer:
                entry: PromisedStatus = answer.reply.entry
                self.table.install(entry, answer.mark)
                return entry
        except Aborted as refusal:
            if refusal.code == AbortCode.VNOVNODE:
                self.table.vnode_is_gone(vnode)
            raise

    async def fetch_statuses(self, fids: list[Fid]) -> None:
        """Bring many statuses up to date. Those that are gone are marked so; no error for them."""
        for part in _parts(fids, MAX_LIST // 4):
            async with self.ask(InlineBulkStatus(part)) as answer:
                for fid, entry in zip(part, answer.reply.entries, strict=True):
                    if not isinstance(entry, int):
                        self.table.install(entry, answer.mark)
                    elif entry == AbortCode.VNOVNODE and (vnode := self.table.get(fid)) is not None:
                        self.table.vnode_is_gone(vnode)

    async def drop(self, work: list[KernelWork]) -> None:
        """Have the kernel drop this; pages it writes back meanwhile are compared with their twins."""
        twins: list[tuple[FileContents, int]] = []
        pages = [item.ino for item in work if item.pages]
        for ino in pages:
            vnode = self.table.by_ino(ino)
            if vnode is not None and vnode.contents is not None:
                twins.append((vnode.contents, vnode.contents.keep_twins()))
        self._dropping.update(pages)
        try:
            await self.kernel.drop(work)
        finally:
            self._dropping.subtract(pages)
            for ino in pages:
                if not self._dropping[ino]:
                    del self._dropping[ino]
        for contents, number in twins:
            contents.forget_twins(number)

    def is_dropping(self, vnode: Vnode) -> bool:
        """Whether the kernel may still have pages that it is to drop."""
        return vnode.ino in self._dropping

    # Kernel caches found stale without a break

    def drop_stale_later(self) -> None:
        """Have the kernel drop what statuses showed to be stale.

        In the background: the caller may be serving a READ that the kernel holds pages locked for.
        """
        work = self.table.found_stale
        if work:
            self.table.found_stale = []
            self.start(self.drop, work)

    async def drop_stale(self) -> None:
        """The same, and wait: only where the kernel holds no page of the file locked for us."""
        work = self.table.found_stale
        if work:
            self.table.found_stale = []
            await self.drop(work)

    def drop_pages_later(self, vnode: Vnode) -> None:
        self.start(self.drop, [KernelWork(vnode.ino, True, False, 0)])

    # Handles

    def close_handle(self, vnode: Vnode) -> None:
        """A handle of the kernel's is gone; the last one of an unlinked file is the end of the file."""
        if vnode.kept and vnode.opens == 1:
            vnode.kept = False
            self.give_up_open([vnode.fid])
        self.table.drop_open(vnode)

    def lost_a_name(self, vnode: Vnode, *, kept_open: bool) -> None:
        """After our own removal, in which we said whether it is open here."""
        if vnode.deleted and kept_open:
            vnode.kept = vnode.opens > 0
            if not vnode.kept:  # closed meanwhile
                self.give_up_open([vnode.fid])
        self.table.may_be_idle(vnode)

    def give_up_open(self, fids: list[Fid]) -> None:
        """Tell the servers that these deleted files need not be kept for us; again and again, until they know."""
        if forgotten := self.closings.add(fids):
            log.warning("%d files that were removed and closed stay at their server until this mount ends", forgotten)
        for volume in {fid.volume for fid in fids} - self._telling:
            self._telling.add(volume)
            self.start(self._tell_closings, volume)

    async def _tell_closings(self, volume: int) -> None:
        try:
            while fids := self.closings.owed(volume, MAX_LIST):
                if not self.sessions[self.table.volumes[volume].server].connected:
                    await trio.sleep(GIVE_UP_RETRY_S)
                elif await self._tell_closed(fids):
                    self.closings.told(fids)
                else:
                    await trio.sleep(GIVE_UP_RETRY_S)
        finally:
            self._telling.discard(volume)

    async def _tell_closed(self, fids: tuple[Fid, ...]) -> bool:
        """Return whether nothing is left to tell."""
        try:
            await self.call(GiveUpOpen(fids))
        except (Aborted, ServerUnavailable) as error:
            if isinstance(error, Aborted) and error.code == AbortCode.VNOVOL:
                return True  # removed with its volume
            log.info("giving up %d open files: %s; trying again", len(fids), error)
            return False
        return True

    # Upkeep

    async def renew_promises(self, server: Server) -> None:
        """Keep a promise on everything open; give up those of evicted vnodes. Runs until cancelled."""
        while True:
            await trio.sleep(RENEW_EVERY_S)
            self.keys.note_expired(time.time())
            await self._give_up_evicted(server)
            soon = self.now() + RENEW_BEFORE_S
            await self.revalidate(
                v
                for v in self.table
                if v.server is server and v.opens and v.promise_until < soon and not v.status.is_dir
            )

    async def revalidate(self, vnodes: Iterable[Vnode]) -> None:
        """Ask for statuses, of open files as who has opened them."""
        by_key: dict[Key, list[Fid]] = {}
        for vnode in vnodes:
            key = vnode.openers[-1] if vnode.openers else self.sessions[vnode.server].current_key()
            by_key.setdefault(key, []).append(vnode.fid)
        try:
            for key, fids in by_key.items():
                with acting_with(key):
                    await self.fetch_statuses(fids)
        except (Aborted, ServerUnavailable) as error:
            log.warning("renewing promises on %d files: %s", sum(map(len, by_key.values())), error)
        self.drop_stale_later()

    async def _give_up_evicted(self, server: Server) -> None:
        while server.given_up:
            fids = server.begin_giving_up(MAX_LIST, known=self.table)
            try:
                await self.sessions[server].call(GiveUpCallBacks(fids))
            except (Aborted, ServerUnavailable) as error:
                log.warning("giving up %d promises of %s: %s", len(fids), server.name, error)
            finally:
                server.end_giving_up(fids)


def _parts(fids: list[Fid], most: int) -> Iterator[tuple[Fid, ...]]:
    """Split into lists of at most `most` fids, each of one volume."""
    by_volume: dict[int, list[Fid]] = {}
    for fid in fids:
        by_volume.setdefault(fid.volume, []).append(fid)
    for of_volume in by_volume.values():
        for start in range(0, len(of_volume), most):
            yield tuple(of_volume[start : start + most])
