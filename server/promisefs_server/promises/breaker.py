"""Telling hosts before what they cached goes stale: steps 4 and 5 of a mutation.

`begin` is called in one step with the publication of a change. It takes the promises on what changed out of the table
and queues their breaks; what it returns is waited for before the caller gets its reply. Calls to a host are
made in batches: what is queued while a batch's task has not started goes with it.

Who has to be waited for
W1  Every host with a promise, until it acknowledged this break.
W2  Every host that has not yet acknowledged an earlier break of the same fid: it gets this one too, since what it does
    about the earlier one may not be enough.
W3  Every host in doubt (see `hosts`): it may be using promises that are not in the table any more.
Each wait ends at the latest when the host's lease ends.

A lease is renewed only when every break that was queued before the renewal arrived has been acknowledged. So a host
that answers renewals but not breaks is waited for no longer than one lease.

A host becomes stale when a break failed, when its lease ended with breaks outstanding, and when the
promise table is full.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.connection import LocalProtocolError
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import MAX_LIST, Break, CallBack, Changed, InitCallBackState3
from promisefs_protocol.observe.timings import Timing
from promisefs_protocol.observe.tracing import Event, tell, tracing
from promisefs_protocol.transport import ConnectionLost, Peer

from promisefs_server.store.vnodes import key_of

from .hosts import Host, HostTable
from .promises import MAX_PROMISES, PromiseTable

log = logging.getLogger(__name__)

NOT_ACKNOWLEDGED = 0
"""Stands for an abort code where breaks that came to nothing are counted."""
MAX_BATCHES_IN_FLIGHT = 16
"""CB.CallBack calls to one host at a time; more breaks wait and go together."""

NotOpen = Callable[[Host, Sequence[Fid]], None]
"""Told which deleted fids a host, having acknowledged their break, does not have open."""


class _Batch:
    def __init__(self, queued_s: float) -> None:
        self.breaks: dict[Fid, Break] = {}
        self.queued_s = queued_s
        self.settled = trio.Event()
        self.scope = trio.CancelScope()

    def add(self, new: Break) -> None:
        old = self.breaks.get(new.fid)
        if old is not None:
            new = new._replace(changed=old.changed | new.changed)
        self.breaks[new.fid] = new


class Contact:
    """A host and how it is reached."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.calls: Peer | None = None
        self.callbacks: Peer | None = None
        self.fresh = trio.Event()
        """Set iff the host is not stale."""
        self.doubt: trio.Event | None = None
        """Present while the host is in doubt; set when that ends."""
        self.waiting: list[_Batch] = []
        """Not sent yet; the last one takes what is queued until it is full."""
        self.in_flight: list[_Batch] = []
        self.initialising = False
        self.minded = False

    @property
    def connected(self) -> bool:
        return self.callbacks is not None or self.calls is not None

    def batches(self) -> list[_Batch]:
        return [*self.in_flight, *self.waiting]

    @property
    def breaks_owed(self) -> int:
        """Breaks that the host has not acknowledged."""
        return sum(len(batch.breaks) for batch in self.batches())

    def longest_break_s(self, now_s: float) -> float:
        """For how long the oldest of them has been under way; 0 if there is none."""
        return max((now_s - batch.queued_s for batch in self.batches()), default=0.0)

    def has_outstanding(self, fid: Fid) -> bool:
        return any(fid in batch.breaks for batch in self.batches())


