"""What locks cost: a lock that passes on, and one that nobody is in the way of.

Timed is from when a process on one view begins to release the lock until a process that waits on the other has it. A
local directory shows how much of that the processes are.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from .targets import Target

WORKER = Path(__file__).with_name("lock_worker.py")
KINDS = ("fcntl", "flock")
FULL_STEPS = 500
QUICK_STEPS = 50
_QUEUED_S = 0.005
"""From when a process is told to lock until it surely waits."""
_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Handover:
    kind: str
    target: str
    median_ms: float
    p99_ms: float
    free_median_ms: float
    """To take a lock that nobody has and give it up again."""
    steps: int


class _Worker:
    def __init__(self, kind: str, path: Path) -> None:
        command = [sys.executable, str(WORKER), kind, str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def tell(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(what.encode() + b"\n")

    def answer(self) -> tuple[int, int]:
        """When it began and when it was done, monotonic nanoseconds. Raise OSError if the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().split()
        if not line:
            raise OSError(f"the process that locks ended with status {self._process.wait()}")
        return int(line[0]), int(line[1])

    def do(self, what: str) -> tuple[int, int]:
        self.tell(what)
        return self.answer()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_LIMIT_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


@contextmanager
def _workers(kind: str, *paths: Path) -> Iterator[list[_Worker]]:
    workers = [_Worker(kind, path) for path in paths]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.close()


def measure(target: Target, kind: str, steps: int) -> Handover:
    """Hand a lock to and fro. Raise OSError."""
    name = f"locked-{kind}"
    (target.warm() / name).touch()
    delays_ms: list[float] = []
    with _workers(kind, target.warm() / name, target.other() / name) as (holder, waiter):
        free_ms = []
        for _ in range(steps):
            began_ns, _ = holder.do("lock")
            _, done_ns = holder.do("unlock")
            free_ms.append((done_ns - began_ns) / 1e6)
        holder.do("lock")
        for _ in range(steps):
            waiter.tell("lock")
            time.sleep(_QUEUED_S)
            released_ns, _ = holder.do("unlock")
            _, locked_ns = waiter.answer()
            delays_ms.append((locked_ns - released_ns) / 1e6)
            holder, waiter = waiter, holder
    p99_ms = statistics.quantiles(delays_ms, n=100, method="inclusive")[98]
    return Handover(kind, target.name, statistics.median(delays_ms), p99_ms, statistics.median(free_ms), steps)


def table(measured: list[Handover]) -> Table:
    made = Table(title="Locks", title_justify="left")
    for header in ("kind", "target", "handover, median ms", "p99 ms", "free lock and unlock, median ms"):
        made.add_column(header, justify="left" if header in ("kind", "target") else "right")
    for one in measured:
        numbers = (one.median_ms, one.p99_ms, one.free_median_ms)
        made.add_row(one.kind, one.target, *(f"{number:.3f}" for number in numbers))
    return made
