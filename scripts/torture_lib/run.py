"""Runs workers on mounts until enough was checked or the time is over."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from .board import make_pipe, say_stop
from .tally import Tally
from .worker import MAX_WORKERS, Task

SCRIPTS = Path(__file__).parent.parent
CHANGERS = 2
LOOKERS = 1
"""Per mount."""
MAX_MOUNTS = MAX_WORKERS // (CHANGERS + LOOKERS)
END_S = 60.0
"""Most time for the workers to end when they were told to: a call that waits for the server may take so long."""

Progress = Callable[[int, int], None]
"""Told now and then: checks so far, failures so far."""
OnFailure = Callable[[str], None]
"""Told of a failure in words as soon as it is known."""


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    pipe: int
    """The write end of its pipe."""
    output: bytearray
    last_line: bytes = b""
    judged: int = 0
    failed: int = 0

    def take(self, data: bytes, on_failure: OnFailure) -> None:
        self.output += data
        *lines, rest = self.output.split(b"\n")
        self.output = bytearray(rest)
        for line in lines:
            self.last_line = bytes(line)
            report = json.loads(line)
            if isinstance(report, list):
                self.judged, self.failed, failures = report
                for failure in failures:
                    on_failure(failure)


def run_torture(
    mounts: Sequence[Path],
    directory: Path,
    seconds: float,
    checks: int | None = None,
    seed: int = 0,
    on_progress: Progress = lambda judged, failed: None,
    on_failure: OnFailure = lambda text: None,
) -> Tally:
    """Torture until `checks` were made, or `seconds` are over. Return what all workers saw and did.

    `directory` is a local one. A worker that fails or does not end counts as a failure.
    """
    lock_file = directory / "torture.lock"
    lock_file.touch()
    total = Tally()

    def fail(text: str) -> None:
        total.fail(text)
        on_failure(text)

    with ExitStack() as stack:
        children = _start(mounts, lock_file, seed, stack)
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for child in children:
                assert child.process.stdout is not None
                selector.register(child.process.stdout, selectors.EVENT_READ, child)
            stopped = False
            while selector.get_map():
                for key, _ in selector.select(timeout=0.2):
                    data = os.read(key.fd, 1 << 16)
                    if data:
                        key.data.take(data, on_failure)
                    else:
                        selector.unregister(key.fileobj)
                judged = sum(child.judged for child in children)
                on_progress(judged, sum(child.failed for child in children))
                enough = checks is not None and judged >= checks
                ended = len(selector.get_map()) < len(children)
                if not stopped and (enough or ended or time.monotonic() > deadline):
                    stopped = True
                    deadline = time.monotonic() + END_S
                    for child in children:
                        say_stop(child.pipe)
                if stopped and time.monotonic() > deadline:
                    fail(f"a worker has not ended {END_S:g} s after it was told to")
                    break
        for number, child in enumerate(children):
            child.process.kill()
            status = child.process.wait()
            report = json.loads(child.last_line) if child.last_line else None
            if status == 0 and isinstance(report, dict):
                total.include(Tally.of(report))
            else:
                fail(f"worker {number} ended with status {status}")
    return total


def _start(mounts: Sequence[Path], lock_file: Path, seed: int, stack: ExitStack) -> list[_Child]:
    assert len(mounts) <= MAX_MOUNTS
    count = len(mounts) * (CHANGERS + LOOKERS)
    pipes = [make_pipe() for _ in range(count)]
    for pipe in pipes:
        stack.callback(os.close, pipe[1])
    writers = [write_end for _, write_end in pipes]
    children = []
    for index, (read_end, write_end) in enumerate(pipes):
        mount, place = divmod(index, CHANGERS + LOOKERS)
        other = mounts[(mount + 1 + place) % len(mounts)] if len(mounts) > 2 else mounts[1 - mount]
        task = Task(
            index, place < CHANGERS, seed + index, str(mounts[mount]), str(other), str(lock_file), read_end, writers
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "torture_lib.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=SCRIPTS,
            pass_fds=[read_end, *writers],
        )
        stack.callback(_end, process)
        os.close(read_end)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it ended at once, which is noticed
            process.stdin.write(json.dumps(task._asdict()).encode() + b"\n")
            process.stdin.flush()
        children.append(_Child(process, write_end, bytearray()))
    return children


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()
