"""A server in the test's own process, and a bare client that shows every message."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trio.testing
from promisefs_protocol.abort import Aborted
from promisefs_protocol.connection import Piece
from promisefs_protocol.identity_messages import Present
from promisefs_protocol.ids import Fid, PromisedStatus
from promisefs_protocol.messages import (
    PROTOCOL_VERSION,
    AnswerLocks,
    Break,
    CallBack,
    CallBackReply,
    CreateFile,
    Empty,
    FetchData,
    FetchStatus,
    GetEntryByName,
    Hello,
    HelloReply,
    InitCallBackState3,
    Link,
    LockAnswer,
    Lookup,
    MakeDir,
    Operation,
    RemoveDir,
    RemoveFile,
    Rename,
    RenewLease,
    Role,
    StoreData,
    StoreStatus,
    Symlink,
)
from promisefs_protocol.transport import ConnectionLost, Peer
from promisefs_server.administration import control_socket
from promisefs_server.service import Fileserver
from promisefs_server.store.membership import ALONE, Membership
from promisefs_server.store.store import Store

Connect = Callable[[], Awaitable[trio.abc.Stream]]
LEASE_S = 15.0
NUMBERS = itertools.count(1)
"""Of operations; a client that comes back with its uuid must not use one twice."""


class TokenPeer(Peer):
    """A peer whose calls go under the token that was presented, unless they say otherwise."""

    context = 0

    async def call(
        self, request: Any, bulk: Piece | None = None, context: int | None = None
    ) -> tuple[Any, bytes | None]:
        return await super().call(request, bulk, self.context if context is None else context)

    async def present(self, token: bytes) -> None:
        self.context = (await self.call(Present(token)))[0].context


class Client:
    """One mount as the server sees it: two connections, breaks recorded, acknowledged unless told otherwise."""

    volume = "root"
    """Whose root directory is `root`; empty for none."""

    def __init__(
        self, connect: Connect, nursery: trio.Nursery, uuid: bytes | None, token: Callable[[bytes], bytes]
    ) -> None:
        """`token` gives the one to present to the server that has a store."""
        self._connect = connect
        self._token = token
        self._nursery = nursery
        self.uuid = uuid or os.urandom(16)
        self.breaks: list[Break] = []
        self.inits = 0
        self.lock_answers: list[LockAnswer] = []
        self.open_fids: set[Fid] = set()
        self.acknowledge = trio.Event()
        """Breaks are acknowledged only when it is set."""
        self.acknowledge.set()
        self.acknowledge_init = trio.Event()
        self.acknowledge_init.set()
        self.root: Fid
        self.calls: TokenPeer
        self.callbacks: Peer
        self.hello: HelloReply

    async def open_peer(self, handler: Any = None) -> TokenPeer:
        async def refuse(request: Any, bulk: bytes | None, context: int) -> Any:
            raise AssertionError(request)

        peer = TokenPeer(await self._connect(), handler or refuse, "server")
        self._nursery.start_soon(peer.run)
        return peer

    def hello_as(self, role: str) -> Hello:
        return Hello("promisefs", PROTOCOL_VERSION, PROTOCOL_VERSION, self.uuid, role, "test")

    async def connect_callbacks(self) -> None:
        self.callbacks = await self.open_peer(self._handle)
        self.hello = (await self.callbacks.call(self.hello_as(Role.CALLBACKS)))[0]

    async def connect_calls(self) -> None:
        self.calls = await self.open_peer()
        await self.calls.call(self.hello_as(Role.CALLS))
        await self.calls.present(self._token(self.hello.server))

    async def connect(self) -> Client:
        await self.connect_callbacks()
        await self.connect_calls()
        if self.volume:
            self.root = (await self.call(GetEntryByName(self.volume))).root
        return self

    async def _handle(self, request: Any, bulk: bytes | None, context: int) -> Any:
        if isinstance(request, CallBack):
            self.breaks += request.breaks
            await self.acknowledge.wait()
            return CallBackReply(tuple(b.fid for b in request.breaks if b.fid in self.open_fids)), None
        if isinstance(request, AnswerLocks):
            self.lock_answers += request.answers
            return Empty(), None
        assert isinstance(request, InitCallBackState3), request
        self.inits += 1
        await self.acknowledge_init.wait()
        return Empty(), None

    async def call(self, request: Any, bulk: bytes | None = None) -> Any:
        return (await self.calls.call(request, bulk))[0]

    async def renew(self) -> None:
        await self.callbacks.call(RenewLease())

    def broken(self) -> set[Fid]:
        return {b.fid for b in self.breaks}

    def op(self, *, repeated: bool = False) -> Operation:
        return Operation(next(NUMBERS), 0, repeated)

    # Short forms of calls

    async def create(self, name: bytes, directory: Fid | None = None, mode: int = 0o100644) -> PromisedStatus:
        return (await self.call(CreateFile(self.op(), directory or self.root, name, mode, 1000, 1000))).entry

    async def mkdir(self, name: bytes, directory: Fid | None = None, mode: int = 0o755) -> PromisedStatus:
        return (await self.call(MakeDir(self.op(), directory or self.root, name, mode, 1000, 1000))).entry

    async def symlink(self, name: bytes, target: bytes) -> PromisedStatus:
        return (await self.call(Symlink(self.op(), self.root, name, target, 1000, 1000))).entry

    async def link(self, fid: Fid, name: bytes, directory: Fid | None = None) -> Any:
        return await self.call(Link(self.op(), fid, directory or self.root, name))

    async def unlink(self, name: bytes, directory: Fid | None = None, keep_open: bool = False) -> Any:
        not_open = None if keep_open else await self._named(directory or self.root, name)
        return await self.call(RemoveFile(self.op(), directory or self.root, name, not_open))

    async def _named(self, directory: Fid, name: bytes) -> Fid | None:
        entry = await self.lookup(name, directory)
        return None if entry is None else entry.fid

    async def rmdir(self, name: bytes, directory: Fid | None = None) -> Any:
        return await self.call(RemoveDir(self.op(), directory or self.root, name))

    async def rename(
        self, old: tuple[Fid, bytes], new: tuple[Fid, bytes], flags: int = 0, keep_open: bool = False
    ) -> Any:
        not_open = None if keep_open else await self._named(*new)
        return await self.call(Rename(self.op(), *old, *new, flags, not_open))

    async def lookup(self, name: bytes, directory: Fid | None = None) -> PromisedStatus | None:
        return (await self.call(Lookup(directory or self.root, name))).entry

    async def stat(self, fid: Fid) -> PromisedStatus:
        return (await self.call(FetchStatus(fid))).entry

    async def store(self, fid: Fid, data: bytes, offset: int = 0, sync: bool = False) -> PromisedStatus:
        return (await self.call(StoreData(fid, offset, None, sync), data)).entry

    async def fetch(self, fid: Fid, offset: int = 0, length: int = 1 << 20) -> bytes:
        _, data = await self.calls.call(FetchData(fid, offset, length))
        assert data is not None
        return data

    async def truncate(self, fid: Fid, size: int) -> PromisedStatus:
        return (await self.call(StoreStatus(fid, None, None, None, size, None, None))).entry

    async def chmod(self, fid: Fid, mode: int) -> PromisedStatus:
        return (await self.call(StoreStatus(fid, mode, None, None, None, None, None))).entry


class Cell:
    """A running server and its clients."""

    def __init__(
        self, folder: Path, nursery: trio.Nursery, lease_s: float, max_promises: int, membership: Membership
    ) -> None:
        self.nursery = nursery
        self.server = Fileserver(Store.open(folder, time.time_ns(), membership), lease_s, max_promises)
        self.ended = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        await self.server.run((), task_status)
        self.ended.set()

    async def stream(self) -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        self.server._connections.start_soon(self.server.serve_connection, theirs, "memory")
        return ours

    def client(self, uuid: bytes | None = None) -> Client:
        return Client(self.stream, self.nursery, uuid, lambda _: self.server_token())

    def server_token(self) -> bytes:
        """That of whoever runs the server."""
        return self.server.registry.authority.server_token()

    async def connected(self, uuid: bytes | None = None) -> Client:
        return await self.client(uuid).connect()

    async def administer(self, request: Any) -> Any:
        """Make a call on the control socket."""
        return (await self.administer_with_bulk(request))[0]

    async def administer_with_bulk(self, request: Any) -> tuple[Any, bytes | None]:
        stream = await control_socket.connect(self.server.store.folder)
        assert stream is not None
        peer = Peer(stream, None, "control")  # type: ignore[arg-type]
        self.nursery.start_soon(peer.run)
        try:
            return await peer.call(request)
        finally:
            await peer.close()

    async def shut_down(self) -> None:
        self.server.stop()
        await self.ended.wait()


@asynccontextmanager
async def running_cell(
    folder: Path, *, lease_s: float = LEASE_S, clean: bool = True, max_promises: int = 1_000_000, limit_s: float = 60,
    membership: Membership = ALONE,
) -> AsyncIterator[Cell]:  # fmt: skip
    """Serve the store in `folder` within the context; end it cleanly, or as a crash would leave it."""
    with trio.fail_after(limit_s):
        async with trio.open_nursery() as nursery:
            cell = Cell(folder, nursery, lease_s, max_promises, membership)
            await nursery.start(cell.run)
            yield cell
            if clean:
                await cell.shut_down()
            nursery.cancel_scope.cancel()


class Pending:
    """A call that goes on in the background."""

    def __init__(self) -> None:
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None

    async def run(self, awaitable: Awaitable[Any]) -> None:
        try:
            self.result = await awaitable
        except (Aborted, ConnectionLost) as error:
            self.error = error
        self.done = True

    async def wait_done(self) -> None:
        """What it waits for may be done in a thread, which gets the processor when it gets it."""
        for _ in range(1000):
            if self.done:
                return
            await settled()
        raise AssertionError("the call does not end")


@asynccontextmanager
async def in_background(awaitable: Awaitable[Any]) -> AsyncIterator[Pending]:
    async with trio.open_nursery() as nursery:
        pending = Pending()
        nursery.start_soon(pending.run, awaitable)
        await settled()
        yield pending
        nursery.cancel_scope.cancel()


async def settled() -> None:
    """Let everything happen that does not wait for the clock or a test; threads too."""
    for _ in range(3):
        await trio.to_thread.run_sync(time.sleep, 0.005)  # longer than what others do in threads takes, mostly
        await trio.testing.wait_all_tasks_blocked()
