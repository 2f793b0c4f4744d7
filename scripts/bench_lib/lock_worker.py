"""A process of `locks`: `lock_worker.py fcntl|flock PATH`.

For each line on standard input, lock or unlock, it does that and prints when it began and when it was done.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path


def obey(kind: str, path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    function = fcntl.lockf if kind == "fcntl" else fcntl.flock
    for line in iter(sys.stdin.readline, ""):
        began_ns = time.monotonic_ns()
        function(fd, fcntl.LOCK_EX if line.strip() == "lock" else fcntl.LOCK_UN)
        print(began_ns, time.monotonic_ns(), flush=True)


if __name__ == "__main__":
    obey(sys.argv[1], Path(sys.argv[2]))
