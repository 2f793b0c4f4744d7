"""The file server: brings the parts together, starts them, and ends them in order.

At the start: hosts that the store knows are restored with their promises if the run before ended cleanly and saved
them; else they are stale, so every mutation waits until they are back or their lease has ended. That one begins now,
and is as long as the longest that may be running: the run before may have given longer ones than this one does.

At the end: no new connections, calls that are being served finish (bounded), calls that come are left unanswered, so
their clients repeat them later; then everything is made durable, promises are saved, the store is marked clean.
"""

from __future__ import annotations

import functools
import logging
import math
import sqlite3
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence

import trio
from promisefs_protocol import tls
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.observe.timings import Timings
from promisefs_protocol.observe.tracing import Event, tell
from promisefs_protocol.tcp import TcpStream
from promisefs_protocol.transport import Reply

from .access.access_control import AccessControl
from .administration import control_socket
from .administration.administration import Administration
from .administration.control import ControlSessions
from .identity.calls import IdentityCalls
from .identity.registry import Registry
from .locks.lock_keeper import LockKeeper
from .observe.statistics import Statistics
from .operations.acls import AclOperations
from .operations.data import DataOperations
from .operations.locks import LockOperations
from .operations.names import NameOperations
from .operations.parts import Later, Operation, Parts
from .operations.ranges import RangeOperations
from .operations.read import ReadOperations
from .operations.volumes import VolumeOperations
from .promises import callback_state
from .promises.breaker import Breaker
from .promises.callback_state import SavedHost
from .promises.hosts import FORGOTTEN_AFTER_S, MAX_HOSTS, Host, HostTable
from .promises.promises import MAX_PROMISES, PromiseTable
from .promises.vnode_locks import VnodeLocks
from .sessions import Session
from .store.database import is_full, is_over_quota
from .store.deletions import Deletions
from .store.durability import Durability
from .store.store import Store, store_errors
from .store.vnodes import key_of
from .store.volume_remains import VolumeRemains
from .store.volumes import VNODE_BITS, VolumeState

log = logging.getLogger(__name__)

DEFAULT_LEASE_S = 15.0
DRAIN_S = 5.0
"""How long calls that are being served may take at shutdown."""
FLUSH_S = 0.1
"""How long clients then have to take the last replies, before their connections are closed."""
MAX_CONNECTIONS = 2 * MAX_HOSTS
MAX_HANDSHAKES = 256
"""TLS handshakes at a time. Each has to end soon."""
HOUSEKEEPING_S = 600


