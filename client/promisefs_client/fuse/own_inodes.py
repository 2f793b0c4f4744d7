"""Looks at inodes of our own mount as any process could, to have the kernel ask us for their attributes.

There is no notification that makes the kernel believe in a smaller size: it has to ask. So a thread opens the inode by
its file handle (open_by_handle_at: no name, no directory's lock, no OPEN request) and calls statx with
AT_STATX_FORCE_SYNC, for which the kernel sends GETATTR; then with AT_STATX_DONT_SYNC, which shows what it believes.

The thread waits for an answer that this process has to give. If the process is killed meanwhile, nothing ends that
wait but the end of the connection, and /dev/fuse is closed only when no thread has it open: so these threads have file
descriptors of their own, and close all they were given (CLOSE_RANGE_UNSHARE).

It takes CAP_DAC_READ_SEARCH, so mostly root, Linux 5.9 and a C library with these functions. `available` says whether.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import queue
import struct
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

THREADS = 4
"""An answer may have to wait for a server that is away."""

_AT_EMPTY_PATH = 0x1000
_AT_STATX_FORCE_SYNC = 0x2000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_SIZE = 0x200
_STATX_BYTES = 256
_SIZE_AT = 40
_DEVICE_AT = 136
"""Of stx_size, and stx_dev_major with stx_dev_minor, in struct statx (linux/stat.h)."""
_FILEID_INO64_GEN = 0x81
"""fuse_encode_fh: number of the inode, high half first, and generation, 32 bits each."""
_CLOSE_RANGE_UNSHARE = 2

_Answer = int | OSError | None
_Done = Callable[[_Answer], None]


class OwnInodes:
    """Of the mount at `mountpoint`, whose device is `device` ("major:minor")."""

    def __init__(self, mountpoint: str, device: str) -> None:
        self._mountpoint = mountpoint
        major, minor = device.split(":")
        self._device = (int(major), int(minor))
        self._wanted: queue.SimpleQueue[tuple[int, int, _Done]] = queue.SimpleQueue()
        self._threads = 0
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.available = all(hasattr(self._libc, name) for name in ("open_by_handle_at", "statx", "close_range"))

    def ask(self, ino: int, generation: int) -> int | None:
        """Have the kernel ask for the inode's attributes; return the size that it believes in then.

        None if that cannot be done, or the kernel does not know the inode. Blocks until we have answered GETATTR.
        """
        if not self.available:
            return None
        if self._threads < THREADS:
            self._threads += 1
            threading.Thread(target=self._serve, name=f"own inodes {self._threads}", daemon=True).start()
        answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._wanted.put((ino, generation, answers.put))
        answer = answers.get()
        if isinstance(answer, OSError):
            self._failed(ino, answer)
            return None
        return answer

    def _serve(self) -> None:
        """In a thread of its own. Nothing is logged here: the log's descriptor is closed, too."""
        if self._libc.close_range(3, 0x7FFFFFFF, _CLOSE_RANGE_UNSHARE):
            self.available = False  # older than Linux 5.9
        while True:
            ino, generation, done = self._wanted.get()
            try:
                done(self._size_after_asking(ino, generation) if self.available else None)
            except OSError as error:
                done(error)

    def _failed(self, ino: int, error: OSError) -> None:
        if error.errno == errno.EPERM:
            self.available = False
            log.info("open_by_handle_at: not permitted: the kernel may believe too long in files that were cut")
        elif error.errno not in (errno.ESTALE, errno.ENOENT, errno.ENOTCONN):
            log.info("looking at inode %d of this mount: %s", ino, error)

    def _size_after_asking(self, ino: int, generation: int) -> int | None:
        root = os.open(self._mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self._statx(root, _AT_STATX_DONT_SYNC)[1] != self._device:
                return None  # unmounted, or something else is mounted over it
            handle = struct.pack("=IiIII", 12, _FILEID_INO64_GEN, ino >> 32, ino & 0xFFFFFFFF, generation & 0xFFFFFFFF)
            inode = self._libc.open_by_handle_at(root, ctypes.create_string_buffer(handle), os.O_PATH | os.O_CLOEXEC)
            if inode < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            try:
                self._statx(inode, _AT_STATX_FORCE_SYNC)
                return self._statx(inode, _AT_STATX_DONT_SYNC)[0]
            finally:
                os.close(inode)
        finally:
            os.close(root)

    def _statx(self, descriptor: int, flags: int) -> tuple[int, tuple[int, int]]:
        """Return size and device."""
        buffer = ctypes.create_string_buffer(_STATX_BYTES)
        if self._libc.statx(descriptor, b"", _AT_EMPTY_PATH | flags, _STATX_SIZE, buffer):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        (size,) = struct.unpack_from("=Q", buffer, _SIZE_AT)
        major, minor = struct.unpack_from("=II", buffer, _DEVICE_AT)
        return size, (major, minor)
