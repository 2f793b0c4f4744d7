"""The model kernel's dentries: looking names up, changing them, listing directories.

After fs/namei.c, fs/fuse/dir.c and readdir.c. A dentry, positive or negative, is believed until its time ends or the
epoch goes up. A LOOKUP's dentry has the epoch from before the request, that of a READDIRPLUS the one of the moment when
the reply is parsed. Changes hold the directory's lock, lookups share it.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3

from .kernel_inodes import Attributes, Inode, KernelCore, OpenFile
from .kernel_pages import PageCacheModel

P = ParamSpec("P")
R = TypeVar("R")

ROOT = pyfuse3.ROOT_INODE
Path = tuple[bytes, ...]
ENTRIES_IN_A_REPLY = 4


class Dentry:
    __slots__ = ("epoch", "inode", "until_s")

    def __init__(self, inode: Inode | None, until_s: float, epoch: int) -> None:
        self.inode = inode
        """None: there is no such name."""
        self.until_s = until_s
        self.epoch = epoch


class _ReaddirToken:
    """Collects what one READDIRPLUS returns."""

    def __init__(self, room: int) -> None:
        self._room = room
        self.entries: list[tuple[bytes, pyfuse3.EntryAttributes, int]] = []

    def __repr__(self) -> str:
        return "/".join(name.decode() for name, _, _ in self.entries)

    def add(self, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        if len(self.entries) >= self._room:
            return False
        self.entries.append((name, entry, next_id))
        return True


class _Fields:
    """As pyfuse3.SetattrFields, which cannot be made in Python."""

    def __init__(self, *updated: str) -> None:
        for name in ("mode", "uid", "gid", "size", "atime", "mtime", "ctime"):
            setattr(self, f"update_{name}", name in updated)
        self._updated = updated

    def __repr__(self) -> str:
        return "/".join(self._updated)


def _fail(number: int) -> OSError:
    return OSError(number, errno.errorcode[number])


def _walks(
    function: Callable[Concatenate[DentryCacheModel, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[DentryCacheModel, P], Coroutine[Any, Any, R]]:
    """A system call that goes by paths: the directories that it is in stay while it does."""

    @functools.wraps(function)
    async def walk(self: DentryCacheModel, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.walking += 1
        try:
            return await function(self, *args, **kwargs)
        finally:
            self.walking -= 1

    return walk


class DentryCacheModel:
    """Paths here are tuples of names, from the root of the mount."""

    def __init__(self, core: KernelCore, pages: PageCacheModel) -> None:
        self._core = core
        self._world = core.world
        self._pages = pages
        self._operations = core.operations
        self.dentries: dict[tuple[int, bytes], Dentry] = {}
        self.walking = 0
        """System calls that may be using any directory."""
        root = core.inodes[ROOT] = Inode(ROOT)
        root.lookups, root.mode, root.busy = 1, stat.S_IFDIR | 0o755, 1

    # Looking up

    async def _lookup(self, directory: Inode, name: bytes, *, locked: bool, revalidate: bool = False) -> Inode | None:
        """What the name stands for; `locked`: the caller holds the directory's lock. Raise OSError but ENOENT."""
        key = (directory.ino, name)
        dentry = self.dentries.get(key)
        if dentry is not None:
            if dentry.epoch < self._core.epoch:
                self.dentries.pop(key)
            elif dentry.until_s < self._core.now() or revalidate:
                if dentry.inode is not None and await self._revalidate(directory, name, dentry):
                    return dentry.inode
                if self.dentries.get(key) is dentry:
                    self.dentries.pop(key)
            else:
                return dentry.inode
        if locked:
            return await self._look_up_anew(directory, name)
        async with directory.lock.holding(shared=True):
            return await self._look_up_anew(directory, name)

    async def _revalidate(self, directory: Inode, name: bytes, dentry: Dentry) -> bool:
        """fuse_dentry_revalidate: ask whether the name still stands for the same inode."""
        inode = dentry.inode
        assert inode is not None
        version = self._core.attr_version
        inode.busy += 1
        try:
            entry = await self._core.request(self._operations.lookup, directory.ino, name, self._core.context)
            if entry.st_ino != inode.ino:
                if entry.st_ino:
                    self._core.nursery.start_soon(self._core._send_forget, entry.st_ino, 1)
                return False
            inode.lookups += 1
            await self._core.change_attributes(inode, entry, version)
            dentry.until_s = self._until(entry)
            return True
        except OSError:
            return False
        finally:
            inode.busy -= 1

    async def _look_up_anew(self, directory: Inode, name: bytes) -> Inode | None:
        epoch, version = self._core.epoch, self._core.attr_version
        try:
            entry = await self._core.request(self._operations.lookup, directory.ino, name, self._core.context)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            self.dentries[directory.ino, name] = Dentry(None, 0.0, epoch)
            return None
        if not entry.st_ino:
            self.dentries[directory.ino, name] = Dentry(None, self._until(entry), epoch)
            return None
        return await self._instantiate(directory, name, entry, epoch, version)

    async def _instantiate(
        self, directory: Inode, name: bytes, entry: pyfuse3.EntryAttributes, epoch: int, version: int
    ) -> Inode:
        inode = await self._core.iget(entry, version)
        self.dentries[directory.ino, name] = Dentry(inode, self._until(entry), epoch)
        return inode

    def _until(self, entry: pyfuse3.EntryAttributes) -> float:
        return self._core.now() + entry.entry_timeout if entry.entry_timeout > 0 else 0.0

    async def _directory(self, path: Path) -> Inode:
        """The directory that a path's last name is in. Raise OSError."""
        inode = self._core.inodes[ROOT]
        for name in path[:-1]:
            found = await self._lookup(inode, name, locked=False)
            if found is None:
                raise _fail(errno.ENOENT)
            if not found.is_dir:
                raise _fail(errno.ENOTDIR)
            inode = found
        return inode

    async def _inode(self, path: Path, revalidate: bool = False) -> Inode:
        if not path:
            return self._core.inodes[ROOT]
        found = await self._lookup(await self._directory(path), path[-1], locked=False, revalidate=revalidate)
        if found is None:
            raise _fail(errno.ENOENT)
        return found

    async def _again_if_stale(self, function: Any, *args: Any) -> Any:
        """The kernel tries a path once more, asking for every name, if it gets ESTALE."""
        try:
            return await function(*args, False)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return await function(*args, True)

    # Attributes

    @_walks
    async def stat(self, path: Path) -> Attributes:
        async def attempt(revalidate: bool) -> Attributes:
            inode = await self._inode(path, revalidate)
            inode.busy += 1
            try:
                return await self._core.attributes(inode)
            finally:
                inode.busy -= 1

        result: Attributes = await self._again_if_stale(attempt)
        return result

    @_walks
    async def chmod(self, path: Path, mode: int) -> int:
        """Return the inode number."""

        async def attempt(revalidate: bool) -> int:
            inode = await self._inode(path, revalidate)
            wanted = pyfuse3.EntryAttributes()
            wanted.st_mode = stat.S_IFMT(inode.mode) | mode
            await self._set_attributes(inode, wanted, _Fields("mode"), None)
            return inode.ino

        ino: int = await self._again_if_stale(attempt)
        return ino

    async def truncate(self, file: OpenFile, size: int) -> None:
        """ftruncate(2)."""
        wanted = pyfuse3.EntryAttributes()
        wanted.st_size = size
        await self._set_attributes(file.inode, wanted, _Fields("size"), file.handle)

    async def _set_attributes(
        self, inode: Inode, wanted: pyfuse3.EntryAttributes, fields: _Fields, handle: int | None
    ) -> None:
        """fuse_do_setattr."""
        resizes = fields.update_size  # type: ignore[attr-defined]
        inode.busy += 1
        try:
            async with inode.lock.holding():
                if resizes:
                    # fuse_set_nowrite: no page is in writeback while the size changes.
                    await self._pages.stop_writeback(inode)
                    inode.size_unstable = True
                try:
                    entry = await self._core.request(
                        self._operations.setattr, inode.ino, wanted, fields, handle, self._core.context
                    )
                except OSError:
                    inode.invalidate_attributes()
                    if resizes:
                        self._pages.resume_writeback(inode)
                    raise
                finally:
                    inode.size_unstable = False
                old_size = inode.size
                self._core.bump_attr_version(inode)
                inode.mode, inode.nlink, inode.mtime_ns = entry.st_mode, entry.st_nlink, entry.st_mtime_ns
                inode.size = entry.st_size
                inode.attributes_until_s = self._until_attributes(entry)
                if resizes:
                    self._pages.resume_writeback(inode)
                if old_size != entry.st_size:
                    await self._pages.truncate(inode, entry.st_size)
                    await self._pages.invalidate(inode)
        finally:
            inode.busy -= 1

    def _until_attributes(self, entry: pyfuse3.EntryAttributes) -> float:
        return self._core.now() + entry.attr_timeout if entry.attr_timeout > 0 else 0.0

    # Opening

    @_walks
    async def open(self, path: Path, flags: int, mode: int = 0o644) -> OpenFile:
        file: OpenFile = await self._again_if_stale(
            self._open_or_create if flags & os.O_CREAT else self._open_existing, path, flags, mode
        )
        return file

    async def _open_existing(self, path: Path, flags: int, mode: int, revalidate: bool) -> OpenFile:
        inode = await self._inode(path, revalidate)
        return await self._open_inode(inode, flags)

    async def _open_inode(self, inode: Inode, flags: int) -> OpenFile:
        if inode.is_dir:
            raise _fail(errno.EISDIR)
        inode.busy += 1
        if flags & os.O_TRUNC:
            # The kernel does this only for truncate(2). A page written back meanwhile would come after the truncation.
            await self._pages.stop_writeback(inode)
        try:
            reply = await self._core.request(
                self._operations.open, inode.ino, flags & ~(os.O_CREAT | os.O_EXCL), self._core.context
            )
            file = self._new_file(inode, reply, flags)
            if flags & os.O_TRUNC:
                self._core.bump_attr_version(inode)
                inode.size = 0
                inode.invalidate_attributes()
            return file
        finally:
            if flags & os.O_TRUNC:
                self._pages.resume_writeback(inode)
                await self._pages.truncate(inode, inode.size)
            inode.busy -= 1

    @staticmethod
    def _new_file(inode: Inode, reply: pyfuse3.FileInfo, flags: int) -> OpenFile:
        assert reply.keep_cache
        file = OpenFile(inode, reply.fh, flags)
        inode.handles.append(file)
        return file

    async def _open_or_create(self, path: Path, flags: int, mode: int, revalidate: bool) -> OpenFile:
        directory = await self._directory(path)
        async with directory.lock.holding():
            found = await self._lookup(directory, path[-1], locked=True, revalidate=revalidate)
            if found is None:
                epoch, version = self._core.epoch, self._core.attr_version
                info, entry = await self._core.request(
                    self._operations.create, directory.ino, path[-1], stat.S_IFREG | mode, flags, self._core.context
                )
                inode = await self._instantiate(directory, path[-1], entry, epoch, version)
                directory.invalidate_attributes()
                return self._new_file(inode, info, flags)
            found.busy += 1
        try:
            if flags & os.O_EXCL:
                raise _fail(errno.EEXIST)
            return await self._open_inode(found, flags)
        finally:
            found.busy -= 1

    def put(self, file: OpenFile) -> None:
        """A descriptor or mapping goes; after the last, RELEASE is sent, which nobody waits for."""
        file.users -= 1
        if not file.users:
            self._core.nursery.start_soon(self._release, file)

    async def _release(self, file: OpenFile) -> None:
        file.inode.busy += 1
        file.inode.handles.remove(file)
        try:
            await self._core.request(self._operations.release, file.handle)
        finally:
            file.inode.busy -= 1

    # Changing names

    @_walks
    async def mkdir(self, path: Path) -> int:
        return await self._make(path, self._operations.mkdir, stat.S_IFDIR | 0o755)

    @_walks
    async def symlink(self, path: Path, target: bytes) -> int:
        return await self._make(path, self._operations.symlink, target)

    async def _make(self, path: Path, handler: Any, *args: Any) -> int:
        directory = await self._directory(path)
        async with directory.lock.holding():
            if await self._lookup(directory, path[-1], locked=True) is not None:
                raise _fail(errno.EEXIST)
            epoch, version = self._core.epoch, self._core.attr_version
            entry = await self._core.request(handler, directory.ino, path[-1], *args, self._core.context)
            inode = await self._instantiate(directory, path[-1], entry, epoch, version)
            directory.invalidate_attributes()
            return inode.ino

    @_walks
    async def link(self, old: Path, new: Path) -> int:
        inode = await self._inode(old)
        inode.busy += 1
        try:
            directory = await self._directory(new)
            async with directory.lock.holding():
                if await self._lookup(directory, new[-1], locked=True) is not None:
                    raise _fail(errno.EEXIST)
                epoch, version = self._core.epoch, self._core.attr_version
                entry = await self._core.request(
                    self._operations.link, inode.ino, directory.ino, new[-1], self._core.context
                )
                linked = await self._instantiate(directory, new[-1], entry, epoch, version)
                directory.invalidate_attributes()
                inode.invalidate_attributes()
                return linked.ino
        finally:
            inode.busy -= 1

    @_walks
    async def unlink(self, path: Path) -> int:
        return await self._remove(path, self._operations.unlink, want_dir=False)

    @_walks
    async def rmdir(self, path: Path) -> int:
        return await self._remove(path, self._operations.rmdir, want_dir=True)

    async def _remove(self, path: Path, handler: Any, *, want_dir: bool) -> int:
        directory = await self._directory(path)
        async with directory.lock.holding():
            inode = await self._lookup(directory, path[-1], locked=True)
            if inode is None:
                raise _fail(errno.ENOENT)
            if inode.is_dir != want_dir:
                raise _fail(errno.ENOTDIR if want_dir else errno.EISDIR)
            inode.busy += 1
            try:
                await self._core.request(handler, directory.ino, path[-1], self._core.context)
                self._name_is_gone(directory, path[-1], inode)
            finally:
                inode.busy -= 1
            return inode.ino

    def _name_is_gone(self, directory: Inode, name: bytes, inode: Inode) -> None:
        """fuse_entry_unlinked, d_delete."""
        dentry = self.dentries.get((directory.ino, name))
        if dentry is not None:
            dentry.inode, dentry.until_s = None, 0.0
        self._core.bump_attr_version(inode)
        inode.nlink = max(0, inode.nlink - 1)
        inode.invalidate_attributes()
        directory.invalidate_attributes()

    @_walks
    async def rename(self, old: Path, new: Path, flags: int = 0) -> int:
        """Return the inode number of what was moved."""
        old_directory, new_directory = await self._directory(old), await self._directory(new)
        first, second = sorted((old_directory, new_directory), key=lambda inode: inode.ino)
        async with first.lock.holding():
            if second is first:
                return await self._rename_locked(old_directory, old[-1], new_directory, new[-1], flags)
            async with second.lock.holding():
                return await self._rename_locked(old_directory, old[-1], new_directory, new[-1], flags)

    async def _rename_locked(
        self, old_directory: Inode, old_name: bytes, new_directory: Inode, new_name: bytes, flags: int
    ) -> int:
        moved = await self._lookup(old_directory, old_name, locked=True)
        if moved is None:
            raise _fail(errno.ENOENT)
        moved.busy += 1
        try:
            replaced = await self._lookup(new_directory, new_name, locked=True, revalidate=True)
            if replaced is not None:
                replaced.busy += 1
            try:
                if replaced is moved:
                    return 0  # vfs_rename: two names of one file; nothing happens
                dentry = self.dentries.get((old_directory.ino, old_name))
                await self._core.request(
                    self._operations.rename,
                    old_directory.ino, old_name, new_directory.ino, new_name, flags, self._core.context,
                )  # fmt: skip
                for inode in (moved, old_directory, new_directory):
                    inode.invalidate_attributes()
                if replaced is not None:
                    self._name_is_gone(new_directory, new_name, replaced)
                # d_move: the dentry keeps its epoch and its time.
                self.dentries.pop((old_directory.ino, old_name), None)
                self.dentries.pop((new_directory.ino, new_name), None)
                if dentry is not None and dentry.inode is moved:
                    self.dentries[new_directory.ino, new_name] = dentry
                return moved.ino
            finally:
                if replaced is not None:
                    replaced.busy -= 1
        finally:
            moved.busy -= 1

    # Listing

    @_walks
    async def listdir(self, path: Path) -> dict[bytes, int]:
        """Names and inode numbers, by READDIRPLUS until there are no more."""
        directory = await self._inode(path)
        if not directory.is_dir:
            raise _fail(errno.ENOTDIR)
        directory.busy += 1
        try:
            handle = await self._core.request(self._operations.opendir, directory.ino, self._core.context)
            names: dict[bytes, int] = {}
            position = 0
            try:
                while True:
                    token = _ReaddirToken(self._world.random.randint(1, ENTRIES_IN_A_REPLY))
                    async with directory.lock.holding(shared=True):
                        version = self._core.attr_version
                        await self._core.request(self._operations.readdir, handle, position, token)
                        await self._take_in(directory, token, version)
                    if not token.entries:
                        return names
                    for name, entry, position in token.entries:  # noqa: B007 (the last one counts)
                        if name not in (b".", b".."):
                            names[name] = entry.st_ino
            finally:
                self._core.nursery.start_soon(self._release_directory, handle)
        finally:
            directory.busy -= 1

    async def _release_directory(self, handle: int) -> None:
        await self._core.request(self._operations.releasedir, handle)

    async def _take_in(self, directory: Inode, token: _ReaddirToken, version: int) -> None:
        """fuse_direntplus_link for each entry."""
        for name, entry, _ in token.entries:
            if name in (b".", b".."):
                continue
            epoch = self._core.epoch
            inode = await self._core.iget(entry, version)
            self.dentries[directory.ino, name] = Dentry(inode, self._until(entry), epoch)

    # Memory pressure

    def shrink(self) -> None:
        """Drop what nothing uses: every dentry, clean pages, inodes."""
        self.dentries.clear()
        for inode in list(self._core.inodes.values()):
            self._pages.shrink(inode)
            in_use = inode.busy or inode.handles or inode.pages or (inode.is_dir and self.walking)
            if not in_use and inode.ino != ROOT:
                self._core.forget(inode)
