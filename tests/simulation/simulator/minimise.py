"""Makes a failing history shorter: fewer faults, fewer processes, fewer steps, and still a failure of the same kind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from .faults import OF_SERVERS
from .layout import ALONE
from .plan import Plan
from .run import Outcome, run_history

T = TypeVar("T")

SCHEDULES = 4
"""Another schedule of the shorter plan may fail where the same one does not."""


def minimise(failure: Outcome, *, seconds: float = 60.0) -> Outcome:
    """Return the shortest failing history found within the time."""
    deadline_s = time.monotonic() + seconds
    kind = _kind(failure)
    best = failure
    improved = True
    while improved:
        improved = False
        for plan in _shorter(best.plan):
            if time.monotonic() > deadline_s:
                return best
            found = _fails(plan, kind)
            if found is not None:
                best, improved = found, True
                break
    return best


def _kind(outcome: Outcome) -> str:
    """What is wrong, in a word: stale, garbage, size, failed, stuck..."""
    return outcome.problems[0].split(":")[0]


def _fails(plan: Plan, kind: str) -> Outcome | None:
    for number in range(SCHEDULES):
        outcome = run_history(plan.with_seed(plan.seed + number))
        if outcome.failed and _kind(outcome) == kind:
            return outcome
    return None


def _shorter(plan: Plan) -> Iterator[Plan]:
    """Plans with something left out: large parts first."""
    for number in range(len(plan.processes)):
        yield replace(plan, processes=_without(plan.processes, number, number + 1))
    for number in range(len(plan.faults)):
        yield replace(plan, faults=_without(plan.faults, number, number + 1))
    if plan.layout is not ALONE and not any(fault.kind in OF_SERVERS for fault in plan.faults):
        yield replace(plan, layout=ALONE)
    for number, (client, steps) in enumerate(plan.processes):
        size = len(steps) // 2
        while size:
            for start in range(0, len(steps), size):
                shorter = (client, _without(steps, start, start + size))
                processes = (*plan.processes[:number], shorter, *plan.processes[number + 1 :])
                yield replace(plan, processes=processes)
            size //= 2


def _without(items: tuple[T, ...], start: int, stop: int) -> tuple[T, ...]:
    return items[:start] + items[stop:]
