"""The pyfuse3 handlers: thin. Each finds its vnodes, delegates, and answers.

Between the last check of a promise and the return of a handler there is no await, and pyfuse3 replies in
the same step: so no answer computed before a break leaves after its acknowledgement.

A request that is never answered hangs its process for good. So every handler has a deadline, the session's timeout,
every exception becomes an errno (`handler`), and nothing cancels them (`main_loop`).
"""

from __future__ import annotations

import errno
import functools
import logging
import mmap
import os
from collections.abc import Callable, Coroutine, Sequence
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

import pyfuse3
from promisefs_protocol.abort import Aborted
from promisefs_protocol.ids import MAX_NAME_BYTES, MAX_SYMLINK_BYTES, Fid
from promisefs_protocol.messages import GetVolumeStatus, StoreStatus
from promisefs_protocol.observe.timings import Timings
from promisefs_protocol.observe.tracing import Event, tell
from promisefs_protocol.rights import LOOKUP, READ

from promisefs_client.data.filestore import FileStore
from promisefs_client.data.ranges import Ranges
from promisefs_client.data.readahead import Readahead
from promisefs_client.data.resizing import correct_size, show_end
from promisefs_client.errors import FsError, ServerUnavailable
from promisefs_client.identity.key import Key, act_with, acting_with
from promisefs_client.identity.local_access import may_access_directory, may_access_file, require, require_open
from promisefs_client.locks.lock_manager import LockManager
from promisefs_client.names.mount_points import MountPoints
from promisefs_client.names.namespace import Namespace, Owner
from promisefs_client.names.xattrs import Xattrs
from promisefs_client.network.cell import Cell
from promisefs_client.rejects.refusals import Writer
from promisefs_client.vnodes.vnode import Vnode
from promisefs_client.vnodes.vnode_table import KernelWork

from .attributes import attributes_of, dot_attributes, no_such_name
from .privileges import keeps_privileges, mode_without_privileges
from .requests import Interrupted, current_request, handling

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_PERMISSIONS = 0o7777
_DOTS = (b".", b"..")
BULK_STATUSES = 1000
"""Entries of a listing whose statuses are asked for together when they are no longer known."""


UPCALLS = Timings()
"""The kernel's requests by kind, until they were answered; failures by errno."""


