"""Hosts: the server's view of its clients, their leases, and whether they may still rely on old promises. No I/O.

Invariants
I1  A stale host holds no promises in the promise table and is granted none. It stops being stale only by
    acknowledging InitCallBackState3.
I2  A stale host whose lease has not ended is *in doubt*: it may still be using promises that the table has lost. Until
    its lease ends or it acknowledges InitCallBackState3, no mutation is answered.
I3  `lease_end_s` moves only while the host is not stale, and only to a time counted from when the renewal was
    received, so the client's own end, counted from when it sent it, comes earlier.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

FORGOTTEN_AFTER_S = 24 * 3600
"""A host not heard of for so long, while the server was up, is forgotten with all that is kept for it."""
MAX_HOSTS = 4096


@dataclass(slots=True, eq=False)
class Host:
    number: int
    """What the store calls it."""
    uuid: bytes
    description: str
    stale: bool = True
    lease_end_s: float = -math.inf
    active_s: float = -math.inf
    """When it last called."""
    silent_s: float = 0.0
    """For how long it was not connected while the server was up."""
    may_have_open_until_s: float = -math.inf
    """Until then it may have files open without having told us again by taking a promise: ask it about every
    file that goes. Infinite while it is stale and was not new; a lease longer after InitCallBackState3."""

    def __str__(self) -> str:
        return f"{self.description or '?'} ({self.uuid.hex()[:8]})"

    def in_doubt(self, now_s: float) -> bool:
        return self.stale and self.lease_end_s > now_s

    def become_stale(self) -> None:
        self.stale = True
        self.may_have_open_until_s = math.inf

    def initialised(self, now_s: float, lease_s: float) -> None:
        """It acknowledged InitCallBackState3."""
        self.stale = False
        if self.may_have_open_until_s == math.inf:
            self.may_have_open_until_s = now_s + lease_s

    def renew(self, received_s: float, lease_s: float) -> None:
        assert not self.stale
        self.lease_end_s = max(self.lease_end_s, received_s + lease_s)


class HostTable:
    def __init__(self) -> None:
        self._by_uuid: dict[bytes, Host] = {}
        self._by_number: dict[int, Host] = {}

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Host]:
        return iter(self._by_number.values())

    def add(self, host: Host) -> None:
        assert host.uuid not in self._by_uuid and host.number not in self._by_number
        self._by_uuid[host.uuid] = host
        self._by_number[host.number] = host

    def remove(self, host: Host) -> None:
        del self._by_uuid[host.uuid]
        del self._by_number[host.number]

    def by_uuid(self, uuid: bytes) -> Host | None:
        return self._by_uuid.get(uuid)

    def by_number(self, number: int) -> Host | None:
        return self._by_number.get(number)

    def may_have_open(self, now_s: float) -> Iterable[Host]:
        """The hosts to be asked about any file that loses its last name, promise or not."""
        return [host for host in self._by_number.values() if host.may_have_open_until_s > now_s]
