"""Ways to look at a name, and what a look may show."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import NamedTuple

from .board import Known

NAMES = 8
STAMP_BYTES = 8
"""A file holds a version, little-endian, in its first and last bytes."""
SCRATCH = mmap.PAGESIZE
MIN_BYTES = 2 * mmap.PAGESIZE
"""Never shorter once published, so that the first page may be mapped. Bytes between SCRATCH and here belong to whoever
has the file open, with or without a name; stamps are never there."""
BY_PATH = ("read", "stat", "listing")
BY_HANDLE = ("pread", "fstat", "mapping")
KINDS = (*BY_PATH, *BY_HANDLE)


class Sight(NamedTuple):
    """What was seen of one name. None: this way to look does not show it."""

    exists: bool = True
    head: int | None = None
    tail: int | None = None
    size: int | None = None
    raced: bool = False
    """ESTALE: a path whose file is replaced again and again may give it (the kernel tries only twice), an open file
    never."""


def name_of(number: int) -> str:
    return f"name{number}"


def stamp(version: int) -> bytes:
    return version.to_bytes(STAMP_BYTES, "little")


def version_of(data: bytes) -> int:
    return int.from_bytes(data[:STAMP_BYTES], "little")


class HeldFile:
    """Open for reading and writing, and mapped."""

    def __init__(self, path: str) -> None:
        """Raise OSError; ValueError if the file is empty."""
        self.was_complete = False
        """It had its stamps when it was opened."""
        self.fd = os.open(path, os.O_RDWR)
        try:
            self.inode = os.fstat(self.fd).st_ino
            self.mapping = mmap.mmap(self.fd, SCRATCH, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        self.mapping.close()
        os.close(self.fd)


def look_by_path(kind: str, mount: Path, number: int) -> Sight:
    try:
        if kind == "stat":
            return Sight(size=os.stat(os.path.join(mount, name_of(number))).st_size)
        with open(os.path.join(mount, name_of(number)), "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return Sight(exists=False)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return Sight(raced=True)
    return Sight(True, version_of(content), version_of(content[-STAMP_BYTES:]), len(content))


def look_by_handle(kind: str, held: HeldFile) -> Sight:
    if kind == "fstat":
        return Sight(size=os.fstat(held.fd).st_size)
    data = os.pread(held.fd, STAMP_BYTES, 0) if kind == "pread" else held.mapping[:STAMP_BYTES]
    return Sight(head=version_of(data))


def look_by_listing(mount: Path) -> list[Sight]:
    """One for each name."""
    there = set(os.listdir(mount))
    return [Sight(exists=name_of(number) in there) for number in range(NAMES)]


def is_right(sight: Sight, known: Known) -> bool:
    """Whether this may be seen by a look that began at the last `known.mark()` and has ended, all heard."""
    if known.quiet:
        expected = known.published
        pairs = ((sight.head, expected.head), (sight.tail, expected.tail), (sight.size, expected.size))
        return (
            not sight.raced
            and sight.exists == expected.exists
            and (not sight.exists or all(seen in (None, right) for seen, right in pairs))
        )
    # In the middle of a change: each byte old or new. A file that is being made is empty, then full of zeros.
    possible = known.possible
    if sight.raced:
        return True
    if not sight.exists:
        return any(not state.exists for state in possible)
    made = {0} if any(not state.exists for state in possible) else set()
    heads = made | {state.head for state in possible if state.exists}
    sizes = made | {state.size for state in possible if state.exists}
    if not any(state.exists for state in possible):
        return False
    if sight.tail is not None:  # reading takes several calls: it may end anywhere between the old end and the new one
        return sight.size is not None and min(sizes) <= sight.size <= max(sizes) and _is_mixed(sight.head, heads)
    return _is_mixed(sight.head, heads) and sight.size in (None, *sizes)


def _is_mixed(version: int | None, versions: set[int]) -> bool:
    """Whether each byte of the stamp is one of these versions' (or it was not looked at)."""
    if version is None:
        return True
    return all(
        byte in choice for byte, choice in zip(stamp(version), zip(*map(stamp, versions), strict=True), strict=True)
    )
