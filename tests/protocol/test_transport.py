"""`Peer` over memory streams: concurrency, cancellation, connection loss, handlers that fail, bounds."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
import trio
import trio.testing
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.connection import HEADER, Connection
from promisefs_protocol.ids import Fid, PromisedStatus, Status
from promisefs_protocol.messages import (
    Empty,
    FetchData,
    FetchStatus,
    GiveUpOpen,
    Probe,
    RenewLease,
    StatusReply,
    StoreData,
    Sync,
)
from promisefs_protocol.transport import MAX_BYTES_SERVED, MAX_CALLS_SERVED, ConnectionLost, Handler, Peer, Reply
from trio.testing import MemoryReceiveStream, MemorySendStream, memory_stream_pair

MemoryStream = trio.StapledStream[MemorySendStream, MemoryReceiveStream]
STATUS = Status(0o100644, 0, 0, 1, 5, 5, 1, 1, 0, 0, 0, 0)


def entry(vnode: int) -> StatusReply:
    return StatusReply(PromisedStatus(Fid(1, vnode, 1), STATUS, 60))


async def refuse_all(request: Any, bulk: bytes | None, context: int) -> Reply:
    raise AssertionError(f"no call was expected: {request}")


@asynccontextmanager
async def running(*peers: Peer) -> AsyncIterator[None]:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(peer.run)
            yield
            for peer in peers:
                await peer.close()


@asynccontextmanager
async def joined_peers(
    server_handler: Handler, client_handler: Handler = refuse_all
) -> AsyncIterator[tuple[Peer, Peer]]:
    a, b = memory_stream_pair()
    client, server = Peer(a, client_handler, "to server"), Peer(b, server_handler, "to client")
    async with running(client, server):
        yield client, server


def frame_of(value: object) -> bytes:
    body: bytes = msgpack.packb(value)
    return HEADER.pack(len(body)) + body


async def test_calls_in_both_directions_at_once() -> None:
    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        return Empty(), bulk

    async with joined_peers(serve, serve) as (client, server), trio.open_nursery() as nursery:

        async def call(peer: Peer, bulk: bytes) -> None:
            assert await peer.call(Probe(), bulk) == (Empty(), bulk)

        for i in range(40):
            nursery.start_soon(call, client, b"c%d" % i)
            nursery.start_soon(call, server, b"s%d" % i * 10_000)


async def test_a_handler_may_answer_at_once_or_by_a_coroutine() -> None:
    gate = trio.Event()

    async def later() -> Reply:
        await gate.wait()
        return Empty(), b"later"

    def serve(request: Any, bulk: bytes | None, context: int) -> Reply | Coroutine[Any, Any, Reply]:
        match bulk:
            case b"refuse":
                raise Aborted(AbortCode.NOENT, "")
            case b"wait":
                return later()
        return Empty(), bulk

    async with joined_peers(serve) as (client, _), trio.open_nursery() as nursery:

        async def wait() -> None:
            assert await client.call(Probe(), b"wait") == (Empty(), b"later")

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert await client.call(Probe(), b"now") == (Empty(), b"now")
        with pytest.raises(Aborted):
            await client.call(Probe(), b"refuse")
        gate.set()


async def test_replies_leave_in_the_order_in_which_they_are_ready() -> None:
    gates = {i: trio.Event() for i in range(1, 6)}
    done: list[int] = []

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        await gates[request.fid.vnode].wait()
        return entry(request.fid.vnode), None

    async with joined_peers(serve) as (client, _), trio.open_nursery() as nursery:

        async def call(i: int) -> None:
            reply, _ = await client.call(FetchStatus(Fid(1, i, 1)))
            assert reply == entry(i)
            done.append(i)

        for i in gates:
            nursery.start_soon(call, i)
        await trio.testing.wait_all_tasks_blocked()
        for i in (4, 1, 5, 2, 3):
            gates[i].set()
            await trio.testing.wait_all_tasks_blocked()
    assert done == [4, 1, 5, 2, 3]


async def test_megabytes_both_ways_through_a_narrow_pipe() -> None:
    """The pipe takes one send at a time, so senders pile up behind the one that drains for all."""
    a, b = trio.testing.lockstep_stream_pair()
    content = bytes(range(256)) * 4096

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        assert bulk is None or bulk == content
        return entry(request.fid.vnode), content if isinstance(request, FetchData) else None

    client, server = Peer(a, refuse_all, "to server"), Peer(b, serve, "to client")
    async with running(client, server), trio.open_nursery() as nursery:

        async def fetch(i: int) -> None:
            assert await client.call(FetchData(Fid(1, i, 1), 0, len(content))) == (entry(i), content)

        async def store(i: int) -> None:
            assert await client.call(StoreData(Fid(1, i, 1), 0, None, True), memoryview(content)) == (entry(i), None)

        for i in range(1, 5):
            nursery.start_soon(fetch, i)
            nursery.start_soon(store, i + 10)


async def test_a_cancelled_call_does_not_garble_the_stream() -> None:
    """Cancelled at every moment: before, while and after its frame is sent, and when its answer comes."""
    content = bytes(range(256)) * 1024

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        for _ in range(request.fid.vnode % 5):
            await trio.lowlevel.checkpoint()
        return entry(request.fid.vnode), bulk

    a, b = trio.testing.lockstep_stream_pair()
    client, server = Peer(a, refuse_all, "to server"), Peer(b, serve, "to client")
    async with running(client, server):
        for steps in range(40):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.call, StoreData(Fid(1, steps + 1, 1), 0, None, False), content)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert await client.call(FetchStatus(Fid(1, 7, 1)), b"x") == (entry(7), b"x")
    assert client._connection.open_calls == 0


async def test_a_caller_cancelled_between_two_answers_of_one_batch() -> None:
    """The batch ends with [a call too many, reply]: the reader waits for room, and the reply's caller is gone then."""
    gate = trio.Event()

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        await gate.wait()
        return entry(1), None

    a, b = memory_stream_pair()
    client = Peer(a, serve, "to server")
    async with running(client):
        scope = trio.CancelScope()

        async def call() -> None:
            with scope:
                await client.call(Probe())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            fetches = [
                frame_of([0, i, 0, "FS.FetchData", [[1, 1, 1], 0, 1 << 20], None])
                for i in range((MAX_BYTES_SERVED >> 20) + 1)
            ]
            await b.send_all(b"".join(fetches) + frame_of([1, 1, [], None]))
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
        assert scope.cancelled_caught
        gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not client.closed


