"""The checker of simulated histories: what it accepts and what it refuses."""

from __future__ import annotations

from dataclasses import replace

from simulator.checker import check_errors
from simulator.checker_contents import ContentsChecker
from simulator.checker_names import NamesChecker
from simulator.checker_progress import check_progress
from simulator.checker_refusals import RefusalsChecker
from simulator.checker_separation import check_separation
from simulator.history import NEVER, Call, History, Kept, Outage
from simulator.layout import LAYOUTS
from simulator.observer import check_agreement
from simulator.plan import FILES, make_plan
from simulator.world import World

INO = 7
INITIAL = {FILES[0]: INO, FILES[1]: 8, (b"d0", b"log"): 9}
NAME = (b"d0", b"x")


class Script:
    """Calls one after the other, or overlapping where their places say so."""

    def __init__(self) -> None:
        self.history = History(World(0))
        self._order = 0.0

    def call(
        self, client: str, kind: str, *args: object, result: object = None, ino: int = INO, error: str = "",
        begin: float | None = None, end: float | None = None,
    ) -> Call:  # fmt: skip
        if begin is None:
            begin = self._order = self._order + 1
        if end is None:
            end = self._order = max(self._order, begin) + 1
        call = Call(len(self.history.calls), client, client, kind, args, begin, 0.0, end, 0.0, ino, result, error)
        self.history.calls.append(call)
        return call

    def problems(self) -> list[str]:
        return [*ContentsChecker(self.history).check(INITIAL), *NamesChecker(self.history).check(INITIAL)]


def read(script: Script, client: str, data: bytes, **places: float) -> None:
    script.call(client, "read", 0, len(data), result=data, **places)  # type: ignore[arg-type]


def test_a_confirmed_write_must_be_seen() -> None:
    script = Script()
    script.call("a", "write", 0, 3, 1)
    script.call("a", "fsync")
    read(script, "b", b"\1\1\1")
    assert script.problems() == []
    read(script, "b", b"\1\0\1")
    assert "stale" in script.problems()[0]


def test_an_unconfirmed_write_may_be_seen_elsewhere_and_must_be_seen_here() -> None:
    script = Script()
    script.call("a", "write", 0, 3, 1)
    read(script, "b", b"\0\0\0")
    read(script, "b", b"\1\0\0")
    read(script, "a", b"\1\1\1")
    assert script.problems() == []
    read(script, "a", b"\1\1\0")
    assert "stale" in script.problems()[0]


def test_a_sync_that_began_before_the_write_ended_confirms_nothing() -> None:
    script = Script()
    script.call("a", "write", 0, 3, 1, begin=1, end=4)
    script.call("a", "fsync", begin=2, end=8)
    read(script, "b", b"\0\0\0", begin=9, end=10)
    assert script.problems() == []


def test_concurrent_writes_may_end_either_way_but_nothing_from_before_comes_back() -> None:
    script = Script()
    script.call("a", "write", 0, 1, 1)
    script.call("a", "fsync")
    script.call("a", "write", 0, 1, 2, begin=10, end=20)
    script.call("b", "write", 0, 1, 3, begin=11, end=21)
    script.call("a", "fsync", begin=22, end=24)
    script.call("b", "fsync", begin=23, end=25)
    read(script, "c", b"\2", begin=30, end=31)
    read(script, "c", b"\3", begin=32, end=33)
    assert script.problems() == []
    read(script, "c", b"\1", begin=34, end=35)
    assert "stale" in script.problems()[0]


def test_bytes_that_nobody_wrote_there() -> None:
    script = Script()
    script.call("a", "write", 5, 3, 1)
    script.call("b", "read", 4, 2, result=b"\1\1")
    assert "garbage" in script.problems()[0]


def test_a_truncation_takes_bytes_away_and_a_failed_one_may() -> None:
    script = Script()
    script.call("a", "write", 0, 4, 1)
    script.call("a", "fsync")
    script.call("b", "truncate", 2, error="ETIMEDOUT", end=NEVER)
    read(script, "c", b"\1\1\1\1", begin=10, end=11)
    read(script, "c", b"\1\1\0\0", begin=12, end=13)
    assert script.problems() == []
    script.call("b", "truncate", 2, begin=14, end=15)
    read(script, "c", b"\1\1\1\1", begin=16, end=17)
    assert "stale" in script.problems()[0]


