"""Locks of files, as they travel and as both sides keep them: owners, ranges, and how ranges replace each other.

An owner's locks on one file are its *pieces*: disjoint, in the order of their starts, and of neighbours that touch no
two are of one kind. What a lock or its release changes is only the range that it names (fcntl(2)): `replaced` is all of
that, and pure.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

from .fields import int_range
from .ids import MAX_FILE_BYTES, U32, U64, Fid, Size


class LockKind(enum.IntEnum):
    """Numbers are AFS's LockRead and LockWrite."""

    READ = 0
    WRITE = 1


class LockOwner(NamedTuple):
    """Who holds a lock at a client, or wants one.

    Locks of flock(2) and those of fcntl(2) do not see each other. One number is one owner: a process's open files, or
    an open file description.
    """

    flock: bool
    number: U64


class Lock(NamedTuple):
    """A range of bytes, both ends inclusive; `end` 2**63-1 is as far as a file can reach. A flock has all of it."""

    kind: Annotated[int, int_range(0, 1)]
    start: Size
    end: Size
    pid: U32  # of the process that took it, at its client

    def conflicts(self, other: Lock) -> bool:
        """Whether two owners cannot have these at a time."""
        return self.overlaps(other.start, other.end) and LockKind.WRITE in (self.kind, other.kind)

    def overlaps(self, start: int, end: int) -> bool:
        return self.start <= end and start <= self.end


class HeldLock(NamedTuple):
    """One piece, with whose it is."""

    fid: Fid
    owner: LockOwner
    lock: Lock


def replaced(pieces: Sequence[Lock], start: int, end: int, new: Lock | None) -> list[Lock]:
    """The pieces when `new`, or nothing, is all that the owner has of the range; `new` has just this range."""
    result: list[Lock] = []
    for piece in pieces:
        if not piece.overlaps(start, end):
            result.append(piece)
            continue
        if piece.start < start:
            result.append(piece._replace(end=start - 1))
        if piece.end > end:
            result.append(piece._replace(start=end + 1))
    if new is not None:
        result.append(new)
    result.sort(key=lambda piece: piece.start)
    return _joined(result)


def _joined(pieces: Iterable[Lock]) -> list[Lock]:
    joined: list[Lock] = []
    for piece in pieces:
        if joined and joined[-1].kind == piece.kind and joined[-1].end + 1 == piece.start:
            joined[-1] = joined[-1]._replace(end=piece.end)
        else:
            joined.append(piece)
    return joined


def cover(pieces: Iterable[Lock], wanted: Lock) -> bool:
    """Whether the owner of these pieces has all of what is wanted, or better."""
    position = wanted.start
    for piece in pieces:
        if piece.start <= position <= piece.end and piece.kind >= wanted.kind:
            position = piece.end + 1
    return position > wanted.end


def within(pieces: Iterable[Lock], start: int, end: int) -> list[Lock]:
    """What the pieces have of a range."""
    return [p._replace(start=max(p.start, start), end=min(p.end, end)) for p in pieces if p.overlaps(start, end)]


WHOLE_FILE = (0, MAX_FILE_BYTES)
"""Start and end of the range that has every byte."""
