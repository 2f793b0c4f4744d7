"""What a faulty or hostile peer may send: only RemoteProtocolError comes out, and nothing after it (I1, I2)."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
from fake_link import deliver, joined
from hypothesis import given, settings
from hypothesis import strategies as st
from message_strategies import Exchange, exchanges
from promisefs_protocol.connection import (
    HEADER,
    MAX_FRAME_BYTES,
    BadCallReceived,
    CallReceived,
    Connection,
    RemoteProtocolError,
)
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import MAX_BULK_BYTES, METHODS, FetchStatus, Probe


def framed(body: bytes) -> bytes:
    return HEADER.pack(len(body)) + body


def frame_of(value: object) -> bytes:
    return framed(msgpack.packb(value))


def connection_with_open_calls() -> Connection:
    connection = Connection()
    for _ in range(3):
        connection.send_call(FetchStatus(Fid(1, 1, 1)))
    connection.send_call(Probe())
    return connection


def receive_hostile(data: bytes, cuts: list[int]) -> None:
    """Deliver; whatever happens, only RemoteProtocolError may come, and after it no event."""
    connection = connection_with_open_calls()
    try:
        deliver(connection, data, cuts)
    except RemoteProtocolError:
        for more in (b"", frame_of([0, 9, 0, "CB.Probe", [], None])):
            with pytest.raises(RemoteProtocolError):
                connection.receive(more)
        return
    assert connection.bytes_wanted <= MAX_FRAME_BYTES + HEADER.size


cuts = st.lists(st.integers(0, 400), max_size=4)

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=20)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(sorted(METHODS)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=20,
)
nearly_frames = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, True, 1.0, 3]), st.integers(0, 5), plain, plain)
    | st.tuples(
        st.just(0), st.integers(0, 5), st.integers(0, 5), st.sampled_from(sorted(METHODS)), plain, st.none() | plain
    )
    | plain,
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=400), cuts)
def test_random_bytes(data: bytes, at: list[int]) -> None:
    receive_hostile(data, at)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.binary(max_size=100), max_size=4), cuts)
def test_random_bodies_in_sound_frames(bodies: list[bytes], at: list[int]) -> None:
    receive_hostile(b"".join(framed(b) for b in bodies), at)


@settings(max_examples=400, deadline=None)
@given(nearly_frames, cuts)
def test_sound_msgpack_of_anything(values: list[Any], at: list[int]) -> None:
    receive_hostile(b"".join(frame_of(v) for v in values), at)


@settings(max_examples=400, deadline=None)
@given(exchanges, st.data())
def test_mutated_calls_and_replies(exchange: Exchange, data: st.DataObject) -> None:
    call = joined(Connection().send_call(exchange.request, None)[1])
    reply = joined(Connection().send_reply(1, exchange.reply, None))
    stream = bytearray(call + reply + call)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stream) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                stream[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del stream[at : at + data.draw(st.integers(1, 4))]
            case _:
                stream[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        if not stream:
            break
    receive_hostile(bytes(stream), data.draw(cuts))


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, 2**31, 2**32 - 1])
def test_a_lying_length_is_refused_before_anything_is_buffered(length: int) -> None:
    connection = Connection()
    with pytest.raises(RemoteProtocolError, match="a frame of"):
        connection.receive(HEADER.pack(length))
    assert connection.bytes_wanted == 0  # nothing is kept of a dead connection's bytes


def test_a_frame_at_the_limit_may_come() -> None:
    connection = Connection()
    assert connection.receive(HEADER.pack(MAX_FRAME_BYTES)) == []
    assert connection.bytes_wanted == MAX_FRAME_BYTES


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x96",
        b"\x94\x01",
        b"\xdd\xff\xff\xff\xff",  # array of 2**32-1
        b"\xdc\xff\xff" + b"\xc0" * 65535,
        b"\xc6\xff\xff\xff\xff",  # bin
        b"\xdb\xff\xff\xff\xff",  # str
        b"\xd9\x02\xff\xff",  # not UTF-8
        b"\xdf\xff\xff\xff\xff",  # map
        b"\x81\xc0\xc0",
        b"\xd4\x05x",  # ext
        b"\xd6\xff\x00\x00\x00\x00",  # timestamp
        b"\xc7\x00\xff",
        b"\xd9\xff" + b"x" * 10,
        b"\xc0\xc0",  # bytes left over
        b"\xc0",
        b"\x90",
        b"\x94\x02\x01\x05\xc0",
        b"\x94\x03\x01\xc0\xc0",
        msgpack.packb([0, 1, "CB.Probe", {"a": 1}, None]),
        msgpack.packb([0, 1, "CB.Probe", msgpack.ExtType(5, b"x"), None]),
    ],
)
def test_bodies_that_are_no_frame(body: bytes) -> None:
    connection = connection_with_open_calls()
    with pytest.raises(RemoteProtocolError):
        connection.receive(framed(body))
    with pytest.raises(RemoteProtocolError):
        connection.receive(frame_of([0, 9, 0, "CB.Probe", [], None]))


def test_bulk_beyond_the_limit_is_refused() -> None:
    head = msgpack.packb([0, 1, 0, "CB.Probe", [], None])[:-1]
    body = head + struct.pack(">BI", 0xC6, MAX_BULK_BYTES + 1) + bytes(MAX_BULK_BYTES + 1)
    with pytest.raises(RemoteProtocolError):
        Connection().receive(framed(body))
    body = head + struct.pack(">BI", 0xC6, MAX_BULK_BYTES) + bytes(MAX_BULK_BYTES)
    (event,) = Connection().receive(framed(body))
    assert isinstance(event, CallReceived)


def peak_bytes_of(data: bytes) -> int:
    connection = Connection()
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            connection.receive(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("depth", [100, 1000, 20_000])
@pytest.mark.parametrize("head", [b"\x91", b"\xdc\x10\x00", b"\xdc\x40\x00", b"\xdd\x00\x00\x10\x00", b"\x81"])
def test_nested_arrays_that_claim_much_cost_little(depth: int, head: bytes) -> None:
    """msgpack allocates an array when its header is read: nested headers claim it at every level."""
    body = head * depth
    assert peak_bytes_of(framed(body)) < 8 * len(body) + (32 << 20)


def test_the_peer_gets_an_abort_for_a_call_that_is_framed_well() -> None:
    connection = Connection()
    (event,) = connection.receive(frame_of([0, 5, 0, "FS.Nonsense" * 10, [], None]))
    assert isinstance(event, BadCallReceived)
    assert event.unknown_method
    assert event.xid == 5
    assert len(event.method_name) <= 40
    (event,) = connection.receive(frame_of([0, 6, 0, "FS.FetchStatus", [1], None]))
    assert isinstance(event, BadCallReceived)
    assert not event.unknown_method
    assert not event.name_too_long
    (event,) = connection.receive(frame_of([0, 7, 0, "FS.Lookup", [[1, 1, 1], b"x" * 256], None]))
    assert isinstance(event, BadCallReceived)
    assert event.name_too_long
    (event,) = connection.receive(frame_of([0, 8, 0, "FS.Lookup", [[1, 1, 1], b"x" * 255], None]))
    assert isinstance(event, CallReceived)


@pytest.mark.parametrize("xid", [True, None, 1.0, "1", b"1", []])
def test_an_xid_is_an_integer(xid: object) -> None:
    connection = connection_with_open_calls()
    with pytest.raises(RemoteProtocolError):
        connection.receive(frame_of([0, xid, 0, "CB.Probe", [], None]))


@pytest.mark.parametrize("context", [True, None, 1.0, "1", b"1", []])
def test_a_context_is_an_integer(context: object) -> None:
    connection = connection_with_open_calls()
    with pytest.raises(RemoteProtocolError):
        connection.receive(frame_of([0, 1, context, "CB.Probe", [], None]))


def test_events_before_the_fault_in_the_same_bytes_are_not_given_after_it() -> None:
    """The connection is torn down as a whole; a call whose abort could not be sent is not begun."""
    connection = Connection()
    good = frame_of([0, 1, 0, "CB.Probe", [], None])
    with pytest.raises(RemoteProtocolError):
        connection.receive(good + framed(b"\xc1"))
    with pytest.raises(RemoteProtocolError):
        connection.receive(b"")