def handler(function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Turn every failure into an errno; anything else would end the main loop and leave the request unanswered."""
    name = function.__name__
    timing = UPCALLS[name]

    @functools.wraps(function)
    async def handle(*args: P.args, **kwargs: P.kwargs) -> R:
        timing.started += 1
        began = perf_counter()
        try:
            with handling(), acting_with(_caller_key(args)):
                return await function(*args, **kwargs)
        except Exception as error:
            number = _errno_for(error, name)
            timing.failed(number)
            raise pyfuse3.FUSEError(number) from None
        finally:
            timing.took(perf_counter() - began)

    return handle


def _caller_key(args: Sequence[Any]) -> Key | None:
    """The key of the process that a handler is called for; None if the kernel does not say which that is."""
    operations, context = args[0], args[-1]
    return operations.keys.of(context.uid) if isinstance(context, pyfuse3.RequestContext) else None


def _errno_for(error: Exception, name: str) -> int:
    """What the kernel is told of a failure of the handler of that name."""
    match error:
        case Aborted() | FsError() | pyfuse3.FUSEError():
            return int(error.errno)
        case Interrupted():
            return errno.EINTR
        case ServerUnavailable():
            tell(log, logging.WARNING, Event.UPCALL_FAILED, "%s: %s", name, error, operation=name, reason=error)
            return errno.ETIMEDOUT
    log.error("%s failed: a defect here", name, exc_info=error)
    return errno.EIO


class _OpenFile:
    __slots__ = (
        "bypasses_pages",
        "is_appending",
        "keeps_privileges",
        "key",
        "readahead",
        "reads_and_writes",
        "vnode",
        "writer",
    )

    def __init__(self, vnode: Vnode, flags: int, uid: int, key: Key, writer: Writer | None) -> None:
        self.vnode = vnode
        self.key = key  # of who opened it
        self.writer = writer  # present iff it may be written through
        self.is_appending = bool(flags & os.O_APPEND) and flags & os.O_ACCMODE != os.O_RDONLY
        self.reads_and_writes = flags & os.O_ACCMODE == os.O_RDWR
        # Through its pages the kernel makes several WRITEs of one write(2) that begins in a page that it does not have
        # (fuse_fill_write_pages), and another mount may append between them. It cannot be mapped, so needs no pages.
        self.bypasses_pages = self.is_appending and not self.reads_and_writes
        self.keeps_privileges = keeps_privileges(uid)
        self.readahead = Readahead()

    def appends(self, offset: int) -> bool:
        """Whether the WRITE at `offset` that is being handled comes from write(2) with O_APPEND.

        The kernel writes mapped pages back through the same handle. Without the FUSE extension it does not say which
        WRITEs those are; they begin at a page, below the size it believes in, which is no more than a guess.
        """
        if not self.is_appending:
            return False
        from_page_cache = current_request().from_page_cache
        if from_page_cache is not None:
            return not from_page_cache
        begins_as_pages_do = offset % mmap.PAGESIZE == 0 and offset < self.vnode.kernel_size.least
        return not (self.vnode.read_write_opens and begins_as_pages_do)


class _OpenDirectory:
    __slots__ = ("key", "listing", "vnode")

    def __init__(self, vnode: Vnode, key: Key) -> None:
        self.vnode = vnode
        self.key = key  # of who opened it
        self.listing: list[tuple[bytes, Fid]] | None = None  # one snapshot for each rewind


class Operations(pyfuse3.Operations):
    """What the kernel asks of one mount."""

    enable_writeback_cache = False  # it would ignore sizes that change elsewhere
    supports_dot_lookup = False

    def __init__(
        self,
        cell: Cell,
        files: FileStore,
        locks: LockManager,
        names: Namespace,
        mount_points: MountPoints,
        xattrs: Xattrs,
        on_init: Callable[[], None],
    ) -> None:
        super().__init__()
        self._on_init = on_init
        self._cell = cell
        self.keys = cell.keys
        self._counters = cell.counters
        self._table = cell.table
        self._files = files
        self._locks = locks
        self._ranges = Ranges(cell, files)
        self._names = names
        self._mount_points = mount_points
        self._xattrs = xattrs
        self._open_files: dict[int, _OpenFile] = {}
        self._open_directories: dict[int, _OpenDirectory] = {}
        self._next_handle = 1

    def init(self) -> None:
        """The kernel and we have agreed on the protocol."""
        self._on_init()

    def _vnode(self, ino: int) -> Vnode:
        vnode = self._table.by_ino(ino)
        if vnode is None:
            raise FsError(errno.ESTALE)
        return vnode

    def _directory(self, ino: int) -> Vnode:
        vnode = self._vnode(ino)
        if vnode.deleted:
            raise FsError(errno.ENOENT)
        return vnode

    def _file(self, handle: int) -> _OpenFile:
        """The open file, for whose opener the request is carried out from here on."""
        file = self._open_files[handle]
        act_with(file.key)
        return file

    def _open_directory(self, handle: int) -> _OpenDirectory:
        directory = self._open_directories[handle]
        act_with(directory.key)
        return directory

    def _attributes(self, vnode: Vnode) -> pyfuse3.EntryAttributes:
        attributes_s = self._table.remaining_s(vnode, self._cell.now())
        self._counters.kernel_attributes.count(attributes_s > 0)
        return attributes_of(vnode, attributes_s, 0)

    def _entry(self, directory: Vnode, name: bytes, vnode: Vnode) -> pyfuse3.EntryAttributes:
        """An answer that gives the kernel a reference."""
        return self._attributes_as(directory, name, vnode, self._table.add_lookup(vnode))

    def _attributes_as(self, directory: Vnode, name: bytes, named: Vnode, shown: Vnode) -> pyfuse3.EntryAttributes:
        """Of `shown`, for the name in the directory, which stands for `named`: the same, or a mount point."""
        now = self._cell.now()
        name_s = self._table.name_remaining_s(directory, name, named.fid, now)
        attributes_s = self._table.remaining_s(shown, now)
        if named.status.is_mount_point and self._mount_points.known_root(directory, named) is not shown:
            name_s = 0.0  # not looked up yet, or it stands for another volume by now
        if shown.status.is_mount_point:
            attributes_s = 0.0
        self._counters.kernel_attributes.count(attributes_s > 0)
        self._counters.kernel_names.count(name_s > 0)
        return attributes_of(shown, attributes_s, name_s)

    def _new_handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    # Names

    @handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        directory = self._directory(parent_inode)
        if len(name) > MAX_NAME_BYTES:
            raise FsError(errno.ENAMETOOLONG)
        vnode = await self._names.lookup(directory, name)
        if vnode is None:
            return no_such_name(self._table.name_remaining_s(directory, name, None, self._cell.now()))
        if vnode.status.is_mount_point:
            root = self._table.add_lookup(await self._mount_points.root_behind(directory, vnode))
            return self._attributes_as(directory, name, vnode, root)
        return self._entry(directory, name, vnode)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, count in inode_list:
            if not self._table.forget(ino, count):
                log.error("forget of inode %d: the kernel has less than %d references", ino, count)

    @handler
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        directory = self._directory(parent_inode)
        vnode = await self._names.create(directory, name, mode & ~ctx.umask, Owner(ctx.uid, ctx.gid))
        return self._entry(directory, name, vnode)

    @handler
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        directory = self._directory(parent_inode)
        vnode = await self._names.make_dir(directory, name, mode & ~ctx.umask, Owner(ctx.uid, ctx.gid))
        return self._entry(directory, name, vnode)

    @handler
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if len(target) > MAX_SYMLINK_BYTES:
            raise FsError(errno.ENAMETOOLONG)
        directory = self._directory(parent_inode)
        vnode = await self._names.symlink(directory, name, target, Owner(ctx.uid, ctx.gid))
        return self._entry(directory, name, vnode)

    @handler
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        directory = self._directory(new_parent_inode)
        vnode = await self._names.link(self._vnode(inode), directory, new_name)
        return self._entry(directory, new_name, vnode)

    @handler
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._names.read_link(self._vnode(inode))

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._names.remove_file(self._directory(parent_inode), name)

    @handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._names.remove_dir(self._directory(parent_inode), name)

    @handler
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        old, new = self._directory(parent_inode_old), self._directory(parent_inode_new)
        await self._names.rename(old, name_old, new, name_new, flags)

    # Attributes

    @handler
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        vnode = self._vnode(inode)
        rights = await self._cell.validate(vnode)
        if not vnode.status.is_dir:
            require(rights, LOOKUP | READ)
        if not vnode.append_opens:  # else it would have the kernel ask, which it is doing
            await show_end(self._cell, vnode)
        return self._attributes(vnode)

    @handler
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        """access(2) and chdir(2). Not asked if the kernel checks mode bits (`posix`)."""
        vnode = self._vnode(inode)
        rights = await self._cell.validate(vnode)
        if vnode.status.is_dir:
            return may_access_directory(rights, mode)
        return may_access_file(rights, vnode.status.mode, mode)

    @handler
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        vnode = self._vnode(inode)
        if fh is not None:
            self._file(fh)
            await self._locks.check(fh)
        mode = attr.st_mode if fields.update_mode else None
        if fields.update_size and mode is None and not keeps_privileges(ctx.uid):
            mode = mode_without_privileges(vnode.status.mode)
        change = StoreStatus(
            vnode.fid,
            mode=None if mode is None else mode & _PERMISSIONS,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        if change.size is not None:
            await self._files.truncate(vnode, change)
        else:
            await self._change(change)
        if vnode.is_dirty and change.mtime_ns is not None:
            vnode.pending_mtime_ns = vnode.written_ns = change.mtime_ns  # what is stored later must not undo it
        # For no time: the kernel takes these as they are (fuse_do_setattr), also if an invalidation has overtaken them.
        attributes = attributes_of(vnode, 0.0, 0)
        vnode.kernel_size.believes(attributes.st_size)
        return attributes

    async def _change(self, change: StoreStatus) -> None:
        async with self._cell.ask(change) as answer:
            self._table.install(answer.reply.entry, answer.mark)

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        reply, _ = await self._cell.call(GetVolumeStatus(self._table.root_fid.volume))
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = reply.block_bytes
        data.f_blocks = reply.blocks
        data.f_bfree = reply.blocks_free
        data.f_bavail = reply.blocks_available
        data.f_files = reply.files
        data.f_ffree = data.f_favail = reply.files_free
        data.f_namemax = MAX_NAME_BYTES
        return data

    # Files

    @handler
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        vnode = await self._count_as_open(self._vnode(inode), flags)
        return self._give_handle(vnode, flags, ctx.uid)

    async def _count_as_open(self, vnode: Vnode, flags: int) -> Vnode:
        """Open an existing file: it counts as open before it is validated, so that no removal passes in between.

        libfuse has O_TRUNC sent with the open (FUSE_CAP_ATOMIC_O_TRUNC). Return the vnode that stands in the table.
        """
        await self._names.settled(vnode)
        vnode = self._table.add_open(vnode)
        try:
            require_open(await self._cell.validate_open(vnode), vnode.status.mode, flags)
            await self._cell.drop_stale()
            if vnode.deleted and not vnode.kept:
                raise FsError(errno.ESTALE)  # the kernel looks the name up again
            if flags & os.O_TRUNC:
                await self._files.truncate(vnode, StoreStatus(vnode.fid, None, None, None, 0, None, None))
                vnode.kernel_size.believes(0)
            if flags & os.O_ACCMODE != os.O_WRONLY:
                await correct_size(self._cell, vnode)
        except BaseException:
            self._cell.close_handle(vnode)
            raise
        return vnode

    def _give_handle(self, vnode: Vnode, flags: int, uid: int) -> pyfuse3.FileInfo:
        """A handle for a vnode that is counted as open already."""
        vnode.kernel_pages = True
        handle = self._new_handle()
        key = self.keys.of(uid)
        writer = None if flags & os.O_ACCMODE == os.O_RDONLY else self._files.writer(vnode, key)
        file = self._open_files[handle] = _OpenFile(vnode, flags, uid, key, writer)
        vnode.openers.append(file.key)
        vnode.read_write_opens += file.reads_and_writes
        vnode.append_opens += file.is_appending
        self._table.open_mmaps.opened(vnode, handle)
        return pyfuse3.FileInfo(fh=handle, keep_cache=True, direct_io=file.bypasses_pages)

    @handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        directory = self._directory(parent_inode)
        try:
            vnode = await self._names.create(directory, name, mode & ~ctx.umask, Owner(ctx.uid, ctx.gid))
            vnode = self._table.add_open(vnode)
        except Aborted as refusal:
            if refusal.errno != errno.EEXIST or flags & os.O_EXCL:
                raise
            vnode = await self._open_existing(directory, name, flags)
        return self._give_handle(vnode, flags, ctx.uid), self._entry(directory, name, vnode)

    async def _open_existing(self, directory: Vnode, name: bytes, flags: int) -> Vnode:
        """Another mount made the file after the kernel had looked it up. Count it as open and return it."""
        directory.names = None  # they said that there is no such file
        vnode = await self._names.lookup(directory, name)
        if vnode is None or not vnode.status.is_file:
            raise FsError(errno.ESTALE)  # gone again, or replaced: the kernel looks once more
        return await self._count_as_open(vnode, flags)

    @handler  # pyfuse3 takes any buffer
    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        file = self._file(fh)
        vnode = file.vnode
        await self._locks.check(fh)
        require(await self._cell.validate(vnode), READ)  # what it was opened with may have been taken away
        data = await self._files.read(vnode, off, size, file.readahead)
        self._counters.read_bytes += len(data)
        if len(data) < size:
            vnode.kernel_size.ended(off + len(data))
        if vnode.size > vnode.kernel_size.least:
            self._cell.start(show_end, self._cell, vnode)  # not here: the kernel has the page locked
        return data

    @handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        file = self._file(fh)
        vnode = file.vnode
        await self._locks.check(fh)
        if not file.keeps_privileges and not current_request().from_page_cache:
            await self._drop_privileges(vnode)
        kernels_end = off + len(buf)
        if vnode.shown_at is not None and off <= vnode.shown_at < kernels_end:
            # The write was under way to us when that byte was shown, and may lie under it in the kernel.
            vnode.shown_at = None
            self._cell.drop_pages_later(vnode)
        if file.appends(off):
            # The kernel's idea of the end may be from before another mount appended.
            if await self._files.append(vnode, buf, file.writer) != off:
                self._cell.start(self._correct_end, vnode, kernels_end)
            if file.bypasses_pages and vnode.opens > 1:
                # Whoever read the last page meanwhile may have zeros behind the end that was.
                self._cell.drop_pages_later(vnode)
            vnode.kernel_size.reaches(kernels_end)
            self._counters.written_bytes += len(buf)
            return len(buf)
        vnode.kernel_size.reaches(kernels_end)
        writer = self._mapped_writer(file) if current_request().from_page_cache else file.writer
        await self._files.write(vnode, off, buf, writer)
        self._counters.written_bytes += len(buf)
        return len(buf)

    def _mapped_writer(self, file: _OpenFile) -> Writer | None:
        """Whose a page is that is written back from a mapping. The kernel names the file that was opened for writing
        last, and does not know who stored into the page; only who may also read can have mapped it."""
        if not file.reads_and_writes:
            for other in reversed(self._open_files.values()):
                if other.vnode is file.vnode and other.reads_and_writes:
                    return other.writer
        return file.writer

    async def _drop_privileges(self, vnode: Vnode) -> None:
        mode = mode_without_privileges(vnode.status.mode)
        if mode is not None:
            await self._change(StoreStatus(vnode.fid, mode & _PERMISSIONS, None, None, None, None, None))

    async def _correct_end(self, vnode: Vnode, kernels_end: int) -> None:
        """An append went elsewhere than the kernel thinks; it takes no attributes while a write makes a file longer."""
        await self._cell.drop([KernelWork(vnode.ino, True, False, 0)])
        vnode.kernel_size.believes(kernels_end)
        await show_end(self._cell, vnode)

    @handler
    async def flush(self, fh: int) -> None:
        file = self._file(fh)
        vnode = file.vnode
        self._table.open_mmaps.flushed(vnode, fh, self._cell.now())
        try:
            if file.writer is None:
                await self._files.store_quietly(vnode)
            else:
                await self._files.store(vnode, sync=False, writer=file.writer)
        finally:
            await self._locks.flushed(vnode, current_request().lock_owner)

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        file = self._file(fh)
        await self._locks.check(fh)
        await self._files.store(file.vnode, sync=True, writer=file.writer)

    @handler
    async def release(self, fh: int) -> None:
        vnode = self._file(fh).vnode
        try:
            # What a mapping wrote after the last flush arrives only now.
            if vnode.deleted and vnode.opens == 1:
                self._files.discard(vnode)
            elif not self._files.gave_up_lately(vnode):
                await self._files.store_quietly(vnode)  # nobody reads the result of a release
        finally:
            await self._locks.released(vnode, fh)
            file = self._open_files.pop(fh)
            vnode.openers.remove(file.key)
            vnode.read_write_opens -= file.reads_and_writes
            vnode.append_opens -= file.is_appending
            self._table.open_mmaps.released(vnode, fh)
            self._cell.close_handle(vnode)
            self._files.released(vnode)

    # Directories

    @handler
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        vnode = self._vnode(inode)
        require(await self._cell.validate(vnode), LOOKUP)
        handle = self._new_handle()
        self._open_directories[handle] = _OpenDirectory(self._table.add_open(vnode), self.keys.of(ctx.uid))
        return handle

    @handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        self._cell.kernel.listings.parsed(fh)
        handle = self._open_directory(fh)
        directory = handle.vnode
        if handle.listing is None or start_id == 0:
            handle.listing = [] if directory.deleted else await self._list_with_dots(directory)
        listing = handle.listing
        reported = False
        for position in range(start_id, len(listing)):
            name, fid = listing[position]
            if name in _DOTS:
                if not pyfuse3.readdir_reply(token, name, dot_attributes(self._table.ino(fid)), position + 1):
                    return
                continue
            vnode = self._table.get(fid)
            if vnode is None:
                # Evicted before the kernel asked. An await after entries were put into the reply would let a break
                # overtake them: so what there is goes out, and the kernel asks again from here.
                if reported:
                    return
                await self._cell.fetch_statuses([fid for _, fid in listing[position : position + BULK_STATUSES]])
                vnode = self._table.get(fid)
            if vnode is not None:
                if not self._report(token, directory, name, vnode, position + 1):
                    return
                if not reported:
                    reported = True
                    self._cell.kernel.listings.sent(fh, directory.ino)

    async def _list_with_dots(self, directory: Vnode) -> list[tuple[bytes, Fid]]:
        parent = directory.parent or directory.fid
        return [(b".", directory.fid), (b"..", parent), *await self._names.listing(directory)]

    def _report(self, token: pyfuse3.ReaddirToken, directory: Vnode, name: bytes, vnode: Vnode, next_id: int) -> bool:
        """Add one entry to the reply, with a reference for the kernel; False if it is full."""
        shown = vnode
        if vnode.status.is_mount_point:
            shown = self._mount_points.known_root(directory, vnode) or vnode
        if not pyfuse3.readdir_reply(token, name, self._attributes_as(directory, name, vnode, shown), next_id):
            return False
        self._table.add_lookup(shown)
        return True

    @handler
    async def releasedir(self, fh: int) -> None:
        self._cell.kernel.listings.parsed(fh)
        self._cell.close_handle(self._open_directories.pop(fh).vnode)

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._files.sync_names(self._open_directory(fh).vnode)

    # Extended attributes

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._xattrs.get(self._vnode(inode), name)

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._xattrs.set(self._vnode(inode), name, value)

    @handler
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return await self._xattrs.list(self._vnode(inode))

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._xattrs.remove(self._vnode(inode), name)