def test_sizes() -> None:
    script = Script()
    script.call("a", "write", 9000, 10, 1)
    script.call("b", "stat", FILES[0], result=(9000, 0o644))
    script.call("b", "stat", FILES[0], result=(9010, 0o644))
    script.call("a", "fsync")
    script.call("b", "stat", FILES[0], result=(9010, 0o644))
    assert script.problems() == []
    script.call("b", "stat", FILES[0], result=(9000, 0o644))
    assert "size" in script.problems()[0]


def test_names() -> None:
    script = Script()
    script.call("a", "create", NAME, ino=20)
    script.call("b", "stat", NAME, ino=20, result=(0, 0o644))
    script.call("a", "unlink", NAME, ino=20, begin=10, end=20)
    script.call("b", "stat", NAME, ino=20, result=(0, 0o644), begin=15, end=16)
    script.call("b", "stat", NAME, ino=0, error="ENOENT", begin=17, end=18)
    assert script.problems() == []
    script.call("b", "stat", NAME, ino=20, result=(0, 0o644), begin=21, end=22)
    assert "stale" in script.problems()[0]


def test_a_listing_must_have_what_was_made_before() -> None:
    script = Script()
    script.call("a", "create", NAME, ino=20)
    script.call("b", "list", (b"d0",), result={b"a": INO, b"log": 9, b"x": 20})
    assert script.problems() == []
    script.call("b", "list", (b"d0",), result={b"a": INO, b"log": 9})
    assert "stale" in script.problems()[0]


def test_in_the_end_all_mounts_must_see_the_same() -> None:
    script = Script()
    script.call("c0/end", "stat", NAME, result=(3, 0o644))
    script.call("c0/end", "read", 0, 3, result=b"new")
    script.call("fresh/end", "stat", NAME, result=(3, 0o644))
    fresh = script.call("fresh/end", "read", 0, 3, result=b"new")
    for call in script.history.calls:
        call.client = call.client.removesuffix("/end")
    assert list(check_agreement(script.history)) == []
    fresh.result = b"old"
    assert [problem.split(":")[0] for problem in check_agreement(script.history)] == ["apart"]


# Several servers, and progress

CELL = LAYOUTS[1]
"""The second directory is on the second server."""
FILE_ON_1 = 1 << 56 | 5


def problems_of(script: Script) -> list[str]:
    plan = replace(make_plan(0), layout=CELL)
    return [
        *check_separation(script.history),
        *check_progress(script.history, plan),
        *check_errors(script.history, plan),
    ]


def timed(script: Script, client: str, kind: str, *args: object, ino: int, at_s: float, error: str = "") -> None:
    """A call from 0 to `at_s`."""
    call = script.call(client, kind, *args, ino=ino, error=error)
    call.end_s = at_s


def test_a_call_ends_in_time() -> None:
    script = Script()
    timed(script, "c0", "fsync", ino=FILE_ON_1, at_s=9.0)
    assert problems_of(script) == []
    timed(script, "c0", "fsync", ino=FILE_ON_1, at_s=10.5)
    assert "late" in problems_of(script)[0]


def test_a_call_may_wait_for_the_server_that_it_needs_and_for_no_other() -> None:
    script = Script()
    script.history.outages.append(Outage(1, "c0", 0.0, 6.0))
    timed(script, "c0", "fsync", ino=FILE_ON_1, at_s=12.0)
    timed(script, "c0", "fsync", ino=FILE_ON_1, at_s=8.0, error="ETIMEDOUT")
    timed(script, "c0", "stat", (b"d1", b"b"), ino=0, at_s=8.0, error="ETIMEDOUT")
    assert problems_of(script) == []
    timed(script, "c0", "fsync", ino=INO, at_s=12.0)
    assert "late" in problems_of(script)[0]
    for client, path in (("c0", (b"d0", b"a")), ("c1", (b"d1", b"b"))):
        other = Script()
        other.history.outages = script.history.outages
        timed(other, client, "stat", path, ino=0, at_s=8.0, error="ETIMEDOUT")
        assert "failed" in problems_of(other)[0]


def test_a_call_may_wait_for_others_of_its_mount() -> None:
    script = Script()
    timed(script, "c0", "fsync", ino=FILE_ON_1, at_s=9.0)
    last = script.call("c0", "fsync", ino=FILE_ON_1, begin=0)
    last.end_s = 15.0
    assert problems_of(script) == []
    script.history.calls[0].client = "c1"
    assert "late" in problems_of(script)[0]


