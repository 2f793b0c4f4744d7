"""Processes by descent: whatever we start carries a mark in its environment, and so does all that it starts.

A mark is a path, "run/cell/m1". A process belongs to a mark if its own mark is that or lies below it. Daemons keep the
environment that they were started with, so any later command finds them, whatever became of their parents; and a
pid that was used again for something else is never taken for ours.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

MARK_VARIABLE = "PROMISEFS_STARTED_BY"
_POLL_S = 0.01
_KILL_WAIT_S = 5.0


def new_mark() -> str:
    """Return a mark that nobody has yet, below the one of this process if it has one."""
    above = os.environ.get(MARK_VARIABLE)
    own = uuid.uuid4().hex[:12]
    return f"{above}/{own}" if above else own


def environment(mark: str) -> dict[str, str]:
    """This process's environment, with `mark` for what is started."""
    return {**os.environ, MARK_VARIABLE: mark}


def mark_of(pid: int) -> str | None:
    """The mark of a living process of ours; None if it has none, is gone, a zombie, or somebody else's."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    prefix = MARK_VARIABLE.encode() + b"="
    return next((v[len(prefix) :].decode(errors="replace") for v in variables if v.startswith(prefix)), None)


def belongs(pid: int, mark: str) -> bool:
    found = mark_of(pid)
    return found is not None and (found == mark or found.startswith(mark + "/"))


def marked(mark: str) -> list[int]:
    """Pids of all living processes that belong to `mark`, this one excepted."""
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in pids if pid != os.getpid() and belongs(pid, mark)]


def command_line(pid: int) -> str:
    """For messages: the command of a process, or a question mark if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    return "?"


def send(pids: Iterable[int], mark: str, signal_number: signal.Signals) -> None:
    """Signal those of `pids` that still belong to `mark`."""
    for pid in pids:
        if belongs(pid, mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal_number)


def wait_until_gone(mark: str, timeout_s: float) -> list[int]:
    """Wait for all processes of `mark`; return those that are still there after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return left


def end(mark: str, grace_s: float) -> list[str]:
    """SIGTERM all processes of `mark`, after `grace_s` SIGKILL. Return a complaint for each that needed the latter."""
    send(marked(mark), mark, signal.SIGTERM)
    complaints = [f"{pid} ({command_line(pid)}) did not end on SIGTERM" for pid in wait_until_gone(mark, grace_s)]
    if complaints:
        send(marked(mark), mark, signal.SIGKILL)
        complaints += [f"{pid} ({command_line(pid)}) survives SIGKILL" for pid in wait_until_gone(mark, _KILL_WAIT_S)]
    return complaints
