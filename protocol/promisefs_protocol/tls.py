"""TLS: the standard library's, over trio's streams.

Certificates are checked, and that they are the host's: by the system's CAs or those of one file.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import trio

from .address import Address
from .local_server import Ends
from .tcp import TcpStream, open_connection, set_options

HANDSHAKE_TIMEOUT_S = 10.0


class TlsError(OSError):
    """There is no trust. The message is for people: why not."""


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Raise OSError, which ssl.SSLError is one of."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    return context


def client_context(ca: Path | None) -> ssl.SSLContext:
    """That trusts the CAs of this file, or the system's. Raise OSError."""
    context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


async def accept(stream: trio.SocketStream, context: ssl.SSLContext) -> trio.abc.Stream:
    """Do the server's part of the handshake. Raise TlsError; the connection is closed then."""
    set_options(stream.socket)
    return await _shaken(trio.SSLStream(stream, context, server_side=True, https_compatible=True))


async def _shaken(stream: trio.SSLStream[trio.SocketStream]) -> trio.abc.Stream:
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT_S):
            await stream.do_handshake()
        return stream
    except BaseException as error:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)
        if isinstance(error, trio.TooSlowError):
            raise TlsError("the TLS handshake takes too long") from None
        if isinstance(error, trio.BrokenResourceError):
            raise TlsError(_reason(error.__cause__)) from None
        raise


def _reason(cause: BaseException | None) -> str:
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError):
        return f"no TLS: {cause.reason}"
    return "the connection ended during the TLS handshake: is TLS spoken there?"


def dialler(context: ssl.SSLContext) -> Callable[[Address], Awaitable[trio.abc.Stream]]:
    """A function that connects to a server and checks that it is the one. It raises OSError."""

    async def dial(address: Address) -> trio.abc.Stream:
        stream = await open_connection(address)
        set_options(stream.socket)
        return await _shaken(trio.SSLStream(stream, context, server_hostname=address.host, https_compatible=True))

    return dial


def ends_of(stream: trio.abc.Stream) -> Ends | None:
    """Both ends' addresses of a connection over the network; None of another one, or if it has ended."""
    if isinstance(stream, TcpStream):
        return stream.ends
    if isinstance(stream, trio.SSLStream):
        with suppress(OSError):
            below: trio.SocketStream = stream.transport_stream
            own, peer = below.socket.getsockname(), below.socket.getpeername()
            return Ends((str(own[0]), int(own[1])), (str(peer[0]), int(peer[1])))
    return None