@pytest.mark.parametrize("how", ["eof", "local close", "reset", "cancel"])
async def test_losing_the_connection_fails_every_open_call(how: str) -> None:
    a, b = memory_stream_pair()
    client = Peer(a, refuse_all, "to server")
    lost: list[int] = []

    async def call(i: int) -> None:
        with pytest.raises(ConnectionLost):
            await client.call(FetchStatus(Fid(1, i, 1)))
        lost.append(i)

    with trio.fail_after(5):
        async with trio.open_nursery() as callers:
            async with trio.open_nursery() as runner:
                runner.start_soon(client.run)
                for i in range(1, 6):
                    callers.start_soon(call, i)
                await trio.testing.wait_all_tasks_blocked()
                match how:
                    case "eof":
                        await b.send_eof()
                    case "local close":
                        await client.close()
                    case "reset":
                        await b.aclose()
                    case _:
                        runner.cancel_scope.cancel()
        await client.wait_closed()
    assert sorted(lost) == [1, 2, 3, 4, 5]
    assert client.closed
    with pytest.raises(ConnectionLost):
        await client.call(Probe())


async def test_a_send_that_fails_ends_the_connection_though_the_reader_noticed_nothing() -> None:
    a, _b = memory_stream_pair()
    client = Peer(a, refuse_all, "to server")

    async def broken() -> None:
        raise trio.BrokenResourceError

    a.send_stream.send_all_hook = broken
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            with pytest.raises(ConnectionLost):
                await client.call(Probe())
            await client.wait_closed()


@pytest.mark.parametrize("how", ["eof", "cancel"])
async def test_a_sender_that_is_stuck_does_not_keep_the_connection_from_ending(how: str) -> None:
    """The peer half-closes and reads no more while an answer to it is being sent."""
    a, b = memory_stream_pair()

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        return Empty(), None

    peer = Peer(a, serve, "to client")
    stuck = trio.Event()
    freed = trio.Event()

    async def never_read() -> None:
        stuck.set()
        await freed.wait()

    a.send_stream.send_all_hook = never_read
    a.send_stream.close_hook = freed.set  # as with a socket: closing wakes the sender
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.run)
            await b.send_all(frame_of([0, 1, 0, "CB.Probe", [], None]))
            await stuck.wait()
            if how == "eof":
                await b.send_eof()
            else:
                nursery.cancel_scope.cancel()
        await peer.wait_closed()


