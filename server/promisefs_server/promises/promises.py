"""The promise table: which hosts hold a promise on which vnode until when. No I/O, no clock.

A promise is the server's word that it tells the host before the vnode's status, data or names change. It lasts for
a time that shrinks with the number of its holders, as in AFS; the server remembers it KEEP_LONGER_S longer than it
told the client, so that its entry always ends later.

Invariants
I1  `_holders[key]` names exactly the hosts whose `_expiry[host]` has `key`; a key nobody holds is not in it.
I2  Entries leave silently only when expired, given up, or together with *all* of their host's (which is then told
    InitCallBackState3); every other leaving is a break.

Compact, since there are hundreds of thousands: a holder is a small int, several are a tuple; expiries are rounded up
to EXPIRY_STEP_S so that one int object serves many entries.
"""

from __future__ import annotations

from collections.abc import Iterator

LIFETIMES_S = ((7, 4 * 3600), (15, 3600), (23, 1800), (39, 900), (63, 600))
"""(up to so many holders, so long)."""
SHORTEST_LIFETIME_S = 420
KEEP_LONGER_S = 180
EXPIRY_STEP_S = 32
MAX_PROMISES = 1_000_000


def lifetime_s(holders: int) -> int:
    """What a client is told when so many hosts, itself among them, hold the promise."""
    for most, seconds in LIFETIMES_S:
        if holders <= most:
            return seconds
    return SHORTEST_LIFETIME_S


class PromiseTable:
    def __init__(self) -> None:
        self._holders: dict[int, int | tuple[int, ...]] = {}
        self._expiry: dict[int, dict[int, int]] = {}
        self._count = 0
        self._round = 0

    def __len__(self) -> int:
        return self._count

    def grant(self, key: int, host: int, now_s: float) -> int:
        """Give or renew a promise. Return for how many seconds the client may rely on it."""
        held = self._expiry.get(host)
        if held is None:
            held = self._expiry[host] = {}
        holders = self._holders.get(key)
        if holders is None:
            self._holders[key] = host
            count = 1
        elif isinstance(holders, int):
            if holders == host:
                count = 1
            else:
                self._holders[key] = (holders, host)
                count = 2
        else:
            if host not in holders:
                holders = self._holders[key] = (*holders, host)
            count = len(holders)
        if key not in held:
            self._count += 1
        seconds = lifetime_s(count)
        expiry = (int(now_s) + seconds + KEEP_LONGER_S) // EXPIRY_STEP_S * EXPIRY_STEP_S + EXPIRY_STEP_S
        if expiry != self._round:
            self._round = expiry
        held[key] = self._round
        return seconds

    def holders(self, key: int, now_s: float) -> list[int]:
        """The hosts whose promise on `key` has not expired."""
        holders = self._holders.get(key)
        if holders is None:
            return []
        if isinstance(holders, int):
            holders = (holders,)
        return [host for host in holders if self._expiry[host][key] > now_s]

    def is_held(self, key: int) -> bool:
        """Whether any host's promise on `key` is here, expired or not."""
        return key in self._holders

    def delete(self, key: int, host: int) -> None:
        """The promise is broken or given up. Nothing happens if there is none."""
        held = self._expiry.get(host)
        if held is None or held.pop(key, None) is None:
            return
        self._count -= 1
        self._drop_holder(key, host)

    def delete_host(self, host: int) -> list[int]:
        """Delete all that a host holds, and return the keys; it must be told InitCallBackState3 (I2)."""
        keys = list(self._expiry.pop(host, ()))
        for key in keys:
            self._count -= 1
            self._drop_holder(key, host)
        return keys

    def _drop_holder(self, key: int, host: int) -> None:
        holders = self._holders[key]
        if isinstance(holders, int):
            assert holders == host
            del self._holders[key]
            return
        rest = tuple(h for h in holders if h != host)
        self._holders[key] = rest if len(rest) > 1 else rest[0]

    def count_of(self, host: int) -> int:
        return len(self._expiry.get(host, ()))

    def reap(self, host: int, now_s: float) -> int:
        """Delete what has expired of a host's. Return how many."""
        expired = [key for key, expiry in self._expiry.get(host, {}).items() if expiry <= now_s]
        for key in expired:
            self.delete(key, host)
        return len(expired)

    def remaining(self, host: int, now_s: float) -> Iterator[tuple[int, int]]:
        """(key, whole seconds that the server would still keep it) of what a host holds."""
        for key, expiry in self._expiry.get(host, {}).items():
            if expiry > now_s:
                yield key, int(expiry - now_s)

    def restore(self, key: int, host: int, expiry_s: int) -> None:
        """Put back a saved promise of a host that has none on `key`."""
        held = self._expiry.setdefault(host, {})
        assert key not in held
        held[key] = expiry_s
        self._count += 1
        holders = self._holders.get(key)
        if holders is None:
            self._holders[key] = host
        else:
            self._holders[key] = ((holders, host) if isinstance(holders, int) else (*holders, host))  # fmt: skip

    def check_invariants(self) -> None:
        pairs = {(key, host) for host, held in self._expiry.items() for key in held}
        named = {
            (key, host)
            for key, holders in self._holders.items()
            for host in ((holders,) if isinstance(holders, int) else holders)
        }
        assert pairs == named, "I1"
        assert len(pairs) == self._count
