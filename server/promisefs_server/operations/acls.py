"""Operations on access control lists.

Who holds a promise on a status goes by the rights that came with it. So a change of a list is told to everyone with a
promise on the directory or on a file that uses its list, before it is answered; also to the caller's own host, where
others may have other rights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid, PromisedStatus
from promisefs_protocol.messages import (
    MAX_LIST,
    Changed,
    FetchACL,
    FetchACLReply,
    StatusReply,
    StoreACL,
    WhoAmI,
    WhoAmIReply,
)
from promisefs_protocol.rights import MAX_ACL_ENTRIES, AclEntry, Rights
from promisefs_protocol.transport import Reply

from promisefs_server.access.acl import NO_ENTRIES, Acl
from promisefs_server.identity.caller import Caller
from promisefs_server.store.acls import number_of
from promisefs_server.store.vnodes import Vnode, key_of

from .parts import Later, Operation, Operations, break_of, now_ns

BREAK_STEP = 1000
"""So many names of a directory are looked at in one step."""


class AclOperations(Operations):
    def table(self) -> dict[type, Operation]:
        return {FetchACL: self.fetch_acl, StoreACL: self.store_acl, WhoAmI: self.who_am_i}

    def fetch_acl(self, caller: Caller, request: FetchACL, bulk: bytes | None) -> Reply:
        vnode = self._vnodes.get(request.fid)
        directory = vnode if vnode.is_dir else self._vnodes.find(vnode.parent)
        if directory is None:
            raise Aborted(AbortCode.NOENT, f"{request.fid} is in no directory any more")
        self._access.need_any(caller.identity, directory, Rights.LOOKUP | Rights.ADMINISTER)
        acl = self._store.acls.get(directory.acl)
        entries = (*self._named(acl.positive, negative=False), *self._named(acl.negative, negative=True))
        return FetchACLReply(self.promised(caller, vnode), entries), None

    def _named(self, entries: Iterable[tuple[int, int]], *, negative: bool) -> list[AclEntry]:
        return [AclEntry(self._principals.name_of(who), rights, negative) for who, rights in entries]

    def who_am_i(self, caller: Caller, request: WhoAmI, bulk: bytes | None) -> Reply:
        identity = caller.identity
        groups = sorted(self._principals.name_of(group) for group in identity.groups)
        return WhoAmIReply(identity.user, identity.name, tuple(groups[:MAX_LIST])), None

    def store_acl(self, caller: Caller, request: StoreACL, bulk: bytes | None) -> Reply | Later:
        self.directory(caller, request.fid, Rights.ADMINISTER)
        return partial(self._store_acl, caller, request)

    async def _store_acl(self, caller: Caller, request: StoreACL) -> Reply:
        with trio.CancelScope(shield=True):
            async with self._locks.hold(key_of(request.fid)):
                directory = self.directory(caller, request.fid, Rights.ADMINISTER)
                acl = self._changed(directory, request)
                changed = directory._replace(ctime_ns=directory.later(now_ns()))
                with self._database.transaction():
                    changed = changed._replace(acl=number_of(self._database, acl))
                    self._vnodes.update(changed)
                self._store.acls.changed(changed.key)
                events = await self._tell(changed)
        await self._breaker.settle(events)
        return StatusReply(self._now(caller, request.fid)), None

    def _changed(self, directory: Vnode, request: StoreACL) -> Acl:
        before = NO_ENTRIES if request.clear else self._store.acls.get(directory.acl)
        after = before.changed((self._principals.id_of(e.name), e.rights, e.negative) for e in request.acl)
        if after.size > MAX_ACL_ENTRIES:
            raise Aborted(AbortCode.TOO_MANY, f"a list has at most {MAX_ACL_ENTRIES} entries")
        return after

    async def _tell(self, directory: Vnode) -> Sequence[trio.Event]:
        """Break promises on the directory and the files in it. Who gets one from here on is told the new rights."""
        events = self._breaker.begin(None, [break_of(directory, Changed.STATUS)])
        after = b""
        while page := self._store.directories.keys_of_files(directory, after, BREAK_STEP):
            held = [self._vnodes.find(key) for _, key in page if self._breaker.promises.is_held(key)]
            told = [break_of(vnode, Changed.STATUS) for vnode in held if vnode is not None]
            events += self._breaker.begin(None, told) if told else []
            after = page[-1][0]
            await trio.lowlevel.checkpoint()
        # Whoever was told of a file before, and has not said so yet, holds no promise any more.
        return [*events, *self._breaker.outstanding()]

    def _now(self, caller: Caller, fid: Fid) -> PromisedStatus:
        return self.promised(caller, self._vnodes.get(fid))
