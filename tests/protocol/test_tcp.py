"""What the kernel is told about our sockets."""

from __future__ import annotations

import socket

import trio
from promisefs_protocol.tcp import TcpStream


async def test_the_kernel_looks_after_idle_connections_and_does_not_delay_small_sends() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    async with listener, await trio.open_tcp_stream("127.0.0.1", port):
        accepted = await listener.accept()
        stream = TcpStream(accepted)
        with stream._socket.dup() as same:
            assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        await stream.aclose()
