"""Calls about who somebody is: SEC.* for tokens and passwords, PT.* for users and groups.

Served on the *calls* connection of a mount and on *commands*, a connection of its own for people at a terminal; those
that need no rights but the server's own, on its control socket. What holds a secret does not show it in its repr.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from .fields import int_range, length_range
from .ids import U32, U64

MAX_TOKEN_BYTES = 2048
MAX_ENTRIES = 1024
"""Most names in one list of users and groups."""

Token = Annotated[bytes, length_range(1, MAX_TOKEN_BYTES)]
PrincipalName = Annotated[str, length_range(1, 63)]
PrincipalId = Annotated[int, int_range(-(2**31), 2**31 - 1)]
Password = Annotated[str, length_range(1, 255)]
Serial = Annotated[str, length_range(1, 64)]
Names = Annotated[tuple[PrincipalName, ...], length_range(0, MAX_ENTRIES)]


# SEC


class Present(NamedTuple):
    """Name a token by a number, on this connection only. Aborts KEYEXPIRED, KEYREVOKED, KEYREJECTED."""

    token: Token

    def __repr__(self) -> str:
        return "Present(...)"


class PresentReply(NamedTuple):
    context: U32
    user: PrincipalId  # 0: whoever runs the server
    name: PrincipalName
    expires_s: U64  # since the epoch, by the server's clock


class Forget(NamedTuple):
    """The number stands for no token any more."""

    context: U32


class Login(NamedTuple):
    """Aborts ACCES, the same for a wrong password and an unknown user, and TOO_MANY after too many of these."""

    user: PrincipalName
    password: Password
    lifetime_s: U32  # at most; 0: as long as the server gives

    def __repr__(self) -> str:
        return f"Login({self.user!r}, ...)"


class IssuedToken(NamedTuple):
    token: Token
    user: PrincipalId
    name: PrincipalName
    serial: Serial
    expires_s: U64

    def __repr__(self) -> str:
        return f"IssuedToken({self.name!r}, {self.serial!r}, ...)"


class SetPassword(NamedTuple):
    """Of oneself, or for administrators anybody's. `old` counts for oneself only."""

    user: PrincipalName
    old: Annotated[str, length_range(0, 255)]
    new: Password

    def __repr__(self) -> str:
        return f"SetPassword({self.user!r}, ...)"


class IssueToken(NamedTuple):
    """A token without a password: on the control socket only."""

    user: PrincipalName
    lifetime_s: U32


class RevokeTokens(NamedTuple):
    """All tokens of a user, or the one of this serial number. For administrators, and for oneself."""

    user: PrincipalName
    serial: Serial | None


class SetDisabled(NamedTuple):
    """A disabled user cannot log in, and no token of theirs is good for anything. For administrators."""

    user: PrincipalName
    disabled: bool


class RotateKeys(NamedTuple):
    """Sign with a new key from now on. Tokens stay good till they expire. For administrators."""


# PT


class Principal(NamedTuple):
    """A user or, with a negative id, a group."""

    id: PrincipalId
    name: PrincipalName
    owner: PrincipalId
    owner_name: PrincipalName
    creator_name: PrincipalName
    memberships: U32  # of a user: groups that it is in; of a group: its members
    disabled: bool
    has_password: bool


class CreateUser(NamedTuple):
    """`id` None: the next that is free. Aborts EXIST."""

    name: PrincipalName
    id: PrincipalId | None


class CreateGroup(NamedTuple):
    """`owner:name` for anybody who is that owner; without a colon for administrators. `owner` None: the caller."""

    name: PrincipalName
    owner: PrincipalName | None


class DeletePrincipal(NamedTuple):
    """Its id is never given to anybody else."""

    name: PrincipalName


class RenamePrincipal(NamedTuple):
    name: PrincipalName
    new_name: PrincipalName


class ChangeOwner(NamedTuple):
    """Of a group."""

    name: PrincipalName
    owner: PrincipalName


class AddToGroup(NamedTuple):
    """A user, or a group that contains no groups to one that is in none. Aborts EXIST."""

    member: PrincipalName
    group: PrincipalName


class RemoveFromGroup(NamedTuple):
    member: PrincipalName
    group: PrincipalName


class ListMembership(NamedTuple):
    """The groups that a user is in, or the members of a group."""

    name: PrincipalName


class ListMembershipReply(NamedTuple):
    names: Names


class Examine(NamedTuple):
    name: PrincipalName


class ExamineReply(NamedTuple):
    entry: Principal


class ListEntries(NamedTuple):
    """Entries with a greater id than `after`, in the order of ids. For administrators."""

    after: PrincipalId | None
    users: bool
    groups: bool


class ListEntriesReply(NamedTuple):
    entries: Annotated[tuple[Principal, ...], length_range(0, MAX_ENTRIES)]
    more: bool


class NameToId(NamedTuple):
    names: Names


class NameToIdReply(NamedTuple):
    """One for each name; None for one that nobody has."""

    ids: Annotated[tuple[PrincipalId | None, ...], length_range(0, MAX_ENTRIES)]


class IdToName(NamedTuple):
    ids: Annotated[tuple[PrincipalId, ...], length_range(0, MAX_ENTRIES)]


class IdToNameReply(NamedTuple):
    """One for each id; that itself as text if nobody has it."""

    names: Names
