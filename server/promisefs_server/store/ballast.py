"""Room on the disk that the store keeps for itself, so that a full disk can be emptied: removing needs space too.

Two reserves, each BALLAST_BYTES: stores of bytes are refused when less than that is available, which leaves it to
metadata; and when less than WATCHED_BYTES is available a file of that size is made, whoever else fills the disk. The
file is deleted when the disk is full all the same, for what frees space, and made again when there is room.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from pathlib import Path

import trio
from promisefs_protocol.abort import AbortCode, Aborted

log = logging.getLogger(__name__)

BALLAST_NAME = "ballast"
BALLAST_BYTES = 16 << 20
WATCHED_BYTES = 1 << 30
"""With more available nothing is kept: a new store is small."""
FULL_BYTES = 1 << 20
"""With less available the disk counts as full for a start or a shutdown."""
POLL_S = 1.0
CHECK_BYTES = 4 << 20
"""Stores look at the disk again after so many bytes, or after POLL_S."""


class Ballast:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / BALLAST_NAME
        self._roomy = True
        self._checked_s = -math.inf
        self._unchecked_bytes = 0

    def available_bytes(self) -> int:
        disk = os.statvfs(self._folder)
        return disk.f_bavail * disk.f_frsize

    @property
    def is_full(self) -> bool:
        return self.available_bytes() < FULL_BYTES

    def release(self) -> bool:
        """The disk is full: give up the file. Return whether there was one."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        log.warning("the disk is full: %d bytes kept for removals are used now", BALLAST_BYTES)
        return True

    def admit(self, size_bytes: int, now_s: float) -> None:
        """Before a store of so many bytes. Abort NOSPC if too little would be left."""
        self._unchecked_bytes += size_bytes
        if now_s - self._checked_s >= POLL_S or self._unchecked_bytes >= CHECK_BYTES:
            self._roomy = self.available_bytes() >= BALLAST_BYTES + size_bytes
            self._checked_s, self._unchecked_bytes = now_s, 0
        if not self._roomy:
            raise Aborted(AbortCode.NOSPC, "the server's disk is full")

    async def run(self) -> None:
        """Keep the file as the disk fills, until cancelled."""
        while True:
            if not self._path.exists() and 2 * BALLAST_BYTES <= self.available_bytes() < WATCHED_BYTES:
                try:
                    await trio.to_thread.run_sync(self._make)
                except OSError as error:
                    log.warning("cannot keep room for removals: %s", error.strerror)
            await trio.sleep(POLL_S)

    def _make(self) -> None:
        new = self._path.with_name(BALLAST_NAME + ".new")
        try:
            with open(new, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)
            new.rename(self._path)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
            raise
