"""The writer's side of `visible`, a process of its own: `visible_writer.py KIND PATH`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

STEP_BYTES = 8
"""A step's number, little-endian, at the start of the file."""


def write_steps(kind: str, path: Path) -> None:
    """For each number on standard input make that step, and print when it began and was done."""
    fd = os.open(path, os.O_RDONLY if kind == "listing" else os.O_RDWR)
    for line in iter(sys.stdin.readline, ""):
        step = int(line)
        if kind == "listing" and step > 2:
            # The folder stays small: what is measured is one change, not a long listing.
            os.unlink(f"n{step - 2}", dir_fd=fd)
        began_ns = time.monotonic_ns()
        if kind == "listing":
            os.close(os.open(f"n{step}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=fd))
        elif kind == "stat":
            os.pwrite(fd, b"x", step - 1)
            os.fsync(fd)
        else:
            os.pwrite(fd, step.to_bytes(STEP_BYTES, "little"), 0)
            os.fsync(fd)
        print(began_ns, time.monotonic_ns(), flush=True)
    os.close(fd)


if __name__ == "__main__":
    write_steps(sys.argv[1], Path(sys.argv[2]))
