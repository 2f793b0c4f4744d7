"""What the kernel is told of its caches, through /dev/fuse. Dedicated threads, no locks.

Invalidating pages waits for READs of that file in flight and for dirty mapped pages to be written back to us
(fuse_reverse_inval_inode, invalidate_inode_pages2_range). So it never runs on the trio thread, never in trio's
default thread pool, which those very READs may need, and nothing that a handler waits for is held meanwhile.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
from collections.abc import Sequence

import pyfuse3
import trio

from promisefs_client.vnodes.vnode import VOLUME_SHIFT
from promisefs_client.vnodes.vnode_table import KernelWork

from .own_inodes import OwnInodes

log = logging.getLogger(__name__)

KERNEL_THREADS = 16
"""For the pages of one volume, and as many for all attributes. Dropping pages may have to wait for a READ, which may
wait for a server that is away: that must not hold up the files of others, nor attributes, which never wait."""
_INC_EPOCH = struct.pack("<IiQ", 16, 8, 0)
"""struct fuse_out_header: length, FUSE_NOTIFY_INC_EPOCH, unique 0 (linux/fuse.h)."""


class FuseNotifier:
    """The `kernel.Notifier` of a real mount."""

    def __init__(self) -> None:
        self._fuse_fd = -1
        self._attributes = trio.CapacityLimiter(KERNEL_THREADS)
        self._pages: dict[int, trio.CapacityLimiter] = {}
        self._stopped = threading.Event()
        self._own_inodes: OwnInodes | None = None
        self._asking = trio.CapacityLimiter(KERNEL_THREADS)

    def attach(self, fuse_fd: int, own_inodes: OwnInodes) -> None:
        """The mount's descriptor of /dev/fuse, once the kernel has answered INIT on it."""
        self._fuse_fd = fuse_fd
        self._own_inodes = own_inodes

    def stop(self) -> None:
        """The mount is going away: no more notifications."""
        self._stopped.set()

    def increment_epoch(self) -> bool:
        try:
            os.write(self._fuse_fd, _INC_EPOCH)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENODEV):
                log.warning("FUSE_NOTIFY_INC_EPOCH: %s", error)
            return False
        return True

    async def invalidate(self, items: Sequence[KernelWork]) -> list[KernelWork]:
        waiting = next((item.ino for item in items if item.pages), None)
        limiter = self._attributes if waiting is None else self._limiter_of(waiting)
        return await trio.to_thread.run_sync(self._invalidate_each, items, limiter=limiter, abandon_on_cancel=True)

    def _limiter_of(self, ino: int) -> trio.CapacityLimiter:
        return self._pages.setdefault(ino >> VOLUME_SHIFT, trio.CapacityLimiter(KERNEL_THREADS))

    async def store(self, ino: int, offset: int, data: bytes) -> None:
        limiter = self._limiter_of(ino)
        await trio.to_thread.run_sync(self._store, ino, offset, data, limiter=limiter, abandon_on_cancel=True)

    async def ask(self, ino: int, generation: int) -> int | None:
        own = self._own_inodes
        if own is None or not own.available or self._stopped.is_set():
            return None
        return await trio.to_thread.run_sync(own.ask, ino, generation, limiter=self._asking, abandon_on_cancel=True)

    # In threads

    def _invalidate_each(self, items: Sequence[KernelWork]) -> list[KernelWork]:
        unknown: list[KernelWork] = []
        for item in items:
            if self._stopped.is_set():
                return []
            try:
                pyfuse3.invalidate_inode(item.ino, attr_only=not item.pages)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENODEV):
                    unknown.append(item)
                else:
                    log.warning("invalidate_inode of %d: %s", item.ino, error)
        return unknown

    def _store(self, ino: int, offset: int, data: bytes) -> None:
        try:
            if not self._stopped.is_set():
                pyfuse3.notify_store(ino, offset, data)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.warning("notify_store of inode %d: %s", ino, error)
