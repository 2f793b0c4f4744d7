"""The HTTP side of metrics: what is answered, and what a hostile peer can take."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from promisefs_protocol.address import Address
from promisefs_protocol.observe import exposition
from promisefs_protocol.observe.exposition import MAX_CONNECTIONS, MetricsAddressError, bound_address, open_listeners

LOOPBACK = Address("127.0.0.1", 0)


async def scrape(accept: str) -> tuple[bytes, str]:
    return f"accepts {accept}\n".encode(), "text/x-test"


@asynccontextmanager
async def serving() -> AsyncIterator[Address]:
    listeners = await open_listeners(LOOPBACK, insecure=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exposition.serve, listeners, scrape)
        with trio.fail_after(20):
            yield bound_address(listeners)
        nursery.cancel_scope.cancel()


async def ask(address: Address, request: bytes) -> bytes:
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        await stream.send_all(request)
        answer = b""
        while more := await stream.receive_some(65536):
            answer += more
    return answer


@pytest.mark.parametrize(
    ("request_line", "status", "body"),
    [
        ("GET /metrics HTTP/1.1", b"200 OK", b"accepts a/b,c/d\n"),
        ("GET /metrics?x=1 HTTP/1.1", b"200 OK", b"accepts a/b,c/d\n"),
        ("HEAD /metrics HTTP/1.1", b"200 OK", b""),
        ("GET / HTTP/1.1", b"404 Not Found", b"metrics are at /metrics\n"),
        ("POST /metrics HTTP/1.1", b"405 Method Not Allowed", b"metrics can only be read\n"),
    ],
)
async def test_answers(request_line: str, status: bytes, body: bytes) -> None:
    async with serving() as address:
        request = f"{request_line}\r\nHost: x\r\nAccept: a/b\r\naccept: c/d\r\n\r\n"
        answer = await ask(address, request.encode())
        head, _, answered = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status) and answered == body


@pytest.mark.parametrize("request_", [b"nonsense\r\n\r\n", b"GET /" + b"a" * 100_000, b"\x16\x03\x01\x02\x00"])
async def test_what_is_no_request_is_dropped(request_: bytes) -> None:
    async with serving() as address:
        async with await trio.open_tcp_stream(address.host, address.port) as stream:
            with suppress(trio.BrokenResourceError):  # a reset, if it had not read all
                await stream.send_all(request_)
                await stream.send_eof()
                assert await stream.receive_some(65536) == b""
        assert b"200 OK" in await ask(address, b"GET /metrics HTTP/1.0\r\n\r\n")


async def test_who_says_nothing_cannot_keep_others_out(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as address:
        idle = [await trio.open_tcp_stream(address.host, address.port) for _ in range(MAX_CONNECTIONS)]
        with trio.socket.socket() as refused:
            await refused.connect((address.host, address.port))
            assert await refused.recv(1) == b""
        await trio.sleep(exposition.CONNECTION_S + 1)
        for stream in idle:
            await stream.aclose()
        assert b"200 OK" in await ask(address, b"GET /metrics HTTP/1.0\r\n\r\n")


async def test_addresses() -> None:
    with pytest.raises(MetricsAddressError, match="can be reached by other machines"):
        await open_listeners(Address("0.0.0.0", 0), insecure=False)
    with pytest.raises(MetricsAddressError, match="cannot resolve"):
        await open_listeners(Address("no.such.host.invalid", 0), insecure=False)
    (listener,) = await open_listeners(Address("0.0.0.0", 0), insecure=True)
    await listener.aclose()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(MetricsAddressError, match="is in use"):
            await open_listeners(Address("127.0.0.1", taken.getsockname()[1]), insecure=False)
