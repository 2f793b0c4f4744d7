"""The model kernel's inodes: what it believes of each, for how long, and the locks it takes.

After fs/fuse/inode.c and dir.c (fuse_iget, fuse_change_attributes, fuse_reverse_inval_inode) and FUSE's traps as they
were measured. A request takes time on its way in and its reply on its way out; a reply is parsed by the process that
asked, some time after the daemon has sent it, and `attr_version` decides whether its attributes still count.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Awaitable, Callable
from typing import Any

import pyfuse3
import trio

from .world import Pace, World

PAGE = 4096


class SharedLock:
    """An inode's i_rwsem: many may look up and list at a time, one changes."""

    def __init__(self) -> None:
        self._shared = 0
        self._exclusive = False
        self._waiting: list[tuple[bool, trio.Event]] = []

    async def acquire(self, shared: bool) -> None:
        if self._waiting or self._exclusive or (self._shared and not shared):
            event = trio.Event()
            self._waiting.append((shared, event))
            await event.wait()
        elif shared:
            self._shared += 1
        else:
            self._exclusive = True

    def release(self, shared: bool) -> None:
        if shared:
            self._shared -= 1
        else:
            self._exclusive = False
        while self._waiting:
            wants_shared, event = self._waiting[0]
            if self._exclusive or (self._shared and not wants_shared):
                return
            self._waiting.pop(0)
            if wants_shared:
                self._shared += 1
            else:
                self._exclusive = True
            event.set()
            if not wants_shared:
                return

    def holding(self, shared: bool = False) -> _Holding:
        return _Holding(self, shared)


class _Holding:
    def __init__(self, lock: SharedLock, shared: bool) -> None:
        self._lock = lock
        self._shared = shared

    async def __aenter__(self) -> None:
        await self._lock.acquire(self._shared)

    async def __aexit__(self, *_: object) -> None:
        self._lock.release(self._shared)


class Page:
    """A page of a file. `locked` or in `writeback`: others wait for it."""

    __slots__ = ("data", "dirty", "locked", "uptodate", "writeback")

    def __init__(self) -> None:
        self.data = bytearray(PAGE)
        self.uptodate = False
        self.dirty = False
        self.locked = False
        self.writeback = False


class Inode:
    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.lookups = 0
        self.mode = 0
        self.nlink = 0
        self.size = 0
        self.mtime_ns = 0
        self.attributes_until_s = 0.0
        """They are asked for again after this; 0 if they are known to be wrong."""
        self.attr_version = 0
        self.size_unstable = False
        """A write or truncation is under way: sizes from replies are not taken."""
        self.no_writeback = False
        """A truncation is under way: pages to be written back wait, and are then cut to the new size."""
        self.lock = SharedLock()
        self.pages: dict[int, Page] = {}
        self.pages_changed = trio.Event()
        self.writeback_error = 0
        self.handles: list[OpenFile] = []
        """Open, or closed and still mapped."""
        self.busy = 0
        """System calls that are using it."""

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def wake(self) -> None:
        self.pages_changed.set()
        self.pages_changed = trio.Event()

    def invalidate_attributes(self) -> None:
        self.attributes_until_s = 0.0


class OpenFile:
    """An open file description."""

    def __init__(self, inode: Inode, handle: int, flags: int) -> None:
        self.inode = inode
        self.handle = handle
        self.flags = flags
        self.users = 1
        """Descriptors and mappings; RELEASE comes after the last."""


class Attributes:
    """What a stat sees."""

    __slots__ = ("ino", "mode", "mtime_ns", "nlink", "size")

    def __init__(self, ino: int, mode: int, nlink: int, size: int, mtime_ns: int) -> None:
        self.ino = ino
        self.mode = mode
        self.nlink = nlink
        self.size = size
        self.mtime_ns = mtime_ns

    @classmethod
    def of_inode(cls, inode: Inode) -> Attributes:
        return cls(inode.ino, inode.mode, inode.nlink, inode.size, inode.mtime_ns)

    @classmethod
    def of_reply(cls, entry: pyfuse3.EntryAttributes) -> Attributes:
        return cls(entry.st_ino, entry.st_mode, entry.st_nlink, entry.st_size, entry.st_mtime_ns)


