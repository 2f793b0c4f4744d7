"""How often something was done, how long it took, and how it failed. Core: no I/O, no clock.

Latencies are counted in fixed buckets, so that adding one costs the same whatever was counted before, and what was
counted between two moments is the difference of two countings.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

BOUNDS_S = (
    1e-5, 2e-5, 5e-5,
    1e-4, 2e-4, 5e-4,
    1e-3, 2e-3, 5e-3,
    1e-2, 2e-2, 5e-2,
    0.1, 0.2, 0.5,
    1.0, 2.0, 5.0, 10.0, 60.0,
)  # fmt: skip
"""A bucket has what took no longer than its bound and longer than the one before. The last bucket has no bound."""


class Timing:
    """One kind of thing that is done: an upcall, a call, a sync."""

    __slots__ = ("buckets", "failures", "started", "total_s")

    def __init__(self) -> None:
        self.started = 0
        """Counted by whoever begins one; those that are not done yet among them."""
        self.buckets = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0
        self.failures: dict[int, int] = {}
        """How often it ended with each error: an errno or an abort code. Those are in the buckets, too."""

    def took(self, seconds: float) -> None:
        """One is done."""
        self.buckets[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def failed(self, code: int) -> None:
        self.failures[code] = self.failures.get(code, 0) + 1

    def as_json(self, name_of: Callable[[int], str] = str) -> dict[str, Any]:
        """`name_of` tells what an error is called."""
        return {
            "started": self.started,
            "total_s": round(self.total_s, 6),
            "buckets": list(self.buckets),
            "failures": {name_of(code): count for code, count in sorted(self.failures.items())},
        }


class Timings:
    """Timings by name, made when first asked for."""

    def __init__(self) -> None:
        self._by_name: dict[str, Timing] = {}

    def __getitem__(self, name: str) -> Timing:
        timing = self._by_name.get(name)
        if timing is None:
            timing = self._by_name[name] = Timing()
        return timing

    def __iter__(self) -> Iterator[tuple[str, Timing]]:
        """Those of which there was any, by name."""
        return iter(sorted((name, timing) for name, timing in self._by_name.items() if timing.started))

    def counts(self) -> dict[str, int]:
        """How often each was begun."""
        return {name: timing.started for name, timing in self}

    def as_json(self, name_of: Callable[[int], str] = str) -> dict[str, dict[str, Any]]:
        return {name: timing.as_json(name_of) for name, timing in self}


# What was counted, as `Timing.as_json` has it


def total(timings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several countings of the same kind of thing together."""
    failures: dict[str, int] = {}
    for timing in timings:
        for name, count in timing["failures"].items():
            failures[name] = failures.get(name, 0) + count
    return {
        "started": sum(timing["started"] for timing in timings),
        "total_s": sum(timing["total_s"] for timing in timings),
        "buckets": [sum(column) for column in zip(*(timing["buckets"] for timing in timings), strict=True)],
        "failures": failures,
    }


def between(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> dict[str, Any]:
    """What was counted from `before` to `after`; all of it if nothing was counted before."""
    if before is None:
        return dict(after)
    failures = {name: count - before["failures"].get(name, 0) for name, count in after["failures"].items()}
    return {
        "started": after["started"] - before["started"],
        "total_s": after["total_s"] - before["total_s"],
        "buckets": [new - old for new, old in zip(after["buckets"], before["buckets"], strict=True)],
        "failures": {name: count for name, count in failures.items() if count},
    }


def mean_s(timing: Mapping[str, Any]) -> float:
    """0 if nothing is done."""
    done = sum(timing["buckets"])
    return float(timing["total_s"] / done) if done else 0.0


def quantile_s(timing: Mapping[str, Any], share: float) -> float:
    """The time within which this share of what is done was done, as exactly as buckets tell: with a straight line
    between their bounds. 0 if nothing is done; the last bound if it took longer than that."""
    buckets: list[int] = timing["buckets"]
    wanted = share * sum(buckets)
    below = 0.0
    for bound, count in zip(BOUNDS_S, buckets, strict=False):
        if count and count >= wanted:
            return below + (bound - below) * wanted / count
        wanted -= count
        below = bound
    return BOUNDS_S[-1] if sum(buckets) else 0.0


def pace(before: Mapping[str, Any] | None, after: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What was done from `before` to `after`, `seconds` later: how often a second, and how long it took."""
    since = between(before, after)
    return {
        "per_s": sum(since["buckets"]) / seconds,
        "mean_s": mean_s(since),
        "p50_s": quantile_s(since, 0.5),
        "p99_s": quantile_s(since, 0.99),
        "failed_per_s": sum(since["failures"].values()) / seconds,
    }


def paces(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]], seconds: float
) -> dict[str, dict[str, Any]]:
    """`pace` of each, by name; only of those of which some were done."""
    each = {name: pace(before.get(name), timing, seconds) for name, timing in after.items()}
    return {name: one for name, one in each.items() if one["per_s"]}
