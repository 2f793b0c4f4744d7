"""Contents of regular files: reading through the cache, readahead, write-back.

Locks: `FileState.store_lock`, one per file, held by whoever stores or truncates it; nobody holds two. Reading
takes none.

Invariants
I1  A write is acknowledged to the application when it is in `contents` as dirty; it leaves only by a store that
    carried it or was refused (I5), a truncation that cut it, or the end of the file itself.
I2  Fetched bytes are added only if nothing happened to the clean blocks since the fetch began (`fill_epoch`), and
    under the version that came with them (bytes may be newer than their label, never older).
I3  What `read` returns is as of a moment after `read` was called: it validates first, and every break takes the
    clean blocks away.
I4  `_states` has an entry for every file that is dirty.
I5  What the server refuses for good is on disk in the quarantine before it leaves `contents`, and every open file that
    could have written it is told. Until then, and if it cannot be kept, it is dirty.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.messages import MAX_BULK_BYTES, AppendData, FetchData, FileVersion, StoreData, StoreStatus, Sync
from promisefs_protocol.observe.tracing import Event, tell

from promisefs_client.errors import FsError, ServerUnavailable
from promisefs_client.fuse.requests import SIGNAL_PATIENCE_S, Interrupted, current_request, interruptible
from promisefs_client.identity.key import Key
from promisefs_client.locks.prompt import Promptly
from promisefs_client.network.cell import Cell
from promisefs_client.network.servers import Server
from promisefs_client.network.session import UNNUMBERED
from promisefs_client.rejects.keeper import RejectKeeper
from promisefs_client.rejects.refusals import Writer, is_final
from promisefs_client.vnodes.vnode import Vnode

from .contents import BLOCK_BYTES, FileContents, PageCache, StoreExtent
from .file_state import FileState, LockLost
from .readahead import Readahead
from .refusing import Refuser
from .room import Rooms

log = logging.getLogger(__name__)

BLOCKS_PER_FETCH = MAX_BULK_BYTES // BLOCK_BYTES
STORES_IN_FLIGHT = 4
WRITE_BEHIND_BYTES = 4 * MAX_BULK_BYTES
"""A file with more dirty than this begins to store whole megabytes in the background."""
DIRTY_SHARE = 0.5
"""Share of the cache limit that may be dirty before writers wait for the server."""
STORE_AFTER_S = 5.0
"""Dirty data goes to the server after this time at the latest."""
RETRY_AFTER_S = 5.0


class FileStore:
    def __init__(
        self, cell: Cell, cache: PageCache, timeout_s: float, rejects: RejectKeeper, key_wait_s: float = 0.0
    ) -> None:
        self._cell = cell
        self._timeout_s = timeout_s
        self.refuser = Refuser(cell, rejects, key_wait_s)
        self._rooms = Rooms(cell, cache)
        self._cache = cache
        self._states: dict[Vnode, FileState] = {}
        self.store_failures = 0
        self.bytes_voided = 0
        """Thrown away, since the lock under which they may have been written was lost."""

    def _state(self, vnode: Vnode) -> FileState:
        state = self._states.get(vnode)
        if state is None:
            state = self._states[vnode] = FileState(vnode)
        return state

    def contents(self, vnode: Vnode) -> FileContents:
        if vnode.contents is None:
            vnode.contents = FileContents(self._cache)
            vnode.contents.set_version(vnode.status.version, vnode.status.size)
        return vnode.contents

    def writer(self, vnode: Vnode, key: Key) -> Writer:
        """For a file that is opened for writing: it is told of what is refused from now on."""
        state = self._states.get(vnode)
        return Writer(key, 0 if state is None else state.refusals.count)

    def gave_up_lately(self, vnode: Vnode) -> bool:
        """Whether a store just failed, and the timer will try again."""
        state = self._states.get(vnode)
        return state is not None and state.retry_at > trio.current_time()

    def released(self, vnode: Vnode) -> None:
        """The last handle is closed: keep no more than a dirty file needs."""
        state = self._states.get(vnode)
        busy = state is None or state.fetching or state.background or state.store_lock.locked() or state.unsaid
        if not busy and not vnode.opens and not vnode.is_dirty:
            del self._states[vnode]

    @property
    def dirty_files(self) -> int:
        return len(self.dirty_vnodes())

    def dirty_vnodes(self) -> list[Vnode]:
        return [vnode for vnode in self._states if vnode.is_dirty]

    # Reading

    async def read(self, vnode: Vnode, offset: int, length: int, readahead: Readahead) -> bytes | memoryview:
        """Bytes of the file; short only at its end. Raise Aborted, ServerUnavailable."""
        cell = self._cell
        contents = self.contents(vnode)
        waited = False
        while True:
            await cell.validate(vnode)
            if contents.version is None:  # a break took the label away; the status is newer than our call
                contents.set_version(vnode.status.version, vnode.status.size)
            size = vnode.size
            _, end = readahead.want(offset, length)
            data = contents.read(offset, length, size)
            if data is not None:
                cell.counters.pages.count(not waited)
                contents.given(offset, data)
                self._fetch_ahead(vnode, contents, max(offset + length, readahead.begun_to), min(end, size), readahead)
                if not cell.valid(vnode):
                    cell.drop_pages_later(vnode)  # good for this answer, but nobody would tell us of a change
                return data
            waited = True
            # What was fetched ahead may be gone again, so all of it is looked at.
            self._fetch_ahead(vnode, contents, offset + length, min(end, size), readahead)
            await self._fetch_needed(vnode, contents, offset, min(length, size - offset))

    async def _fetch_needed(self, vnode: Vnode, contents: FileContents, offset: int, length: int) -> None:
        """Get nearer to having the range: wait for one fetch, under way or our own. The caller looks again."""
        state = self._state(vnode)
        missing = contents.missing(offset, length)
        under_way = next((state.fetching[index] for index in missing if index in state.fetching), None)
        if under_way is not None:
            with interruptible(SIGNAL_PATIENCE_S):
                await under_way.wait()
        elif missing:
            run = _runs(missing)[0]
            await self._fetch_and_fill(vnode, contents, run, self._announce(state, run))

    def _fetch_ahead(self, vnode: Vnode, contents: FileContents, start: int, end: int, readahead: Readahead) -> None:
        """Begin to fetch what a sequential reader will want, a megabyte at a time.

        Nothing of the block before `start`: the read needs that one itself, and has to see why it cannot be fetched.
        """
        start = -(-start // BLOCK_BYTES) * BLOCK_BYTES
        if start >= end or not self._cell.connected(vnode):
            return
        state = self._state(vnode)
        runs = _runs([i for i in contents.missing(start, end - start) if i not in state.fetching])
        readahead.begun_to = end
        # The last piece waits until it is a whole fetch, or the end of the file.
        if runs and len(runs[-1]) < BLOCKS_PER_FETCH and (runs[-1][-1] + 1) * BLOCK_BYTES < vnode.size:
            readahead.begun_to = runs.pop().start * BLOCK_BYTES
        for run in runs:
            self._cell.start(self._fetch_announced, vnode, contents, run, self._announce(state, run))

    @staticmethod
    def _announce(state: FileState, run: range) -> trio.Event:
        """Say that these blocks, none of them announced yet, are being fetched; `_fetch_and_fill` sets the event."""
        event = trio.Event()
        for index in run:
            assert index not in state.fetching
            state.fetching[index] = event
        return event

    async def _fetch_announced(self, vnode: Vnode, contents: FileContents, run: range, event: trio.Event) -> None:
        try:
            await self._fetch_and_fill(vnode, contents, run, event)
        except (Aborted, ServerUnavailable) as error:
            log.debug("readahead of %s: %s", vnode.fid, error)  # the reader will ask, and see for itself

    async def _fetch_and_fill(self, vnode: Vnode, contents: FileContents, run: range, event: trio.Event) -> None:
        cell = self._cell
        state = self._state(vnode)
        epoch = contents.fill_epoch
        try:
            async with cell.ask(FetchData(vnode.fid, run.start * BLOCK_BYTES, len(run) * BLOCK_BYTES)) as answer:
                unchanged = contents.fill_epoch == epoch
                cell.counters.fetched_bytes += len(answer.bulk or b"")
                entry = answer.reply.entry
                cell.table.install(entry, answer.mark)
                if unchanged:
                    contents.fill(run.start, answer.bulk or b"", contents.fill_epoch, entry.status.version)
        except Aborted as refusal:
            if refusal.code == AbortCode.VNOVNODE:
                cell.table.vnode_is_gone(vnode)
            raise
        finally:
            for index in run:
                del state.fetching[index]
            event.set()
            self.released(vnode)
        cell.drop_stale_later()

    # Writing

    async def write(self, vnode: Vnode, offset: int, data: bytes, writer: Writer | None = None) -> None:
        """Take bytes as dirty. Waits for the server only if too much is dirty already, or bytes of another key's.

        Raise Aborted, ServerUnavailable, FsError, with nothing taken, if the cache is full of what cannot be stored, or
        what the writer wrote before was refused.
        """
        contents = self.contents(vnode)
        if vnode.lost:
            raise FsError(errno.ESTALE)
        key = None if writer is None else writer.key
        written_back = current_request().from_page_cache
        if not written_back and writer is not None and (vnode.read_write_opens == 0 or written_back is not None):
            self._tell(vnode, writer)
        if contents.is_others(offset, len(data), key):
            await self._store_others_first(vnode, contents, written_back)
        state = self._state(vnode)
        if self._cache.dirty_bytes > self._cache.limit_bytes:
            await self._relieve(vnode)
            if self._cache.dirty_bytes > self._cache.limit_bytes:
                current_request().raise_if_interrupted()
                if state.failure is not None:
                    raise state.failure  # no more can be kept, and the server does not take it
            state = self._state(vnode)
        through = self._rooms.take(vnode.volume, len(data)) and writer is not None and not written_back
        if through:
            await self.store_quietly(vnode)  # what others wrote is not this write's to answer for
        mapped, promised = vnode.read_write_opens > 0, self._cell.valid(vnode)
        if written_back is not None:  # of what is surely written back, what equals the base was surely not written
            mapped = promised = written_back
        contents.write(
            offset, data, key,
            mapped=mapped, promised=promised, written_back=bool(written_back), reach=vnode.status.size,
        )  # fmt: skip
        if not contents.is_dirty:
            return  # pages written back for a break, with nothing of our own in them
        vnode.written_ns = time.time_ns()
        if vnode.pending_mtime_ns in (None, vnode.status.mtime_ns):  # not dirty, or an mtime that was set in between
            vnode.pending_mtime_ns = vnode.written_ns
        if state.dirty_since is None:
            state.dirty_since = trio.current_time()
        if through:
            await self._write_through(vnode, offset, len(data), writer)
        if contents.dirty_bytes >= WRITE_BEHIND_BYTES and not state.background and state.retry_at == 0.0:
            state.background = True
            self._cell.start(self._write_behind, state)
        if self._cache.dirty_bytes > self._cache.limit_bytes * DIRTY_SHARE:
            await self._relieve(vnode)

    async def _write_through(self, vnode: Vnode, offset: int, length: int, writer: Writer | None) -> None:
        """There is little room: store what was just written. Raise Aborted if it is refused; then it is not kept."""
        state = self._state(vnode)
        this = (offset, offset + length)
        state.through.append(this)
        try:
            await self.store_quietly(vnode)
        finally:
            state.through.remove(this)
        if writer is not None:
            self._tell(vnode, writer)

    async def _store_others_first(self, vnode: Vnode, contents: FileContents, written_back: bool | None) -> None:
        """Bytes of another key are about to be overwritten: if these were refused later, those would be lost.

        What the kernel writes back from a mapping must not fail. While it drops pages a break's acknowledgement waits
        for it, and the store may wait for that: then the page becomes the later writer's, with all that is dirty in it.
        """
        if written_back and self._cell.is_dropping(vnode):
            return
        try:
            await self._store_all_of(vnode, sync=False)
        except (Aborted, ServerUnavailable):
            if not written_back:
                raise

    async def _relieve(self, vnode: Vnode) -> None:
        """Memory pressure: the writer stores before it goes on. If that fails it goes on all the same: its
        data is kept, and whoever calls fsync or close is told. It does not wait for a server that is none of its own
        and away."""
        for candidate in [vnode, *self._states]:
            if self._cache.dirty_bytes <= self._cache.limit_bytes * DIRTY_SHARE:
                return
            if candidate.is_dirty and (candidate.server is vnode.server or self._cell.connected(candidate)):
                await self.store_quietly(candidate)
                if current_request().interrupted:
                    return

    async def _write_behind(self, state: FileState) -> None:
        vnode = state.vnode
        try:
            async with Promptly(state.store_lock):
                await self._store_extents(vnode, whole_only=True)
        except (Aborted, ServerUnavailable) as error:
            self._failed(state, error)
        finally:
            state.background = False
            self._settle(state)

    async def append(self, vnode: Vnode, data: bytes, writer: Writer | None = None) -> int:
        """Add bytes at the end of the file, wherever that is at the server, at once. Return their offset.

        `store` then waits until everyone has been told: here the kernel holds pages locked, which one of them may wait
        for. Raise Aborted, ServerUnavailable, FsError.
        """
        if vnode.lost:
            raise FsError(errno.ESTALE)
        if writer is not None:
            self._tell(vnode, writer)
        contents = self.contents(vnode)
        state = self._state(vnode)
        try:
            with trio.move_on_after(self._timeout_s):
                async with Promptly(state.store_lock):
                    while vnode.is_dirty:  # it may reach beyond the server's end
                        await self._store_extents(vnode)
                    self._cell.table.stores_done(vnode)
                    return await self._append_at_server(vnode, contents, state, data)
            raise ServerUnavailable(f"appending to {vnode.fid} takes too long")
        except (Aborted, ServerUnavailable) as error:
            self._failed(state, error)
            raise
        finally:
            self._settle(state)

    async def _append_at_server(self, vnode: Vnode, contents: FileContents, state: FileState, data: bytes) -> int:
        table = self._cell.table
        request = AppendData(UNNUMBERED, vnode.fid, time.time_ns())
        with self._voidable(state):
            async with self._cell.ask(request, data) as answer:
                entry, offset = answer.reply
                incarnation, version = entry.status.version
                if contents.version == (incarnation, version - 1):
                    contents.appended(offset, data, contents.version)
                    contents.advance_version(entry.status.version, entry.status.size)
                table.install(entry, answer.mark)
                state.appends += 1
                self._cell.counters.stored_bytes += len(data)
        self._cell.drop_stale_later()
        return int(offset)

    async def store(self, vnode: Vnode, *, sync: bool, writer: Writer | None = None) -> None:
        """Store what is dirty; with `sync`, all of the file is durable after.

        Raise Aborted, ServerUnavailable, FsError. If bytes are refused, by this call or before, `writer` is told once;
        without one whoever had them stored is.
        """
        if vnode.lost and not vnode.is_dirty:
            raise FsError(errno.ESTALE)  # every fsync and close says so from now on
        state = self._states.get(vnode)
        if state is not None and state.unsaid:
            state.unsaid = False
            raise FsError(errno.EIO)
        refusals = 0 if state is None else state.refusals.count
        await self._store_all_of(vnode, sync)
        state = self._states.get(vnode)
        if state is not None and state.refusals.count:
            await self.refuser.wait_until_shown(state)
            if writer is not None:
                self._tell(vnode, writer)
            elif (refusal := state.refusals.after(refusals)) is not None:
                raise refusal

    async def _store_all_of(self, vnode: Vnode, sync: bool) -> None:
        """Raise Aborted, ServerUnavailable. What is refused for good is noted, and no failure of this."""
        state = self._states.get(vnode)
        if not sync and (state is None or not (vnode.is_dirty or state.appends_seen < state.appends)):
            if state is not None:
                self._settle(state)  # what was dirty may have turned out not to be
            return
        state = self._state(vnode)
        try:
            with trio.move_on_after(self._timeout_s) as deadline:
                async with Promptly(state.store_lock):
                    durable = await self._store_dirty(state, sync)
                await self._finish(state, sync and not durable and not vnode.lost)
            if deadline.cancelled_caught:
                raise ServerUnavailable(f"storing {vnode.fid} takes too long")
        except (Aborted, ServerUnavailable) as error:
            self._failed(state, error)
            raise
        finally:
            self._settle(state)

    @asynccontextmanager
    async def stored(self, vnode: Vnode) -> AsyncIterator[FileContents]:
        """Within the context the server has what was dirty when it was entered, and nothing else is stored or cut.

        Entering raises Aborted, ServerUnavailable, FsError.
        """
        if vnode.lost:
            raise FsError(errno.ESTALE)
        contents, state = self.contents(vnode), self._state(vnode)
        try:
            async with Promptly(state.store_lock):
                refusals = state.refusals.count
                try:
                    await self._store_dirty(state, sync=False)
                except (Aborted, ServerUnavailable) as error:
                    self._failed(state, error)
                    raise
                if (refusal := state.refusals.after(refusals)) is not None:
                    raise refusal
                self._cell.table.stores_done(vnode)
                with self._voidable(state):
                    yield contents
        finally:
            self._settle(state)

    async def _store_dirty(self, state: FileState, sync: bool) -> bool:
        """Store until nothing is dirty. Return whether that, done with `sync`, made everything durable."""
        durable = False
        while state.vnode.is_dirty:
            durable = await self._store_extents(state.vnode, sync_if_single=sync)
        return durable

    async def _finish(self, state: FileState, durable: bool) -> None:
        """Have what was stored made durable, and what was appended be known to everyone.

        The store lock is not held: what others wait for before they acknowledge may be an append that waits for it.
        """
        appends = state.appends
        if durable or state.appends_seen < appends:
            await self._cell.call(Sync((state.vnode.fid,), durable, state.appends_seen < appends))
            state.appends_seen = max(state.appends_seen, appends)
        state.retry_at = 0.0
        state.failure = None
        state.expired_since = None

    async def store_quietly(self, vnode: Vnode) -> None:
        """Store what is dirty; whoever wrote it is told what went wrong."""
        try:
            await self._store_all_of(vnode, sync=False)
        except (Aborted, ServerUnavailable):
            return  # logged and counted in `_failed`; the data stays dirty

    def _failed(self, state: FileState, error: Exception) -> None:
        if isinstance(error, Interrupted):
            log.info("storing %s: %s; what is dirty stays dirty", state.vnode.fid, error)
            return  # it says nothing about the server; whoever waits next sees for himself
        self.store_failures += 1
        state.retry_at = trio.current_time() + RETRY_AFTER_S
        state.failure = error
        fid, left = state.vnode.fid, self.contents(state.vnode).dirty_bytes
        about = {"fid": fid, "server": state.vnode.server.name, "bytes": left, "reason": error}
        message = "storing %s: %s; %d bytes stay dirty"
        tell(log, logging.WARNING, Event.STORE_FAILED, message, fid, error, left, **about)

    def _settle(self, state: FileState) -> None:
        """After stores: bring the marks of dirtiness in line with what is dirty."""
        vnode = state.vnode
        self.refuser.show(state)
        if vnode.is_dirty:
            return
        state.dirty_since = None
        state.event = None
        vnode.pending_mtime_ns = vnode.written_ns = None
        self._cell.table.stores_done(vnode)
        self._cell.drop_stale_later()
        self.released(vnode)
        self._cell.table.may_be_idle(vnode)

    async def _store_extents(self, vnode: Vnode, *, whole_only: bool = False, sync_if_single: bool = False) -> bool:
        """Store what is dirty now, several extents at a time. Return whether that made everything durable.

        The store lock is held. Every extent begun has ended when this returns or raises.
        """
        contents = self.contents(vnode)
        first = contents.begin_store(MAX_BULK_BYTES, whole_only=whole_only)
        if first is None:
            return False
        if not contents.waiting_bytes:
            stored = await self._store_extent(vnode, contents, first, sync_if_single)
            return stored and sync_if_single
        failures: list[Exception] = []
        slots = trio.Semaphore(STORES_IN_FLIGHT)

        async def store_one(extent: StoreExtent) -> None:
            try:
                await self._store_extent(vnode, contents, extent, False)
            except (Aborted, ServerUnavailable) as error:
                failures.append(error)
            finally:
                slots.release()

        extent: StoreExtent | None = first
        async with trio.open_nursery() as nursery:
            while extent is not None and not failures:
                try:
                    await slots.acquire()
                except BaseException:
                    contents.store_failed(extent)
                    raise
                nursery.start_soon(store_one, extent)
                extent = contents.begin_store(MAX_BULK_BYTES, whole_only=whole_only)
            if extent is not None:
                contents.store_failed(extent)
        if failures:
            raise failures[0]
        return False

    async def _store_extent(self, vnode: Vnode, contents: FileContents, extent: StoreExtent, sync: bool) -> bool:
        """Return whether the server has it; if not, another client's change came before, and less of it is dirty."""
        with self._voidable(self._state(vnode)):
            return await self._store_extent_at_server(vnode, contents, extent, sync)
        raise AssertionError("a voided call raises")

    async def _store_extent_at_server(
        self, vnode: Vnode, contents: FileContents, extent: StoreExtent, sync: bool
    ) -> bool:
        cell = self._cell
        since = None if extent.since is None else FileVersion(*extent.since)
        request = StoreData(vnode.fid, extent.offset, vnode.written_ns, sync, since)
        try:
            async with cell.ask(request, extent.data, extent.key) as answer:
                cell.counters.stored_bytes += extent.length
                entry, label = answer.reply.entry, contents.version
                cell.table.install_own_data(entry, answer.mark)
                if contents.stored(extent, entry.status.version, label):
                    cell.drop_pages_later(vnode)
        except Aborted as refusal:
            if is_final(refusal) and not self.refuser.waits_for_token(self._state(vnode), refusal):
                await self.refuser.refused(self._state(vnode), contents, extent, refusal)
                return False
            changed = refusal.code == AbortCode.CHANGED
            contents.store_failed(extent, changed=changed)
            if changed:
                return False
            raise
        except BaseException:
            contents.store_failed(extent)
            contents.drop_clean()  # the server may have it all the same
            raise
        cell.drop_stale_later()
        return True

    def _tell(self, vnode: Vnode, writer: Writer) -> None:
        """Raise what the writer has not been told yet."""
        state = self._states.get(vnode)
        refusal = None if state is None else state.refusals.tell(writer)
        if refusal is not None:
            raise refusal

    async def truncate(self, vnode: Vnode, change: StoreStatus) -> None:
        """Set the size, and whatever else `change` holds. Raise Aborted, ServerUnavailable."""
        assert change.size is not None
        cell = self._cell
        contents = self.contents(vnode)
        state = self._state(vnode)
        try:
            async with Promptly(state.store_lock):
                with self._voidable(state):
                    async with cell.ask(change) as answer:
                        entry = answer.reply.entry
                        cell.table.install_own_data(entry, answer.mark)
                        contents.truncate(change.size, entry.status.version)
                        if vnode.is_dirty:  # it counts as a write, and what is stored later must not undo its time
                            vnode.pending_mtime_ns = vnode.written_ns = vnode.status.mtime_ns
        finally:
            self._settle(state)

    # Locks that are lost

    def void(self, vnode: Vnode) -> None:
        """A lock was lost under which this file may have been written: another may have it, and have stored since.

        Nothing of ours must follow: calls under way are not repeated, what is dirty is thrown away, and whoever calls
        fsync or close next is told (EIO).
        """
        state = self._state(vnode)
        if vnode.is_dirty or state.changing:
            state.unsaid = True
            self.bytes_voided += self.contents(vnode).dirty_bytes
        for scope in state.changing:
            scope.cancel()
        self.refuser.throw_away(vnode, self.contents(vnode), LockLost())
        self._cell.drop_pages_later(vnode)
        self._settle(state)

    @contextmanager
    def _voidable(self, state: FileState) -> Iterator[None]:
        """Around a call that changes the file at the server. Raise LockLost if `void` comes meanwhile."""
        scope = trio.CancelScope()
        state.changing.add(scope)
        try:
            with scope:
                yield
        finally:
            state.changing.discard(scope)
        if scope.cancelled_caught:
            self.refuser.throw_away(
                state.vnode, self.contents(state.vnode), LockLost()
            )  # what the call carried is dirty again
            raise LockLost

    def discard(self, vnode: Vnode) -> None:
        """The last handle of an unlinked file closes: nobody can ever read what is still dirty."""
        state = self._states.get(vnode)
        if state is not None and vnode.contents is not None:
            vnode.contents.discard_dirty(0, None)
            self._settle(state)

    async def sync_names(self, directory: Vnode) -> None:
        """fsync of a directory: every change of names that its server answered is durable."""
        await self._cell.call(Sync((directory.fid,)))

    # Upkeep

    async def store_all(self) -> list[Exception]:
        """Store every dirty file, those of one server while another one is waited for. Return what went wrong."""
        failures: list[Exception] = []

        async def store_those_of(server: Server) -> None:
            for vnode in [vnode for vnode in self._states if vnode.is_dirty and vnode.server is server]:
                try:
                    await self.store(vnode, sync=False)
                except (Aborted, FsError, ServerUnavailable) as error:
                    failures.append(error)

        async with trio.open_nursery() as nursery:
            for server in dict.fromkeys(vnode.server for vnode in self._states):
                nursery.start_soon(store_those_of, server)
        return failures

    async def store_in_time(self, server: Server) -> None:
        """Store what has been dirty for STORE_AFTER_S at this server. Runs until cancelled."""
        while True:
            await trio.sleep(1.0)
            now = trio.current_time()
            for state in [state for state in self._states.values() if state.vnode.server is server]:
                due = state.dirty_since is not None and state.dirty_since + STORE_AFTER_S <= now
                if due and state.retry_at <= now:
                    await self.store_quietly(state.vnode)


def _runs(indexes: list[int]) -> list[range]:
    """Split sorted block indexes into runs that one fetch can carry."""
    runs: list[range] = []
    for index in indexes:
        if runs and runs[-1].stop == index and len(runs[-1]) < BLOCKS_PER_FETCH:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