class KernelCore:
    """Inodes of one mount, and how requests travel."""

    def __init__(
        self, world: World, now: Callable[[], float], operations: pyfuse3.Operations, nursery: trio.Nursery
    ) -> None:
        self.world = world
        self.pace = Pace(world.random)
        self._turns = self.pace
        """How soon a process runs again that waits for an answer."""
        self.now = now
        """The machine's clock."""
        self.operations: Any = operations
        self.nursery = nursery
        self.context = pyfuse3.RequestContext()
        self.attr_version = 1
        self.epoch = 1
        self.inodes: dict[int, Inode] = {}
        self.drop_pages: Callable[[Inode], Awaitable[None]]
        """Invalidate all pages; set by the page cache."""
        self.cut_pages: Callable[[Inode, int], Awaitable[None]]
        """Drop pages beyond a size; set by the page cache."""
        self.trace: Callable[[str], None] | None = None
        self.extension = False
        """Whether it is said of a WRITE if it comes from the page cache."""
        self._queue = trio.Lock()

    async def request(self, handler: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """One request: it waits to be read, is served, and its reply waits to be looked at. Raise OSError.

        Requests are read in the order in which they were made; how long each is served is another matter.
        """
        async with self._queue:
            await self.pace.pause()
        if self.trace is not None:
            self.trace(f"{handler.__name__}{_shorten(args)} ...")
        try:
            reply = await handler(*args)
        except pyfuse3.FUSEError as error:
            if self.trace is not None:
                self.trace(f"{handler.__name__}{_shorten(args)} -> {errno.errorcode[error.errno]}")
            await self._turns.pause()
            raise OSError(error.errno, errno.errorcode[error.errno]) from None
        if self.trace is not None:
            self.trace(f"{handler.__name__}{_shorten(args)} -> {_shorten(reply)}")
        await self._turns.pause()
        return reply

    def wait_for_turn(self, long_s: float) -> None:
        """From now on processes wait up to so long before they look at an answer. Notifications come as before."""
        self._turns = Pace(self.world.random)
        self._turns.slow_down(long_s)

    # Inodes

    def bump_attr_version(self, inode: Inode) -> None:
        self.attr_version += 1
        inode.attr_version = self.attr_version

    async def iget(self, entry: pyfuse3.EntryAttributes, version: int) -> Inode:
        """A reply gave a reference to an inode: fuse_iget."""
        inode = self.inodes.get(entry.st_ino)
        if inode is None:
            inode = self.inodes[entry.st_ino] = Inode(entry.st_ino)
            inode.size = entry.st_size
            inode.mtime_ns = entry.st_mtime_ns
            inode.mode = entry.st_mode
        inode.lookups += 1
        inode.busy += 1
        try:
            await self.change_attributes(inode, entry, version)
        finally:
            inode.busy -= 1
        return inode

    async def change_attributes(self, inode: Inode, entry: pyfuse3.EntryAttributes, version: int) -> None:
        """Take the attributes of a reply to a request that was sent at attr_version `version`."""
        if inode.attr_version > version or inode.size_unstable:
            return
        self.bump_attr_version(inode)
        old_size, old_mtime_ns = inode.size, inode.mtime_ns
        inode.mode, inode.nlink = entry.st_mode, entry.st_nlink
        inode.size, inode.mtime_ns = entry.st_size, entry.st_mtime_ns
        inode.attributes_until_s = self.now() + entry.attr_timeout if entry.attr_timeout > 0 else 0.0
        if not inode.is_dir:
            if old_size != inode.size:
                await self.cut_pages(inode, inode.size)
                await self.drop_pages(inode)
            elif old_mtime_ns != inode.mtime_ns:
                await self.drop_pages(inode)

    async def attributes(self, inode: Inode) -> Attributes:
        """What stat(2) gives of an inode; asks if what is known is too old."""
        if inode.attributes_until_s > self.now():
            return Attributes.of_inode(inode)
        return await self.ask_attributes(inode)

    async def ask_attributes(self, inode: Inode) -> Attributes:
        """GETATTR."""
        version = self.attr_version
        entry = await self.request(self.operations.getattr, inode.ino, self.context)
        await self.change_attributes(inode, entry, version)
        return Attributes.of_reply(entry)

    def forget(self, inode: Inode) -> None:
        """Nothing refers to the inode any more: it goes, and the daemon is told some time later."""
        assert not inode.handles and not inode.busy
        del self.inodes[inode.ino]
        if inode.lookups:
            self.nursery.start_soon(self._send_forget, inode.ino, inode.lookups)

    async def _send_forget(self, ino: int, lookups: int) -> None:
        await self.pace.pause()
        await self.operations.forget([(ino, lookups)])


def _shorten(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_shorten(v) for v in value if not isinstance(v, pyfuse3.RequestContext)) + ")"
    if isinstance(value, bytes | bytearray | memoryview):
        return describe_bytes(bytes(value)) if len(value) > 24 else repr(bytes(value))
    if isinstance(value, pyfuse3.EntryAttributes):
        return (
            f"[ino {value.st_ino:x} size {value.st_size} mode {value.st_mode:o} nlink {value.st_nlink}"
            f" mtime {value.st_mtime_ns % 10**12} attr {value.attr_timeout:.2f}s name {value.entry_timeout:.2f}s]"
        )
    if isinstance(value, pyfuse3.FileInfo):
        return f"fh {value.fh}"
    return repr(value)


def describe_bytes(data: bytes) -> str:
    """Bytes as runs: `3x100 0x3996`."""
    runs: list[str] = []
    start = 0
    while start < len(data):
        value = data[start]
        rest = data[start:]
        length = len(rest) - len(rest.lstrip(bytes((value,))))
        runs.append(f"{value}x{length}")
        start += length
        if len(runs) > 12:
            runs.append("...")
            break
    return "<" + " ".join(runs) + ">"
