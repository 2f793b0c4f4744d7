"""Many histories, on several processors, until one fails or there are enough."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from .layout import ALONE, LAYOUTS
from .plan import make_plan
from .run import Outcome, run_history
from .template import template

CHUNK = 4
Prepare = Callable[[], AbstractContextManager[object]]
"""Made around each chunk of histories, in the process that runs them: patches production code for mutants."""


def run_seeds(
    first: int, count: int, *, jobs: int = 0, profile: str | None = None, prepare: Prepare = nullcontext,
    deadline_s: float = float("inf"),
) -> Iterator[Outcome]:  # fmt: skip
    """Give the outcomes of so many histories, in no particular order; no more after `deadline_s` (time.monotonic)."""
    chunks = ((seed, min(CHUNK, first + count - seed)) for seed in range(first, first + count, CHUNK))
    if jobs == 1:
        for chunk in chunks:
            if time.monotonic() > deadline_s:
                return
            yield from _run_chunk((*chunk, profile, prepare))
        return
    tasks = ((*chunk, profile, prepare) for chunk in chunks)
    for layout in (ALONE, *LAYOUTS):
        template(layout)  # here: processes of a pool leave what they make
    with multiprocessing.get_context("fork").Pool(jobs or os.cpu_count()) as pool:
        for outcomes in pool.imap_unordered(_run_chunk, _until(deadline_s, tasks)):
            yield from outcomes


def _until(
    deadline_s: float, tasks: Iterator[tuple[int, int, str | None, Prepare]]
) -> Iterator[tuple[int, int, str | None, Prepare]]:
    for task in tasks:
        if time.monotonic() > deadline_s:
            return
        yield task


def _run_chunk(task: tuple[int, int, str | None, Prepare]) -> list[Outcome]:
    first, count, profile, prepare = task
    with prepare():
        return [run_history(make_plan(seed, profile=profile)) for seed in range(first, first + count)]
