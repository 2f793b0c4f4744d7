"""The local rule: who runs a server can use it from the same machine without logging in.

A server leaves the token of whoever runs it in a file named after its store, in that user's runtime directory. A mount
process of the same user reads it when it has connected, and presents it, if it did connect to where that server
listens: a stranger could say in HELLO that it is that store, but does not listen at that address of this machine.
The token is good for that run of the server only, so what a killed server leaves behind opens nothing.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from .runtime_directory import NotPrivate, directories, read_private

MAX_FILE_BYTES = 65536
ANY_ADDRESS = ("0.0.0.0", "::")


class Ends(NamedTuple):
    """A connection's own address and the peer's, as getsockname() and getpeername() say them."""

    own: tuple[str, int]
    peer: tuple[str, int]


class LocalServer(NamedTuple):
    token: bytes
    addresses: tuple[tuple[str, int], ...]  # where it listens

    def __repr__(self) -> str:
        return f"LocalServer(..., {self.addresses!r})"

    def to_bytes(self) -> bytes:
        return json.dumps({"token": self.token.decode(), "addresses": self.addresses}).encode()

    def listens_at(self, ends: Ends) -> bool:
        """Whether that connection leads to it: to an address where it listens, or if that is any, to this machine's."""
        host, port = ends.peer
        for own_host, own_port in self.addresses:
            if own_port == port and (own_host == host or (own_host in ANY_ADDRESS and ends.own[0] == host)):
                return True
        return False


def file_name(store: bytes) -> str:
    return f"server-{store.hex()}"


def find_local_server(store: bytes, owner: int) -> LocalServer | None:
    """What a server of this user's has left, if there is one."""
    for directory in directories(owner):
        try:
            content = read_private(directory, file_name(store), owner, MAX_FILE_BYTES)
            if content is not None:
                said = json.loads(content)
                addresses = tuple((str(host), int(port)) for host, port in said["addresses"])
                return LocalServer(str(said["token"]).encode(), addresses)
        except (NotPrivate, ValueError, KeyError, TypeError):
            continue
    return None
