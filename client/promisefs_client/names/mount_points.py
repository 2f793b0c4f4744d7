"""Mount points: names in one volume that stand for the root directory of another.

The kernel sees a directory with the inode number of that root; its parent is the directory where the name is. A
listing shows the same if the root was looked up there before. Else it must not wait for another server, so it shows a
directory under the mount point's own inode number, for no time at all: whoever uses the name looks it up.

The kernel has one dentry for each directory. So a volume cannot be below itself (ELOOP), and one that hangs in two
places of a mount is seen, by getcwd() for example, in the place where it was looked up last.
"""

from __future__ import annotations

import errno

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid, is_volume_name
from promisefs_protocol.messages import FetchStatus, MakeMountPoint, RemoveMountPoint

from promisefs_client.errors import FsError, ServerUnavailable
from promisefs_client.network.cell import Cell
from promisefs_client.network.session import UNNUMBERED
from promisefs_client.vnodes.vnode import Vnode

from .namespace import Namespace


class MountPoints:
    def __init__(self, cell: Cell, names: Namespace) -> None:
        self._cell = cell
        self._table = cell.table
        self._names = names

    async def target(self, mount_point: Vnode) -> str:
        """The name of the volume that it stands for."""
        return (await self._names.read_link(mount_point)).decode()

    async def root_behind(self, directory: Vnode, mount_point: Vnode) -> Vnode:
        """The root directory of the volume, up to date.

        Raise FsError(ENODEV) if there is no such volume, FsError(ELOOP) if it is around `directory`, ServerUnavailable,
        Aborted.
        """
        with trio.move_on_after(self._cell.timeout_s):
            name = await self.target(mount_point)
            try:
                volume = await self._cell.locator.by_name(name)
            except Aborted as refusal:
                raise FsError(errno.ENODEV if refusal.code == AbortCode.VNOVOL else refusal.errno) from None
            if self._is_around(directory, volume.root):
                raise FsError(errno.ELOOP)
            root = self._table.get(volume.root)
            if root is None:
                async with self._cell.ask(FetchStatus(volume.root)) as answer:
                    root = self._table.install(answer.reply.entry, answer.mark)
            else:
                await self._cell.validate(root)
            root.parent = directory.fid
            return root
        raise ServerUnavailable(f"the volume that {mount_point.fid} stands for could not be looked up in time")

    def known_root(self, directory: Vnode, mount_point: Vnode) -> Vnode | None:
        """The root directory of the volume, if the kernel knows it as being in this directory."""
        if mount_point.target is None:
            return None
        volume = self._table.volumes.named(mount_point.target.decode())
        root = None if volume is None else self._table.get(volume.root)
        return root if root is not None and root.lookups and root.parent == directory.fid else None

    def _is_around(self, directory: Vnode, root: Fid) -> bool:
        """Whether that is the directory itself or one of those that it is in."""
        seen: set[Fid] = set()
        vnode: Vnode | None = directory
        while vnode is not None and vnode.fid not in seen:
            if vnode.fid == root:
                return True
            seen.add(vnode.fid)
            vnode = None if vnode.parent is None else self._table.get(vnode.parent)
        return False

    # For `promisefs fs`

    async def make(self, directory: Vnode, name: bytes, volume_name: str) -> None:
        """Raise FsError(EINVAL) for what no volume can be called, Aborted(EXIST)..."""
        if not is_volume_name(volume_name):
            raise FsError(errno.EINVAL)
        request = MakeMountPoint(UNNUMBERED, directory.fid, name, volume_name)
        vnode = await self._names.add(directory, name, request)
        vnode.target = volume_name.encode()

    async def remove(self, directory: Vnode, name: bytes) -> None:
        """Raise FsError(EINVAL) if the name is no mount point, Aborted..."""
        await self.find(directory, name)
        async with self._cell.ask(RemoveMountPoint(UNNUMBERED, directory.fid, name)) as answer:
            self._table.own_change(answer.reply.directory, answer.mark, {name: None})
            removed = self._table.install(answer.reply.entry, answer.mark)
        self._table.may_be_idle(removed)

    async def find(self, directory: Vnode, name: bytes) -> Vnode:
        """The mount point of that name. Raise Aborted(NOENT), FsError(EINVAL) if it is something else."""
        vnode = await self._names.lookup(directory, name)
        if vnode is None:
            raise Aborted(AbortCode.NOENT)
        if not vnode.status.is_mount_point:
            raise FsError(errno.EINVAL)
        return vnode

    async def vnode_at(self, names: list[bytes]) -> Vnode:
        """What a path below the mount's root leads to, mount points followed and symlinks not.

        Raise Aborted(NOENT, NOTDIR), and what `root_behind` does.
        """
        vnode = self._table.get(self._table.root_fid)
        assert vnode is not None, "the kernel refers to it"
        for name in names:
            if not vnode.status.is_dir:
                raise Aborted(AbortCode.NOTDIR)
            found = await self._names.lookup(vnode, name)
            if found is None:
                raise Aborted(AbortCode.NOENT)
            vnode = await self.root_behind(vnode, found) if found.status.is_mount_point else found
        return vnode

    async def directory_at(self, names: list[bytes]) -> Vnode:
        """The same, of a directory."""
        vnode = await self.vnode_at(names)
        if not vnode.status.is_dir:
            raise Aborted(AbortCode.NOTDIR)
        return vnode
