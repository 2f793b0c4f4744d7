"""What a check finds."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Severity(enum.StrEnum):
    NOTE = "note"
    """Nothing is wrong: what a crash leaves behind, which the next start clears up or which nobody sees."""
    DAMAGE = "damage"
    """A repair mends it."""
    LOSS = "loss"
    """It cannot be mended from what is in the store: bring it back from a backup, or do what the text says."""


class Problem(NamedTuple):
    rule: str
    """Its name; stable, for programs."""
    severity: Severity
    vnode: int
    """Key of the vnode that it is about; 0 if it is about none."""
    text: str


class Report:
    """Problems, all of them counted and the first of each rule kept."""

    MAX_KEPT = 100
    """Of each rule."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.counts: dict[tuple[str, Severity], int] = {}

    def add(self, problem: Problem) -> None:
        counted = (problem.rule, problem.severity)
        self.counts[counted] = self.counts.get(counted, 0) + 1
        if self.counts[counted] <= self.MAX_KEPT:
            self.problems.append(problem)

    def count(self, severity: Severity) -> int:
        return sum(count for (_, of), count in self.counts.items() if of is severity)

    @property
    def is_sound(self) -> bool:
        return not self.count(Severity.DAMAGE) and not self.count(Severity.LOSS)
