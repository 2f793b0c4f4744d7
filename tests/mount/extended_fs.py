"""A file system of one file, in memory, with every operation of the FUSE extension. Run: extended_fs.py MOUNTPOINT

It says on stdout, a JSON list on each line, what the kernel asks it of the extension's. What an operation does depends
on its offset (`start` of a lock; LOOKUP of "blocks" is BLOCK): BLOCK waits until a signal comes, FAIL fails with
EDEADLK, DEFECT with something else, NONSENSE returns what is no answer. On SIGTERM it ends with whatever is in flight.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import sys
from typing import Any

import trio
from promisefs_client.fuse import fuse_extension
from promisefs_client.fuse.requests import Interrupted, current_request, handling, interruptible
from promisefs_client.locks.file_lock import FileLock, LockKind

if __name__ == "__main__":
    fuse_extension.load()

import pyfuse3

FILE = 2
BLOCK, FAIL, DEFECT, NONSENSE = 1000, 2000, 3000, 4000
SIZE = 1 << 20


def say(*words: Any) -> None:
    print(json.dumps(words), flush=True)


async def act(where: int) -> None:
    match where:
        case n if n == BLOCK:
            say("blocked")
            try:
                with interruptible():
                    await trio.sleep_forever()
            except Interrupted:
                say("interrupted")
                raise pyfuse3.FUSEError(errno.EINTR) from None
        case n if n == FAIL:
            raise pyfuse3.FUSEError(errno.EDEADLK)
        case n if n == DEFECT:
            raise ZeroDivisionError


class Operations(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self._data = bytearray(SIZE)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        entry.st_size = SIZE
        entry.entry_timeout = entry.attr_timeout = 3600
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        with handling():
            if name == b"blocks":
                await act(BLOCK)
        if name != b"file":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FILE)

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def setattr(self, inode: int, *rest: object) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=7, keep_cache=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return bytes(self._data[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        with handling():
            say("write", off, len(buf), current_request().from_page_cache)
        self._data[off : off + len(buf)] = buf
        return len(buf)

    async def flush(self, fh: int) -> None:
        with handling():
            say("flush", current_request().lock_owner)

    async def release(self, fh: int) -> None:
        with handling():
            say("release", current_request().releases_flock, current_request().lock_owner)

    # The extension's

    async def getlk(self, inode: int, fh: int, owner: int, lock: FileLock) -> Any:
        say("getlk", inode, fh, owner, lock)
        await act(lock.start)
        if lock.start == NONSENSE:
            return "nonsense"
        # Of a process that there is: in a namespace of processes the kernel shows no other.
        return FileLock(LockKind.WRITE, 5, 2**63 - 1, os.getpid()) if lock.end > 5 else None

    async def setlk(self, inode: int, fh: int, owner: int, lock: FileLock, wait: bool) -> None:
        say("setlk", inode, fh, owner, lock, wait)
        await act(lock.start)

    async def flock(self, inode: int, fh: int, owner: int, kind: LockKind, wait: bool) -> None:
        say("flock", inode, fh, owner, kind, wait)
        if wait and kind is LockKind.WRITE:
            await act(BLOCK)

    async def fallocate(self, inode: int, fh: int, mode: int, offset: int, length: int) -> None:
        say("fallocate", inode, fh, mode, offset, length)
        await act(offset)

    async def lseek(self, inode: int, fh: int, offset: int, whence: int) -> Any:
        say("lseek", inode, fh, offset, whence)
        await act(offset)
        return "nonsense" if offset == NONSENSE else offset + 3

    async def copy_file_range(self, inode_in: int, fh_in: int, offset_in: int, *rest: int) -> int:
        say("copy_file_range", inode_in, fh_in, offset_in, *rest)
        await act(offset_in)
        return rest[3] // 2  # of the length


async def main(mountpoint: str) -> None:
    operations = Operations()
    extension = fuse_extension.loaded()
    assert extension is not None, fuse_extension.in_effect(None)
    extension.extend(operations)
    pyfuse3.init(operations, mountpoint, {"default_permissions", "fsname=extended"})
    assert fuse_extension.in_effect(extension)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(end_on_sigterm)
            say("mounted", fuse_extension.features(extension))
            async with extension.serving():
                await pyfuse3.main(max_tasks=100)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close()
    say("ended")


async def end_on_sigterm(task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            pyfuse3.terminate()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