class Fileserver:
    """One running server. `run` it; then `serve_connection` may be called; `stop` ends it."""

    def __init__(
        self, store: Store, lease_s: float = DEFAULT_LEASE_S, max_promises: int = MAX_PROMISES,
        *, trusts_everybody: bool = False, tls: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        self.store = store
        with store_errors(store.folder):
            self.registry = Registry(store.folder, store.uuid, store.start_id, trusts_everybody=trusts_everybody)
        self.identity_calls = IdentityCalls(self.registry, self._announce_rights)
        self._tls = tls
        self._handshakes = 0
        self.lease_s = lease_s
        self._lease_ms = math.ceil(lease_s * 1000)
        self.access = AccessControl(store.acls, store.vnodes)
        self.hosts = HostTable()
        self.promises = PromiseTable()
        self.durability = Durability(store.database, store.files)
        self.deletions = Deletions(store, self.durability.commit)
        self.locks = VnodeLocks()
        self.remains = VolumeRemains(store)
        self.breaker: Breaker
        self.lock_keeper: LockKeeper
        """Both present from when `run` has started."""
        self.statistics = Statistics(self)
        self.operations: dict[type, Operation] = {}
        self.draining = False
        self.calls_served = 0
        """Calls that could not be answered at once, and are not yet."""
        self.calls = Timings()
        """By method, those that were answered; failures by abort code."""
        self._max_promises = max_promises
        self._stop = trio.Event()
        self._idle = trio.Event()
        self._sessions: set[Session] = set()
        self.command_sessions: set[Session] = set()
        """Of these, those that are of no mount."""
        self._connections: trio.Nursery

    # Life

    def stop(self) -> None:
        """Begin the shutdown; `run` returns when it is done."""
        self._stop.set()

    async def run(
        self,
        listeners: Sequence[trio.SocketListener] = (),
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stop`. The store is closed when it returns or raises, marked clean only if all went well."""
        clean = False
        try:
            with store_errors(self.store.folder):
                await self._prepare()
            async with trio.open_nursery() as background:
                self.breaker = Breaker(
                    self.hosts, self.promises, self.store.uuid, self.lease_s, background, self._max_promises
                )
                self.breaker.on_not_open = self.not_open
                self.breaker.orphans_of = self._orphans_of
                self.lock_keeper = LockKeeper(self.hosts, self.breaker, background)
                self.deletions.on_gone = self.lock_keeper.files_gone
                with store_errors(self.store.folder):
                    self._restore_hosts()
                self._make_operations()
                background.start_soon(self.durability.run)
                background.start_soon(self.durability.run_checkpoints)
                background.start_soon(self.deletions.run)
                background.start_soon(self.remains.run)
                background.start_soon(self.store.ballast.run)
                background.start_soon(self._keep_house)
                background.start_soon(self._shorten_lease)
                if not self.store.was_clean:
                    background.start_soon(self.deletions.sweep)
                await self._serve(listeners, task_status)
                await self.deletions.finish()
                background.cancel_scope.cancel()
            clean = await self._settle_on_disk()
        finally:
            control_socket.remove(self.store.folder)
            self.durability.close()
            self.registry.close()
            self.store.close(clean=clean)

    async def _prepare(self) -> None:
        """What must be on disk before anything is served."""
        database = self.store.database
        with database.transaction():
            self.store.hosts.purge_unknown()
            gone = self.store.orphans.purge_unheld()
        self.deletions.add(gone)
        if self._lease_ms > self.store.lease_ms:
            self.store.set_lease(self._lease_ms)
        if not self.store.was_clean:
            await trio.to_thread.run_sync(self.store.files.sync_all)
        for volume in self.store.volumes.in_state(VolumeState.LEAVING):
            log.error(
                "volume %s is not served: its move to server %d was interrupted; stop both servers and run"
                " 'promisefsd volume move %s %s' with that one's directory to finish it",
                volume.name, volume.other_number, self.store.folder, volume.name,
            )  # fmt: skip
        for volume in self.store.volumes.in_state(VolumeState.ARRIVING):
            log.warning(
                "volume %s did not arrive, its move was interrupted: the copy here is deleted, server %d still has it",
                volume.name, volume.other_number,
            )  # fmt: skip

    async def _serve(self, listeners: Sequence[trio.SocketListener], task_status: trio.TaskStatus[None]) -> None:
        control = control_socket.listen(self.store.folder)
        administration = Administration(self.store, self.remains, self._announce_volumes, self.durability.commit)
        controls = ControlSessions(self, administration)
        async with trio.open_nursery() as connections:
            self._connections = connections
            with trio.CancelScope() as accepting:
                async with trio.open_nursery() as acceptors:
                    for listener in listeners:
                        self._accept(acceptors, self._accepted, listener)
                    self._accept(acceptors, controls.serve, control)
                    task_status.started()
                    await self._stop.wait()
                    accepting.cancel()
            await self._drain()
            await trio.sleep(FLUSH_S)
            connections.cancel_scope.cancel()

    def _accept(
        self, acceptors: trio.Nursery, serve: Callable[[trio.SocketStream], Awaitable[None]],
        listener: trio.SocketListener,
    ) -> None:  # fmt: skip
        acceptors.start_soon(
            functools.partial(trio.serve_listeners, serve, [listener], handler_nursery=self._connections)
        )

    async def _announce_volumes(self) -> None:
        """What volumes there are, or their names, has just changed."""
        there = {volume.volume for volume in self.store.volumes.in_state(VolumeState.HERE)}
        gone = [key for key in self.lock_keeper.table.files() if key >> VNODE_BITS not in there]
        self.lock_keeper.files_gone(gone, AbortCode.VNOVOL)
        await self.breaker.settle(self.breaker.mark_all_stale())

    async def _announce_rights(self) -> None:
        """Who may do what has just changed."""
        await self.breaker.settle(self.breaker.mark_all_stale())

    async def _drain(self) -> None:
        self.draining = True
        with trio.move_on_after(DRAIN_S):
            while self.calls_served:
                self._idle = trio.Event()
                await self._idle.wait()
        if self.calls_served:
            log.warning("%d calls are cut off by the shutdown", self.calls_served)

    async def _settle_on_disk(self) -> bool:
        """Make everything durable and save the promises. Return whether the store may be marked clean."""
        try:
            if self.store.ballast.is_full:
                self.store.ballast.release()
            await trio.to_thread.run_sync(self.store.files.sync_written)
            callback_state.save(
                self.store.folder / callback_state.STATE_NAME,
                self.store.uuid,
                self.store.starts,
                time.time_ns(),
                self._saved_hosts(),
            )
        except OSError as error:
            log.error("the store is not marked clean: %s", error)
            return False
        return not self.durability.failed

    # Connections and calls

    async def _accepted(self, stream: trio.SocketStream) -> None:
        try:
            host, port = stream.socket.getpeername()[:2]
        except OSError:
            await trio.aclose_forcefully(stream)
            return
        description = f"{host}:{port}"
        if self._tls is None:
            await self.serve_connection(TcpStream(stream), description)
        else:
            secure = await self._shake_hands(stream, self._tls, description)
            if secure is not None:
                await self.serve_connection(secure, description)

    async def _shake_hands(
        self, stream: trio.SocketStream, context: ssl.SSLContext, description: str
    ) -> trio.abc.Stream | None:
        """Return the secure stream, None if there is to be none; then the connection is closed."""
        if self._handshakes >= MAX_HANDSHAKES:
            log.warning("%s: refused: %d TLS handshakes are going on", description, self._handshakes)
            await trio.aclose_forcefully(stream)
            return None
        self._handshakes += 1
        try:
            return await tls.accept(stream, context)
        except OSError as error:
            log.warning("%s: %s", description, error)
            return None
        finally:
            self._handshakes -= 1

    async def serve_connection(self, stream: trio.abc.Stream, description: str) -> None:
        """Serve one connection to its end. Raises nothing but trio.Cancelled."""
        if len(self._sessions) >= MAX_CONNECTIONS:
            log.warning("%s: refused: there are %d connections", description, len(self._sessions))
            await trio.aclose_forcefully(stream)
            return
        session = Session(self, stream, description)
        self._sessions.add(session)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)

    async def carry_out(self, first: Later, again: Later, what: str, *, growing: bool) -> Reply:
        """Run what is left of a call. If the disk is full and it is not `growing`, give up the ballast and try `again`.

        Raise Aborted, OSError.
        """
        self.calls_served += 1
        try:
            try:
                return await first()
            except sqlite3.Error as error:
                # The transaction was rolled back, so nothing has happened.
                if growing or not is_full(error) or not self.store.ballast.release():
                    raise
            return await again()
        except sqlite3.Error as error:
            if is_over_quota(error):
                raise Aborted(AbortCode.DQUOT, "the volume's quota is used up") from None
            code = AbortCode.NOSPC if is_full(error) else AbortCode.IO
            log.error("%s: %r", what, error)
            raise Aborted(code, f"the store: {error}") from None
        finally:
            self.calls_served -= 1
            if not self.calls_served:
                self._idle.set()

    @property
    def connections(self) -> int:
        return len(self._sessions)

    def served(self, method: str, seconds: float, code: int) -> None:
        """A call was answered: count it."""
        timing = self.calls[method]
        timing.started += 1
        timing.took(seconds)
        if code:
            timing.failed(code)

    def _make_operations(self) -> None:
        parts = Parts(
            self.store, self.access, self.registry.principals, self.breaker, self.durability, self.deletions, self.locks
        )
        self.operations.update(ReadOperations(parts).table())
        self.operations.update(NameOperations(parts).table())
        self.operations.update(DataOperations(parts).table())
        self.operations.update(RangeOperations(parts).table())
        self.operations.update(AclOperations(parts).table())
        self.operations.update(VolumeOperations(parts).table())
        self.operations.update(LockOperations(parts, self.lock_keeper).table())

    # Hosts

    def new_host(self, uuid: bytes, description: str) -> Host:
        """Make a host that was not known, in the store too. Raise sqlite3.Error."""
        with self.store.database.transaction():
            number = self.store.hosts.insert(uuid, description)
        host = Host(number, uuid, description)
        self.hosts.add(host)
        return host

    def make_room_for_host(self) -> None:
        """At MAX_HOSTS: forget whoever has been silent for longest and needs nothing. Abort TOO_MANY if nobody is."""
        if len(self.hosts) < MAX_HOSTS:
            return
        now_s = trio.current_time()
        idle = [h for h in self.hosts if h.lease_end_s <= now_s and not self.breaker.contact(h).connected]
        for host in sorted(idle, key=lambda host: (-host.silent_s, host.active_s)):
            if not self.store.orphans.held_by(host.number):
                message = "%s: forgotten, for there are %d hosts"
                tell(log, logging.INFO, Event.CLIENT_GONE, message, host, MAX_HOSTS, client=host)
                self.forget_host(host)
                return
        raise Aborted(AbortCode.TOO_MANY, f"{MAX_HOSTS} hosts are known already")

    def forget_host(self, host: Host) -> None:
        """The host is gone for good, and all that was kept for it."""
        with self.store.database.transaction():
            gone = self.store.orphans.release_all(host.number)
            self.store.replies.forget(host.number)
            self.store.hosts.delete(host.number)
        self.breaker.forget(host)
        self.lock_keeper.forget(host)
        self.hosts.remove(host)
        self.deletions.add(gone)

    def not_open(self, host: Host, fids: Sequence[Fid]) -> None:
        """The host does not have these unlinked files open."""
        try:
            with self.store.database.transaction():
                gone = self.store.orphans.release(host.number, [key_of(fid) for fid in fids])
        except sqlite3.Error as error:
            # They stay until the host is forgotten.
            log.error("%s: cannot release %d unlinked files: %s", host, len(fids), error)
            return
        self.deletions.add(gone)

    def _orphans_of(self, host: Host) -> Sequence[Fid]:
        try:
            found = [self.store.vnodes.find(key) for key in self.store.orphans.held_by(host.number)]
        except sqlite3.Error as error:
            log.error("%s: cannot list its unlinked files: %s", host, error)
            return ()
        return [vnode.fid for vnode in found if vnode is not None]

    def _restore_hosts(self) -> None:
        hosts = callback_state.take(
            self.store.folder / callback_state.STATE_NAME, self.store.uuid, self.store.starts - 1, time.time_ns()
        )
        if not self.store.was_clean:
            hosts = None
        now_s = trio.current_time()
        saved = {} if hosts is None else {host.uuid: host for host in hosts}
        held_locks: list[Host] = []
        for record in self.store.hosts.all():
            host = Host(record.number, record.uuid, record.description, silent_s=record.silent_s)
            host.lease_end_s = now_s + self.store.lease_ms / 1000
            self.hosts.add(host)
            there = saved.get(host.uuid)
            if there is None:
                host.become_stale(())
                host.past_unknown = True
            elif there.stale:
                host.become_stale(())
                if not there.in_doubt:
                    host.lease_end_s = -math.inf
            else:
                host.stale = False
                for key, left_s in there.promises:
                    self.promises.restore(key, host.number, int(now_s) + left_s)
            if there is not None:
                host.restore_recalled(there.recalled, there.unknown, now_s)
            if there is None or there.locks:
                held_locks.append(host)
            self.breaker.contact(host)
        self.lock_keeper.wait_for_reclaims(held_locks, self.store.lease_ms / 1000)
        if len(self.hosts):
            log.info("%d hosts known, %d promises restored", len(self.hosts), len(self.promises))

    def _saved_hosts(self) -> list[SavedHost]:
        now_s = trio.current_time()
        saved = []
        for host in self.hosts:
            contact = self.breaker.contact(host)
            if contact.batches():
                self.breaker.mark_stale(contact)
            promises = list(self.promises.remaining(host.number, now_s))
            recalled = host.recalled(now_s)
            locks = self.lock_keeper.table.holds(host.number) or self.lock_keeper.may_reclaim(host)
            in_doubt = host.in_doubt(now_s)
            saved.append(SavedHost(host.uuid, host.stale, in_doubt, host.past_unknown, promises, recalled, locks))
        return saved

    async def _shorten_lease(self) -> None:
        """When the leases of earlier runs have ended, those of this one are the longest."""
        if self._lease_ms < self.store.lease_ms:
            await trio.sleep(self.store.lease_ms / 1000)
            try:
                self.store.set_lease(self._lease_ms)
            except sqlite3.Error as error:
                log.error("restarts go on waiting for leases of %d ms: %s", self.store.lease_ms, error)

    async def _keep_house(self) -> None:
        """Reap promises, close connections that are dead, and forget hosts that have been silent for too long."""
        while True:
            await trio.sleep(HOUSEKEEPING_S)
            for host in list(self.hosts):
                await trio.lowlevel.checkpoint()
                self.promises.reap(host.number, trio.current_time())
            await self.close_dead()
            try:
                self.note_silence(HOUSEKEEPING_S)
            except sqlite3.Error as error:
                log.error("housekeeping: %s", error)

    async def close_dead(self) -> None:
        """Close the connections of hosts that have said nothing for long: nobody is there, or it has to come anew."""
        before_s = trio.current_time() - self.lease_s
        for host in list(self.hosts):
            if max(host.lease_end_s, host.active_s) < before_s:
                contact = self.breaker.contact(host)
                for peer in (contact.calls, contact.callbacks):
                    if peer is not None:
                        log.info("%s: its lease ended long ago: closing %s", host, peer.description)
                        await peer.close()

    def note_silence(self, seconds: int) -> None:
        """So much time has passed: add it to the silence of hosts whose lease has ended; forget those of too much."""
        now_s = trio.current_time()
        changed = []
        for host in list(self.hosts):
            if host.lease_end_s > now_s:
                silent_s = 0.0
            else:
                silent_s = host.silent_s + seconds
            if silent_s >= FORGOTTEN_AFTER_S:
                tell(log, logging.INFO, Event.CLIENT_GONE, "%s: silent for a day: forgotten", host, client=host)
                self.forget_host(host)
            elif silent_s != host.silent_s:
                host.silent_s = silent_s
                changed.append((int(silent_s), host.number))
        if changed:
            with self.store.database.transaction():
                self.store.hosts.set_silent(changed)

    def check_invariants(self) -> None:
        """Assert what must hold between any two steps, as far as it is in memory."""
        self.breaker.check_invariants(trio.current_time())
        self.locks.check_invariants()
        self.lock_keeper.table.check_invariants()
        self.store.vnodes.check_invariants(lambda key: self.locks.any_held((key,)))
        for session in self._sessions:
            session.check_invariants()

    def check_store_invariants(self) -> None:
        """The same for what is in the database."""
        self.store.volumes.check_invariants()
        self.store.orphans.check_invariants()
        self.store.directories.places.check_invariants()
        self.store.replies.check_invariants()
        self.deletions.check_invariants()
