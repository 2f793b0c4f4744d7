"""One connection of a client: HELLO, then its calls, each checked for where and when it may be made."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

import trio
from promisefs_protocol.abort import AbortCode, Aborted, name_of
from promisefs_protocol.messages import (
    METHOD_OF_REQUEST,
    MUTATIONS,
    PROTOCOL_VERSION,
    AppendData,
    CreateFile,
    Empty,
    GiveUpAllCallBacks,
    GiveUpCallBacks,
    GiveUpOpen,
    Hello,
    HelloReply,
    Link,
    MakeDir,
    MakeMountPoint,
    RenewLease,
    Role,
    SetXattr,
    StoreData,
    Symlink,
    fids_of,
)
from promisefs_protocol.observe.tracing import Event, tell, tracing
from promisefs_protocol.transport import Peer, Reply

from .identity.caller import Caller
from .identity.calls import Asker
from .identity.contexts import Contexts
from .operations.parts import Later
from .promises.breaker import Contact
from .store.vnodes import key_of

if TYPE_CHECKING:
    from .service import Fileserver

log = logging.getLogger(__name__)

MAGIC = "promisefs"
OLDEST_VERSION = 2
HELLO_TIMEOUT_S = 10.0
"""A connection that has not introduced itself by then is closed."""
GATE_TIMEOUT_S = 10.0
"""How long a call of a stale host waits for its InitCallBackState3."""
COMMANDS_LIMIT_S = 120.0
"""A connection for commands is closed after this: people make a few calls and go."""
MAX_COMMANDS = 64
"""Connections for commands at a time, so that they cannot take those of mounts."""

_GROWING = (CreateFile, MakeDir, MakeMountPoint, Symlink, Link, SetXattr, StoreData, AppendData)
"""What has to go without the ballast when the disk is full."""


class Session:
    def __init__(self, server: Fileserver, stream: trio.abc.Stream, description: str) -> None:
        self._server = server
        self._peer = Peer(stream, self._handle, description, self._served)
        self._contexts = Contexts()
        self._contact: Contact | None = None
        self._role = ""
        self._introduced = trio.Event()

    async def run(self) -> None:
        """Serve to the end of the connection. Raises nothing but trio.Cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._expect_hello)
                await self._peer.run()
                nursery.cancel_scope.cancel()
        finally:
            self._server.command_sessions.discard(self)
            contact = self._contact
            if contact is not None:
                if contact.calls is self._peer:
                    contact.calls = None
                self._server.breaker.callbacks_lost(contact, self._peer)

    def check_invariants(self) -> None:
        """A connection is used for a host in the role that it said in HELLO."""
        contact = self._contact
        assert (contact is not None or self._role == Role.COMMANDS) is self._introduced.is_set()
        if contact is not None:
            assert self._role == Role.CALLBACKS or contact.callbacks is not self._peer
            assert self._role == Role.CALLS or contact.calls is not self._peer

    async def _expect_hello(self) -> None:
        with trio.move_on_after(HELLO_TIMEOUT_S):
            await self._introduced.wait()
        if not self._introduced.is_set():
            log.warning("%s: said no HELLO: closing the connection", self._peer.description)
            await self._peer.close()
        elif self._role == Role.COMMANDS:
            await trio.sleep(COMMANDS_LIMIT_S)
            await self._peer.close()

    # Calls

    def _served(self, method: str, seconds: float, code: int) -> None:
        """A call was answered: count it."""
        self._server.served(method, seconds, code)
        if tracing.on:
            client = self._peer.description if self._contact is None else self._contact.host
            event, reason = (Event.ABORT, name_of(code)) if code else (Event.CALL, None)
            tracing.emit(event, method=method, client=client, seconds=seconds, reason=reason)

    def _handle(self, request: Any, bulk: bytes | None, context: int) -> Reply | Coroutine[Any, Any, Reply]:
        if self._server.draining:
            return _never()
        try:
            result = self._dispatch(request, bulk, context)
        except sqlite3.Error as error:
            result = partial(_fail, error)
        if isinstance(result, tuple):
            return result
        again = partial(self._dispatch_and_wait, request, bulk, context)
        growing = isinstance(request, _GROWING)
        return self._server.carry_out(
            result, again, f"{self._peer.description}: {type(request).__name__}", growing=growing
        )

    async def _dispatch_and_wait(self, request: Any, bulk: bytes | None, context: int) -> Reply:
        result = self._dispatch(request, bulk, context)
        return result if isinstance(result, tuple) else await result()

    def _dispatch(self, request: Any, bulk: bytes | None, context: int) -> Reply | Later:
        if isinstance(request, Hello):
            return partial(self._hello, request)
        if self._server.identity_calls.serves(request) and self._role in (Role.CALLS, Role.COMMANDS):
            return partial(self._identify, request, context)
        contact = self._contact
        if contact is None:
            where = "this is a connection for commands" if self._introduced.is_set() else "HELLO comes first"
            raise Aborted(AbortCode.NOT_INTRODUCED, where)
        self._server.breaker.check_known(contact)
        contact.host.active_s = received_s = trio.current_time()
        if self._role == Role.CALLBACKS:
            if not isinstance(request, RenewLease):
                raise Aborted(AbortCode.NOT_INTRODUCED, "this is the callbacks connection")
            return partial(self._renew, contact, received_s)
        if contact.host.stale:
            return partial(self._when_fresh, contact, request, bulk, context)
        return self._operate(contact, request, bulk, context)

    async def _identify(self, request: Any, context: int) -> Reply:
        """A call about who somebody is."""
        identity = self._server.registry.identity(self._contexts, context)
        address = self._peer.description.rpartition(":")[0]
        return await self._server.identity_calls.carry_out(Asker(identity, self._contexts, address), request), None

    async def _renew(self, contact: Contact, received_s: float) -> Reply:
        await self._server.breaker.renew(contact, received_s)
        return Empty(), None

    async def _when_fresh(self, contact: Contact, request: Any, bulk: bytes | None, context: int) -> Reply:
        await self._server.breaker.wait_fresh(contact, GATE_TIMEOUT_S)
        result = self._operate(contact, request, bulk, context)
        return result if isinstance(result, tuple) else await result()

    def _operate(self, contact: Contact, request: Any, bulk: bytes | None, context: int) -> Reply | Later:
        operation = self._server.operations.get(type(request))
        if operation is not None:
            if isinstance(request, MUTATIONS):
                self._server.store.volumes.check_writable(next(fids_of(request)).volume)
            identity = self._server.registry.identity(self._contexts, context)
            return operation(Caller(contact, identity), request, bulk)
        return self._give_up(contact, request), None

    def _give_up(self, contact: Contact, request: Any) -> Empty:
        server = self._server
        match request:
            case GiveUpCallBacks(fids=fids):
                for fid in fids:
                    server.promises.delete(key_of(fid), contact.host.number)
            case GiveUpOpen(fids=fids):
                server.not_open(contact.host, fids)
            case GiveUpAllCallBacks():
                tell(log, logging.INFO, Event.CLIENT_GONE, "%s: gone", contact.host, client=contact.host)
                server.forget_host(contact.host)
            case _:
                name = METHOD_OF_REQUEST[type(request)].name
                raise Aborted(AbortCode.NOT_INTRODUCED, f"{name} is no call for this connection")
        return Empty()

    # HELLO

    async def _hello(self, hello: Hello) -> Reply:
        received_s = trio.current_time()
        if self._introduced.is_set():
            raise Aborted(AbortCode.NOT_INTRODUCED, "HELLO was said before")
        if hello.magic != MAGIC or hello.role not in tuple(Role):
            raise Aborted(AbortCode.BAD_MESSAGE, "this is a promisefs server")
        version = min(hello.newest_version, PROTOCOL_VERSION)
        if version < max(hello.oldest_version, OLDEST_VERSION):
            raise Aborted(
                AbortCode.BAD_VERSION,
                f"this server speaks versions {OLDEST_VERSION} to {PROTOCOL_VERSION},"
                f" you {hello.oldest_version} to {hello.newest_version}",
            )
        server = self._server
        if hello.role == Role.COMMANDS:
            if len(server.command_sessions) >= MAX_COMMANDS:
                raise Aborted(AbortCode.TOO_MANY, f"{MAX_COMMANDS} commands are being served: try again")
            server.command_sessions.add(self)
            self._role = hello.role
            self._introduced.set()
            return self._hello_reply(version), None
        host = server.hosts.by_uuid(hello.client)
        if host is None:
            if hello.role != Role.CALLBACKS:
                raise Aborted(AbortCode.NO_CALLBACKS, "the callbacks connection comes first")
            server.make_room_for_host()
            host = server.new_host(hello.client, hello.description)
        contact = self._contact = server.breaker.contact(host)
        self._role = hello.role
        self._introduced.set()
        host.active_s, host.description = received_s, hello.description
        if hello.role == Role.CALLBACKS:
            # Else power loss could make the next start forget whom it has to wait for. Also if the host is not new: its
            # first HELLO may have been cut off before this.
            await server.durability.commit()
            await server.breaker.callbacks_connected(contact, self._peer, received_s)
            address = self._peer.description
            about = {"client": host, "address": address}
            tell(log, logging.INFO, Event.CONNECTED, "%s: connected from %s", host, address, **about)
        else:
            await self._take_over_calls(contact)
        return self._hello_reply(version), None

    def _hello_reply(self, version: int) -> HelloReply:
        server = self._server
        lease_ms = int(server.lease_s * 1000)
        return HelloReply(version, server.store.uuid, server.store.start_id, lease_ms, lease_ms)

    async def _take_over_calls(self, contact: Contact) -> None:
        """What the host repeats here, and what it does next, comes after all that was begun on its last connection."""
        old, contact.calls = contact.calls, self._peer
        if old is not None:
            await old.close()
            await old.wait_closed()


async def _never() -> Reply:
    await trio.sleep_forever()


async def _fail(error: sqlite3.Error) -> Reply:
    raise error
