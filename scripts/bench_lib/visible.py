"""How long after fsync returned on one view its effect is seen on another, and whether ever an older state was.

A writer process changes something on the first view, calls fsync (for names: the call that makes the name) and says
through a pipe, with the time of its return, which step it was. The reader, which has everything cached from the step
before, looks on the second view until it sees the step. A first look that does not see it is a stale read. The delay
therefore contains the pipe and one look; a local directory shows how much that is.
"""

from __future__ import annotations

import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .targets import Target
from .visible_writer import STEP_BYTES

WRITER = Path(__file__).with_name("visible_writer.py")
KINDS = ("read", "mmap", "stat", "listing")
FULL_STEPS = 500
QUICK_STEPS = 100
SEEN_S = 10.0


@dataclass(frozen=True, slots=True)
class Visibility:
    kind: str
    median_ms: float
    p99_ms: float
    stale: int
    """Steps of which the first look did not see them."""
    steps: int
    write_median_ms: float
    """What the writer waited for its change and fsync."""
    delays_ms: tuple[float, ...]
    """All of them, shortest first."""


class NeverSeen(Exception):
    """A step was not seen within SEEN_S."""

    def __init__(self, kind: str, step: int) -> None:
        super().__init__(f"{kind}: step {step} is not seen after {SEEN_S:g} s")
        self.kind = kind


def measure(target: Target, kind: str, steps: int) -> Visibility:
    """Run `steps` steps. Raise NeverSeen."""
    name = f"visible-{kind}"
    _prepare(target.warm() / name, kind)
    command = [sys.executable, str(WRITER), kind, str(target.warm() / name)]
    delays_ms: list[float] = []
    writes_ms: list[float] = []
    stale = 0
    with _looking(target.other() / name, kind) as look:
        look()
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert writer.stdin is not None and writer.stdout is not None
        try:
            for step in range(1, steps + 1):
                writer.stdin.write(b"%d\n" % step)
                line = writer.stdout.readline().split()
                if not line:
                    raise OSError(f"the writer ended with status {writer.wait()}")
                began_ns, done_ns = int(line[0]), int(line[1])
                if look() < step:
                    stale += 1
                    deadline = time.monotonic() + SEEN_S
                    while look() < step:
                        if time.monotonic() > deadline:
                            raise NeverSeen(kind, step)
                delays_ms.append((time.monotonic_ns() - done_ns) / 1e6)
                writes_ms.append((done_ns - began_ns) / 1e6)
        finally:
            writer.stdin.close()
            writer.wait(SEEN_S)
            writer.stdout.close()
    p99_ms = statistics.quantiles(delays_ms, n=100, method="inclusive")[98]
    median_ms, write_median_ms = statistics.median(delays_ms), statistics.median(writes_ms)
    return Visibility(kind, median_ms, p99_ms, stale, steps, write_median_ms, tuple(sorted(delays_ms)))


def _prepare(path: Path, kind: str) -> None:
    if kind == "listing":
        path.mkdir()
    else:
        path.write_bytes(bytes(mmap.PAGESIZE if kind != "stat" else 0))


@contextmanager
def _looking(path: Path, kind: str) -> Iterator[Callable[[], int]]:
    """Yield a function that looks once and returns the last step that it saw."""
    if kind == "stat":
        yield lambda: os.stat(path).st_size
    elif kind == "listing":
        yield lambda: max((int(name.removeprefix("n")) for name in os.listdir(path)), default=0)
    else:
        fd = os.open(path, os.O_RDONLY)
        try:
            if kind == "read":
                yield lambda: int.from_bytes(os.pread(fd, STEP_BYTES, 0), "little")
            else:
                with mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ) as page:
                    yield lambda: int.from_bytes(page[:STEP_BYTES], "little")
        finally:
            os.close(fd)
