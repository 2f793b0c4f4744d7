"""Runs a `Connection` over a trio stream. With `tcp` and `tls`, the only module here that knows trio.

`Peer.run` reads and dispatches; `Peer.call` may be used from any task meanwhile. A handler answers a call at once if
it can; what it returns else is run in a task of its own, so replies leave in any order.

Who sends: whoever has a frame gives the socket what it takes without waiting. The rest goes to the outbox, which a task
of `run` empties, and so does everything that comes while it is not empty. So nobody waits for a peer that does not
read, and no cancellation of a caller leaves half a frame behind.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from time import perf_counter
from typing import Any

import trio

from .abort import AbortCode, Aborted, code_of
from .connection import (
    NOBODY,
    AbortReceived,
    BadCallReceived,
    CallReceived,
    Connection,
    Piece,
    RemoteProtocolError,
    ReplyReceived,
)
from .messages import FetchData
from .tcp import TcpStream

log = logging.getLogger(__name__)

RECEIVE_BYTES = 65536
MAX_RECEIVE_BYTES = 1 << 20
MAX_CALLS_SERVED = 256
"""Calls of one peer being served at a time; more are not read until some are done."""
MAX_BYTES_SERVED = 32 << 20
"""Bytes held for one peer: what came with its calls, what they ask for, and answers that it has not taken yet. Beyond
it no call begins, unless nothing else is going on, and no more are read."""

Reply = tuple[Any, Piece | None]
"""A reply message and its bulk, if any."""
Handler = Callable[[Any, bytes | None, int], Reply | Coroutine[Any, Any, Reply]]
"""Serves one request with its bulk and the number of its context: at once, or by the coroutine that it returns. Either
raises Aborted to refuse it."""


Observer = Callable[[str, float, int], None]
"""Told of each call that was served: its method, the seconds that it took, and the abort code, 0 for a reply."""


def _ignore(method: str, seconds: float, code: int) -> None:
    """Nobody counts what this peer calls."""


class ConnectionLost(Exception):
    """The connection ended before the reply came: the call may or may not have been carried out."""


class _Slot:
    """Where a caller waits for its answer."""

    __slots__ = ("answer", "event")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.answer: ReplyReceived | Exception | None = None

    def set(self, answer: ReplyReceived | Exception) -> None:
        self.answer = answer
        self.event.set()


class Peer:
    """The other end of one connection.

    `handler` serves the peer's calls. Any exception of its other than Aborted or OSError is a defect: it
    is logged, the caller gets INTERNAL, and the connection goes on.
    """

    def __init__(
        self, stream: trio.abc.Stream, handler: Handler, description: str, observer: Observer = _ignore
    ) -> None:
        self.description = description
        self._observer = observer
        self._stream = stream
        self._handler = handler
        self._connection = Connection()
        self._slots: dict[int, _Slot] = {}
        self._outbox: deque[Piece] = deque()
        self._outbox_bytes = 0
        """Of the outbox, and of what has been taken from it but not sent."""
        self._outbox_filled = trio.Event()
        self._held_bytes = 0
        """Of the calls being served, see `_bytes_for`."""
        self._serving = 0
        """Calls being served in tasks."""
        self._less_held = trio.Event()
        self._closed = False
        self._running = trio.CancelScope()
        self._ended = trio.Event()

    @property
    def closed(self) -> bool:
        return self._closed

    async def wait_closed(self) -> None:
        """Wait until the connection has ended and every open call has failed."""
        await self._ended.wait()

    async def run(self) -> None:
        """Serve until the connection ends, by whichever side; then fail every call still open.

        Raises nothing but trio.Cancelled. What is being served for the peer is cancelled.
        """
        try:
            with self._running:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._empty_outbox)
                    try:
                        await self._read_all(nursery)
                    finally:
                        await self.close()
        finally:
            self._closed = True
            for slot in self._slots.values():
                if slot.answer is None:
                    slot.set(ConnectionLost(self.description))
            self._ended.set()

    async def close(self) -> None:
        """End the connection now: no call begins any more, those being served are cancelled, `run` returns.

        `wait_closed` tells when the last of them has ended. A handler of this peer must not wait for that.
        """
        self._closed = True
        self._running.cancel()
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._stream)

    async def call(self, request: Any, bulk: Piece | None = None, context: int = NOBODY) -> tuple[Any, bytes | None]:
        """Make a call. Return (reply, bulk). Raise Aborted or ConnectionLost; if cancelled, its fate is unknown."""
        if self._closed:
            raise ConnectionLost(self.description)
        xid, pieces = self._connection.send_call(request, bulk, context)
        slot = self._slots[xid] = _Slot()
        try:
            self._send(pieces)
            await slot.event.wait()
        finally:
            del self._slots[xid]
            self._connection.forget_call(xid)
        answer = slot.answer
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer.reply, answer.bulk

    # Receiving

    async def _read_all(self, nursery: trio.Nursery) -> None:
        while not self._closed:
            wanted = min(max(RECEIVE_BYTES, self._connection.bytes_wanted), MAX_RECEIVE_BYTES)
            try:
                data = await self._stream.receive_some(wanted)
                if not data:
                    return
                events = self._connection.receive(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            except RemoteProtocolError as error:
                log.warning("%s: closing the connection: %s", self.description, error)
                return
            for event in events:
                # A caller may have been cancelled while an earlier event of this batch was awaited.
                if isinstance(event, ReplyReceived):
                    if slot := self._slots.get(event.xid):
                        slot.set(event)
                elif isinstance(event, AbortReceived):
                    if slot := self._slots.get(event.xid):
                        slot.set(Aborted(event.code, event.message))
                elif isinstance(event, CallReceived):
                    held_bytes = _bytes_for(event)
                    await self._wait_room(held_bytes)
                    self._serve(event, held_bytes, nursery)
                else:
                    await self._wait_room(0)
                    self._refuse(event)

    async def _wait_room(self, wanted_bytes: int) -> None:
        while self._serving >= MAX_CALLS_SERVED or (
            (bytes_now := self._held_bytes + self._outbox_bytes) and bytes_now + wanted_bytes > MAX_BYTES_SERVED
        ):
            self._less_held = trio.Event()
            await self._less_held.wait()

    def _serve(self, event: CallReceived, held_bytes: int, nursery: trio.Nursery) -> None:
        if self._closed:
            return  # see `_serve_in_task`
        began = perf_counter()
        try:
            reply = self._handler(event.request, event.bulk, event.context)
            if isinstance(reply, tuple):
                self._send(self._connection.send_reply(event.xid, *reply))
                self._observer(event.method.name, perf_counter() - began, 0)
                return
        except Exception as error:
            self._send(self._abort_for(event, error, began))
            return
        self._serving += 1
        self._held_bytes += held_bytes
        nursery.start_soon(self._serve_in_task, event, reply, held_bytes, began)

    async def _serve_in_task(
        self, event: CallReceived, coming_reply: Coroutine[Any, Any, Reply], held_bytes: int, began: float
    ) -> None:
        try:
            if self._closed:
                # The peer may have repeated it elsewhere already: here it would come too late.
                coming_reply.close()
                return
            try:
                pieces = self._connection.send_reply(event.xid, *await coming_reply)
                self._observer(event.method.name, perf_counter() - began, 0)
            except Exception as error:
                pieces = self._abort_for(event, error, began)
            self._send(pieces)
        finally:
            self._held_bytes -= held_bytes
            self._serving -= 1
            self._less_held.set()

    def _abort_for(self, event: CallReceived, error: Exception, began: float) -> list[Piece]:
        match error:
            case Aborted():
                code, message = error.code, error.message
            case OSError():
                log.warning("%s: %s: %r", self.description, event.method.name, error)
                code, message = code_of(error.errno or 0), error.strerror or ""
            case _:
                log.error("%s: %s failed: a defect here", self.description, event.method.name, exc_info=error)
                code, message = AbortCode.INTERNAL, "internal error, see the log"
        self._observer(event.method.name, perf_counter() - began, code)
        return self._connection.send_abort(event.xid, code, message)

    def _refuse(self, event: BadCallReceived) -> None:
        if event.unknown_method:
            code = AbortCode.UNKNOWN_METHOD
        else:
            code = AbortCode.NAMETOOLONG if event.name_too_long else AbortCode.BAD_MESSAGE
        log.warning("%s: refused %r: %s", self.description, event.method_name[:40], event.reason)
        self._send(self._connection.send_abort(event.xid, code, event.reason))

    # Sending

    def _send(self, pieces: Sequence[Piece]) -> None:
        """Send, or see to it that it is sent. If the connection has ended, nobody waits for it any more."""
        if not self._outbox_bytes and isinstance(self._stream, TcpStream):
            try:
                pieces = self._stream.send_now(pieces)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._running.cancel()  # the reader may not have noticed
                return
        if pieces:
            self._outbox.extend(pieces)
            self._outbox_bytes += sum(map(len, pieces))
            self._outbox_filled.set()

    async def _empty_outbox(self) -> None:
        """Send what the stream did not take at once, until cancelled."""
        try:
            while True:
                await self._outbox_filled.wait()
                while self._outbox:
                    batch = self._next_batch()
                    await self._stream.send_all(batch)
                    self._outbox_bytes -= len(batch)
                    self._less_held.set()
                self._outbox_filled = trio.Event()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._running.cancel()

    def _next_batch(self) -> Piece:
        """Take what fits well into one send: small pieces joined, a large one alone."""
        outbox = self._outbox
        first = outbox.popleft()
        if not outbox or len(first) > RECEIVE_BYTES:
            return first
        batch, size = [first], len(first)
        while outbox and size + len(outbox[0]) <= RECEIVE_BYTES:
            size += len(outbox[0])
            batch.append(outbox.popleft())
        return b"".join(batch)


def _bytes_for(event: CallReceived) -> int:
    """What serving a call takes at most: the bulk that came with it and the bulk that it asks for."""
    asked_bytes = event.request.length if isinstance(event.request, FetchData) else 0
    return asked_bytes + len(event.bulk or b"")
