"""Names: looking up, listing, and changing them, through the caches of directories. Mount points are not followed.

Every change goes to the server at once; the reply's statuses are installed, and the directory's names edited
if nobody else changed it in between (VnodeTable.own_change).
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import (
    MAX_LIST,
    CreateFile,
    FetchData,
    FetchDirectory,
    Link,
    Lookup,
    MakeDir,
    MakeMountPoint,
    RemoveDir,
    RemoveFile,
    Rename,
    RenameFlags,
    Symlink,
)
from promisefs_protocol.rights import LOOKUP

from promisefs_client.errors import FsError, ServerUnavailable
from promisefs_client.fuse.requests import SIGNAL_PATIENCE_S, interruptible
from promisefs_client.identity.local_access import require
from promisefs_client.network.cell import Cell
from promisefs_client.network.session import UNNUMBERED
from promisefs_client.vnodes.vnode import Version, Vnode

LISTING_ATTEMPTS = 5
"""How often a listing begins anew because the directory changed meanwhile; the last one is taken as it comes."""


class Owner(NamedTuple):
    """Who a new file belongs to."""

    uid: int
    gid: int


class Namespace:
    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._table = cell.table
        self._removing: dict[Fid, trio.Event] = {}
        """Files of which a name is being removed, and the server was told that they are not open here."""

    # Looking up

    async def lookup(self, directory: Vnode, name: bytes) -> Vnode | None:
        """What `name` stands for, None if there is none, as of a moment after this was called."""
        known = self._cached(directory, name)
        if known is not None:
            fid = known[0]
            vnode = None if fid is None else self._table.get(fid)
            if fid is None or (vnode is not None and self._cell.rights(vnode) is not None):
                self._cell.counters.names.hits += 1
                return vnode
        self._cell.counters.names.misses += 1
        async with self._cell.ask(Lookup(directory.fid, name)) as answer:
            reply = answer.reply
            directory = self._table.install(reply.directory, answer.mark)
            vnode = None if reply.entry is None else self._table.install(reply.entry, answer.mark)
            self._learn(directory, reply.directory.status.version, name, vnode)
        self._cell.drop_stale_later()
        return vnode

    def _cached(self, directory: Vnode, name: bytes) -> tuple[Fid | None] | None:
        """(fid or None) if the directory's cached names say; None if they do not. Raise FsError(EACCES)."""
        names = directory.names
        if names is None or not names.knows(name) or not self._may_list(directory):
            return None
        return (names.entries.get(name),)

    def _may_list(self, directory: Vnode) -> bool:
        """Whether what is known of a directory's names may be told now; False: the server has to be asked.

        Raise FsError(EACCES).
        """
        rights = self._cell.rights(directory)
        if rights is not None and not rights & LOOKUP:
            raise FsError(errno.EACCES)
        return rights is not None

    def _learn(self, directory: Vnode, version: Version, name: bytes, vnode: Vnode | None) -> None:
        self._table.learn_name(directory, version, name, None if vnode is None else vnode.fid)
        if vnode is not None and vnode.status.is_dir:
            vnode.parent = directory.fid

    async def listing(self, directory: Vnode) -> list[tuple[bytes, Fid]]:
        """All names, in byte order when they come from the server."""
        names = directory.names
        if names is not None and names.complete and self._may_list(directory):
            self._cell.counters.listings.hits += 1
            return [(name, fid) for name, fid in names.entries.items() if fid is not None]
        self._cell.counters.listings.misses += 1
        for attempt in range(LISTING_ATTEMPTS):
            entries = await self._fetch_listing(directory, must_be_of_one_version=attempt < LISTING_ATTEMPTS - 1)
            if entries is not None:
                return entries
        raise AssertionError("the last attempt takes what comes")

    async def _fetch_listing(self, directory: Vnode, must_be_of_one_version: bool) -> list[tuple[bytes, Fid]] | None:
        entries: list[tuple[bytes, Fid]] = []
        version: Version | None = None
        one_version = True
        after, more = b"", True
        while more:
            async with self._cell.ask(FetchDirectory(directory.fid, after, MAX_LIST)) as answer:
                reply, mark = answer.reply, answer.mark
                self._table.install(reply.directory, mark)
                for name, entry in reply.entries:
                    vnode = self._table.install(entry, mark)
                    if vnode.status.is_dir:
                        vnode.parent = directory.fid
                    entries.append((name, entry.fid))
                more = reply.more
                if entries:
                    after = entries[-1][0]
                page_version = reply.directory.status.version
                one_version &= version in (None, page_version)
                version = page_version
                if not more and one_version:
                    self._table.learn_listing(directory, page_version, dict(entries))
            if not one_version and must_be_of_one_version:
                return None
        self._cell.drop_stale_later()
        return entries

    async def read_link(self, vnode: Vnode) -> bytes:
        if vnode.target is not None:
            require(await self._cell.validate(vnode), LOOKUP)
        else:
            async with self._cell.ask(FetchData(vnode.fid, 0, vnode.status.size)) as answer:
                self._table.install(answer.reply.entry, answer.mark)
                vnode.target = answer.bulk or b""
        return vnode.target

    # Changing

    async def create(self, directory: Vnode, name: bytes, mode: int, owner: Owner) -> Vnode:
        """A regular file, fifo or socket. Raise Aborted(EXIST)..."""
        if stat.S_IFMT(mode) not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
            raise FsError(errno.EPERM)  # device nodes have no meaning on another machine
        vnode: Vnode | None = None
        self._table.begin_create()
        try:
            vnode = await self.add(directory, name, CreateFile(UNNUMBERED, directory.fid, name, mode, *owner))
        finally:
            self._cell.give_up_open(self._table.end_create(vnode))
        return vnode

    async def make_dir(self, directory: Vnode, name: bytes, mode: int, owner: Owner) -> Vnode:
        vnode = await self.add(directory, name, MakeDir(UNNUMBERED, directory.fid, name, mode, *owner))
        vnode.parent = directory.fid
        if vnode.status.nlink == 2 and self._cell.valid(vnode) and vnode.names is None:
            self._table.learn_listing(vnode, vnode.status.version, {})  # nobody can have put anything into it yet
        return vnode

    async def symlink(self, directory: Vnode, name: bytes, target: bytes, owner: Owner) -> Vnode:
        vnode = await self.add(directory, name, Symlink(UNNUMBERED, directory.fid, name, target, *owner))
        vnode.target = target
        return vnode

    async def link(self, vnode: Vnode, directory: Vnode, name: bytes) -> Vnode:
        if vnode.volume is not directory.volume:
            raise FsError(errno.EXDEV)
        return await self.add(directory, name, Link(UNNUMBERED, vnode.fid, directory.fid, name))

    async def add(
        self, directory: Vnode, name: bytes, request: CreateFile | MakeDir | Symlink | Link | MakeMountPoint
    ) -> Vnode:
        """Make the call that gives the directory a new name. Return what it stands for."""
        async with self._cell.ask(request) as answer:
            reply = answer.reply
            vnode = self._table.install(reply.entry, answer.mark)
            self._table.own_change(reply.directory, answer.mark, {name: vnode.fid})
        return vnode

    async def remove_file(self, directory: Vnode, name: bytes) -> None:
        vnode = await self._must_exist(directory, name)
        await self.settled(vnode)
        with self._removal(vnode) as not_open:
            request = RemoveFile(UNNUMBERED, directory.fid, name, not_open)
            async with self._cell.ask(request) as answer:
                reply = answer.reply
                self._table.own_change(reply.directory, answer.mark, {name: None})
                removed = self._table.install(reply.entry, answer.mark)
        self._cell.lost_a_name(removed, kept_open=removed.fid != not_open)

    async def remove_dir(self, directory: Vnode, name: bytes) -> None:
        async with self._cell.ask(RemoveDir(UNNUMBERED, directory.fid, name)) as answer:
            reply = answer.reply
            self._table.own_change(reply.directory, answer.mark, {name: None})
            removed = self._table.get(reply.removed)
            if removed is not None:
                self._table.vnode_is_gone(removed)
                self._table.may_be_idle(removed)

    async def rename(
        self, old_directory: Vnode, old_name: bytes, new_directory: Vnode, new_name: bytes, flags: int
    ) -> None:
        if flags not in (RenameFlags.NONE, RenameFlags.NOREPLACE, RenameFlags.EXCHANGE):
            raise FsError(errno.EINVAL)
        if old_directory.volume is not new_directory.volume:
            raise FsError(errno.EXDEV)
        target = None if flags & RenameFlags.NOREPLACE else await self.lookup(new_directory, new_name)
        if target is not None:
            await self.settled(target)
        with self._removal(target) as not_open:
            request = Rename(UNNUMBERED, old_directory.fid, old_name, new_directory.fid, new_name, flags, not_open)
            async with self._cell.ask(request) as answer:
                reply = answer.reply
                moved = self._table.install(reply.moved, answer.mark)
                replaced = None if reply.replaced is None else self._table.install(reply.replaced, answer.mark)
                exchanged = replaced if flags & RenameFlags.EXCHANGE else None
                old: dict[bytes, Fid | None] = {old_name: None if exchanged is None else exchanged.fid}
                new: dict[bytes, Fid | None] = {new_name: moved.fid}
                if (old_directory.fid, old_name) == (new_directory.fid, new_name) or moved is replaced:
                    old_directory.names = new_directory.names = None  # nothing changed, or two names of one file
                    self._table.install(reply.old_directory, answer.mark)
                    self._table.install(reply.new_directory, answer.mark)
                elif old_directory is new_directory:
                    self._table.own_change(reply.new_directory, answer.mark, old | new)
                else:
                    self._table.own_change(reply.old_directory, answer.mark, old)
                    self._table.own_change(reply.new_directory, answer.mark, new)
                if moved.status.is_dir:
                    moved.parent = new_directory.fid
                if exchanged is not None and exchanged.status.is_dir:
                    exchanged.parent = old_directory.fid
        if replaced is not None:
            self._cell.lost_a_name(replaced, kept_open=replaced.fid != not_open)

    @contextmanager
    def _removal(self, vnode: Vnode | None) -> Iterator[Fid | None]:
        """While a name, of this file as far as we know, is being removed. Give the fid if the file is not open now;
        whoever would open it meanwhile waits in `settled`. Any other file the server keeps until we give it up."""
        if vnode is None:
            yield None
            return
        if vnode.opens:
            try:
                yield None
            except ServerUnavailable:
                vnode.kept = True  # perhaps; it is given up at the last close
                raise
            return
        event = self._removing[vnode.fid] = trio.Event()
        try:
            yield vnode.fid
        finally:
            del self._removing[vnode.fid]
            event.set()

    async def settled(self, vnode: Vnode) -> None:
        """Return when no removal is under way that takes the file for not open."""
        while (event := self._removing.get(vnode.fid)) is not None:
            with interruptible(SIGNAL_PATIENCE_S):
                await event.wait()

    async def _must_exist(self, directory: Vnode, name: bytes) -> Vnode:
        vnode = await self.lookup(directory, name)
        if vnode is None:
            raise Aborted(AbortCode.NOENT)
        return vnode
