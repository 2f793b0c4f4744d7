"""Hosts: the server's view of its clients, their leases, and whether they may still rely on old promises. No I/O.

What may be open where. Clients keep a promise on each file that they have open, so who has a promise is asked when the
file loses its last name. A client whose promise ended takes a new one within RECALL_S; until then `may_have_open`
remembers for it: what was broken lately, and what it held when it became stale.

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
from dataclasses import dataclass, field

FORGOTTEN_AFTER_S = 24 * 3600
"""A host not heard of for so long, while the server was up, is forgotten with all that is kept for it."""
MAX_HOSTS = 4096
RECALL_S = 120.0
"""Clients look after the promises on their open files more often than this."""
MAX_RECALLED = 100_000
"""Broken promises remembered of one host. Beyond it the oldest are forgotten: if such a file is open there, and loses
its last name before the client has taken a new promise, its handles go stale."""


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
    """For how long it had no lease while the server was up. A connection may be dead without a sign of it."""
    past_promises: set[int] = field(default_factory=set)
    """Vnode keys that it had promises on when it became stale, or not long before."""
    past_unknown: bool = False
    """Its past promises were lost in a crash of the server: anything may be open there."""
    past_until_s: float = math.inf
    """When these two cease to matter: RECALL_S after InitCallBackState3."""
    broken: dict[int, float] = field(default_factory=dict)
    """Vnode keys whose promise was broken, oldest first, and until when to remember that."""

    def __str__(self) -> str:
        return f"{self.description!r} ({self.uuid.hex()[:8]})"

    def in_doubt(self, now_s: float) -> bool:
        return self.stale and self.lease_end_s > now_s

    def become_stale(self, held: Iterable[int]) -> None:
        """It loses its promises; `held` are their vnode keys."""
        self.stale = True
        self.past_promises.update(held, self.broken)
        self.past_until_s = math.inf

    def initialised(self, now_s: float) -> None:
        """It acknowledged InitCallBackState3."""
        self.stale = False
        self.past_until_s = now_s + RECALL_S

    def promise_broken(self, key: int, now_s: float) -> None:
        broken = self.broken
        broken.pop(key, None)
        broken[key] = now_s + RECALL_S
        while len(broken) > MAX_RECALLED or broken[next(iter(broken))] <= now_s:
            del broken[next(iter(broken))]

    def may_have_open(self, key: int, now_s: float) -> bool:
        """Whether it may have this file open though it has no promise on it."""
        self._expire_past(now_s)
        return self.past_unknown or key in self.past_promises or self.broken.get(key, -math.inf) > now_s

    def _expire_past(self, now_s: float) -> None:
        if now_s >= self.past_until_s:
            self.past_promises.clear()
            self.past_unknown = False

    def recalled(self, now_s: float) -> list[int]:
        """The vnode keys for which `may_have_open`, besides `past_unknown`, which this brings up to date."""
        self._expire_past(now_s)
        return [*self.past_promises, *(key for key, until_s in self.broken.items() if until_s > now_s)]

    def restore_recalled(self, keys: Iterable[int], unknown: bool, now_s: float) -> None:
        """After a restart: what `recalled` returned and `past_unknown` was before it."""
        self.past_promises.update(keys)
        self.past_unknown = unknown
        self.past_until_s = math.inf if self.stale else now_s + RECALL_S

    def asked(self, key: int) -> None:
        """It is being asked whether it has this file open; the store remembers until it answers."""
        self.broken.pop(key, None)
        self.past_promises.discard(key)

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

    def check_invariants(self) -> None:
        """Both ways to a host lead to the same."""
        assert len(self._by_uuid) == len(self._by_number)
        for number, host in self._by_number.items():
            assert host.number == number and self._by_uuid[host.uuid] is host

    def may_have_open(self, key: int, now_s: float) -> list[Host]:
        """The hosts to be asked when this file loses its last name, though they hold no promise on it."""
        return [host for host in self._by_number.values() if host.may_have_open(key, now_s)]