async def test_aborts_reach_the_caller() -> None:
    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        raise Aborted(AbortCode.NOENT, "no \udcff here")

    async with joined_peers(serve) as (client, _):
        with pytest.raises(Aborted) as caught:
            await client.call(Probe())
    assert caught.value.code == AbortCode.NOENT
    assert caught.value.errno == errno.ENOENT
    assert caught.value.message == "no \\udcff here"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (ValueError("a defect"), AbortCode.INTERNAL),
        (ExceptionGroup("two", [ValueError(), KeyError()]), AbortCode.INTERNAL),
        (OSError(errno.ENOSPC, "No space"), AbortCode.NOSPC),
        (OSError(errno.ENAMETOOLONG, "\udcff"), AbortCode.NAMETOOLONG),
        (OSError(errno.EMFILE, "?"), AbortCode.IO),
        (OSError("no errno"), AbortCode.IO),
    ],
    ids=ascii,
)
async def test_a_handler_that_fails_costs_one_call_only(
    fault: Exception, code: AbortCode, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [fault]

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        if faults:
            raise faults.pop()
        return Empty(), None

    with caplog.at_level(logging.WARNING):
        async with joined_peers(serve) as (client, _):
            with pytest.raises(Aborted) as caught:
                await client.call(Probe())
            assert caught.value.code == code
            assert await client.call(Probe()) == (Empty(), None)
    assert len(caplog.records) == 1
    assert "CB.Probe" in caplog.text


async def test_a_reply_that_cannot_be_packed_is_a_defect_of_the_handler(caplog: pytest.LogCaptureFixture) -> None:
    replies: list[Reply] = [(object(), None), (Empty(), bytes(2 << 20)), (Empty(), b"good")]

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        return replies.pop(0)

    async with joined_peers(serve) as (client, _):
        for _ in range(2):
            with pytest.raises(Aborted) as caught:
                await client.call(Probe())
            assert caught.value.code == AbortCode.INTERNAL
        assert await client.call(Probe()) == (Empty(), b"good")


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("FS.Nonsense", [], AbortCode.UNKNOWN_METHOD),
        ("", [], AbortCode.UNKNOWN_METHOD),
        ("CB.Probe", [1], AbortCode.BAD_MESSAGE),
        ("CB.Probe", None, AbortCode.BAD_MESSAGE),
        ("FS.FetchData", [[1, 1, 1], -1, 5], AbortCode.BAD_MESSAGE),
        ("FS.FetchData", [[1, 1, 1], 0, 1 << 40], AbortCode.BAD_MESSAGE),
        ("FS.Lookup", [[1, 1, 1], b"x" * 256], AbortCode.NAMETOOLONG),
        ("FS.Lookup", [[1, 1, 1], b"a/b"], AbortCode.BAD_MESSAGE),
        ("FS.Lookup", [[1, 1, 1], b"a\0b"], AbortCode.BAD_MESSAGE),
        ("FS.Lookup", [[1, 1, 1], "text"], AbortCode.BAD_MESSAGE),
    ],
)
async def test_calls_that_do_not_fit_are_refused_and_the_connection_lives(
    name: str, arguments: object, code: AbortCode, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        assert request == RenewLease()
        return Empty(), None

    a, b = memory_stream_pair()
    async with running(Peer(b, serve, "to client")):
        await a.send_all(frame_of([0, 5, 0, name, arguments, None]))
        assert (await receive_frame(a))[:3] == [2, 5, code]
        await a.send_all(frame_of([0, 6, 0, "CB.RenewLease", [], None]))
        assert await receive_frame(a) == [1, 6, [], None]
    assert len(caplog.records) == 1  # one line for the refusal


async def receive_frame(stream: MemoryStream) -> list[Any]:
    data = bytearray()
    while len(data) < HEADER.size or len(data) < HEADER.size + HEADER.unpack_from(data)[0]:
        more = await stream.receive_some()
        assert more, "the connection has ended"
        data += more
    unpacked: list[Any] = msgpack.unpackb(data[HEADER.size :])
    return unpacked


async def test_bytes_that_are_no_frame_end_the_connection_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    a, b = memory_stream_pair()
    server = Peer(b, refuse_all, "the hostile one")
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            await a.send_all(b"GET / HTTP/1.1\r\n\r\n")
            assert await a.receive_some() == b""
    assert len(caplog.records) == 1
    assert "the hostile one" in caplog.text


async def test_calls_served_at_a_time_are_bounded() -> None:
    gate = trio.Event()
    started = most = 0
    finished = 0

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        nonlocal started, most, finished
        started += 1
        most = max(most, started - finished)
        await gate.wait()
        finished += 1
        return Empty(), None

    calls = 2 * MAX_CALLS_SERVED + 10
    async with joined_peers(serve) as (client, _), trio.open_nursery() as nursery:
        for i in range(calls):
            nursery.start_soon(client.call, GiveUpOpen((Fid(1, i + 1, 1),)))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert started == MAX_CALLS_SERVED
        gate.set()
    assert finished == calls
    assert most == MAX_CALLS_SERVED


async def test_what_is_being_served_is_cancelled_when_the_connection_ends() -> None:
    ended = trio.Event()

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()
        raise AssertionError

    a, b = memory_stream_pair()
    server = Peer(b, serve, "to client")
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            await a.send_all(b"".join(bytes(p) for p in Connection().send_call(Sync(()))[1]))
            await trio.testing.wait_all_tasks_blocked()
            await a.send_eof()
    assert ended.is_set()


async def test_a_small_call_is_sent_as_one_piece() -> None:
    """One segment on the wire, so one wake-up of the peer: the cost of a call is mostly that."""
    a, _b = memory_stream_pair()
    sends = 0

    async def count() -> None:
        nonlocal sends
        sends += 1

    a.send_stream.send_all_hook = count
    client = Peer(a, refuse_all, "to server")
    async with running(client), trio.open_nursery() as nursery:
        nursery.start_soon(client.call, StoreData(Fid(1, 1, 1), 0, None, False), b"x" * 16384)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sends == 1


async def test_no_call_begins_after_close_though_one_was_waiting_for_its_turn() -> None:
    begun: list[int] = []
    freed = trio.Event()

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        begun.append(request.fids[0].vnode)
        with trio.CancelScope(shield=True):
            await freed.wait()
        return Empty(), None

    a, b = memory_stream_pair()
    server = Peer(b, serve, "to client")
    calls = Connection()
    burst = b"".join(
        bytes(piece) for i in range(MAX_CALLS_SERVED + 2) for piece in calls.send_call(Sync((Fid(1, i + 1, 1),)))[1]
    )
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            await a.send_all(burst)
            await trio.testing.wait_all_tasks_blocked()
            assert len(begun) == MAX_CALLS_SERVED
            await server.close()
            freed.set()
            await server.wait_closed()
    assert len(begun) == MAX_CALLS_SERVED


async def test_closing_cancels_what_is_being_served_at_once() -> None:
    cancelled = trio.Event()

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async with joined_peers(serve) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(fails_with_connection_lost, client)
        await trio.testing.wait_all_tasks_blocked()
        await server.close()
        await server.wait_closed()
        assert cancelled.is_set()


async def fails_with_connection_lost(peer: Peer) -> None:
    with pytest.raises(ConnectionLost):
        await peer.call(Sync(()))


async def test_a_peer_that_does_not_read_has_a_bounded_number_of_bytes_fetched_for_it() -> None:
    size = 1 << 20
    served = 0

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        nonlocal served
        served += 1
        return entry(1), bytes(size)

    a, b = trio.testing.lockstep_stream_pair()
    server = Peer(b, serve, "to client")
    calls = Connection()
    burst = b"".join(bytes(p) for _ in range(100) for p in calls.send_call(FetchData(Fid(1, 1, 1), 0, size))[1])
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            await a.send_all(burst)
            await trio.testing.wait_all_tasks_blocked(0.01)
            # One is in the stream's hands; replies are a little longer than their bulk.
            assert MAX_BYTES_SERVED // size - 1 <= served <= MAX_BYTES_SERVED // size + 1
            answers = 0
            while answers < 100:
                answers += len(calls.receive(await a.receive_some(1 << 20)))
            assert served == 100
            await a.aclose()


async def test_calls_with_bulk_that_cannot_be_served_yet_are_not_all_read() -> None:
    held = trio.Event()
    served = 0

    async def serve(request: Any, bulk: bytes | None, context: int) -> Reply:
        nonlocal served
        served += 1
        await held.wait()
        return entry(1), None

    async with joined_peers(serve) as (client, _), trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(client.call, StoreData(Fid(1, 1, 1), 0, None, False), bytes(1 << 20))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert served == MAX_BYTES_SERVED >> 20
        held.set()
    assert served == 100
