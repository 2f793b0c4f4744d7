"""Copying the database as it is at one moment, also while it is used."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from .syncing import sync_path


def copy_database(connection: sqlite3.Connection, target: Path) -> None:
    """Copy all that is committed to `target`, durably, in place of what is there. Raise sqlite3.Error, OSError.

    Not within a transaction. Takes long for large stores: with a connection of its own it is for threads.
    """
    new = target.with_name(target.name + ".new")
    new.unlink(missing_ok=True)
    try:
        # Made beforehand so that it is never readable for others.
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        connection.execute("VACUUM INTO ?", (str(new),))
        sync_path(new)
        new.rename(target)
        sync_path(target.parent)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
