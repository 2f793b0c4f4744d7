"""How often a login may fail. Core: no I/O; the time is an argument.

Failures are counted for each user and for each address that they come from, whether or not there is such a user. From
the FREE-th on each makes the next wait, twice as long as the one before, up to LONGEST_S. So who guesses gets about a
try a minute for a user, however many machines are used, and a minute is the most that this keeps anybody from logging
in. Entries that are old are forgotten, and at MAX_ENTRIES the oldest goes.
"""

from __future__ import annotations

from collections import OrderedDict

FREE = 5
FIRST_S = 1.0
LONGEST_S = 60.0
FORGOTTEN_AFTER_S = 3600.0
MAX_ENTRIES = 20_000


class LoginLimits:
    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # who -> (how many, when the last was)

    def __len__(self) -> int:
        return len(self._failures)

    def wait_s(self, user: str, address: str, now_s: float) -> float:
        """How long it takes till this user may try from this address; 0: not at all."""
        return max(self._wait_s(key, now_s) for key in _keys(user, address))

    def _wait_s(self, key: str, now_s: float) -> float:
        count, last_s = self._failures.get(key, (0, 0.0))
        if count < FREE or now_s - last_s >= FORGOTTEN_AFTER_S:
            return 0.0
        return max(0.0, last_s + min(LONGEST_S, FIRST_S * 2.0 ** min(count - FREE, 16)) - now_s)

    def failed(self, user: str, address: str, now_s: float) -> None:
        """A try is counted when it begins, so that many at once are not free."""
        for key in _keys(user, address):
            count, last_s = self._failures.pop(key, (0, 0.0))
            self._failures[key] = (1 if now_s - last_s >= FORGOTTEN_AFTER_S else count + 1, now_s)
        while len(self._failures) > MAX_ENTRIES:
            self._failures.popitem(last=False)

    def succeeded(self, user: str, address: str) -> None:
        for key in _keys(user, address):
            self._failures.pop(key, None)


def _keys(user: str, address: str) -> tuple[str, str]:
    return f"user {user}", f"from {address}"
