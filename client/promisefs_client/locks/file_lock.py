"""Locks as the kernel asks for them: byte ranges (fcntl, open file descriptions) and whole files (flock)."""

from __future__ import annotations

import enum
from typing import NamedTuple

TO_THE_END = 2**63 - 1
"""As the end of a range: however long the file gets."""


class LockKind(enum.IntEnum):
    """Numbers of fcntl.h."""

    READ = 0
    WRITE = 1
    UNLOCK = 2


class FileLock(NamedTuple):
    kind: LockKind
    start: int
    end: int
    """Its last byte."""
    pid: int
    """Of the process that asks, or has it."""
