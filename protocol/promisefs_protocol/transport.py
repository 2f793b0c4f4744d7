"""Runs a `Connection` over a trio stream. The only module here that knows trio.

`Peer.run` reads and dispatches; `Peer.call` may be used from any task meanwhile. Each call
received runs in a task of its own, so replies leave in any order.

Who sends: the first task that finds the outbox idle drains it, for the others too, shielded
from cancellation, since half a frame would garble the stream. A peer that stops reading is therefore
waited for without limit here; whoever owns the peer closes it when its lease has ended, which wakes the sender.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from .abort import AbortCode, Aborted, code_of
from .connection import (
    AbortReceived,
    BadCallReceived,
    CallReceived,
    Connection,
    Piece,
    RemoteProtocolError,
    ReplyReceived,
)
from .messages import FetchData

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
Handler = Callable[[Any, bytes | None], Awaitable[Reply]]
"""Serves one request; raises Aborted to refuse it."""


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

    def __init__(self, stream: trio.abc.Stream, handler: Handler, description: str) -> None:
        self.description = description
        self._stream = stream
        self._handler = handler
        self._connection = Connection()
        self._slots: dict[int, _Slot] = {}
        self._outbox: deque[Piece] = deque()
        self._outbox_bytes = 0
        """Of the outbox, and of what has been taken from it but not sent."""
        self._held_bytes = 0
        """Of the calls being served, see `_bytes_for`."""
        self._less_held = trio.Event()
        self._sending = False
        self._serving = trio.Semaphore(MAX_CALLS_SERVED)
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
                    try:
                        await self._read_all(nursery)
                    finally:
                        # Before the nursery is waited for: a sender in it is shielded, and only this wakes it.
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

    async def call(self, request: Any, bulk: Piece | None = None) -> tuple[Any, bytes | None]:
        """Make a call. Return (reply, bulk). Raise Aborted or ConnectionLost; if cancelled, its fate is unknown."""
        if self._closed:
            raise ConnectionLost(self.description)
        xid, pieces = self._connection.send_call(request, bulk)
        slot = self._slots[xid] = _Slot()
        try:
            await self._send(pieces)
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
                    await self._serving.acquire()
                    self._held_bytes += held_bytes
                    nursery.start_soon(self._serve, event, held_bytes)
                else:
                    await self._wait_room(0)
                    await self._refuse(event)

    async def _wait_room(self, wanted_bytes: int) -> None:
        while (bytes_now := self._held_bytes + self._outbox_bytes) and bytes_now + wanted_bytes > MAX_BYTES_SERVED:
            self._less_held = trio.Event()
            await self._less_held.wait()

    async def _serve(self, event: CallReceived, held_bytes: int) -> None:
        try:
            if self._closed:
                # The peer may have repeated it elsewhere already: here it would come too late.
                return
            try:
                reply, bulk = await self._handler(event.request, event.bulk)
                pieces = self._connection.send_reply(event.xid, reply, bulk)
            except Aborted as refusal:
                pieces = self._connection.send_abort(event.xid, refusal.code, refusal.message)
            except OSError as error:
                log.warning("%s: %s: %s", self.description, event.method.name, error)
                pieces = self._connection.send_abort(event.xid, code_of(error.errno or 0), error.strerror or "")
            except Exception:
                log.exception("%s: %s failed: a defect here", self.description, event.method.name)
                pieces = self._connection.send_abort(event.xid, AbortCode.INTERNAL, "internal error, see the log")
            # Now they are the outbox's.
            self._held_bytes -= held_bytes
            held_bytes = 0
            await self._send_quietly(pieces)
        finally:
            self._held_bytes -= held_bytes
            self._less_held.set()
            self._serving.release()

    async def _refuse(self, event: BadCallReceived) -> None:
        if event.unknown_method:
            code = AbortCode.UNKNOWN_METHOD
        else:
            code = AbortCode.NAMETOOLONG if event.name_too_long else AbortCode.BAD_MESSAGE
        log.warning("%s: refused %r: %s", self.description, event.method_name[:40], event.reason)
        await self._send_quietly(self._connection.send_abort(event.xid, code, event.reason))

    # Sending

    async def _send_quietly(self, pieces: list[Piece]) -> None:
        """Send an answer; if the connection has ended meanwhile, nobody waits for it any more."""
        try:
            await self._send(pieces)
        except ConnectionLost:
            return

    async def _send(self, pieces: list[Piece]) -> None:
        self._outbox.extend(pieces)
        self._outbox_bytes += sum(map(len, pieces))
        if self._sending:
            return
        self._sending = True
        try:
            with trio.CancelScope(shield=True):
                while self._outbox:
                    batch = self._next_batch()
                    await self._stream.send_all(batch)
                    self._outbox_bytes -= len(batch)
                    self._less_held.set()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self.close()  # wakes the reader, which may not have noticed
            self._outbox.clear()
            self._outbox_bytes = 0
            raise ConnectionLost(self.description) from None
        finally:
            self._sending = False

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
