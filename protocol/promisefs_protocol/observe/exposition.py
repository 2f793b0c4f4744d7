"""Serves metrics over HTTP, in the process's own trio loop. A request is answered and its connection closed.

Whoever reaches the port may ask, so all that he can take is bounded: connections, the size of a request, time.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus

import h11
import trio

from promisefs_protocol.address import Address

log = logging.getLogger(__name__)

PATH = "/metrics"
MAX_CONNECTIONS = 16
"""More are closed at once."""
MAX_REQUEST_BYTES = 16384
CONNECTION_S = 10.0
"""How long a scraper may take to ask and to take the answer."""
RECEIVE_BYTES = 4096

Scrape = Callable[[str], Awaitable[tuple[bytes, str]]]
"""Takes what types are accepted, returns the metrics and their type."""


class MetricsAddressError(Exception):
    """Metrics cannot be served there. The message is one line for people."""


async def open_listeners(address: Address, *, insecure: bool) -> list[trio.SocketListener]:
    """Listen at an address of this machine; at one that others reach only if `insecure`. Raise MetricsAddressError."""
    try:
        found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise MetricsAddressError(f"metrics: cannot resolve {address.host!r}: {error.strerror}") from None
    hosts = [str(sockaddr[0]) for *_, sockaddr in found]
    if not insecure and not all(ipaddress.ip_address(host.partition("%")[0]).is_loopback for host in hosts):
        raise MetricsAddressError(
            f"metrics: {address.host} can be reached by other machines, and anybody there could read them: "
            "serve them at a loopback address, or allow it (--metrics-insecure, -o metrics_insecure)"
        )
    try:
        # With port 0 each address of a name would get another port: one is enough.
        return list(await trio.open_tcp_listeners(address.port, host=hosts[0] if address.port == 0 else address.host))
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be listened on: {error.strerror}"
        raise MetricsAddressError(f"metrics: {address} {reason}") from None


def bound_address(listeners: Sequence[trio.SocketListener]) -> Address:
    return Address(*listeners[0].socket.getsockname()[:2])


async def serve(listeners: Sequence[trio.SocketListener], scrape: Scrape) -> None:
    """Answer scrapers until cancelled."""
    connections = 0

    async def serve_one(stream: trio.SocketStream) -> None:
        nonlocal connections
        if connections >= MAX_CONNECTIONS:
            await trio.aclose_forcefully(stream)
            return
        connections += 1
        try:
            with trio.move_on_after(CONNECTION_S):
                await _answer(stream, scrape)
        except (trio.BrokenResourceError, h11.ProtocolError) as error:
            log.debug("metrics: %r", error)
        except Exception:
            log.exception("metrics: a defect here")
        finally:
            connections -= 1
            await trio.aclose_forcefully(stream)

    await trio.serve_listeners(serve_one, list(listeners))


async def _answer(stream: trio.SocketStream, scrape: Scrape) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST_BYTES)
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await stream.receive_some(RECEIVE_BYTES))
    if not isinstance(event, h11.Request):
        return  # closed before anything was asked
    path = event.target.decode("ascii").partition("?")[0]
    status, body, content_type = 200, b"", "text/plain; charset=utf-8"
    if event.method not in (b"GET", b"HEAD"):
        status, body = 405, b"metrics can only be read\n"
    elif path != PATH:
        status, body = 404, f"metrics are at {PATH}\n".encode()
    else:
        accept = ",".join(value.decode("latin-1") for name, value in event.headers if name == b"accept")
        body, content_type = await scrape(accept)
    headers = [("Content-Type", content_type), ("Content-Length", str(len(body))), ("Connection", "close")]
    reply = connection.send(h11.Response(status_code=status, reason=HTTPStatus(status).phrase, headers=headers)) or b""
    if event.method != b"HEAD":
        reply += connection.send(h11.Data(data=body)) or b""
    await stream.send_all(reply)
    await stream.send_eof()
    while await stream.receive_some(RECEIVE_BYTES):
        pass  # until who asked has closed: else what he had not read yet could be lost
