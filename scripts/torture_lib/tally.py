"""Counts and distributions: made in each worker, sent as JSON, added up."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_FAILURES = 20
"""Failures told in words by one worker; all are counted."""
_RATIO = 1.05
_LOG_RATIO = math.log(_RATIO)


@dataclass(slots=True)
class Histogram:
    """Durations in buckets of 5 %."""

    buckets: dict[int, int] = field(default_factory=dict)
    longest_ns: int = 0

    def add(self, duration_ns: int) -> None:
        bucket = round(math.log(max(duration_ns, 1)) / _LOG_RATIO)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.longest_ns = max(self.longest_ns, duration_ns)

    def include(self, other: Histogram) -> None:
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.longest_ns = max(self.longest_ns, other.longest_ns)

    @property
    def count(self) -> int:
        return sum(self.buckets.values())

    def shares(self) -> list[tuple[float, float]]:
        """The distribution: (milliseconds, share of durations up to there), rising. Empty without any."""
        points, so_far, count = [], 0, self.count
        for bucket in sorted(self.buckets):
            so_far += self.buckets[bucket]
            points.append((min(_RATIO**bucket, self.longest_ns) / 1e6, so_far / count))
        return points

    def quantile_ms(self, share: float) -> float:
        """NaN without any."""
        return next((ms for ms, up_to in self.shares() if up_to >= share), math.nan)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Histogram:
        return cls({int(bucket): count for bucket, count in data["buckets"].items()}, data["longest_ns"])


@dataclass(slots=True)
class Checks:
    """Looks of one kind that were judged."""

    judged: int = 0
    first: int = 0
    """Those that were a worker's first of this kind since a change of the name."""
    busy: int = 0
    """Those during which the name was being changed: not older than published, not other than announced."""
    absent: int = 0
    """Those that had to find that there is no such name."""
    stale: int = 0

    def include(self, other: Checks) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Tally:
    checks: dict[str, Checks] = field(default_factory=dict)
    seen: dict[str, Histogram] = field(default_factory=dict)
    """From publication to the end of a look that was begun on hearing of it, by kind of look."""
    deeds: dict[str, Histogram] = field(default_factory=dict)
    """How long changes took, by kind."""
    orphans: int = 0
    """Uses of files that no longer had a name."""
    failures: list[str] = field(default_factory=list)
    failed: int = 0

    def fail(self, text: str) -> None:
        self.failed += 1
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(text)

    def checks_of(self, kind: str) -> Checks:
        return self.checks.setdefault(kind, Checks())

    @property
    def judged(self) -> int:
        return sum(checks.judged for checks in self.checks.values())

    @property
    def stale(self) -> int:
        return sum(checks.stale for checks in self.checks.values())

    def include(self, other: Tally) -> None:
        for kind, checks in other.checks.items():
            self.checks_of(kind).include(checks)
        for mine, its in ((self.seen, other.seen), (self.deeds, other.deeds)):
            for kind, histogram in its.items():
                mine.setdefault(kind, Histogram()).include(histogram)
        self.orphans += other.orphans
        self.failures += other.failures
        self.failed += other.failed

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Tally:
        return cls(
            {kind: Checks(**checks) for kind, checks in data["checks"].items()},
            {kind: Histogram.of(histogram) for kind, histogram in data["seen"].items()},
            {kind: Histogram.of(histogram) for kind, histogram in data["deeds"].items()},
            data["orphans"],
            data["failures"],
            data["failed"],
        )
