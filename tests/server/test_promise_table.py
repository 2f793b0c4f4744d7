"""The promise table against a model of it."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from promisefs_server.promises.promises import EXPIRY_STEP_S, KEEP_LONGER_S, PromiseTable, lifetime_s

KEYS = st.integers(1, 6)
HOSTS = st.integers(1, 4)


def test_lifetimes_shrink_with_the_number_of_holders() -> None:
    assert [lifetime_s(n) for n in (1, 7, 8, 15, 16, 23, 24, 39, 40, 63, 64, 1000)] == [
        14400, 14400, 3600, 3600, 1800, 1800, 900, 900, 600, 600, 420, 420,
    ]  # fmt: skip


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = PromiseTable()
        self.told: dict[tuple[int, int], float] = {}
        self.now = 0.0

    @rule(key=KEYS, host=HOSTS)
    def grant(self, key: int, host: int) -> None:
        seconds = self.table.grant(key, host, self.now)
        self.told[key, host] = self.now + seconds

    @rule(key=KEYS, host=HOSTS)
    def delete(self, key: int, host: int) -> None:
        self.table.delete(key, host)
        self.told.pop((key, host), None)

    @rule(host=HOSTS)
    def delete_host(self, host: int) -> None:
        self.table.delete_host(host)
        self.told = {pair: until for pair, until in self.told.items() if pair[1] != host}

    @rule(host=HOSTS)
    def reap(self, host: int) -> None:
        self.table.reap(host, self.now)

    @rule(seconds=st.floats(0, 20000))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(host=HOSTS)
    def save_and_restore(self, host: int) -> None:
        saved = list(self.table.remaining(host, self.now))
        self.table.delete_host(host)
        for key, left_s in saved:
            self.table.restore(key, host, int(self.now) + left_s)

    @invariant()
    def holders_are_known_for_longer_than_they_were_told(self) -> None:
        self.table.check_invariants()
        for key in range(1, 7):
            holders = self.table.holders(key, self.now)
            for host in range(1, 5):
                until = self.told.get((key, host), -1.0)
                if self.now < until:
                    assert host in holders
                if self.now > until + KEEP_LONGER_S + EXPIRY_STEP_S:
                    assert host not in holders


TestPromiseTable = Machine.TestCase
