"""One file server as this mount's core sees it: its lease, and which promises of its may still be installed.

Core: no I/O; times are seconds of the client's clock. Every method is atomic.

A promise travels with the reply to a call. Meanwhile the server may have broken it, on the other connection, or told
us to forget everything; then it must not be installed. Each break and reset takes the next number of a sequence; each
call notes at its start how far that was. One server's breaks and resets say nothing about another's promises.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import NamedTuple

from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import START_ID_BITS

from promisefs_client.identity.key import Credentials

MAX_REMEMBERED_BREAKS = 10_000
"""When more distinct fids were broken during calls in flight, all those calls lose their promises instead."""


class CallMark(NamedTuple):
    """Taken when a call is sent; needed to install what it brings."""

    server: Server
    number: int
    sequence: int
    sent_at: float
    credentials: Credentials | None = None  # whose rights the statuses tell


class Server:
    """Lease and sequence of breaks of one server."""

    def __init__(self, name: str) -> None:
        self.name = name
        """For people: its address."""
        self.lease_until = 0.0
        """Its promises are worth something until then; set by the session."""
        self.lapses = 0
        """How often it was renewed only after it had run out."""
        self.start_id = 0
        """Of the run of the server that was met last; 0: none yet."""
        self.restored = False
        """What it says may be older than what it said before; set back when nothing of that is trusted any more."""
        self.given_up: list[Fid] = []
        """Evicted with a promise: the server may be told. The shell takes it with `begin_giving_up`."""
        self._giving_up: set[Fid] = set()
        self._sequence = 0
        self._reset_sequence = 0
        self._broken: dict[Fid, int] = {}
        self._calls: set[int] = set()
        self._next_call = 0

    def extend_lease(self, until: float, now: float) -> None:
        """It has been renewed, if `until` is later than it was."""
        if now >= self.lease_until:
            self.lapses += 1
        self.lease_until = max(self.lease_until, until)

    def met(self, start_id: int) -> None:
        """A run of the server was met. One that is no later than the last is of a store brought back from a backup."""
        if start_id != self.start_id and start_id >> START_ID_BITS <= self.start_id >> START_ID_BITS:
            self.restored = True
        self.start_id = start_id

    def begin_call(self, now: float, credentials: Credentials | None = None) -> CallMark:
        self._next_call += 1
        self._calls.add(self._next_call)
        return CallMark(self, self._next_call, self._sequence, now, credentials)

    def end_call(self, mark: CallMark) -> None:
        self._calls.discard(mark.number)
        if not self._calls:
            self._broken.clear()

    def still_promises(self, fid: Fid, mark: CallMark) -> bool:
        """Whether a promise on the fid that the marked call brought has not been taken back since."""
        return (
            mark.server is self
            and mark.sequence >= self._reset_sequence
            and mark.sequence >= self._broken.get(fid, 0)
            and fid not in self._giving_up
        )

    def unreset_since(self, mark: CallMark) -> bool:
        """Whether what the marked call brought has not been taken back as a whole since."""
        return mark.sequence >= self._reset_sequence

    def broke(self, fids: Iterable[Fid]) -> None:
        """The server took its promises on these back, whether we know the fids or not."""
        self._sequence += 1
        if self._calls:
            for fid in fids:
                if len(self._broken) >= MAX_REMEMBERED_BREAKS:
                    self._reset_sequence = self._sequence
                    self._broken.clear()
                self._broken[fid] = self._sequence

    def broke_all(self) -> None:
        """InitCallBackState3, or a lost lease."""
        self._sequence += 1
        self._reset_sequence = self._sequence

    def begin_giving_up(self, most: int, known: Container[Fid]) -> tuple[Fid, ...]:
        """Take fids to name in a GiveUpCallBacks, none that is `known` again; `end_giving_up` follows its reply.

        The server may serve it before or after a call that grants one of them again, so until then none is installed,
        and those of calls that are in flight at the reply are not either.
        """
        chosen = [fid for fid in self.given_up[:most] if fid not in known]
        del self.given_up[:most]
        self._giving_up.update(chosen)
        return tuple(chosen)

    def end_giving_up(self, fids: Iterable[Fid]) -> None:
        given_up = list(fids)
        self._giving_up.difference_update(given_up)
        self.broke(given_up)