class Breaker:
    """Owns the hosts' contacts and every change of the promise table but grants. Its tasks live in `nursery`."""

    def __init__(
        self, hosts: HostTable, promises: PromiseTable, server_uuid: bytes, lease_s: float,
        nursery: trio.Nursery, max_promises: int = MAX_PROMISES,
    ) -> None:  # fmt: skip
        self.hosts = hosts
        self.promises = promises
        self.lease_s = lease_s
        self._server_uuid = server_uuid
        self._nursery = nursery
        self._max_promises = max_promises
        self._contacts: dict[int, Contact] = {}
        self.breaks_sent = 0
        self.resets_sent = 0
        """InitCallBackState3 calls."""
        self.leases_ended = 0
        """Hosts that had not acknowledged breaks when their lease ended."""
        self.deliveries = Timing()
        """CB.CallBack calls, until they were acknowledged or given up, which `failures` counts."""
        self.waits = Timing()
        """Of mutations for the acknowledgements of others."""
        self.on_not_open: NotOpen = lambda host, fids: None
        self.orphans_of: Callable[[Host], Sequence[Fid]] = lambda host: ()
        """Which orphans are kept for a host; it is asked about them after InitCallBackState3."""

    # Hosts

    def contact(self, host: Host) -> Contact:
        contact = self._contacts.get(host.number)
        if contact is None:
            contact = self._contacts[host.number] = Contact(host)
            if not host.stale:
                contact.fresh.set()
            elif host.in_doubt(trio.current_time()):
                self._begin_doubt(contact, ())
        return contact

    def forget(self, host: Host) -> None:
        """The host is gone for good; whoever waits for it need not any longer."""
        contact = self._contacts.pop(host.number, None)
        self.promises.delete_host(host.number)
        if contact is None:
            return
        host.stale = True
        if contact.doubt is not None:
            contact.doubt.set()
            contact.doubt = None
        for batch in contact.batches():
            batch.scope.cancel()
            batch.settled.set()
        contact.waiting.clear()

    def check_known(self, contact: Contact) -> None:
        """Abort NOT_INTRODUCED if the host has been forgotten: nothing may be kept for it any more."""
        if not self._knows(contact):
            raise Aborted(AbortCode.NOT_INTRODUCED, "HELLO comes first: this host has said that it is gone")

    def _knows(self, contact: Contact) -> bool:
        return self._contacts.get(contact.host.number) is contact

    # Grants

    def grant(self, host: Host, key: int) -> int:
        """Promise `host` to tell it before vnode `key` changes. Return for how many seconds; 0 for no promise."""
        if host.stale:
            return 0
        if len(self.promises) >= self._max_promises:
            self._make_room()
            if host.stale:
                return 0
        return self.promises.grant(key, host.number, trio.current_time())

    def _make_room(self) -> None:
        """The table is full: the least recently active host loses all that it holds."""
        holders = [host for host in self.hosts if self.promises.count_of(host.number)]
        victim = min(holders, key=lambda host: host.active_s)
        log.warning("the promise table is full: %s loses its %d", victim, self.promises.count_of(victim.number))
        self.mark_stale(self.contact(victim))

    # Breaks

    def may_have_open(self, fid: Fid, caller: Host) -> set[int]:
        """The hosts, by number, other than the caller, that may have a file open: with a promise, or past knowing."""
        now_s = trio.current_time()
        key = key_of(fid)
        numbers = set(self.promises.holders(key, now_s))
        numbers.update(host.number for host in self.hosts.may_have_open(key, now_s))
        numbers.update(contact.host.number for contact in self._contacts.values() if contact.has_outstanding(fid))
        numbers.discard(caller.number)
        return numbers

    def begin(self, caller: Host | None, breaks: Iterable[Break]) -> list[trio.Event]:
        """Queue breaks for everyone but the caller, who learns it by the reply; None: for everyone.

        Return what has to be set before the mutation is answered.
        """
        now_s = trio.current_time()
        events: list[trio.Event] = []
        busy = [c for c in self._contacts.values() if c.waiting or c.in_flight]
        for item in breaks:
            key = key_of(item.fid)
            targets = {number: self._contacts[number] for number in self.promises.holders(key, now_s)}
            for contact in busy:
                if contact.has_outstanding(item.fid):
                    targets[contact.host.number] = contact
            if item.changed & Changed.DELETED:
                for host in self.hosts.may_have_open(key, now_s):
                    targets[host.number] = self.contact(host)
            if caller is not None:
                targets.pop(caller.number, None)
            for contact in targets.values():
                self.promises.delete(key, contact.host.number)
                if item.changed & Changed.DELETED:
                    contact.host.asked(key)
                else:
                    contact.host.promise_broken(key, now_s)
                if not contact.host.stale:
                    events.append(self._queue(contact, item))
        for contact in self._contacts.values():
            if contact.doubt is not None:
                events.append(contact.doubt)
        return events

    def outstanding(self) -> list[trio.Event]:
        """What a mutation that changes nothing more would wait for: all that is under way."""
        events = [batch.settled for contact in self._contacts.values() for batch in contact.batches()]
        return events + [c.doubt for c in self._contacts.values() if c.doubt is not None]

    async def settle(self, events: Iterable[trio.Event]) -> None:
        """Step 5: wait until every host acknowledged or its lease has ended."""
        not_set = [event for event in events if not event.is_set()]
        if not not_set:
            return
        self.waits.started += 1
        began_s = trio.current_time()
        for event in not_set:
            await event.wait()
        self.waits.took(trio.current_time() - began_s)

    def _queue(self, contact: Contact, item: Break) -> trio.Event:
        if tracing.on:
            what = "|".join(flag.name.lower() for flag in Changed(item.changed) if flag.name)
            tracing.emit(Event.CB_BREAK, fid=item.fid, client=contact.host, changed=what, dv=item.data_version)
        waiting = contact.waiting
        if not waiting or (len(waiting[-1].breaks) >= MAX_LIST and item.fid not in waiting[-1].breaks):
            waiting.append(_Batch(trio.current_time()))
            if len(waiting) + len(contact.in_flight) <= MAX_BATCHES_IN_FLIGHT:
                self._nursery.start_soon(self._deliver, contact)
        waiting[-1].add(item)
        if not contact.minded:
            contact.minded = True
            self._nursery.start_soon(self._mind, contact)
        return waiting[-1].settled

    async def _deliver(self, contact: Contact) -> None:
        """Send batches to a host until none is waiting."""
        while contact.waiting:
            batch = contact.waiting.pop(0)
            contact.in_flight.append(batch)
            if await self._acknowledged(contact, batch):
                if batch in contact.in_flight:
                    contact.in_flight.remove(batch)
                batch.settled.set()
            elif batch in contact.in_flight:
                self.mark_stale(contact)

    async def _acknowledged(self, contact: Contact, batch: _Batch) -> bool:
        peer = contact.callbacks
        if peer is None or contact.host.stale:
            return False
        self.breaks_sent += len(batch.breaks)
        self.deliveries.started += 1
        began_s = trio.current_time()
        with batch.scope:
            try:
                reply, _ = await peer.call(CallBack(tuple(batch.breaks.values())))
            except (ConnectionLost, Aborted, LocalProtocolError) as error:
                fid, count = next(iter(batch.breaks)), len(batch.breaks)
                message = "%s: break of %s%s not acknowledged: %r"
                more = f" and {count - 1} more" if count > 1 else ""
                about = {"fid": fid, "client": contact.host, "breaks": count, "reason": repr(error)}
                tell(log, logging.INFO, Event.CB_NOT_ACKED, message, contact.host, fid, more, error, **about)
                self.deliveries.failed(NOT_ACKNOWLEDGED)
                return False
            finally:
                self.deliveries.took(trio.current_time() - began_s)
            still_open = set(reply.still_open)
            deleted = [b.fid for b in batch.breaks.values() if b.changed & Changed.DELETED]
            if tracing.on:
                about = {"breaks": len(batch.breaks), "seconds": trio.current_time() - began_s}
                tracing.emit(Event.CB_ACK, fid=next(iter(batch.breaks)), client=contact.host, **about)
            not_open = [fid for fid in deleted if fid not in still_open]
            if not_open:
                self.on_not_open(contact.host, not_open)
            return True
        self.deliveries.failed(NOT_ACKNOWLEDGED)
        return False

    async def _mind(self, contact: Contact) -> None:
        """Watch the lease of a host as long as breaks are outstanding."""
        while contact.batches():
            if trio.current_time() >= contact.host.lease_end_s:
                message, owed = "%s: its lease ended with %d breaks outstanding", contact.breaks_owed
                about = {"client": contact.host, "breaks": owed}
                tell(log, logging.WARNING, Event.LEASE_LOST, message, contact.host, owed, **about)
                self.leases_ended += 1
                peer = contact.callbacks
                self.mark_stale(contact)
                if peer is not None:
                    # A peer that does not read blocks its senders until this. Meanwhile the host may have come back.
                    await peer.close()
            else:
                await trio.sleep_until(contact.host.lease_end_s)
        contact.minded = False

    # Stale hosts

    def mark_stale(self, contact: Contact) -> None:
        """The host loses all promises; what it knows is worth nothing until it acknowledged InitCallBackState3.

        Breaks that it had not acknowledged settle when it does that, or when its lease ends.
        """
        host = contact.host
        if host.stale:
            return
        host.become_stale(self.promises.delete_host(host.number))
        contact.fresh = trio.Event()
        lost = contact.batches()
        contact.waiting.clear()
        contact.in_flight.clear()
        for batch in lost:
            batch.scope.cancel()
        self._begin_doubt(contact, lost)
        self._nursery.start_soon(self.initialise, contact)

    def mark_all_stale(self) -> list[trio.Event]:
        """Every host gets InitCallBackState3 before anything else. Return what is set when none trusts what it had."""
        for host in self.hosts:
            self.mark_stale(self.contact(host))
        return self.outstanding()

    def _begin_doubt(self, contact: Contact, lost: Sequence[_Batch]) -> None:
        contact.doubt = trio.Event()
        self._nursery.start_soon(self._end_doubt, contact, contact.doubt, lost)

    @staticmethod
    async def _end_doubt(contact: Contact, doubt: trio.Event, lost: Sequence[_Batch]) -> None:
        with trio.CancelScope(deadline=contact.host.lease_end_s):
            await doubt.wait()
        doubt.set()
        if contact.doubt is doubt:
            contact.doubt = None
        for batch in lost:
            batch.settled.set()

    async def initialise(self, contact: Contact) -> None:
        """Have a stale host forget all promises, on whichever callbacks connection it has or gets meanwhile."""
        if contact.initialising:
            return
        contact.initialising = True
        try:
            while self._knows(contact) and contact.host.stale and (peer := contact.callbacks) is not None:
                sent_s = trio.current_time()
                self.resets_sent += 1
                if tracing.on:
                    tracing.emit(Event.CB_RESET, client=contact.host)
                try:
                    await peer.call(InitCallBackState3(self._server_uuid))
                except (ConnectionLost, Aborted, LocalProtocolError) as error:
                    log.info("%s: InitCallBackState3: %r", contact.host, error)
                    if contact.callbacks is peer:
                        contact.callbacks = None
                    await peer.close()
                    continue
                if contact.callbacks is peer and self._knows(contact):
                    self._initialised(contact, sent_s)
        finally:
            contact.initialising = False

    def _initialised(self, contact: Contact, sent_s: float) -> None:
        host = contact.host
        host.initialised(trio.current_time())
        # Whatever the client counts its lease from, a HELLO or a renewal, it sent before.
        host.renew(sent_s, self.lease_s)
        contact.fresh.set()
        if contact.doubt is not None:
            contact.doubt.set()
            contact.doubt = None
        for fid in self.orphans_of(host):
            self._queue(contact, Break(fid, Changed.DELETED, 0))

    async def wait_fresh(self, contact: Contact, timeout_s: float) -> None:
        """Return when the host is not stale. Abort NO_CALLBACKS if it does not happen in time, NOT_INTRODUCED."""
        if not contact.fresh.is_set():
            with trio.move_on_after(timeout_s):
                await contact.fresh.wait()
        self.check_known(contact)
        if not contact.fresh.is_set():
            raise Aborted(AbortCode.NO_CALLBACKS, "InitCallBackState3 was not acknowledged")

    # Leases

    async def callbacks_connected(self, contact: Contact, peer: Peer, received_s: float) -> None:
        """A callbacks connection said HELLO. Return when the host's lease runs; abort NO_CALLBACKS."""
        old, contact.callbacks = contact.callbacks, peer
        if contact.batches():
            # Breaks were lost with the old connection, or may have been.
            self.mark_stale(contact)
        if old is not None:
            await old.close()
            await old.wait_closed()
        await self._renew_when_fresh(contact, received_s)

    def callbacks_lost(self, contact: Contact, peer: Peer) -> None:
        if contact.callbacks is peer:
            contact.callbacks = None

    async def renew(self, contact: Contact, received_s: float) -> None:
        """CB.RenewLease. Return when the lease is renewed; abort NO_CALLBACKS."""
        await self.settle([batch.settled for batch in contact.batches()])
        await self._renew_when_fresh(contact, received_s)

    async def _renew_when_fresh(self, contact: Contact, received_s: float) -> None:
        self.check_known(contact)
        if contact.host.stale:
            self._nursery.start_soon(self.initialise, contact)
            await self.wait_fresh(contact, self.lease_s)
        contact.host.renew(received_s, self.lease_s)

    def check_invariants(self, now_s: float) -> None:
        """Assert those of `hosts` and `promises`, and that each break that is waited for is under way and minded."""
        self.hosts.check_invariants()
        self.promises.check_invariants()
        for number, contact in self._contacts.items():
            host, batches = contact.host, contact.batches()
            assert self.hosts.by_number(number) is host
            assert not (host.stale and self.promises.count_of(number)), "hosts I1"
            assert contact.doubt is not None or not host.in_doubt(now_s), "hosts I2"
            assert contact.fresh.is_set() is not host.stale
            assert not (batches and host.stale), "breaks for a host that is to forget everything"
            assert contact.minded or not batches, "nobody watches the lease of a host that owes acknowledgements"
            assert len(contact.in_flight) <= MAX_BATCHES_IN_FLIGHT
            for batch in batches:
                assert batch.breaks and len(batch.breaks) <= MAX_LIST and not batch.settled.is_set()
