"""The lock table by itself: what fcntl(2) and flock(2) say, fairness, circles, and a random comparison byte by byte."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import MAX_FILE_BYTES
from promisefs_protocol.locks import WHOLE_FILE, Lock, LockKind, cover, replaced, within
from promisefs_server.locks import lock_table
from promisefs_server.locks.lock_table import LockTable, Owner

READ, WRITE = LockKind.READ, LockKind.WRITE
F, G = 1, 2
"""Files."""


def lock(kind: int, start: int = 0, end: int = MAX_FILE_BYTES, pid: int = 1) -> Lock:
    return Lock(kind, start, end, pid)


class Desk:
    """A table, and requests numbered by themselves."""

    def __init__(self) -> None:
        self.table = LockTable()
        self.number = 0
        self.granted: list[int] = []
        self.refused: dict[int, int] = {}

    def owner(self, name: int, *, flock: bool = False) -> Owner:
        return Owner(name, flock, name)

    def set(self, who: int, what: Lock, key: int = F, *, wait: bool = True, flock: bool = False) -> bool:
        """Return whether it was granted at once."""
        self.number += 1
        granted = self.table.set(key, self.owner(who, flock=flock), what, self.number, wait=wait)[1]
        self.collect()
        return granted

    def release(
        self, who: int, key: int = F, start: int = 0, end: int = MAX_FILE_BYTES, *, flock: bool = False
    ) -> None:
        self.table.release(key, self.owner(who, flock=flock), start, end)
        self.collect()

    def collect(self) -> None:
        for _, answer in self.table.answers:
            if answer.code:
                self.refused[answer.request] = answer.code
            else:
                self.granted.append(answer.request)
        self.table.answers.clear()
        self.table.check_invariants()

    def refusal(self, who: int, what: Lock, key: int = F, *, wait: bool = False, flock: bool = False) -> AbortCode:
        with pytest.raises(Aborted) as caught:
            self.set(who, what, key, wait=wait, flock=flock)
        self.table.check_invariants()
        return AbortCode(caught.value.code)


@pytest.fixture
def desk() -> Desk:
    return Desk()


# Ranges


def test_a_release_in_the_middle_splits_and_a_lock_there_joins_again() -> None:
    whole = [lock(WRITE, 0, 9)]
    split = replaced(whole, 3, 5, None)
    assert split == [lock(WRITE, 0, 2), lock(WRITE, 6, 9)]
    assert replaced(split, 3, 5, lock(WRITE, 3, 5)) == whole
    assert replaced(split, 3, 5, lock(READ, 3, 5)) == [lock(WRITE, 0, 2), lock(READ, 3, 5), lock(WRITE, 6, 9)]
    assert within(split, 2, 6) == [lock(WRITE, 2, 2), lock(WRITE, 6, 6)]


def test_what_covers_a_wanted_lock() -> None:
    pieces = [lock(READ, 0, 4), lock(WRITE, 5, 9), lock(WRITE, 11, MAX_FILE_BYTES)]
    assert cover(pieces, lock(READ, 2, 9)) and cover(pieces, lock(WRITE, 5, 5))
    assert not cover(pieces, lock(WRITE, 4, 9)) and not cover(pieces, lock(READ, 0, 11))
    assert cover(pieces, lock(WRITE, 11, MAX_FILE_BYTES))


# Sharing and exclusion


def test_readers_share_and_a_writer_does_not(desk: Desk) -> None:
    assert desk.set(1, lock(READ)) and desk.set(2, lock(READ))
    assert desk.refusal(3, lock(WRITE)) is AbortCode.AGAIN
    assert desk.set(3, lock(WRITE), G)
    assert desk.set(4, lock(WRITE), flock=True), "flock and fcntl do not see each other"


def test_ranges_that_do_not_meet_do_not_conflict(desk: Desk) -> None:
    assert desk.set(1, lock(WRITE, 0, 9)) and desk.set(2, lock(WRITE, 10, 19))
    assert desk.refusal(1, lock(READ, 9, 10)) is AbortCode.AGAIN
    desk.release(2, F, 10, 10)
    assert desk.set(1, lock(READ, 9, 10))


def test_an_upgrade_waits_for_the_other_readers_and_keeps_the_read_lock_meanwhile(desk: Desk) -> None:
    assert desk.set(1, lock(READ)) and desk.set(2, lock(READ))
    assert not desk.set(1, lock(WRITE))
    assert desk.refusal(3, lock(WRITE)) is AbortCode.AGAIN
    assert desk.table.covers(F, desk.owner(1), lock(READ))
    desk.release(2)
    assert desk.granted == [3]


def test_a_downgrade_lets_readers_in(desk: Desk) -> None:
    assert desk.set(1, lock(WRITE))
    assert not desk.set(2, lock(READ))
    assert desk.set(1, lock(READ))
    assert desk.granted == [2]


def test_two_readers_of_flock_that_both_convert_do_not_wait_for_ever(desk: Desk) -> None:
    assert desk.set(1, lock(READ), flock=True) and desk.set(2, lock(READ), flock=True)
    assert not desk.set(1, lock(WRITE), flock=True)
    assert not desk.set(2, lock(WRITE), flock=True)
    assert desk.granted == [3]
    desk.release(1, flock=True)
    assert desk.granted == [3, 4]


def test_a_refused_conversion_of_a_flock_has_lost_the_lock(desk: Desk) -> None:
    assert desk.set(1, lock(READ), flock=True) and desk.set(2, lock(READ), flock=True)
    assert desk.refusal(1, lock(WRITE), flock=True) is AbortCode.AGAIN
    assert desk.set(2, lock(WRITE), wait=False, flock=True)


def test_what_is_in_the_way(desk: Desk) -> None:
    desk.set(1, lock(READ, 5, 9, 77))
    desk.set(2, lock(WRITE, 2, 3, 88))
    table = desk.table
    assert table.conflicting(F, desk.owner(3), lock(WRITE)) == (desk.owner(2), lock(WRITE, 2, 3, 88))
    assert table.conflicting(F, desk.owner(2), lock(WRITE)) == (desk.owner(1), lock(READ, 5, 9, 77))
    assert table.conflicting(F, desk.owner(3), lock(READ, 4, 100)) is None


# The queue


def test_readers_do_not_overtake_a_waiting_writer(desk: Desk) -> None:
    desk.set(1, lock(READ))
    assert not desk.set(2, lock(WRITE))
    assert not desk.set(3, lock(READ))
    assert desk.set(4, lock(READ), wait=False), "who does not wait takes what is free"
    desk.release(4)
    desk.release(1)
    assert desk.granted == [2]
    desk.release(2)
    assert desk.granted == [2, 3]


def test_a_reader_that_holds_something_overtakes_so_that_no_circle_is_made(desk: Desk) -> None:
    """The writer may be waiting for just this reader."""
    desk.set(1, lock(READ, 0, 9))
    assert not desk.set(2, lock(WRITE, 0, 99))
    assert desk.set(1, lock(READ, 10, 19))
    desk.set(3, lock(READ, 0, 0), G)
    assert desk.set(3, lock(READ, 0, 9))


def test_a_waiting_reader_that_gets_something_elsewhere_overtakes_from_then_on(desk: Desk) -> None:
    desk.set(1, lock(READ))
    desk.set(2, lock(WRITE))
    assert not desk.set(3, lock(READ)) and not desk.set(4, lock(READ))
    assert desk.set(3, lock(READ), G)
    assert desk.granted == [3]
    desk.set(5, lock(WRITE, 0, 0), 3)
    assert not desk.set(4, lock(READ), 3)
    desk.release(5, 3)
    assert desk.granted == [3, 7, 4], "the lock that it waited for elsewhere counts too"


def test_readers_in_the_queue_hide_no_writer_from_those_behind(desk: Desk) -> None:
    desk.set(1, lock(READ))
    assert (
        not desk.set(2, lock(WRITE, 0, 4)) and not desk.set(3, lock(READ, 0, 9)) and not desk.set(4, lock(READ, 0, 4))
    )
    desk.set(5, lock(READ, 50, 50), wait=False)
    desk.release(5, F, 50, 50)
    assert desk.granted == []


def test_who_cancels_makes_room_for_those_behind(desk: Desk) -> None:
    desk.set(1, lock(READ))
    desk.set(2, lock(WRITE))
    desk.set(3, lock(READ))
    assert desk.table.cancel(F, desk.owner(2), lock(WRITE), 2)[1] is False
    desk.collect()
    assert desk.granted == [3]


def test_who_cancels_too_late_has_the_lock(desk: Desk) -> None:
    desk.set(1, lock(WRITE))
    desk.set(2, lock(WRITE))
    desk.release(1)
    assert desk.table.cancel(F, desk.owner(2), lock(WRITE), 2)[1] is True
    assert desk.table.cancel(F, desk.owner(3), lock(WRITE), 99)[1] is False


def test_a_repeated_request_keeps_its_place(desk: Desk) -> None:
    desk.set(1, lock(WRITE))
    desk.set(2, lock(WRITE))
    desk.set(3, lock(WRITE))
    assert desk.table.set(F, desk.owner(2), lock(WRITE), 2, wait=True)[1] is False
    desk.release(1)
    assert desk.granted == [2]
    assert desk.table.set(F, desk.owner(2), lock(WRITE), 2, wait=True)[1] is True, "the answer was lost"
    desk.table.check_invariants()


# Circles


def test_a_circle_through_files_and_hosts_is_refused(desk: Desk) -> None:
    for who in (1, 2, 3):
        desk.set(who, lock(WRITE), who)
    assert not desk.set(1, lock(WRITE), 2) and not desk.set(2, lock(WRITE), 3)
    assert desk.refusal(3, lock(WRITE), 1, wait=True) is AbortCode.DEADLK
    assert desk.refusal(3, lock(WRITE), 1) is AbortCode.AGAIN
    desk.release(3, 3)
    assert len(desk.granted) == 1, "the others go on"


def test_two_readers_that_both_upgrade_make_a_circle(desk: Desk) -> None:
    desk.set(1, lock(READ))
    desk.set(2, lock(READ))
    assert not desk.set(1, lock(WRITE))
    assert desk.refusal(2, lock(WRITE), wait=True) is AbortCode.DEADLK


# Hosts, files, restarts


def test_a_host_that_goes_leaves_nothing(desk: Desk) -> None:
    desk.set(1, lock(WRITE))
    desk.set(2, lock(WRITE))
    desk.set(1, lock(READ), G)
    desk.set(3, lock(WRITE), G)
    desk.table.drop_host(1)
    desk.collect()
    assert sorted(desk.granted) == [2, 4] and not desk.table.concerns(1)
    desk.table.drop_host(2)
    desk.table.drop_host(3)
    desk.collect()
    assert not desk.table._books


def test_who_waits_for_a_file_that_is_gone_is_told(desk: Desk) -> None:
    desk.set(1, lock(WRITE))
    desk.set(2, lock(WRITE))
    desk.set(1, lock(WRITE), G)
    assert desk.table.files() == {F, G}
    desk.table.drop_files([F], AbortCode.VNOVNODE)
    desk.collect()
    assert desk.refused == {2: AbortCode.VNOVNODE} and desk.table.concerns(1) and not desk.table.concerns(2)


def test_while_paused_nothing_is_given_but_back(desk: Desk) -> None:
    table = desk.table
    table.paused = True
    assert not desk.set(1, lock(WRITE)) and not desk.set(2, lock(READ, 5, 5), wait=False)
    assert not desk.set(3, lock(WRITE, 0, 0), G, wait=False)
    assert table.restore(F, desk.owner(4), lock(READ, 0, 9))
    assert not table.restore(F, desk.owner(5), lock(WRITE, 9, 9))
    assert table.restore(G, desk.owner(5), lock(WRITE, 9, 9))
    table.resume()
    desk.collect()
    assert sorted(desk.granted) == [2, 3] and desk.refused == {}
    assert desk.refusal(1, lock(WRITE, 9, 9), G) is AbortCode.AGAIN
    desk.release(4)
    desk.release(2)
    assert desk.granted[2:] == [1]


def test_who_did_not_want_to_wait_is_refused_after_the_pause(desk: Desk) -> None:
    desk.table.paused = True
    desk.set(1, lock(WRITE), wait=False)
    desk.table.restore(F, desk.owner(2), lock(READ))
    desk.table.resume()
    desk.collect()
    assert desk.refused == {1: AbortCode.AGAIN}


def test_limits_of_a_host(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_table, "MAX_PIECES_OF_HOST", 3)
    monkeypatch.setattr(lock_table, "MAX_WAITING_OF_HOST", 2)
    for start in (0, 10, 20):
        assert desk.set(1, lock(WRITE, start, start + 5))
    assert desk.refusal(1, lock(WRITE, 30, 30)) is AbortCode.NOLCK
    with pytest.raises(Aborted):
        desk.release(1, F, 2, 3)
    assert desk.set(2, lock(WRITE, 30, 30))
    for _ in range(2):
        assert not desk.set(3, lock(WRITE))
    assert desk.refusal(3, lock(WRITE), wait=True) is AbortCode.NOLCK
    desk.release(1)
    assert desk.set(1, lock(WRITE, 50, 50), wait=False)


# At random

BYTES = 6
"""The last one stands for all that follows."""
HOSTS, FILES = 3, 2


def end_of(byte: int) -> int:
    return MAX_FILE_BYTES if byte == BYTES - 1 else byte


OWNERS = st.builds(
    lambda host, flock, number: Owner(host, flock, number), st.integers(1, HOSTS), st.booleans(), st.integers(1, 2)
)
RANGES = st.tuples(st.integers(0, BYTES - 1), st.integers(0, BYTES - 1)).map(sorted)
KEYS = st.integers(1, FILES)


class Bytewise(RuleBasedStateMachine):
    """Says of every byte who has it, believes the table about who was granted what, and finds out if that was right."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LockTable()
        self.held: dict[tuple[int, Owner], list[int | None]] = {}
        self.waiting: dict[int, tuple[int, Owner, int, int, int, bool]] = {}
        self.number = 0

    # What is so

    def bytes_of(self, key: int, owner: Owner) -> list[int | None]:
        return self.held.setdefault((key, owner), [None] * BYTES)

    def blockers(self, key: int, owner: Owner, kind: int, first: int, last: int) -> set[Owner]:
        found = set()
        for (other_key, other), kinds in self.held.items():
            if other_key == key and other.flock == owner.flock and other != owner:
                theirs = [k for k in kinds[first : last + 1] if k is not None]
                if theirs and (kind == WRITE or WRITE in theirs):
                    found.add(other)
        return found

    def holds_nothing(self, owner: Owner) -> bool:
        return not any(o == owner and any(k is not None for k in kinds) for (_, o), kinds in self.held.items())

    def behind(self, request: int | None, key: int, owner: Owner, kind: int, first: int, last: int) -> bool:
        if not self.holds_nothing(owner) or (request is not None and not self.waiting[request][-1]):
            return False
        for other, (its_key, its_owner, its_kind, its_first, its_last, _) in self.waiting.items():
            if other == request:
                return False
            meet = its_first <= last and first <= its_last
            if its_key == key and its_owner.flock == owner.flock and meet and WRITE in (kind, its_kind):
                return True
        return False

    def circle(self, owner: Owner, start: set[Owner]) -> bool:
        todo, seen = list(start), set(start)
        while todo:
            one = todo.pop()
            if one == owner:
                return True
            for key, waiter, kind, first, last, _ in self.waiting.values():
                if waiter == one:
                    more = self.blockers(key, waiter, kind, first, last) - seen
                    seen |= more
                    todo += more
        return False

    def granted(self, key: int, owner: Owner, kind: int, first: int, last: int) -> None:
        assert not self.blockers(key, owner, kind, first, last), "it was not free"
        self.bytes_of(key, owner)[first : last + 1] = [kind] * (last + 1 - first)

    def take_answers(self, before: float = math.inf) -> None:
        """Those of changes before the given one."""
        orders = [answer.order for _, answer in self.table.answers]
        assert orders == sorted(orders)
        while self.table.answers and self.table.answers[0][1].order < before:
            host, answer = self.table.answers.pop(0)
            key, owner, kind, first, last, wait = self.waiting.pop(answer.request)
            assert owner.host == host
            if answer.code == 0:
                self.granted(key, owner, kind, first, last)
            elif answer.code == AbortCode.AGAIN:
                assert not wait and self.blockers(key, owner, kind, first, last)
            else:
                assert answer.code == AbortCode.DEADLK and wait
                assert self.circle(owner, self.blockers(key, owner, kind, first, last))

    # What happens

    @rule(key=KEYS, owner=OWNERS, kind=st.sampled_from([READ, WRITE]), reach=RANGES, wait=st.booleans())
    def set(self, key: int, owner: Owner, kind: int, reach: list[int], wait: bool) -> None:
        first, last = (0, BYTES - 1) if owner.flock else reach
        self.number += 1
        order: float = math.inf
        try:
            order, granted = self.table.set(key, owner, lock(kind, first, end_of(last)), self.number, wait=wait)
            refusal = None
        except Aborted as aborted:
            granted, refusal = False, aborted.code
        kinds = self.bytes_of(key, owner)
        if owner.flock and kinds[0] is not None and kinds[0] != kind:
            kinds[:] = [None] * BYTES
            self.take_answers(order if granted else math.inf)
        request = (key, owner, kind, first, last)
        blockers = self.blockers(*request)
        if refusal is None and not granted:
            assert self.table.paused or (wait and (blockers or self.behind(None, *request)))
            assert self.table.paused or owner.flock or not self.circle(owner, blockers)
            self.waiting[self.number] = (*request, wait)
        elif refusal == AbortCode.AGAIN:
            assert blockers and not wait and not self.table.paused
        elif refusal is not None:
            assert refusal == AbortCode.DEADLK and wait and self.circle(owner, blockers)
        else:
            assert not self.table.paused and not (wait and self.behind(None, *request))
            self.granted(*request)
        self.take_answers()

    @rule(key=KEYS, owner=OWNERS, reach=RANGES)
    def release(self, key: int, owner: Owner, reach: list[int]) -> None:
        first, last = (0, BYTES - 1) if owner.flock else reach
        self.table.release(key, owner, first, end_of(last))
        self.bytes_of(key, owner)[first : last + 1] = [None] * (last + 1 - first)
        self.take_answers()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.waiting:
            number = data.draw(st.sampled_from(sorted(self.waiting)))
            key, owner, kind, first, last, _ = self.waiting.pop(number)
            assert self.table.cancel(key, owner, lock(kind, first, end_of(last)), number)[1] is False
            self.take_answers()

    @rule(host=st.integers(1, HOSTS))
    def host_goes(self, host: int) -> None:
        self.table.drop_host(host)
        self.held = {at: kinds for at, kinds in self.held.items() if at[1].host != host}
        self.waiting = {n: w for n, w in self.waiting.items() if w[1].host != host}
        assert not self.table.concerns(host)
        self.take_answers()

    @rule()
    def restart(self) -> None:
        self.table.paused = True

    @rule(key=KEYS, owner=OWNERS, kind=st.sampled_from([READ, WRITE]), reach=RANGES)
    def restore(self, key: int, owner: Owner, kind: int, reach: list[int]) -> None:
        if self.table.paused:
            first, last = (0, BYTES - 1) if owner.flock else reach
            restored = self.table.restore(key, owner, lock(kind, first, end_of(last)))
            assert restored is not bool(self.blockers(key, owner, kind, first, last))
            if restored:
                self.granted(key, owner, kind, first, last)

    @rule()
    def resume(self) -> None:
        self.table.resume()
        self.take_answers()

    @invariant()
    def the_table_says_the_same(self) -> None:
        self.table.check_invariants()
        for (key, owner), kinds in self.held.items():
            pieces = self.table._held(key, owner)
            for byte, kind in enumerate(kinds):
                there = [p.kind for p in pieces if p.overlaps(byte, end_of(byte))]
                assert there == ([] if kind is None else [kind])
        assert set(self.waiting) == {request for _, request in self.table._waiting}

    @invariant()
    def nobody_is_forgotten(self) -> None:
        if not self.table.paused:
            for number, (key, owner, kind, first, last, _) in self.waiting.items():
                request = (key, owner, kind, first, last)
                assert self.blockers(*request) or self.behind(number, *request), number


Bytewise.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_bytewise = Bytewise.TestCase


def test_the_whole_file_is_every_byte() -> None:
    assert cover([lock(READ, *WHOLE_FILE)], lock(READ, MAX_FILE_BYTES, MAX_FILE_BYTES))
