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
    """A line of the writer: fsync of this byte had returned at `done_ns`."""

    byte: int
    done_ns: int


class Seen(NamedTuple):
    """A line of the reader: a load of this byte had returned at `seen_ns`, the last of another began at `old_ns`."""

    byte: int
    seen_ns: int
    old_ns: int


def parse_written(line: str) -> Written:
    byte, done_ns = line.split()
    return Written(int(byte, 16), int(done_ns))


def parse_seen(line: str) -> Seen:
    byte, seen_ns, old_ns = line.split()
    return Seen(int(byte, 16), int(seen_ns), int(old_ns))


class Verdict(NamedTuple):
    delays_ns: list[int]
    """For each byte written that was seen (or a newer one): first sight minus return of fsync.

    Negative if it was seen before fsync returned, which the protocol makes the usual case.
    """
    stale: list[Written]
    """Bytes after whose fsync a load began that still got an older byte."""
    missed: list[Written]
    """Bytes of which neither they nor newer ones were seen."""


def judge(written: list[Written], seen: list[Seen]) -> Verdict:
    """Compare a writer's lines with those of a reader (-c -t) that had a line before the first of them.

    Both are in order. Bytes wrap at 256: neither may be more than 127 steps from the other.
    """
    verdict = Verdict([], [], [])
    next_seen = 0
    for write in written:
        # The reader only ever goes forward, so the first line at or after this byte stays ahead for the next.
        while next_seen < len(seen) and (seen[next_seen].byte - write.byte) % 256 >= 128:
            next_seen += 1
        if next_seen == len(seen):
            verdict.missed.append(write)
            continue
        sight = seen[next_seen]
        verdict.delays_ns.append(sight.seen_ns - write.done_ns)
        if sight.old_ns > write.done_ns:
            verdict.stale.append(write)
    return verdict
