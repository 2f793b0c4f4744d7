"""Operations on names: each happens exactly once, in one transaction with the reply that is kept for a repetition.

From the checks to the queueing of breaks and the grants of the reply all is one step, so no other task sees anything in
between, and nothing that cancels the call can leave breaks untold.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import S_IFMNT, Fid, PromisedStatus, is_volume_name
from promisefs_protocol.messages import (
    METHOD_OF_REQUEST,
    Break,
    Changed,
    CreateFile,
    EntryReply,
    Link,
    MakeDir,
    MakeMountPoint,
    RemoveDir,
    RemoveDirReply,
    RemoveFile,
    RemoveFileReply,
    RemoveMountPoint,
    Rename,
    RenameFlags,
    RenameReply,
    Symlink,
)
from promisefs_protocol.rights import Rights
from promisefs_protocol.transport import Reply

from promisefs_server.identity.caller import Caller
from promisefs_server.store.vnodes import SET_ID_BITS, Vnode

from .parts import Later, Operation, Operations, break_of, now_ns

Promise = Callable[[Vnode], PromisedStatus]
NAMES = Changed.STATUS | Changed.DATA
"""What a break says of a directory whose names changed."""
CREATABLE_TYPES = (0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)


class Change(NamedTuple):
    """What an operation did, as yet uncommitted."""

    reply: Callable[[Promise], Any]
    """Makes the reply; called once without promises, to be kept, and once with them."""
    breaks: tuple[Break, ...]
    gone: tuple[int, ...] = ()
    """Keys of vnodes whose rows were deleted."""


class NameOperations(Operations):
    def table(self) -> dict[type, Operation]:
        return {
            CreateFile: self.create_file,
            MakeDir: self.make_dir,
            Symlink: self.symlink,
            Link: self.link,
            RemoveFile: self.remove_file,
            RemoveDir: self.remove_dir,
            MakeMountPoint: self.make_mount_point,
            RemoveMountPoint: self.remove_mount_point,
            Rename: self.rename,
        }

    def _once(
        self,
        caller: Caller,
        request: Any,
        files: Callable[[], Iterable[int]],
        apply: Callable[[int], Change],
        new_in_volume: int | None = None,
    ) -> Reply | Later:
        """Carry out `apply`, or give the reply of the first time. `files` are those whose rows it changes."""
        if self._deletions.has_room and not self._locks.any_held(files()):
            return self.settled(*self._carry_out(caller, request, apply, new_in_volume))
        return partial(self._once_later, caller, request, files, apply, new_in_volume)

    async def _once_later(
        self,
        caller: Caller,
        request: Any,
        files: Callable[[], Iterable[int]],
        apply: Callable[[int], Change],
        new_in_volume: int | None,
    ) -> Reply:
        await self._deletions.wait_room()
        async with self._locks.settled(files):
            self._breaker.check_known(caller.contact)
            events, reply = self._carry_out(caller, request, apply, new_in_volume)
        await self._breaker.settle(events)
        return reply, None

    def _carry_out(
        self, caller: Caller, request: Any, apply: Callable[[int], Change], new_in_volume: int | None
    ) -> tuple[Sequence[trio.Event], Any]:
        """Return what has to be waited for, and the reply."""
        method = METHOD_OF_REQUEST[type(request)]
        host = caller.host
        reply = self._store.replies.find(host.number, request.operation, method)
        if reply is not None:
            # The first time may not have been waited for to its end.
            return self._breaker.outstanding(), reply
        if new_in_volume is not None:
            self._store.volumes.reserve(new_in_volume)
        with self._database.transaction():
            change = apply(now_ns())
            self._store.replies.save(host.number, request.operation, method, change.reply(self.unpromised))
        events = self._breaker.begin(host, change.breaks)
        for key in change.gone:
            self._breaker.promises.delete(key, host.number)
        self._deletions.add(change.gone)
        return events, change.reply(lambda vnode: self.promised(caller, vnode))

    # New names

    def _create(
        self, caller: Caller, request: CreateFile | MakeDir | Symlink, mode: int, target: bytes | None = None
    ) -> Reply | Later:
        def apply(now_ns: int) -> Change:
            directory = self.directory(caller, request.directory, Rights.INSERT)
            directory, entry = self._store.directories.create(
                directory, request.name, mode, _owner(caller, request.uid), request.gid, target, now_ns
            )
            return Change(lambda p: EntryReply(p(directory), p(entry)), (break_of(directory, NAMES),))

        return self._once(caller, request, lambda: (), apply, request.directory.volume)

    def create_file(self, caller: Caller, request: CreateFile, bulk: bytes | None) -> Reply | Later:
        kind = stat.S_IFMT(request.mode)
        if kind not in CREATABLE_TYPES:
            raise Aborted(AbortCode.PERM, f"files of type {kind:o} cannot be made")
        if request.mode & SET_ID_BITS and not caller.identity.administrator:
            self.directory(caller, request.directory, Rights.INSERT)
            raise Aborted(AbortCode.PERM, "only administrators have files run as somebody else")
        return self._create(caller, request, (kind or stat.S_IFREG) | stat.S_IMODE(request.mode))

    def make_dir(self, caller: Caller, request: MakeDir, bulk: bytes | None) -> Reply | Later:
        return self._create(caller, request, stat.S_IFDIR | stat.S_IMODE(request.mode))

    def symlink(self, caller: Caller, request: Symlink, bulk: bytes | None) -> Reply | Later:
        if b"\0" in request.target:
            raise Aborted(AbortCode.INVAL, "a target has no NUL")
        return self._create(caller, request, stat.S_IFLNK | 0o777, request.target)

    def make_mount_point(self, caller: Caller, request: MakeMountPoint, bulk: bytes | None) -> Reply | Later:
        if not is_volume_name(request.volume_name):
            raise Aborted(AbortCode.INVAL, f"{request.volume_name!r} cannot be the name of a volume")

        def apply(now_ns: int) -> Change:
            directory, entry = self._store.directories.create(
                self.directory(caller, request.directory, Rights.INSERT | Rights.ADMINISTER),
                request.name, S_IFMNT | 0o755, 0, 0, request.volume_name.encode(), now_ns,
            )  # fmt: skip
            return Change(lambda p: EntryReply(p(directory), p(entry)), (break_of(directory, NAMES),))

        return self._once(caller, request, lambda: (), apply, request.directory.volume)

    def link(self, caller: Caller, request: Link, bulk: bytes | None) -> Reply | Later:
        _check_one_volume(request.fid, request.directory)

        def apply(now_ns: int) -> Change:
            directory, vnode = self._vnodes.directory(request.directory), self._vnodes.get(request.fid)
            self._access.need_link(caller.identity, vnode, directory)
            directory, entry = self._store.directories.link(directory, request.name, vnode, now_ns)
            return Change(
                lambda p: EntryReply(p(directory), p(entry)),
                (break_of(directory, NAMES), break_of(entry, Changed.STATUS)),
            )

        return self._once(caller, request, lambda: (self._vnodes.get(request.fid).key,), apply)

    # Names that go

    def _named(self, directory_fid: Any, name: bytes) -> tuple[int, ...]:
        entry = self._store.directories.lookup(self._vnodes.directory(directory_fid), name)
        return () if entry is None else (entry.key,)

    def _lost_name(self, caller: Caller, entry: Vnode, not_open: Fid | None) -> tuple[bool, Break]:
        """A file has one name less: return whether its row is gone, and its break."""
        if entry.nlink:
            return False, break_of(entry, Changed.STATUS)
        holders = self._breaker.may_have_open(entry.fid, caller.host)
        if entry.fid != not_open:
            holders.add(caller.host.number)
        kept = self._store.orphans.hold(entry, holders)
        return not kept, break_of(entry, Changed.STATUS | Changed.DELETED)

    def remove_file(self, caller: Caller, request: RemoveFile, bulk: bytes | None) -> Reply | Later:
        def apply(now_ns: int) -> Change:
            directory, entry = self._store.directories.remove_file(
                self.directory(caller, request.directory, Rights.DELETE), request.name, now_ns
            )
            gone, broken = self._lost_name(caller, entry, request.not_open)
            return Change(
                lambda p: RemoveFileReply(
                    p(directory), p(entry) if entry.nlink or entry.fid != request.not_open else self.unpromised(entry)
                ),
                (break_of(directory, NAMES), broken),
                (entry.key,) if gone else (),
            )

        return self._once(caller, request, lambda: self._named(request.directory, request.name), apply)

    def remove_dir(self, caller: Caller, request: RemoveDir, bulk: bytes | None) -> Reply | Later:
        def apply(now_ns: int) -> Change:
            directory, entry = self._store.directories.remove_dir(
                self.directory(caller, request.directory, Rights.DELETE), request.name, now_ns
            )
            return Change(
                lambda p: RemoveDirReply(p(directory), entry.fid),
                (break_of(directory, NAMES), break_of(entry, NAMES | Changed.DELETED)),
                (entry.key,),
            )

        return self._once(caller, request, lambda: (), apply)

    def remove_mount_point(self, caller: Caller, request: RemoveMountPoint, bulk: bytes | None) -> Reply | Later:
        def apply(now_ns: int) -> Change:
            directory, entry = self._store.directories.remove_mount_point(
                self.directory(caller, request.directory, Rights.DELETE), request.name, now_ns
            )
            return Change(
                lambda p: RemoveFileReply(p(directory), self.unpromised(entry)),
                (break_of(directory, NAMES), break_of(entry, Changed.STATUS | Changed.DELETED)),
                (entry.key,),
            )

        return self._once(caller, request, lambda: (), apply)

    def rename(self, caller: Caller, request: Rename, bulk: bytes | None) -> Reply | Later:
        _check_one_volume(request.old_directory, request.new_directory)

        def files() -> tuple[int, ...]:
            return self._named(request.old_directory, request.old_name) + self._named(
                request.new_directory, request.new_name
            )

        return self._once(caller, request, files, lambda now_ns: self._rename(caller, request, now_ns))

    def _rename_between(self, caller: Caller, request: Rename, *, exchange: bool) -> tuple[Vnode, Vnode]:
        """The directories, between which the caller may rename this."""
        both = Rights.INSERT | Rights.DELETE
        old = self.directory(caller, request.old_directory, both if exchange else Rights.DELETE)
        new = self.directory(caller, request.new_directory, both if exchange else Rights.INSERT)
        if not self._access.has(caller.identity, new, Rights.DELETE):
            # It would take the place of what is there.
            if self._store.directories.lookup(new, request.new_name) is not None:
                self._access.need(caller.identity, new, Rights.DELETE)
        return old, new

    def _rename(self, caller: Caller, request: Rename, now_ns: int) -> Change:
        flags = RenameFlags(request.flags)
        old, new = self._rename_between(caller, request, exchange=bool(flags & RenameFlags.EXCHANGE))
        old_directory, new_directory, moved, replaced, happened = self._store.directories.rename(
            old,
            request.old_name,
            new,
            request.new_name,
            noreplace=bool(flags & RenameFlags.NOREPLACE),
            exchange=bool(flags & RenameFlags.EXCHANGE),
            now_ns=now_ns,
        )
        breaks: list[Break] = []
        gone: tuple[int, ...] = ()
        if happened:
            breaks += [break_of(d, NAMES) for d in {d.key: d for d in (old_directory, new_directory)}.values()]
            breaks.append(break_of(moved, Changed.STATUS))
        if replaced is not None:
            if replaced.is_dir and not replaced.nlink:
                breaks.append(break_of(replaced, NAMES | Changed.DELETED))
                gone = (replaced.key,)
            elif flags & RenameFlags.EXCHANGE:
                breaks.append(break_of(replaced, Changed.STATUS))
            else:
                is_gone, broken = self._lost_name(caller, replaced, request.not_open)
                breaks.append(broken)
                gone = (replaced.key,) if is_gone else ()

        def reply(p: Promise) -> RenameReply:
            if replaced is None:
                there = None
            elif replaced.nlink or (replaced.fid != request.not_open and not replaced.is_dir):
                there = p(replaced)
            else:
                there = self.unpromised(replaced)
            return RenameReply(p(old_directory), p(new_directory), p(moved), there)

        return Change(reply, tuple(breaks), gone)


def _owner(caller: Caller, uid: int) -> int:
    """Whom a new file belongs to: its maker. Only administrators may say somebody else, as tar and rsync do."""
    return uid if caller.identity.administrator else caller.identity.user


def _check_one_volume(one: Fid, other: Fid) -> None:
    if one.volume != other.volume:
        raise Aborted(AbortCode.XDEV, "they are in different volumes")
