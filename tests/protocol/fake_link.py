"""Two `Connection`s joined in memory, with bytes split wherever the test says."""

from __future__ import annotations

from collections.abc import Iterable

from promisefs_protocol.connection import Connection, Event, Piece


def joined(pieces: Iterable[Piece]) -> bytes:
    return b"".join(bytes(p) for p in pieces)


def deliver(connection: Connection, data: bytes, cuts: Iterable[int] = ()) -> list[Event]:
    """Feed `data` in the parts that `cuts` (offsets) make; return all events."""
    events: list[Event] = []
    at = 0
    for cut in [*sorted(cuts), len(data)]:
        events += connection.receive(data[at:cut])
        at = cut
    return events


class Link:
    """`client` and `server`, and what each has sent that the other has not got yet."""

    def __init__(self) -> None:
        self.client = Connection()
        self.server = Connection()
        self.to_server = bytearray()
        self.to_client = bytearray()

    def pass_to_server(self, cuts: Iterable[int] = ()) -> list[Event]:
        data, self.to_server = bytes(self.to_server), bytearray()
        return deliver(self.server, data, cuts)

    def pass_to_client(self, cuts: Iterable[int] = ()) -> list[Event]:
        data, self.to_client = bytes(self.to_client), bytearray()
        return deliver(self.client, data, cuts)
