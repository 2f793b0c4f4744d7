"""Keeping data files from being deleted while a backup copies them.

A lock on DIR/backup-lock, shared among backups: the kernel gives it up with the process that holds it, however that
ends. A server deletes data files only while nobody holds it. A file whose row is gone when the lock is taken may be
deleted; every other one stays until it is given up, or the server ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

HOLD_NAME = "backup-lock"


@contextlib.contextmanager
def deletions_held(folder: Path) -> Iterator[None]:
    """No data file of the store in `folder` is deleted within the context. Raise OSError."""
    descriptor = _open(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def are_deletions_held(folder: Path) -> bool:
    """Whether somebody wants data files to stay. Raise OSError."""
    descriptor = _open(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open(folder: Path) -> int:
    return os.open(folder / HOLD_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
