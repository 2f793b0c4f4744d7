"""A process that cleans up when the one that should have cannot: it hangs on a dead mount, or was killed.

    with Guard(directory, mark) as guard:     what is mounted below directory, what runs with mark
        guard.arm(60)                         clean up in 60 s unless armed again or disarmed before
        ...
        guard.disarm()
    # left in any way but by the `with` statement: the guard sees its pipe close, and cleans up

Cleaning up: abort the FUSE connections (this frees whoever hangs on them, page faults included), unmount lazily,
SIGKILL. It has to be a process: a thread would wait for the GIL, which a page fault in a mapping holds.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

if __package__:
    from . import mounts, processes
else:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from cell_lib import mounts, processes

_DISMISS = "dismiss"
_FIRED = b"fired\n"


class Guard:
    """The side that is guarded."""

    def __init__(self, directory: Path, mark: str) -> None:
        command = [sys.executable, __file__, str(directory.resolve()), mark]
        environment = {name: value for name, value in os.environ.items() if name != processes.MARK_VARIABLE}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment, start_new_session=True
        )
        self.fired = 0
        """How often it had to act, as far as `disarm` has seen."""

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dismiss()

    def arm(self, limit_s: float) -> None:
        self._say(f"{time.monotonic() + limit_s}")

    def disarm(self) -> bool:
        """Take back `arm`. Return whether the time had run out."""
        assert self._process.stdout is not None
        self._say("inf")
        fired = bool(select.select([self._process.stdout], [], [], 0)[0])
        if fired:
            self.fired += self._process.stdout.read(4096).count(_FIRED)
        return fired

    def dismiss(self) -> None:
        """End the guard; nothing is cleaned up."""
        if self._process.poll() is None:
            self._say(_DISMISS)
        self._process.communicate(timeout=10)

    def _say(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode() + b"\n")


def clean_up(directory: Path, mark: str) -> None:
    for mount in mounts.fuse_mounts_below(directory):
        mounts.force_unmount(mount)
    processes.send(processes.marked(mark), mark, signal.SIGKILL)


def _stand_guard(directory: Path, mark: str) -> None:
    deadline = float("inf")
    buffer = b""
    while True:
        wait_s = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        if not select.select([0], [], [], wait_s)[0]:
            os.write(2, f"guard: time is up, ending all below {directory}\n".encode())
            clean_up(directory, mark)
            deadline = float("inf")
            os.write(1, _FIRED)
            continue
        data = os.read(0, 4096)
        if not data:
            clean_up(directory, mark)
            return
        *lines, buffer = (buffer + data).split(b"\n")
        if _DISMISS.encode() in lines:
            return
        if lines:
            deadline = float(lines[-1])


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _stand_guard(Path(sys.argv[1]), sys.argv[2])