def test_bytes_are_dropped_for_a_reason_of_their_own_servers() -> None:
    script = Script()
    script.history.promises_end("c0", 0, None)
    script.history.promises_end("c0", 1, (FILE_ON_1 + 1,))
    script.history.promises_end("c1", 1, None)
    script.history.dropped("c0", FILE_ON_1)
    assert "touched" in problems_of(script)[0]
    script.history.drops.clear()
    script.history.promises_end("c0", 1, (FILE_ON_1,))
    script.history.dropped("c0", FILE_ON_1)
    assert problems_of(script) == []


def test_nothing_goes_from_one_volume_to_another() -> None:
    script = Script()
    script.call("c0", "rename", (b"d0", b"x"), (b"d1", b"x"), ino=0, error="EXDEV")
    script.call("c0", "rename", (b"d0", b"x"), (b"d0", b"y"))
    assert problems_of(script) == []
    script.call("c0", "rename", (b"d0", b"x"), (b"d1", b"x"))
    assert "failed" in problems_of(script)[0]
    other = Script()
    other.call("c0", "link", (b"d0", b"x"), (b"d0", b"y"), ino=0, error="EXDEV")
    assert "failed" in problems_of(other)[0]


# Refused writes


def refused_script(told: str = "ENOSPC") -> Script:
    """Two bytes in the middle of a write are refused; its fsync ends with `told`."""
    script = Script()
    script.call("a", "write", 0, 6, 1)
    sync = script.call("a", "fsync", error=told, begin=5, end=9)
    assert sync.end == 9
    script.history.kept.append(Kept(7, "a", INO, 2, b"\1\1"))
    return script


def refusal_problems(script: Script) -> list[str]:
    checker = RefusalsChecker(script.history)
    return [*checker.check(), *ContentsChecker(script.history, checker).check(INITIAL)]


def test_what_was_refused_may_be_seen_until_that_was_told_and_not_afterwards() -> None:
    script = refused_script()
    read(script, "a", b"\1\1\1\1\1\1", begin=6, end=8)
    read(script, "a", b"\1\1\0\0\1\1", begin=10, end=11)
    assert refusal_problems(script) == []
    read(script, "a", b"\1\1\1\0\1\1", begin=12, end=13)
    assert "garbage" in refusal_problems(script)[0]


def test_what_was_not_refused_stays() -> None:
    script = refused_script()
    read(script, "a", b"\1\0\0\0\1\1", begin=10, end=11)
    assert "stale" in refusal_problems(script)[0]


def test_a_refusal_must_be_told_and_only_own_bytes_are_kept() -> None:
    script = refused_script(told="")
    assert refusal_problems(script) == []  # it began before: the next one can still say it
    script.call("a", "close", begin=20, end=21)
    assert "swallowed" in refusal_problems(script)[0]
    script = refused_script()
    script.history.kept.append(Kept(8, "b", INO, 2, b"\1"))
    assert "nobody wrote it" in refusal_problems(script)[0]


def test_what_was_overwritten_by_a_refused_write_before_it_was_stored_is_gone_with_it() -> None:
    script = Script()
    script.call("a", "write", 0, 2, 2)
    script.call("a", "write", 0, 2, 1)
    script.call("a", "fsync", error="ENOSPC", begin=10, end=12)
    script.history.kept.append(Kept(11, "a", INO, 0, b"\1\1"))
    read(script, "a", b"\0\0", begin=13, end=14)
    assert refusal_problems(script) == []
    script = Script()
    script.call("a", "write", 0, 2, 2)
    script.call("a", "fsync")
    script.call("a", "write", 0, 2, 1)
    script.call("a", "fsync", error="ENOSPC", begin=10, end=12)
    script.history.kept.append(Kept(11, "a", INO, 0, b"\1\1"))
    read(script, "a", b"\0\0", begin=13, end=14)
    assert "stale" in refusal_problems(script)[0]


def test_the_size_goes_back_with_what_was_refused() -> None:
    script = Script()
    script.call("a", "write", 9000, 10, 1)
    script.call("a", "fsync", error="EDQUOT", begin=5, end=9)
    script.history.kept.append(Kept(7, "a", INO, 9000, b"\1" * 10))
    script.call("a", "stat", FILES[0], result=(9000, 0o644), begin=10, end=11)
    assert refusal_problems(script) == []
    script.call("a", "stat", FILES[0], result=(9010, 0o644), begin=12, end=13)
    assert "size" in refusal_problems(script)[0]
