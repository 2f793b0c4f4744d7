"""Tells the kernel to drop what it caches. Dedicated threads, no locks.

Invalidating pages waits for READs of that file in flight and for dirty mapped pages to be written back to us
(fuse_reverse_inval_inode, invalidate_inode_pages2_range). So it never runs on the trio thread, never in trio's
default thread pool, which those very READs may need, and nothing that a handler waits for is held meanwhile.

Names are dropped with FUSE_NOTIFY_INC_EPOCH (Linux 6.16): every dentry, positive or negative, is looked up again when
next used. It takes no lock. Where the kernel does not know it, names are given to the kernel without any time
(`VnodeTable.names_can_be_dropped`), since invalidate_entry would wait for directory locks that our own requests hold.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterable

import pyfuse3
import trio

from .listings import ListingsInFlight
from .vnode_table import KernelWork

log = logging.getLogger(__name__)

KERNEL_THREADS = 16
BATCH = 512
_INC_EPOCH = struct.pack("<IiQ", 16, 8, 0)
"""struct fuse_out_header: length, FUSE_NOTIFY_INC_EPOCH, unique 0 (linux/fuse.h)."""

LISTING_WAIT_S = 0.02
LISTING_POLL_S = 0.001
"""How long dropping names waits for a READDIRPLUS reply that it overtook: the kernel parses it at once, if it gets to
run. One that takes longer is made up for when it is known to be parsed."""

LOOKUP_FIRST_WAIT_S = 0.0005
LOOKUP_LONGEST_WAIT_S = 0.05
LOOKUP_TRIES = 100
"""An inode that the kernel was told of but does not know yet: the process that asked has the LOOKUP's reply and has not
got to run. On a busy machine that can take long, and what it is about to believe is stale: some five seconds."""


class KernelCaches:
    """The kernel's side of one mount.

    `references(ino)` says how many lookups of an inode the kernel was given (asked from other threads: a plain
    dict read).
    """

    def __init__(self, references: Callable[[int], int]) -> None:
        self._fuse_fd = -1
        self._references = references
        self._limiter = trio.CapacityLimiter(KERNEL_THREADS)
        self._stopped = threading.Event()
        self.has_epochs = False
        self.listings = ListingsInFlight(self._bump_epoch)

    def attach(self, fuse_fd: int) -> None:
        """The kernel has answered INIT on this descriptor: learn what it can do."""
        self._fuse_fd = fuse_fd
        self.has_epochs = self._bump_epoch()

    def stop(self) -> None:
        """The mount is going away: no more notifications."""
        self._stopped.set()

    async def drop(self, work: Iterable[KernelWork]) -> None:
        """Return when the kernel no longer uses what `work` names. May take as long as a READ of the file does."""
        simple: list[KernelWork] = []
        with_pages: list[KernelWork] = []
        directories: set[int] = set()
        for item in work:
            if item.names:
                directories.add(item.ino)
            (with_pages if item.pages else simple).append(item)
        if directories and self.has_epochs:
            await self._drop_names_by_epoch(directories)
        if len(with_pages) + bool(simple) <= 1:
            await self._in_thread(simple or with_pages)
            return
        async with trio.open_nursery() as nursery:
            for start in range(0, len(simple), BATCH):
                nursery.start_soon(self._in_thread, simple[start : start + BATCH])
            for item in with_pages:
                nursery.start_soon(self._in_thread, [item])

    async def _drop_names_by_epoch(self, directories: set[int]) -> None:
        self._bump_epoch()
        overtaken = self.listings.overtake(directories)
        if overtaken:
            with trio.move_on_after(LISTING_WAIT_S):
                while self.listings.pending(overtaken):  # noqa: ASYNC110 (rare and short)
                    await trio.sleep(LISTING_POLL_S)
            self._bump_epoch()

    def drop_every_name(self) -> None:
        """Have every dentry of the mount looked up again. Only where `has_epochs`."""
        self._bump_epoch()

    async def store_byte(self, ino: int, offset: int, byte: bytes) -> None:
        """Put one byte into the kernel's page cache: makes it believe that the file reaches so far.

        Without it a mapping that was there before the file grew still gets SIGBUS behind the old end.
        """
        await trio.to_thread.run_sync(
            self._notify_store, ino, offset, byte, limiter=self._limiter, abandon_on_cancel=True
        )

    def _notify_store(self, ino: int, offset: int, byte: bytes) -> None:
        try:
            if not self._stopped.is_set():
                pyfuse3.notify_store(ino, offset, byte)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.warning("notify_store of inode %d: %s", ino, error)

    async def _in_thread(self, items: list[KernelWork]) -> None:
        if items:
            await trio.to_thread.run_sync(self._drop_each, items, limiter=self._limiter, abandon_on_cancel=True)

    # In threads

    def _drop_each(self, items: list[KernelWork]) -> None:
        for item in items:
            if self._stopped.is_set():
                return
            self._drop_inode(item)

    def _drop_inode(self, item: KernelWork) -> None:
        wait_s = LOOKUP_FIRST_WAIT_S
        for _ in range(LOOKUP_TRIES):
            try:
                pyfuse3.invalidate_inode(item.ino, attr_only=not item.pages)
                return
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    log.warning("invalidate_inode of %d: %s", item.ino, error)
                    return
            if not self._references(item.ino) or self._stopped.wait(wait_s):
                return
            wait_s = min(2 * wait_s, LOOKUP_LONGEST_WAIT_S)
        log.warning("inode %d: the kernel was told of it %d tries ago and does not know it", item.ino, LOOKUP_TRIES)

    def _bump_epoch(self) -> bool:
        try:
            os.write(self._fuse_fd, _INC_EPOCH)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENODEV):
                log.warning("FUSE_NOTIFY_INC_EPOCH: %s", error)
            return False
        return True
