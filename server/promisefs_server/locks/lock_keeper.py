"""Keeps the lock table in step with the world: leases, restarts, and answers to those who waited.

Locks last as long as their host's lease. The client's own count of it ends earlier, so nobody gets a lock before the
one who had it can know that it is gone. Before it is taken away the host's connections are closed, and what was being
carried out on them has ended: no store of its can come after the lock has passed on (the client repeats calls that it
got no answer to only when ExtendLock has told it what it lost).

After a restart the table is empty, and hosts say what they held (ExtendLock). Until each of those that may have held
something has done that, or its lease has ended, the table is paused: nobody is given anything that another may have.
After a clean shutdown these are the hosts that held locks, else all that the store knows.

Answers go out on the callbacks connection that is there at that moment, and are forgotten if it fails: its client comes
again and repeats its SetLock calls.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.connection import LocalProtocolError
from promisefs_protocol.messages import MAX_LIST, AnswerLocks, LockAnswer
from promisefs_protocol.transport import ConnectionLost, Peer

from promisefs_server.promises.breaker import Breaker
from promisefs_server.promises.hosts import Host, HostTable

from .lock_table import LockTable

log = logging.getLogger(__name__)

RECLAIM_LEASES = 2
"""A host that is there after a restart but does not say what it held is waited for so many leases."""


class LockKeeper:
    """Its tasks live in `nursery`."""

    def __init__(self, hosts: HostTable, breaker: Breaker, nursery: trio.Nursery) -> None:
        self.table = LockTable()
        self._hosts = hosts
        self._breaker = breaker
        self._nursery = nursery
        self._outboxes: dict[Peer, list[LockAnswer]] = {}
        """Present while a task sends to that peer."""
        self._minded: set[int] = set()
        self._reclaiming: dict[int, trio.Event] = {}
        """Hosts, by number, that may have held locks when the run before ended, and have not said all of it."""
        self._resumed = trio.Event()
        self._resumed.set()

    # Restarts

    def wait_for_reclaims(self, hosts: Iterable[Host], longest_s: float) -> None:
        """At the start: these may hold locks that the table does not have. `longest_s`: no lease is longer."""
        for host in hosts:
            event = self._reclaiming[host.number] = trio.Event()
            self._nursery.start_soon(
                self._expect_reclaim, host, event, trio.current_time() + RECLAIM_LEASES * longest_s
            )
        if self._reclaiming:
            self.table.paused = True
            self._resumed = trio.Event()

    async def _expect_reclaim(self, host: Host, event: trio.Event, limit_s: float) -> None:
        while not event.is_set() and (until_s := min(host.lease_end_s, limit_s)) > trio.current_time():
            with trio.CancelScope(deadline=until_s):
                await event.wait()
        if not event.is_set():
            log.info("%s: has not said in time which locks it held", host)
            self.reclaimed(host)

    def may_reclaim(self, host: Host) -> bool:
        return host.number in self._reclaiming

    def reclaimed(self, host: Host) -> None:
        """The host has said what it held, or is not waited for any longer."""
        event = self._reclaiming.pop(host.number, None)
        if event is None:
            return
        event.set()
        if not self._reclaiming:
            self.table.resume()
            self._resumed.set()
            self.answer()

    async def wait_resumed(self) -> None:
        await self._resumed.wait()

    # After changes of the table

    def changed_by(self, host: Host) -> None:
        """A call of the host's may have changed the table."""
        if host.number not in self._minded and self.table.concerns(host.number):
            self._minded.add(host.number)
            self._nursery.start_soon(self._mind, host)
        self.answer()

    def answer(self) -> None:
        """Send what the table has to say to those who waited."""
        answers, self.table.answers = self.table.answers, []
        for number, answer in answers:
            host = self._hosts.by_number(number)
            peer = None if host is None else self._breaker.contact(host).callbacks
            if peer is not None:
                outbox = self._outboxes.get(peer)
                if outbox is None:
                    outbox = self._outboxes[peer] = []
                    self._nursery.start_soon(self._deliver, peer, outbox)
                outbox.append(answer)

    async def _deliver(self, peer: Peer, outbox: list[LockAnswer]) -> None:
        try:
            while outbox:
                batch = tuple(outbox[:MAX_LIST])
                del outbox[:MAX_LIST]
                await peer.call(AnswerLocks(batch))
        except (ConnectionLost, Aborted, LocalProtocolError) as error:
            log.info("%s: waiting lock requests not answered: %r", peer.description, error)
            await peer.close()  # it comes again, and asks again
        finally:
            del self._outboxes[peer]

    # Leases

    async def _mind(self, host: Host) -> None:
        """Watch the lease of a host as long as it has locks, or waits for some."""
        while self.table.concerns(host.number):
            if trio.current_time() < host.lease_end_s:
                await trio.sleep_until(host.lease_end_s)
                continue
            contact = self._breaker.contact(host)
            for peer in (contact.calls, contact.callbacks):
                if peer is not None:
                    await peer.close()
                    await peer.wait_closed()
            if trio.current_time() >= host.lease_end_s:
                log.warning("%s: its lease ended: its locks are released", host)
                self._drop(host)
        self._minded.discard(host.number)

    def forget(self, host: Host) -> None:
        """The host is gone for good."""
        self._drop(host)
        self.reclaimed(host)

    def _drop(self, host: Host) -> None:
        self.table.drop_host(host.number)
        self.answer()

    # Files

    def files_gone(self, keys: Iterable[int], code: AbortCode = AbortCode.VNOVNODE) -> None:
        """These are not here any more."""
        self.table.drop_files(keys, code)
        self.answer()
