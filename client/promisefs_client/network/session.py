"""The session with one server: two connections, the lease, calls that survive a reconnect.

Theory of operation. `run` keeps trying: it dials the callbacks connection, says HELLO, then the calls connection, says
HELLO; from then on `call` works. It renews the lease every third of it. When either connection ends, or a
renewal is not answered before the lease has ended, both are closed and dialling begins again. The lease goes on
running meanwhile: if the server is back in time and still knows us, nothing is dropped. When it runs out,
`on_lease_lost` is called once.

Invariants
I1  `Server.lease_until` counts from when the request was *sent* that the server answered, and is TRUSTED_SHARE of the
    lease, so it ends before the lease at the server does.
I2  A call is repeated after a lost connection until its deadline. A change of names has one number however often it
    is repeated, which stays in `_operations` until its reply is here.
I3  A signal ends a call that waits for a server which is away, as its deadline would. But who catches the signal may
    try again, so it does not end a change of names that may have been carried out. While a server is connected its
    answer to a change is waited for, whatever signal comes; that to a question only until the process is killed.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.address import Address
from promisefs_protocol.connection import NOBODY, Piece
from promisefs_protocol.identity_messages import Present
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import (
    METHOD_OF_REQUEST,
    PROTOCOL_VERSION,
    CancelLock,
    CopyRange,
    Fallocate,
    FetchACL,
    FetchData,
    FetchDirectory,
    FetchStatus,
    GetEntryByID,
    GetEntryByName,
    GetLock,
    GetVolumeStatus,
    GetXattr,
    GiveUpAllCallBacks,
    Hello,
    HelloReply,
    InlineBulkStatus,
    ListXattrs,
    Lookup,
    Method,
    Operation,
    ReleaseLock,
    RenewLease,
    Role,
    Seek,
    SetLock,
    SetVolumeStatus,
    StoreACL,
    StoreData,
    StoreStatus,
    Sync,
    WhoAmI,
)
from promisefs_protocol.observe.timings import Timings
from promisefs_protocol.observe.tracing import Event, tell, tracing
from promisefs_protocol.tcp import connect
from promisefs_protocol.transport import ConnectionLost, Handler, Peer, Reply

from promisefs_client.errors import ServerUnavailable
from promisefs_client.fuse.requests import ONLY_IF_KILLED, SIGNAL_PATIENCE_S, interruptible
from promisefs_client.identity.key import Key, Keyring, current_key
from promisefs_client.locks.prompt import Promptly

from . import clock
from .clock import Clock
from .servers import Server

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
MAX_CALLS = 512
"""Calls in flight; further ones wait. Below what the connection allows."""
MAX_WAITING = 2048
"""Calls that wait for a server which is away; further ones fail at once, so that FUSE workers are left for what needs
no server, or another one."""
FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 1.0
BUSY_RETRY_S = 0.2
TRUSTED_SHARE = 0.9
"""So much of a lease is used. At its end the kernel has to drop pages and attributes, of thousands of mapped files
maybe, and all that must be over before the server stops waiting for us: 1.5 s of 15. It is also room for a clock here
that is slower than the server's: kernels correct clocks by at most 0.05 % of rate (MAXFREQ, adjtimex(2)), so a tenth is
plenty."""
LEASE_CHECK_S = 0.5
"""The lease is looked at so often: timers stand still while the machine is suspended, it does not. What we are asked
for after a resume is validated in any case; this is how long the kernel may still answer by itself."""
_TRANSIENT = {AbortCode.NO_CALLBACKS, AbortCode.SHUTTING_DOWN, AbortCode.TOO_MANY, AbortCode.NOT_INTRODUCED}


_QUESTIONS = {
    FetchStatus,
    InlineBulkStatus,
    Lookup,
    FetchDirectory,
    FetchACL,
    FetchData,
    Seek,
    GetXattr,
    ListXattrs,
    GetVolumeStatus,
    GetEntryByName,
    GetEntryByID,
    GetLock,
    FetchACL,
    WhoAmI,
}
"""Calls that change nothing."""
_REPEATABLE = {
    StoreData,
    StoreStatus,
    StoreACL,
    SetVolumeStatus,
    Fallocate,
    CopyRange,
    Sync,
    SetLock,
    CancelLock,
    ReleaseLock,
}
"""Calls that may be made again, whether or not they were carried out, by who does not know that they are repeated."""

UNNUMBERED = Operation(0, 0, False)
NO_ANSWER = 0
"""Stands for an abort code where calls that were not answered in time are counted."""


class Refused(Exception):
    """The server does not want to talk to us: nothing to wait for."""


Dial = Callable[[Address], Awaitable[trio.abc.Stream]]
"""Connects to a server. Raises OSError."""


class ServerSession:
    def __init__(
        self,
        server: Server,
        address: Address,
        client: bytes,
        description: str,
        keys: Keyring,
        timeout_s: float,
        on_callback: Handler,
        on_lease_lost: Callable[[], Awaitable[None]],
        dial: Dial = connect,
        now: Clock = clock.now,
    ) -> None:
        self.server = server
        self.address = address
        self.keys = keys
        self.timeout_s = timeout_s
        self.lease_s = 0.0
        self.connects = 0
        self.leases_lost = 0
        self.timeouts = 0
        """Calls that were not answered in time."""
        self.calls_made = Timings()
        """By method, until they were answered, repetitions and waiting for the server included. Failures by abort code,
        NO_ANSWER among them."""
        self.lost_at: float | None = None
        """When the connection was lost; None while there is one."""
        self._waiting: dict[int, float] = {}  # call -> when it began, oldest first
        self._next_call = 0
        self._client = client
        self._description = description
        self.before_calls: Callable[[Peer], Awaitable[None]] = _say_nothing
        """What has to be said on the calls connection before anything else, and when a lease that had run out goes on.
        May raise ConnectionLost, Aborted."""
        self._on_callback = on_callback
        self._on_lease_lost = on_lease_lost
        self._dial = dial
        self._now = now
        self._calls: Peer | None = None
        self._contexts: dict[bytes, int] = {}
        """By what number the server knows a token, on the calls connection that there is."""
        self._presenting = trio.Lock()
        self._slots = trio.Semaphore(MAX_CALLS)
        self._store: bytes | None = None  # UUID of the store we know; fids mean nothing to another one
        self._up = trio.Event()
        self._lease_began = trio.Event()
        self._next_operation = 0
        self._operations: set[int] = set()

    @property
    def store(self) -> bytes | None:
        """The server's, whose tokens count there; None if it was not reached yet."""
        return self._store

    @property
    def connected(self) -> bool:
        return self._calls is not None

    @property
    def waiting(self) -> int:
        """Calls whose callers wait for this server."""
        return len(self._waiting)

    def longest_wait_s(self, now: float) -> float:
        return now - next(iter(self._waiting.values()), now)

    # Calls

    def current_key(self) -> Key:
        """Whose key what this task asks goes under."""
        return current_key() or self.keys.for_upkeep(self._store or b"")

    async def call(
        self, request: Any, bulk: Piece | None = None, timeout_s: float | None = None, key: Key | None = None
    ) -> tuple[Any, bytes | None]:
        """Call the server, waiting and repeating as needed. Raise Aborted, or ServerUnavailable after `timeout`.

        The call goes under `key`: by default that of whoever this task works for, and if there is none the mount's own.
        A change of names is numbered here, whatever its `operation` is: UNNUMBERED.
        """
        method = METHOD_OF_REQUEST[type(request)]
        timing = self.calls_made[method.name]
        timing.started += 1
        if self._calls is None and len(self._waiting) >= MAX_WAITING:
            self.timeouts += 1
            timing.failed(NO_ANSWER)
            raise ServerUnavailable(f"{method.name}: {MAX_WAITING} calls wait for {self.address} already")
        self._next_call += 1
        number = self._next_call
        key = key or self.current_key()
        self._waiting[number] = began = self._now()
        try:
            with trio.move_on_after(self.timeout_s if timeout_s is None else timeout_s):
                async with Promptly(self._slots):
                    if not method.names_once:
                        answer = await self._call_repeatedly(method, request, bulk, key)
                    else:
                        with self._operation() as operation:
                            numbered = request._replace(operation=operation)
                            answer = await self._call_repeatedly(method, numbered, bulk, key)
                if tracing.on:
                    self._trace(Event.CALL, request, began)
                return answer
        except Aborted as refusal:
            timing.failed(refusal.code)
            if tracing.on:
                self._trace(Event.ABORT, request, began, str(refusal))
            raise
        finally:
            del self._waiting[number]
            timing.took(self._now() - began)
        self.timeouts += 1
        timing.failed(NO_ANSWER)
        if tracing.on:
            self._trace(Event.ABORT, request, began, "no answer")
        raise ServerUnavailable(f"{method.name}: no answer from {self.address}")

    def _trace(self, event: Event, request: Any, began: float, reason: str | None = None) -> None:
        method = METHOD_OF_REQUEST[type(request)].name
        fid = next((argument for argument in request if isinstance(argument, Fid)), None)
        seconds = self._now() - began
        tracing.emit(event, fid=fid, method=method, server=self.address, seconds=seconds, reason=reason)

    async def _call_repeatedly(
        self, method: Method, request: Any, bulk: Piece | None, key: Key
    ) -> tuple[Any, bytes | None]:
        patience_s = SIGNAL_PATIENCE_S
        while True:
            with interruptible(patience_s):
                peer = await self._wait_connected()
            try:
                if method.request not in _QUESTIONS:
                    return await peer.call(request, bulk, await self._context(peer, key))
                with interruptible(ONLY_IF_KILLED):
                    return await peer.call(request, bulk, await self._context(peer, key))
            except ConnectionLost:
                if self._calls is peer:
                    self._disconnected()
            except Aborted as refusal:
                if refusal.code not in _TRANSIENT:
                    raise
                log.debug("%s: %s; trying again", method.name, refusal)
                await trio.sleep(BUSY_RETRY_S)
            if method.names_once:
                request = request._replace(operation=request.operation._replace(repeated=True))
            if method.request not in _QUESTIONS | _REPEATABLE:
                patience_s = ONLY_IF_KILLED

    async def _context(self, peer: Peer, key: Key) -> int:
        """By what number the server knows the key's token: it is presented once on each connection.

        Raise ConnectionLost, Aborted.
        """
        assert self._store is not None
        token = key.token_for(self._store)
        if token is None:
            return NOBODY
        contexts = self._contexts
        context = contexts.get(token)
        if context is None:
            async with self._presenting:
                context = contexts.get(token)
                if context is None:
                    reply, _ = await peer.call(Present(token))
                    context = contexts[token] = reply.context
        return int(context)

    @contextmanager
    def _operation(self) -> Iterator[Operation]:
        """Number a change of names; in use until its reply has been seen (I2)."""
        self._next_operation += 1
        number = self._next_operation
        self._operations.add(number)
        try:
            yield Operation(number, min(self._operations), False)
        finally:
            self._operations.discard(number)

    async def _wait_connected(self) -> Peer:
        while self._calls is None:  # it may be gone again before we run
            await self._up.wait()
        return self._calls

    # Connections

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Stay connected until cancelled. Started when the first connection is up.

        If that fails: Refused, OSError, trio.TooSlowError; Aborted if the server would not have us for too long.
        """
        await self._stay_connected(task_status, must_begin=True)

    async def keep_trying(self) -> None:
        """The same, but the first connection may come as late as it likes."""
        await self._stay_connected(None, must_begin=False)

    async def _stay_connected(self, task_status: trio.TaskStatus[None] | None, *, must_begin: bool) -> None:
        retry_s = FIRST_RETRY_S
        first_until = trio.current_time() + CONNECT_TIMEOUT_S
        said = ""  # of this outage: what goes on for hours is not logged again and again
        while True:
            before = self.connects
            try:
                await self._connect_and_serve(task_status if self.connects == 0 else None)
            except (OSError, Refused, Aborted, trio.TooSlowError) as error:
                # On a busy machine InitCallBackState3 may take longer than a short lease; the next time it may not.
                again = isinstance(error, Aborted) and trio.current_time() < first_until
                if must_begin and self.connects == 0 and not again:
                    raise
                problem = str(error) or "no answer"
                if problem != said:
                    said = problem
                    level = logging.ERROR if isinstance(error, Refused) else logging.INFO
                    log.log(level, "%s: %s", self.address, said)
            if self.connects != before:
                tell(
                    log, logging.WARNING, Event.DISCONNECTED, "connection to %s lost", self.address, server=self.address
                )
                retry_s = FIRST_RETRY_S
                said = ""
            await trio.sleep(retry_s)
            retry_s = min(retry_s * 2, LONGEST_RETRY_S)

    async def _connect_and_serve(self, task_status: trio.TaskStatus[None] | None) -> None:
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            try:
                with trio.fail_after(CONNECT_TIMEOUT_S):
                    sent_at = self._now()
                    callbacks, hello = await self._introduce(Role.CALLBACKS, self._on_callback, nursery)
                    self._check_store(hello.server)
                    self.server.met(hello.server_start)
                    if self.server.restored:
                        log.error("%s: an older backup of the store is served: nothing cached is used", self.address)
                        await self._on_lease_lost()
                    self._extend_lease(sent_at, hello.lease_ms / 1000)
                    calls, _ = await self._introduce(Role.CALLS, _serve_nothing, nursery)
                    await self._say_first(calls)
                self.connects += 1
                self._contexts = {}
                self._calls = calls
                self.lost_at = None
                self._up.set()
                tell(log, logging.INFO, Event.CONNECTED, "connected to %s", self.address, server=self.address)
                if task_status is not None:
                    task_status.started()
                await self._renew_while_connected(callbacks, calls)
            except (OSError, Refused, Aborted, trio.TooSlowError) as error:
                failure = error  # raised outside the nursery, which would wrap it
            finally:
                self._disconnected()
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _introduce(self, role: Role, handler: Handler, nursery: trio.Nursery) -> tuple[Peer, HelloReply]:
        stream = await self._dial(self.address)
        peer = Peer(stream, handler, f"server {self.address} ({role})")
        nursery.start_soon(peer.run)
        hello = Hello("promisefs", PROTOCOL_VERSION, PROTOCOL_VERSION, self._client, role, self._description)
        try:
            reply, _ = await peer.call(hello)
        except ConnectionLost:
            if self._store is not None:  # it was one: it ended just now
                raise ConnectionResetError(f"{self.address} closed the connection") from None
            raise Refused(
                f"{self.address} closed the connection: is a promisefs server there? If it speaks TLS: -o tls"
            ) from None
        except Aborted as refusal:
            if refusal.code in _TRANSIENT:
                raise
            raise Refused(f"{self.address}: {refusal}") from None
        if role == Role.CALLS:
            self.keys.connected(reply.server, stream, str(self.address))
        return peer, reply

    async def _say_first(self, calls: Peer) -> None:
        try:
            await self.before_calls(calls)
        except ConnectionLost:
            raise ConnectionResetError(f"{self.address} closed the connection") from None

    def _check_store(self, store: bytes) -> None:
        if self._store not in (None, store):
            raise Refused(f"{self.address} serves another store now: unmount, or bring the old one back")
        self._store = store

    async def _renew_while_connected(self, callbacks: Peer, calls: Peer) -> None:
        while not callbacks.closed and not calls.closed:
            # A third of a lease after the last renewal was sent: after one that took long the next follows at once.
            due = self.server.lease_until - self.lease_s * (TRUSTED_SHARE - 1 / 3)
            await self._sleep_until_closed(callbacks, calls, max(0.0, due - self._now()))
            if callbacks.closed or calls.closed:
                return
            sent_at = self._now()
            try:
                with trio.fail_after(self.lease_s):
                    await callbacks.call(RenewLease())
            except (ConnectionLost, trio.TooSlowError):
                return
            lapses = self.server.lapses
            self._extend_lease(sent_at, self.lease_s)
            if lapses != self.server.lapses:
                await self._say_first(calls)

    @staticmethod
    async def _sleep_until_closed(callbacks: Peer, calls: Peer, seconds: float) -> None:
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:

                async def watch(peer: Peer) -> None:
                    await peer.wait_closed()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch, callbacks)
                nursery.start_soon(watch, calls)

    def _disconnected(self) -> None:
        if self._calls is not None:
            self.lost_at = self._now()
        self._calls = None
        if self._up.is_set():
            self._up = trio.Event()

    # Lease

    def _extend_lease(self, sent_at: float, lease_s: float) -> None:
        self.lease_s = lease_s
        self.server.extend_lease(sent_at + lease_s * TRUSTED_SHARE, self._now())
        self._lease_began.set()

    async def watch_lease(self) -> None:
        """Call `on_lease_lost` each time the lease runs out. Runs until cancelled."""
        while True:
            if self.server.lease_until <= self._now():
                await self._lease_began.wait()
            while (left := self.server.lease_until - self._now()) > 0:  # noqa: ASYNC110 (renewed meanwhile)
                await trio.sleep(min(left, LEASE_CHECK_S))
            message = "the lease from %s ran out: no cached data is used until it is back"
            tell(log, logging.WARNING, Event.LEASE_LOST, message, self.address, server=self.address)
            self._lease_began = trio.Event()
            self.leases_lost += 1
            await self._on_lease_lost()

    async def say_goodbye(self) -> None:
        """Tell the server that this mount ends, if it can be told."""
        calls = self._calls
        if calls is not None:
            with trio.move_on_after(2.0):
                try:
                    await calls.call(GiveUpAllCallBacks())
                except (ConnectionLost, Aborted) as error:
                    log.info("goodbye to %s: %s", self.address, error)


async def _say_nothing(calls: Peer) -> None:
    """There is nothing that could have been lost."""


async def _serve_nothing(request: Any, bulk: bytes | None, context: int) -> Reply:
    raise Aborted(AbortCode.UNKNOWN_METHOD, "calls to a client come on its callbacks connection")
