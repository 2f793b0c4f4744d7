"""Compiles scripts/mmap_demo.c and understands what it prints with -t."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parent.parent / "mmap_demo.c"
BUILD = SOURCE.parent.parent / "build"
_COMPILE_S = 60.0


class CompileError(Exception):
    """cc failed; the message is what it said."""


def build() -> Path:
    """Return the compiled program, compiling it if its source has changed. Any number of callers at once."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    program = BUILD / f"mmap_demo-{digest}"
    if program.exists():
        return program
    BUILD.mkdir(exist_ok=True)
    new = BUILD / f"mmap_demo.{os.getpid()}"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(new), str(SOURCE)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S)
    except FileNotFoundError:
        raise CompileError("there is no C compiler (cc)") from None
    except subprocess.CalledProcessError as failed:
        raise CompileError(f"{' '.join(command)}:\n{failed.stderr}") from None
    new.replace(program)
    return program


class Written(NamedTuple):
    """A line of the writer: the byte was stored after `stored_ns`, and its fsync had returned at `done_ns`."""

    byte: int
    stored_ns: int
    done_ns: int


class Seen(NamedTuple):
    """A line of the reader: a load of this byte had returned at `seen_ns`, the last of another began at `old_ns`."""

    byte: int
    seen_ns: int
    old_ns: int


def parse_written(line: str) -> Written:
    byte, stored_ns, done_ns = line.split()
    return Written(int(byte, 16), int(stored_ns), int(done_ns))


def parse_seen(line: str) -> Seen:
    byte, seen_ns, old_ns = line.split()
    return Seen(int(byte, 16), int(seen_ns), int(old_ns))


class Sight(NamedTuple):
    """How the reader met one byte of the writer."""

    written: Written
    seen: Seen | None
    """Its first sight of this byte or a newer one; None if there was none yet."""

    @property
    def delay_ns(self) -> int | None:
        """From the return of fsync to the first sight. Negative if the sight came first, as is usual: the server
        answers the writer's fsync only after the reader's mount has acknowledged the break."""
        return self.seen.seen_ns - self.written.done_ns if self.seen else None

    @property
    def stale(self) -> bool:
        """Whether a load that began after fsync had returned got an older byte."""
        return self.seen is not None and self.seen.old_ns > self.written.done_ns


def match(written: list[Written], seen: list[Seen]) -> list[Sight]:
    """Compare a writer's lines with those of a reader (-c -t) that had a line before the first of them.

    Both are in order. Bytes wrap at 256: neither may be more than 127 steps from the other.
    """
    sights = []
    next_seen = 0
    for write in written:
        # The reader only ever goes forward, so what is older than this byte is older than all that follow.
        while next_seen < len(seen) and (seen[next_seen].byte - write.byte) % 256 >= 128:
            next_seen += 1
        sights.append(Sight(write, seen[next_seen] if next_seen < len(seen) else None))
    return sights
