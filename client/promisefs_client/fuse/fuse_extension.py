"""What pyfuse3 leaves out of FUSE, as ordinary handlers: the Python side of fuse_extension.c.

`load` comes before anything imports pyfuse3. `FuseExtension.extend` takes the operations object that pyfuse3 is given
next; of the methods named in `ExtendedOperations` the kernel is offered those that it has. They fail as pyfuse3's
handlers do, by FUSEError. Beside that the extension tells handlers of their request (`requests`): flags, and signals
for the process that waits.

Each operation of ours runs in a task of its own and is answered exactly once, whatever becomes of the task.

Where the extension cannot be loaded, or PROMISEFS_FUSE_EXTENSION=off is set, everything works but for that.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import trio

from promisefs_client.locks.file_lock import FileLock, LockKind

from .fuse_extension_build import BUILT, fingerprint
from .requests import Request, handling

log = logging.getLogger(__name__)

SWITCH = "PROMISEFS_FUSE_EXTENSION"
"""Environment variable; "off" means not to use the extension."""
MAX_REQUESTS = 4096
"""Operations of ours under way, waits for locks above all; one more is refused with ENOLCK."""
KILL_CHECK_S = 1.0
"""The kernel tells of a process's first signal only. One that is killed after that is found out so often."""


class ExtendedOperations(Protocol):
    """Handlers beside pyfuse3's. An operations object may have any of them."""

    async def getlk(self, inode: int, fh: int, owner: int, lock: FileLock) -> FileLock | None:
        """F_GETLK: a lock that this one would have to wait for."""

    async def setlk(self, inode: int, fh: int, owner: int, lock: FileLock, wait: bool) -> None:
        """F_SETLK, F_SETLKW: take, change or give up (UNLOCK) a lock on a range. EAGAIN if it is another's."""

    async def flock(self, inode: int, fh: int, owner: int, kind: LockKind, wait: bool) -> None:
        """The same with flock(2)."""

    async def fallocate(self, inode: int, fh: int, mode: int, offset: int, length: int) -> None: ...

    async def lseek(self, inode: int, fh: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE."""

    async def copy_file_range(
        self,
        inode_in: int,
        fh_in: int,
        offset_in: int,
        inode_out: int,
        fh_out: int,
        offset_out: int,
        length: int,
        flags: int,
    ) -> int:
        """Return how many bytes were copied."""


_OPERATIONS = ("getlk", "setlk", "flock", "fallocate", "lseek", "copy_file_range")
"""In the order of the C side's `enum operation`."""
_CAP_CACHE_SYMLINKS = 1 << 23
"""FUSE_CAP_CACHE_SYMLINKS of fuse_common.h."""
_FROM_PAGE_CACHE, _HAS_LOCK_OWNER, _RELEASES_FLOCK = 1, 2, 4


class _CRequest(ctypes.Structure):
    """`struct request` of the C side."""

    _fields_ = (
        ("req", ctypes.c_void_p),
        ("number", ctypes.c_uint64),
        ("operation", ctypes.c_int32),
        ("taken", ctypes.c_int32),
        ("ino", ctypes.c_uint64),
        ("fh", ctypes.c_uint64),
        ("lock_owner", ctypes.c_uint64),
        ("start", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("pid", ctypes.c_int32),
        ("wait", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("ino_out", ctypes.c_uint64),
        ("fh_out", ctypes.c_uint64),
        ("offset_out", ctypes.c_int64),
    )


_OnRequest = ctypes.CFUNCTYPE(None, ctypes.POINTER(_CRequest))
_OnInterrupt = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_int32)


class _Shared(ctypes.Structure):
    """`fuse_extension` of the C side."""

    _fields_ = (
        ("libfuse_new", ctypes.c_void_p),
        ("libfuse_new_versioned", ctypes.c_void_p),
        ("libfuse_receive", ctypes.c_void_p),
        ("on_request", _OnRequest),
        ("on_interrupt", _OnInterrupt),
        ("enabled", ctypes.c_uint32),
        ("handled", ctypes.c_uint32),
        ("want", ctypes.c_uint32),
        ("max_background", ctypes.c_uint32),
        ("absent_xattrs", ctypes.c_char_p),
        ("capable", ctypes.c_uint32),
        ("wanted", ctypes.c_uint32),
        ("session", ctypes.c_void_p),
        ("number", ctypes.c_uint64),
        ("lock_owner", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
    )


class CannotLoad(Exception):
    """One line for the log."""


class _NumberedRequest(Request):
    __slots__ = ("number",)

    def __init__(self, number: int, flags: int = 0, lock_owner: int | None = None) -> None:
        super().__init__(bool(flags & _FROM_PAGE_CACHE), lock_owner, bool(flags & _RELEASES_FLOCK))
        self.number = number


class FuseExtension:
    """The extension of this process's one mount. Everything happens on the event loop's thread."""

    def __init__(self) -> None:
        """Load it, and pyfuse3. Raise CannotLoad."""
        self._library = _load_library()
        self._shared = _Shared.in_dll(self._library, "fuse_extension")
        self._connect_pyfuse3()
        self._on_request = _OnRequest(self._begin)  # kept: C has no more than its address
        self._on_interrupt = _OnInterrupt(self._interrupt)
        self._shared.on_request = self._on_request
        self._shared.on_interrupt = self._on_interrupt
        self._shared.enabled = 1
        self._operations: Any = None
        self._nursery: trio.Nursery | None = None
        self._requests: dict[int, _NumberedRequest] = {}
        self._own = 0

    def _connect_pyfuse3(self) -> None:
        """Import pyfuse3, which binds its calls to ours, and find what those call: its own libfuse."""
        if "pyfuse3" in sys.modules:
            raise CannotLoad("pyfuse3 was imported before")
        import pyfuse3

        self._fuse_error = pyfuse3.FUSEError
        through_pyfuse3 = ctypes.CDLL(pyfuse3.__file__)  # symbols are looked up in it and in what it was linked to
        self._shared.libfuse_new = _address(through_pyfuse3, "fuse_session_new")
        self._shared.libfuse_new_versioned = _address(through_pyfuse3, "fuse_session_new_versioned")
        self._shared.libfuse_receive = _address(through_pyfuse3, "fuse_session_receive_buf")
        if _address(through_pyfuse3, "fuse_reply_err") != _address(self._library, "fuse_reply_err"):
            raise CannotLoad("pyfuse3 has a libfuse of its own")

    # Set up

    def extend(
        self,
        operations: object,
        *,
        absent_xattrs: Sequence[bytes] = (),
        cache_symlinks: bool = False,
        max_background: int = 0,
    ) -> None:
        """Before pyfuse3.init: the kernel will be offered what these can do.

        absent_xattrs: no file has extended attributes whose names begin so; the handler is not asked.
        cache_symlinks: no symlink ever changes its target.
        max_background: how many requests it may send without waiting for answers, readahead among them; 0: its default.
        """
        self._operations = operations
        self._absent_xattrs = b"".join(start + b"\0" for start in absent_xattrs) + b"\0"  # kept: C has its address
        self._shared.absent_xattrs = self._absent_xattrs
        self._shared.want = _CAP_CACHE_SYMLINKS if cache_symlinks else 0
        self._shared.max_background = max_background
        self._shared.handled = sum(1 << i for i, name in enumerate(_OPERATIONS) if hasattr(operations, name))
        handling.source = self

    @property
    def caches_symlinks(self) -> bool:
        """Once the kernel has answered INIT: whether it keeps the targets of symlinks."""
        return bool(self._shared.wanted & _CAP_CACHE_SYMLINKS)

    @property
    def in_effect(self) -> bool:
        """After pyfuse3.init: whether pyfuse3's session is ours."""
        return bool(self._shared.session)

    def handles(self, name: str) -> bool:
        """Whether the kernel was offered this operation."""
        return bool(self._shared.handled >> _OPERATIONS.index(name) & 1)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """While pyfuse3's main loop runs. At the end whatever of ours is not answered yet is cancelled and answered."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                yield
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()

    # Requests of all kinds

    def take(self) -> Request | None:
        shared = self._shared
        number = shared.number
        if not number:
            return None
        shared.number = 0
        flags = shared.flags
        request = _NumberedRequest(number, flags, shared.lock_owner if flags & _HAS_LOCK_OWNER else None)
        self._requests[number] = request
        return request

    def done(self, request: Request) -> None:
        assert isinstance(request, _NumberedRequest)
        del self._requests[request.number]

    def _interrupt(self, number: int, pid: int) -> None:
        """The thread `pid` that waits for this request got a signal. It is not answered yet, but may be about to be."""
        request = self._requests.get(number)
        if request is not None:
            killed = _is_killed(pid)
            request.interrupt(trio.current_time(), killed)
            if not killed and self._nursery is not None:
                self._nursery.start_soon(self._watch, request, pid)

    async def _watch(self, request: _NumberedRequest, pid: int) -> None:
        while request.number in self._requests:
            if _is_killed(pid):
                request.interrupt(trio.current_time(), True)
                return
            await trio.sleep(KILL_CHECK_S)

    # Operations of ours

    def _begin(self, pointer: Any) -> None:
        """Take a request over, unless this raises: then the C side answers it."""
        asked = pointer.contents
        request = self.take()
        assert request is not None
        name = _OPERATIONS[asked.operation]
        if self._nursery is None or self._own >= MAX_REQUESTS:
            self.done(request)
            self._answer(asked.req, name, errno.ENOLCK, None)
        else:
            self._nursery.start_soon(self._carry_out, asked.req, name, _arguments(name, asked), request)
            self._own += 1
        asked.taken = 1

    async def _carry_out(self, req: int, name: str, arguments: tuple[Any, ...], request: Request) -> None:
        error, result = errno.ECONNABORTED, None  # if the task is cancelled: the mount ends
        try:
            with handling(request):
                result = await getattr(self._operations, name)(*arguments)
            error = 0
        except self._fuse_error as failure:
            error = failure.errno
        except Exception:
            log.exception("%s failed: a defect here", name)
            error = errno.EIO
        finally:
            self._own -= 1
            self._answer(req, name, error, result)

    def _answer(self, req: int, name: str, error: int, result: Any) -> None:
        """Exactly once for each request: libfuse frees it. A kernel that no longer wants the answer is no error."""
        library = self._library
        try:
            if error or name in ("setlk", "flock", "fallocate"):
                library.fuse_reply_err(req, error)
            elif name == "getlk":
                lock = result or FileLock(LockKind.UNLOCK, 0, 0, 0)
                library.fuse_extension_reply_lock(req, lock.kind, lock.start, lock.end, lock.pid)
            elif name == "lseek":
                library.fuse_reply_lseek(req, result)
            else:
                library.fuse_reply_write(req, result)
        except (ctypes.ArgumentError, AttributeError):  # before anything was called
            log.exception("%s has returned %r", name, result)
            library.fuse_reply_err(req, errno.EIO)


def _load_library() -> ctypes.CDLL:
    if not BUILT.exists():
        raise CannotLoad(f"{BUILT.name} was not built: python -m promisefs_client.fuse.fuse_extension_build")
    try:
        library = ctypes.CDLL(str(BUILT))  # not visible to pyfuse3 yet
    except OSError as error:
        raise CannotLoad(str(error)) from None
    stamp = (ctypes.c_char * len(fingerprint())).in_dll(library, "fuse_extension_fingerprint")
    if stamp.raw.decode() != fingerprint():
        raise CannotLoad(f"{BUILT.name} is of another version: python -m promisefs_client.fuse.fuse_extension_build")
    for name, *types in (
        ("fuse_reply_err", ctypes.c_int),
        ("fuse_reply_lseek", ctypes.c_int64),
        ("fuse_reply_write", ctypes.c_size_t),
        ("fuse_extension_reply_lock", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_void_p, *types], ctypes.c_int
    ctypes.CDLL(str(BUILT), mode=os.RTLD_GLOBAL | os.RTLD_NOW)
    return library


def _address(library: ctypes.CDLL, name: str) -> int | None:
    """None if it has no such symbol."""
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        return None


def _arguments(name: str, asked: Any) -> tuple[Any, ...]:
    """Of the handler of that name."""
    match name:
        case "getlk" | "setlk":
            lock = FileLock(LockKind(asked.kind), asked.start, asked.end, asked.pid)
            common = (asked.ino, asked.fh, asked.lock_owner, lock)
            return common if name == "getlk" else (*common, bool(asked.wait))
        case "flock":
            return asked.ino, asked.fh, asked.lock_owner, LockKind(asked.kind), bool(asked.wait)
        case "fallocate":
            return asked.ino, asked.fh, asked.flags, asked.start, asked.end
        case "lseek":
            return asked.ino, asked.fh, asked.start, asked.flags
        case _:
            source = asked.ino, asked.fh, asked.start
            return *source, asked.ino_out, asked.fh_out, asked.offset_out, asked.end, asked.flags


def _is_killed(pid: int) -> bool:
    """Whether the thread has a signal that it does not survive. Those become SIGKILL when they are sent."""
    try:
        with open(f"/proc/{pid}/status") as status:
            pending = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd:", "ShdPnd:"))]
    except OSError:
        return False  # of another namespace
    return any(signals >> (signal.SIGKILL - 1) & 1 for signals in pending)


_loaded: FuseExtension | None = None
_reason = "it was not loaded"
_level = logging.WARNING


def load() -> None:
    """Load the extension if it can be. Before anything imports pyfuse3; once."""
    global _loaded, _reason, _level
    if os.environ.get(SWITCH) == "off":
        _reason, _level = f"{SWITCH}=off", logging.INFO
        return
    try:
        _loaded = FuseExtension()
    except CannotLoad as error:
        _reason = str(error)


def loaded() -> FuseExtension | None:
    return _loaded


def in_effect(extension: FuseExtension | None) -> FuseExtension | None:
    """After pyfuse3.init: the extension if pyfuse3's session is extended by it. If it is not, the log says why."""
    if extension is not None and extension.in_effect:
        return extension
    reason = _reason if extension is None else "calls of pyfuse3 do not reach it"
    log.log(_level, "the FUSE extension is not used: %s", reason)
    return None


def features(extension: FuseExtension | None) -> dict[str, bool]:
    """What a mount has because of the extension, by name."""
    operations = {name: extension is not None and extension.handles(name) for name in _OPERATIONS}
    return {
        **operations,
        "interrupts": extension is not None,
        "write_flags": extension is not None,
        "cached_symlinks": extension is not None and extension.caches_symlinks,
    }
