"""SEC.* and PT.*: the calls about who somebody is, and who may make them.

Administrators may do everything. Everybody may examine, and ask for names by ids and the other way round; a user may
list their own groups, and see and change groups that they own, themselves or through a group that they are in.

A change that takes something from somebody, or gives it, ends what clients have cached: `announce` is called in one
step with the commit, and the change is answered when no client goes by what it knew, and it is durable.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.identity_messages import (
    AddToGroup,
    ChangeOwner,
    CreateGroup,
    CreateUser,
    DeletePrincipal,
    Examine,
    ExamineReply,
    Forget,
    IdToName,
    IdToNameReply,
    IssuedToken,
    IssueToken,
    ListEntries,
    ListEntriesReply,
    ListMembership,
    ListMembershipReply,
    Login,
    NameToId,
    NameToIdReply,
    Present,
    PresentReply,
    RemoveFromGroup,
    RenamePrincipal,
    RevokeTokens,
    RotateKeys,
    SetDisabled,
    SetPassword,
)
from promisefs_protocol.messages import Empty
from promisefs_protocol.observe.tracing import Event, tell
from promisefs_protocol.principals import ANYUSER, AUTHUSER

from .authority import DEFAULT_LIFETIME_S, LONGEST_LOGIN_S
from .contexts import Contexts
from .identity import SERVER_USER, Identity
from .principals import Record
from .registry import Registry

log = logging.getLogger(__name__)


class Asker(NamedTuple):
    """Who makes one of these calls, and where from."""

    identity: Identity
    contexts: Contexts
    address: str  # of the other end, without the port


class IdentityCalls:
    def __init__(self, registry: Registry, announce: Callable[[], Awaitable[None]]) -> None:
        self._registry = registry
        self._principals = registry.principals
        self._authority = registry.authority
        self._announce = announce
        self._table: dict[type, Callable[[Asker, Any], Awaitable[Any]]] = {
            Present: self.present,
            Forget: self.forget,
            Login: self.login,
            SetPassword: self.set_password,
            RevokeTokens: self.revoke,
            SetDisabled: self.set_disabled,
            RotateKeys: self.rotate_keys,
            IssueToken: self.issue,
            CreateUser: self.create_user,
            CreateGroup: self.create_group,
            DeletePrincipal: self.delete,
            RenamePrincipal: self.rename,
            ChangeOwner: self.change_owner,
            AddToGroup: self.add,
            RemoveFromGroup: self.remove,
            ListMembership: self.membership,
            Examine: self.examine,
            ListEntries: self.entries,
            NameToId: self.ids,
            IdToName: self.names,
        }

    def serves(self, request: Any) -> bool:
        return type(request) in self._table

    async def carry_out(self, asker: Asker, request: Any) -> Any:
        """Return the reply. Raise Aborted, OSError, sqlite3.Error."""
        return await self._table[type(request)](asker, request)

    # Tokens and passwords

    async def present(self, asker: Asker, request: Present) -> PresentReply:
        claims = self._authority.accept(request.token, time.time())
        context = asker.contexts.add(claims)
        return PresentReply(context, claims.user, self._principals.name_of(claims.user), claims.expires_s)

    async def forget(self, asker: Asker, request: Forget) -> Empty:
        asker.contexts.forget(request.context)
        return Empty()

    async def login(self, asker: Asker, request: Login) -> IssuedToken:
        await self._check_password(asker, request.user, request.password)
        lifetime_s = min(request.lifetime_s or DEFAULT_LIFETIME_S, LONGEST_LOGIN_S)
        issued = self._issue(self._principals.user(request.user), lifetime_s)
        about = {"user": issued.name, "address": asker.address}
        tell(log, logging.INFO, Event.LOGIN, "%s has logged in from %s", issued.name, asker.address, **about)
        return issued

    async def _check_password(self, asker: Asker, user: str, password: str) -> None:
        limits, now_s = self._registry.limits, trio.current_time()
        if wait_s := limits.wait_s(user, asker.address, now_s):
            raise Aborted(AbortCode.TOO_MANY, f"too many failed logins: try again in {math.ceil(wait_s)} s")
        limits.failed(user, asker.address, now_s)
        try:
            record = self._principals.user(user)
            hashed = None if record.disabled else record.password
        except Aborted:
            hashed = None
        if not await self._registry.passwords.matches(password, hashed):
            message, about = "login of %r from %s refused", {"user": user, "address": asker.address}
            tell(log, logging.WARNING, Event.LOGIN_REFUSED, message, user, asker.address, **about)
            raise Aborted(AbortCode.ACCES, "the user or the password is wrong")
        limits.succeeded(user, asker.address)

    def _issue(self, user: Record, lifetime_s: int) -> IssuedToken:
        token, claims = self._authority.issue(user, lifetime_s, time.time())
        return IssuedToken(token, user.id, user.name, claims.serial, claims.expires_s)

    async def issue(self, asker: Asker, request: IssueToken) -> IssuedToken:
        if asker.identity.user != SERVER_USER:
            raise Aborted(AbortCode.ACCES, "only whoever runs the server gives tokens without a password")
        return self._issue(self._principals.user(request.user), request.lifetime_s)

    async def set_password(self, asker: Asker, request: SetPassword) -> Empty:
        user = self._principals.user(request.user)
        if not asker.identity.administrator:
            if asker.identity.user != user.id:
                raise Aborted(AbortCode.ACCES, "only administrators set others' passwords")
            await self._check_password(asker, user.name, request.old)
        hashed = await self._registry.passwords.hashed(request.new)
        self._principals.set_password(user.id, hashed)
        return await self._done()

    async def revoke(self, asker: Asker, request: RevokeTokens) -> Empty:
        user = self._principals.user(request.user)
        if not asker.identity.administrator and (asker.identity.user != user.id or request.serial is not None):
            raise Aborted(AbortCode.ACCES, "only administrators revoke others' tokens, or single ones")
        self._authority.revoke(user, request.serial, time.time())
        return await self._done(changes_rights=True)

    async def set_disabled(self, asker: Asker, request: SetDisabled) -> Empty:
        _must_be_administrator(asker)
        self._principals.set_disabled(self._principals.user(request.user).id, request.disabled)
        return await self._done(changes_rights=True)

    async def rotate_keys(self, asker: Asker, request: RotateKeys) -> Empty:
        _must_be_administrator(asker)
        self._authority.rotate(time.time())
        return await self._done()

    # Users and groups

    async def create_user(self, asker: Asker, request: CreateUser) -> ExamineReply:
        _must_be_administrator(asker)
        return await self._made(self._principals.create_user(request.name, request.id, asker.identity.user))

    async def create_group(self, asker: Asker, request: CreateGroup) -> ExamineReply:
        owner = self._owner_of_new(asker, request)
        if not (asker.identity.administrator or (":" in request.name and self._is_or_is_in(asker, owner))):
            raise Aborted(AbortCode.ACCES, f"you may make groups that are called {asker.identity.name}:NAME")
        if request.name.startswith("system:"):
            _must_be_administrator(asker)
        return await self._made(self._principals.create_group(request.name, owner, asker.identity.user))

    def _owner_of_new(self, asker: Asker, request: CreateGroup) -> Record:
        if request.owner is not None:
            return self._principals.find(request.owner)
        prefix, colon, _ = request.name.partition(":")
        if asker.identity.user == SERVER_USER:
            return self._principals.find(prefix if colon and prefix != "system" else "system:administrators")
        return self._principals.find(asker.identity.name)

    async def delete(self, asker: Asker, request: DeletePrincipal) -> Empty:
        record = self._to_change(asker, request.name)
        self._principals.delete(record)
        return await self._done(changes_rights=True)

    async def rename(self, asker: Asker, request: RenamePrincipal) -> ExamineReply:
        record = self._to_change(asker, request.name)
        return await self._made(self._principals.rename(record, request.new_name))

    async def change_owner(self, asker: Asker, request: ChangeOwner) -> ExamineReply:
        record = self._to_change(asker, self._principals.group(request.name).name)
        return await self._made(self._principals.change_owner(record, self._principals.find(request.owner)))

    async def add(self, asker: Asker, request: AddToGroup) -> Empty:
        group = self._to_change(asker, self._principals.group(request.group).name)
        self._principals.add(self._principals.find(request.member), group)
        return await self._done(changes_rights=True)

    async def remove(self, asker: Asker, request: RemoveFromGroup) -> Empty:
        group = self._to_change(asker, self._principals.group(request.group).name)
        self._principals.remove(self._principals.find(request.member), group)
        return await self._done(changes_rights=True)

    async def membership(self, asker: Asker, request: ListMembership) -> ListMembershipReply:
        _must_be_authenticated(asker)
        record = self._principals.find(request.name)
        if not record.is_group and record.id != asker.identity.user:
            _must_be_administrator(asker)
        return ListMembershipReply(tuple(self._principals.membership(record)))

    async def examine(self, asker: Asker, request: Examine) -> ExamineReply:
        _must_be_authenticated(asker)
        return ExamineReply(self._principals.entry(self._principals.find(request.name)))

    async def entries(self, asker: Asker, request: ListEntries) -> ListEntriesReply:
        _must_be_administrator(asker)
        entries, more = self._principals.entries(request.after, users=request.users, groups=request.groups)
        return ListEntriesReply(tuple(entries), more)

    async def ids(self, asker: Asker, request: NameToId) -> NameToIdReply:
        _must_be_authenticated(asker)
        return NameToIdReply(self._principals.ids_of(request.names))

    async def names(self, asker: Asker, request: IdToName) -> IdToNameReply:
        _must_be_authenticated(asker)
        return IdToNameReply(tuple(self._principals.name_of(number) for number in request.ids))

    def _to_change(self, asker: Asker, name: str) -> Record:
        """What an administrator may change, and of groups their owners. Abort ACCES."""
        _must_be_authenticated(asker)
        record = self._principals.find(name)
        if not asker.identity.administrator:
            owner = self._principals.by_id(record.owner)
            if not record.is_group or owner is None or not self._is_or_is_in(asker, owner):
                raise Aborted(AbortCode.ACCES, f"{name} is not yours to change")
        return record

    @staticmethod
    def _is_or_is_in(asker: Asker, record: Record) -> bool:
        if record.id in (ANYUSER, AUTHUSER):
            return False
        return asker.identity.user == record.id or record.id in asker.identity.groups

    async def _made(self, record: Record) -> ExamineReply:
        await self._registry.make_durable()
        return ExamineReply(self._principals.entry(record))

    async def _done(self, *, changes_rights: bool = False) -> Empty:
        if changes_rights:
            await self._announce()
        await self._registry.make_durable()
        return Empty()


def _must_be_authenticated(asker: Asker) -> None:
    if not asker.identity.authenticated:
        raise Aborted(AbortCode.ACCES, "you have no token: log in")


def _must_be_administrator(asker: Asker) -> None:
    if not asker.identity.administrator:
        raise Aborted(AbortCode.ACCES, "only administrators may do that")
