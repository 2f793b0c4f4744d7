"""A TCP stream that does not pause when it need not.

trio.SocketStream passes through the scheduler at every send and receive, even if the socket is ready: about four
needless rounds in each call and reply, a quarter of the time of a small call (docs/performance.md). Here a send that
fits into the socket's buffer returns at once, and a receive waits exactly once. Fairness: every receive is a
checkpoint, and whoever sends waits for a reply or for its next request.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress

import trio

from .address import Address
from .local_server import Ends

KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""The kernel asks after a minute of silence, and gives a peer up that has not answered for another one."""

TCP_RTO_MAX_MS = 44
"""linux/tcp.h, since Linux 6.15; the socket module does not have it yet."""
LONGEST_RTO_MS = 1000
"""What was lost is sent again after this time at the latest. By default the waits double, up to two minutes, so a short
interruption would cost a lease that is much longer."""


def set_options(connection: socket.socket | trio.socket.SocketType) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for level, option, value in KEEPALIVE:
        connection.setsockopt(level, option, value)
    with suppress(OSError):  # an older kernel
        connection.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, LONGEST_RTO_MS)


class TcpStream(trio.abc.Stream):
    """One TCP connection. Raises what trio's streams raise: BrokenResourceError, ClosedResourceError."""

    def __init__(self, stream: trio.SocketStream) -> None:
        """Take over the connection of a trio stream, which must not be used any more."""
        self._socket = socket.socket(fileno=stream.socket.detach())
        self._socket.setblocking(False)
        set_options(self._socket)

    @property
    def ends(self) -> Ends | None:
        """Both ends' addresses; None if the connection has ended."""
        try:
            own, peer = self._socket.getsockname(), self._socket.getpeername()
        except OSError:
            return None
        return Ends((str(own[0]), int(own[1])), (str(peer[0]), int(peer[1])))

    def send_now(self, pieces: Sequence[bytes | bytearray | memoryview]) -> Sequence[bytes | bytearray | memoryview]:
        """Send what the peer takes at once. Return what is left, in order."""
        for position, piece in enumerate(pieces):
            try:
                sent = self._socket.send(piece)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise self._lost() from error
            if sent < len(piece):
                return [memoryview(piece)[sent:], *pieces[position + 1 :]]
        return ()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything. A checkpoint only if the peer does not take it at once."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)
            except OSError as error:
                raise self._lost() from error

    async def wait_send_all_might_not_block(self) -> None:
        if self._socket.fileno() < 0:
            raise trio.ClosedResourceError
        await trio.lowlevel.wait_writable(self._socket)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for bytes and return at most `max_bytes` of them; b"" at the end of the stream."""
        while True:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(65536 if max_bytes is None else max_bytes)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._lost() from error

    def _lost(self) -> Exception:
        return trio.ClosedResourceError() if self._socket.fileno() < 0 else trio.BrokenResourceError()

    async def aclose(self) -> None:
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        await trio.lowlevel.checkpoint()


async def connect(address: Address) -> TcpStream:
    """Connect to the first of the host's addresses that answers (happy eyeballs). Raise OSError."""
    return TcpStream(await open_connection(address))


async def open_connection(address: Address) -> trio.SocketStream:
    """The same, as a stream of trio's."""
    try:
        return await trio.open_tcp_stream(address.host, address.port)
    except OSError as failed:
        # "All attempts failed" does not say why: the first attempt's error does.
        causes = failed.__cause__
        first = causes.exceptions[0] if isinstance(causes, ExceptionGroup) else failed
        if isinstance(first, OSError) and first.errno and first.errno > 0:  # those of the resolver are negative
            first = OSError(first.errno, os.strerror(first.errno))  # trio's text has a socket address in it
        raise first from None
