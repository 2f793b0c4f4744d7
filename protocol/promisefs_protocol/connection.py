"""Frames and calls, without I/O: bytes in, events out (as h11 and wsproto do it).

A frame is a 4-byte big-endian length and that many bytes of one msgpack array:

    [0, xid, context, method, arguments, bulk]      a call
    [1, xid, result, bulk]                          its reply
    [2, xid, code, message]                         or its abort

Either side calls; each numbers its own calls. `context` says who calls: the number of a token that was presented on
this connection, or NOBODY. `bulk` is bin or nil and comes last, so that it is sent
without being copied into the frame: what `send_*` returns is a list of pieces to write in order.

Invariants
I1  Nothing is believed that the peer says about lengths: frames are bounded before they are buffered, and msgpack's
    own limits bound what a frame can claim. It allocates an array when it reads its header, so nested headers claim
    MAX_LIST elements at each of its 1024 levels: 32 MiB at most, and only until the frame is refused.
I2  After the first RemoteProtocolError the connection is dead: it gives no more events.
I3  A reply or abort is passed on only if its xid belongs to a call that is open here; the entry is then removed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import msgpack

from .fields import FieldError, NameTooLong
from .messages import MAX_BULK_BYTES, MAX_LIST, METHOD_OF_REQUEST, METHODS, Method

HEADER = struct.Struct(">I")
MAX_FRAME_BYTES = MAX_BULK_BYTES + (1 << 20)
"""A full bulk and a megabyte of arguments beside it."""
NOBODY = 0
"""The context of calls that are made under no token."""
MAX_OPEN_CALLS = 1024
"""Most calls in flight in one direction on one connection."""

_CALL, _REPLY, _ABORT = 0, 1, 2
_BIN32 = struct.Struct(">BI")
_INLINE_BULK_BYTES = 16384
"""Up to here copying bulk into the frame is cheaper than another piece to send."""

Piece = bytes | bytearray | memoryview


class RemoteProtocolError(Exception):
    """The peer sent something that cannot be a frame of ours. The connection must be closed."""


class LocalProtocolError(Exception):
    """Our own side asked for what the protocol does not allow. Nothing has changed."""


@dataclass(frozen=True, slots=True)
class CallReceived:
    xid: int
    context: int
    method: Method
    request: Any
    bulk: bytes | None


@dataclass(frozen=True, slots=True)
class BadCallReceived:
    """A well-framed call that has to be aborted: unknown method (method is None) or arguments that do not fit."""

    xid: int
    method_name: str
    unknown_method: bool
    name_too_long: bool
    reason: str


@dataclass(frozen=True, slots=True)
class ReplyReceived:
    xid: int
    reply: Any
    bulk: bytes | None


@dataclass(frozen=True, slots=True)
class AbortReceived:
    xid: int
    code: int
    message: str


_ABANDONED = Method("abandoned", tuple, tuple, False, lambda value: value, lambda value: value)
"""Stands in the table of open calls for one whose caller no longer waits."""

Event = CallReceived | BadCallReceived | ReplyReceived | AbortReceived


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


class Connection:
    """One end of a connection. Not thread-safe; every method is atomic."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._next_xid = 1
        self._open: dict[int, Method] = {}
        self._dead = False

    @property
    def open_calls(self) -> int:
        return len(self._open)

    @property
    def bytes_wanted(self) -> int:
        """How many bytes the frame that is coming still needs; 0 if none has begun."""
        if len(self._buffer) < HEADER.size:
            return 0
        return max(0, int(HEADER.unpack_from(self._buffer)[0]) + HEADER.size - len(self._buffer))

    def send_call(self, request: Any, bulk: Piece | None = None, context: int = NOBODY) -> tuple[int, list[Piece]]:
        """Return the call's xid and the pieces to write. Raise LocalProtocolError at MAX_OPEN_CALLS."""
        method = METHOD_OF_REQUEST[type(request)]
        if len(self._open) >= MAX_OPEN_CALLS:
            raise LocalProtocolError(f"{MAX_OPEN_CALLS} calls are in flight")
        xid = self._next_xid
        pieces = self._frame(b"\x96\x00" + _pack(xid) + _pack(context) + _pack(method.name) + _pack(request), bulk)
        self._next_xid += 1
        self._open[xid] = method
        return xid, pieces

    def send_reply(self, xid: int, reply: Any, bulk: Piece | None = None) -> list[Piece]:
        return self._frame(b"\x94\x01" + _pack(xid) + _pack(reply), bulk)

    def send_abort(self, xid: int, code: int, message: str) -> list[Piece]:
        # File names in it that are not UTF-8 are lone surrogates, which msgpack cannot pack.
        text = message.encode("utf-8", "backslashreplace").decode()[:255]
        return [self._finish(b"\x94\x02" + _pack(xid) + _pack(int(code)) + _pack(text))]

    def forget_call(self, xid: int) -> None:
        """The caller gave up: a reply that still comes is dropped."""
        if xid in self._open:
            self._open[xid] = _ABANDONED

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take bytes from the peer; return what they complete. Raise RemoteProtocolError (I2)."""
        if self._dead:
            raise RemoteProtocolError("the connection is already broken")
        buffer = self._buffer
        buffer += data
        events: list[Event] = []
        start = 0
        try:
            while len(buffer) - start >= HEADER.size:
                (length,) = HEADER.unpack_from(buffer, start)
                if length > MAX_FRAME_BYTES:
                    raise RemoteProtocolError(f"a frame of {length} bytes; the limit is {MAX_FRAME_BYTES}")
                end = start + HEADER.size + length
                if len(buffer) < end:
                    break
                with memoryview(buffer) as whole, whole[start + HEADER.size : end] as body:
                    event = self._event(self._unpack(body))
                start = end
                if event is not None:
                    events.append(event)
        except RemoteProtocolError:
            self._dead = True
            buffer.clear()
            raise
        if start:
            del buffer[:start]
        return events

    # Decoding

    @staticmethod
    def _unpack(body: memoryview) -> Any:
        try:
            return msgpack.unpackb(
                body,
                use_list=False,
                raw=False,
                strict_map_key=True,
                max_str_len=1024,
                max_bin_len=MAX_BULK_BYTES,
                max_array_len=MAX_LIST,
                max_map_len=0,
                max_ext_len=0,
            )
        except (ValueError, RecursionError, msgpack.UnpackException) as error:
            raise RemoteProtocolError(f"a frame that is not msgpack of ours: {error!r}") from None

    def _event(self, frame: Any) -> Event | None:
        if type(frame) is not tuple or any(type(number) is not int for number in frame[:2]):
            raise RemoteProtocolError("a frame that does not begin with two integers")
        match frame:
            case (0, int() as xid, context, str() as name, arguments, bytes() | None as bulk) if type(context) is int:
                return self._call_event(xid, context, name, arguments, bulk)
            case (1, int() as xid, result, bytes() | None as bulk):
                method = self._closed_call(xid)
                if method is _ABANDONED:
                    return None
                try:
                    return ReplyReceived(xid, method.decode_reply(result), bulk)
                except FieldError as error:
                    raise RemoteProtocolError(f"reply to {method.name}: {error}") from None
            case (2, int() as xid, int() as code, str() as message):
                method = self._closed_call(xid)
                return None if method is _ABANDONED else AbortReceived(xid, code, message)
        raise RemoteProtocolError("a frame that is no call, reply or abort")

    @staticmethod
    def _call_event(xid: int, context: int, name: str, arguments: Any, bulk: bytes | None) -> Event:
        method = METHODS.get(name)
        if method is None:
            return BadCallReceived(xid, name[:40], True, False, f"no method {name[:40]!r}")
        try:
            return CallReceived(xid, context, method, method.decode_request(arguments), bulk)
        except FieldError as error:
            return BadCallReceived(xid, name, False, isinstance(error, NameTooLong), str(error)[:200])

    def _closed_call(self, xid: int) -> Method:
        method = self._open.pop(xid, None)
        if method is None:
            raise RemoteProtocolError(f"an answer to call {xid}, which is not open")
        return method

    # Encoding

    @staticmethod
    def _finish(body: bytes) -> bytes:
        if len(body) > MAX_FRAME_BYTES:
            raise LocalProtocolError(f"a frame of {len(body)} bytes; the limit is {MAX_FRAME_BYTES}")
        return HEADER.pack(len(body)) + body

    @classmethod
    def _frame(cls, head: bytes, bulk: Piece | None) -> list[Piece]:
        if bulk is None:
            return [cls._finish(head + b"\xc0")]
        size = len(bulk)
        if size > MAX_BULK_BYTES:
            raise LocalProtocolError(f"bulk of {size} bytes; the limit is {MAX_BULK_BYTES}")
        head += _BIN32.pack(0xC6, size)
        if size <= _INLINE_BULK_BYTES:
            return [cls._finish(head + bytes(bulk))]
        if len(head) + size > MAX_FRAME_BYTES:
            raise LocalProtocolError(f"a frame of {len(head) + size} bytes; the limit is {MAX_FRAME_BYTES}")
        return [HEADER.pack(len(head) + size) + head, bulk]
