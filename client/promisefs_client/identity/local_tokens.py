"""Finds the token of a server that the mount's owner runs on this machine, see `local_server`."""

from __future__ import annotations

import os

import trio
from promisefs_protocol.local_server import find_local_server
from promisefs_protocol.tls import ends_of


def local_token(store: bytes, stream: trio.abc.Stream) -> bytes | None:
    ends = ends_of(stream)
    if ends is None:
        return None
    server = find_local_server(store, os.geteuid())
    return server.token if server is not None and server.listens_at(ends) else None
