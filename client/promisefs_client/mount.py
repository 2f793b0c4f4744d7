"""A mount from beginning to end: connect, mount, serve, store, unmount."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyfuse3
import trio
from promisefs_protocol.observe import exposition
from promisefs_protocol.observe.metrics import encoded

from .commands.mounts import device_of
from .commands.unmounting import is_unmounted, unmount_own
from .control.control_server import ControlServer
from .control.fs_commands import FsCommands
from .control.fs_examine import Examination
from .control.fs_flush import Flushing
from .control.open_files import open_files_report
from .control.status import count_promises, mount_report
from .control.trace import trace
from .data.contents import PageCache
from .data.filestore import FileStore
from .errors import ExitCode, UserError
from .fuse import fuse_extension, kernel_readahead
from .fuse.fuse_extension import FuseExtension, in_effect
from .fuse.kernel import KernelCaches
from .fuse.lock_handlers import OPERATIONS
from .fuse.main_loop import QUEUE_WIDTH, fuse_descriptor, serve_kernel, widen_queue
from .fuse.notifications import FuseNotifier
from .fuse.own_inodes import OwnInodes
from .identity.logins import Logins
from .locks.lock_manager import LockManager
from .names.mount_points import MountPoints
from .names.namespace import Namespace
from .names.xattrs import ABSENT, Xattrs
from .network.cell import Cell
from .network.connections import Connections
from .observe.metrics import METRICS
from .options import LockScope, MountOptions, Source
from .rejects.keeper import RejectKeeper
from .rejects.quarantine import Quarantine, default_directory
from .vnodes.vnode_table import KernelWork, VnodeTable

log = logging.getLogger(__name__)

FSTYPE = "promisefs"


def check_mountpoint(path: str) -> str:
    """Return the absolute path of an empty directory that can be mounted on. Raise UserError."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISDIR(mode):
            raise UserError(f"{path} is not a directory", ExitCode.MOUNTPOINT)
        if os.listdir(path):
            raise UserError(f"{path} is not empty: mount on an empty directory", ExitCode.MOUNTPOINT)
        return os.path.realpath(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: create it first (mkdir {path})", ExitCode.MOUNTPOINT) from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            message = f"{path} is a mount whose process died: run 'fusermount3 -u {path}' first"
            raise UserError(message, ExitCode.MOUNTPOINT) from None
        raise UserError(f"{path}: {error.strerror}", ExitCode.MOUNTPOINT) from None


def check_fuse() -> None:
    """Raise UserError unless this machine can mount FUSE file systems."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise UserError(
            "/dev/fuse does not exist: load the module (modprobe fuse), or give the container --device /dev/fuse",
            ExitCode.FUSE,
        ) from None
    except OSError as error:
        raise UserError(
            f"/dev/fuse cannot be opened ({error.strerror}): check its permissions", ExitCode.FUSE
        ) from None
    try:
        subprocess.run(["fusermount3", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise UserError("fusermount3 is missing: install the package fuse3", ExitCode.FUSE) from None


@contextmanager
def _said_on_stderr() -> Iterator[int]:
    """Have what libfuse and fusermount3 say on stderr written to the file that is given."""
    said, stderr = os.memfd_create("stderr"), os.dup(2)
    os.dup2(said, 2)
    try:
        yield said
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(said)


def _lines(descriptor: int) -> list[str]:
    text = os.pread(descriptor, 2000, 0).decode(errors="replace")
    return [line.removeprefix("fusermount3: ") for line in text.splitlines() if line.strip()]


class Mount:
    """One mount of one volume. `run` serves it until it is unmounted or told to end."""

    def __init__(self, source: Source, mountpoint: str, options: MountOptions) -> None:
        self._source = source
        self._mountpoint = mountpoint
        self._options = options
        self._started_at = time.time()
        self._pages = PageCache(options.cache_bytes)
        self._connections = Connections(source, options, f"{socket.gethostname()}:{mountpoint}"[:200])
        self._notifier = FuseNotifier()
        self._metrics_address = ""
        self._initialised = trio.Event()
        self._ending = False
        self._cell: Cell | None = None
        self._files: FileStore | None = None
        self._locks: LockManager | None = None
        self._extension: FuseExtension | None = None

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Mount, call `on_ready`, serve. Raise UserError if it cannot be mounted, or data could not be stored."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            try:
                await self._connect(nursery)
                await self._serve(nursery, on_ready)
            except UserError as error:
                failure = error  # raised outside the nursery, which would wrap it
            # Also when nothing could be mounted: the server would keep others waiting for our lease.
            await self._connections.say_goodbye()
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _connect(self, nursery: trio.Nursery) -> None:
        connections = self._connections
        await connections.open(nursery)
        volume, root = await connections.find_root()
        table = VnodeTable(self._pages, connections.volumes, volume, root, self._options.max_idle)
        table.shared = "allow_other" in self._options.fuse

        def references(ino: int) -> int:
            vnode = table.by_ino(ino)
            return 0 if vnode is None else vnode.lookups

        kernel = KernelCaches(self._notifier, references)
        self._cell = Cell(connections.sessions, connections.locator, table, kernel, nursery)
        rejects = RejectKeeper(self._cell, self._quarantine(), str(self._source))
        self._files = FileStore(self._cell, self._pages, self._options.timeout_s, rejects, self._options.key_wait_s)

    def _quarantine(self) -> Quarantine:
        """Raise UserError if a directory was named that cannot be used. The usual one is made when it is needed."""
        options = self._options
        directory = options.rejects or default_directory()
        quarantine = Quarantine(directory, str(self._source), options.rejects_limit_bytes, options.rejects_max_age_s)
        if options.rejects is not None:
            try:
                quarantine.prepare()
            except OSError as error:
                raise UserError(f"rejects={directory} cannot be used: {error}", ExitCode.USAGE) from None
        return quarantine

    async def _serve(self, nursery: trio.Nursery, on_ready: Callable[[], None]) -> None:
        cell, files = self._cell, self._files
        assert cell is not None and files is not None
        names = Namespace(cell)
        xattrs = Xattrs(cell, self._source.cell or str(self._source.servers[0]))
        mount_points = MountPoints(cell, names)
        locks = self._locks = LockManager(cell, files)
        await self._serve_metrics(nursery)
        make_operations = OPERATIONS[self._options.locks]
        operations = make_operations(cell, files, locks, names, mount_points, xattrs, self._initialised.set)
        extension = fuse_extension.loaded()
        several = len(self._connections.sessions) > 1
        if extension is not None:
            width = QUEUE_WIDTH if several else 0
            extension.extend(operations, absent_xattrs=ABSENT, cache_symlinks=True, max_background=width)
        options = {f"fsname={self._options.name or self._source}", f"subtype={FSTYPE}", *self._options.fuse}
        if self._options.posix:
            options.add("default_permissions")
        with _said_on_stderr() as said:
            try:
                pyfuse3.init(operations, self._mountpoint, options)
            except RuntimeError as error:
                reason = "; ".join(_lines(said)) or str(error)
                raise UserError(f"cannot mount on {self._mountpoint}: {reason}", ExitCode.FUSE) from None
            for line in _lines(said):
                log.warning("%s", line)
        self._extension = in_effect(extension)
        try:
            descriptor = fuse_descriptor()
            device = device_of(descriptor, self._mountpoint)
            control = ControlServer(device, shared="allow_other" in self._options.fuse)
            if several and self._extension is None:
                widen_queue(device)
        except BaseException:
            pyfuse3.close(unmount=True)
            raise
        control.commands["status"] = self._report
        control.commands["mmaps"] = self._mmaps
        control.user_commands.update(Logins(cell, files, self._options).commands)
        control.streams["trace"] = trace
        control.commands.update(FsCommands(mount_points).commands)
        control.commands.update(Examination(cell, mount_points).commands)
        control.commands.update(Flushing(cell, mount_points).commands)
        try:
            self._connections.attach(cell, locks)
            nursery.start_soon(control.serve)
            nursery.start_soon(self._on_signals)
            nursery.start_soon(self._announce, descriptor, device, on_ready)
            for server in self._connections.sessions:
                nursery.start_soon(cell.renew_promises, server)
                nursery.start_soon(files.store_in_time, server)
            try:
                await serve_kernel(descriptor, self._extension)
            finally:
                control.remove()
            await self._store_everything()
        finally:
            self._notifier.stop()
            mounted = not is_unmounted(descriptor)
            pyfuse3.close(unmount=False)  # first, so that the kernel asks nobody for anything
            if mounted:
                unmount_own(device)

    async def _serve_metrics(self, nursery: trio.Nursery) -> None:
        """If they are wanted. Raise UserError if that is not possible there."""
        if self._options.metrics is None:
            return
        try:
            listeners = await exposition.open_listeners(self._options.metrics, insecure=self._options.metrics_insecure)
        except exposition.MetricsAddressError as error:
            raise UserError(str(error), ExitCode.USAGE) from None
        self._metrics_address = f"http://{exposition.bound_address(listeners)}{exposition.PATH}"
        log.info("metrics are at %s", self._metrics_address)
        nursery.start_soon(exposition.serve, listeners, self._scrape)

    async def _announce(self, fuse_fd: int, device: str, on_ready: Callable[[], None]) -> None:
        await self._initialised.wait()
        assert self._cell is not None
        self._notifier.attach(fuse_fd, OwnInodes(self._mountpoint, device))
        self._cell.kernel.initialised()
        self._cell.table.names_can_be_dropped = self._cell.kernel.has_epochs
        kernel_readahead.widen(device)
        await self._show_root()
        log.info("mounted %s on %s", self._source, self._mountpoint)
        on_ready()

    async def _show_root(self) -> None:
        """Have the kernel ask for the root's attributes once.

        Until it has got some it takes the root for a directory that nobody may enter, and it throws away a GETATTR
        reply that an invalidation overtakes: then whoever has waited for a server that was away gets EACCES.
        """
        with suppress(OSError):
            await trio.to_thread.run_sync(os.stat, self._mountpoint, abandon_on_cancel=True)

    async def _on_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                if not self._ending:
                    self._ending = True
                    await self._have_pages_written_back()
                    await self._store_everything(quietly=True)
                    pyfuse3.terminate()

    async def _have_pages_written_back(self) -> None:
        """Have the kernel give us what processes stored into mappings."""
        assert self._cell is not None
        mapped = [KernelWork(v.ino, True, False, 0) for v in self._cell.table if v.opens and v.kernel_pages]
        with trio.move_on_after(self._options.timeout_s):
            await self._cell.drop(mapped)

    async def _store_everything(self, quietly: bool = False) -> None:
        """Store what is dirty, trying for `timeout`. Raise UserError if something is left and not `quietly`."""
        assert self._files is not None
        with trio.move_on_after(self._options.timeout_s):
            while await self._files.store_all():  # noqa: ASYNC110 (it tries again)
                await trio.sleep(1.0)
        left, vnodes = self._pages.dirty_bytes, self._files.dirty_vnodes()
        if left and not quietly:
            await self._files.refuser.keep_unstored(vnodes, "the mount ended before it was stored")
            lost = self._pages.dirty_bytes
            fate = f"{lost} of them are lost" if lost else "kept, see 'promisefs rejects list'"
            raise UserError(
                f"{left} bytes in {len(vnodes)} files could not be stored at {self._source.where}: {fate}",
                ExitCode.BUSY,
            )

    # Asked at the terminal

    async def _report(self, args: dict[str, Any]) -> dict[str, Any]:
        assert self._cell is not None and self._files is not None and self._locks is not None
        mounted_s = time.time() - self._started_at
        callbacks = self._connections.callbacks
        now = self._cell.now()
        promises = await count_promises(self._cell.table, now)
        report = mount_report(self._cell, self._files, self._pages, callbacks, promises, mounted_s, now)
        scope = LockScope.LOCAL if self._extension is None else self._options.locks
        locks = {"scope": scope, "held": self._locks.held, "waiting": self._locks.waiting, "lost": self._locks.losses}
        features = fuse_extension.features(self._extension)
        return {**report, "locks": locks, "features": features, "metrics": self._metrics_address}

    async def _scrape(self, accept: str) -> tuple[bytes, str]:
        report = await self._report({})
        report |= {"mountpoint": self._mountpoint, "source": str(self._source)}
        return await trio.to_thread.run_sync(encoded, METRICS, report, accept)

    async def _mmaps(self, args: dict[str, Any]) -> dict[str, Any]:
        assert self._cell is not None
        return open_files_report(self._cell.table, self._cell.now())
