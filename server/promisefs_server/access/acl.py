"""Access control lists: what they hold, and what they give whom. Core: no I/O.

A list has positive and negative entries, each the rights of one user or group by PT id. A user has the union of what
the positive entries give him, his groups, system:authuser if he has shown a token, and system:anyuser; without the
same union of negative entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgpack
from promisefs_protocol.principals import ADMINISTRATORS, ANONYMOUS, ANYUSER
from promisefs_protocol.rights import ALL_RIGHTS, EVERYTHING, INSERT, OWNER, READ, SUPERUSER, WRITE, Rights

from promisefs_server.identity.identity import Identity

Entry = tuple[int, int]
"""(PT id, rights)."""


class Acl(NamedTuple):
    """Entries in the order of their ids, one for each at most, none without rights: equal lists compare equal."""

    positive: tuple[Entry, ...]
    negative: tuple[Entry, ...]

    def packed(self) -> bytes:
        packed: bytes = msgpack.packb([self.positive, self.negative])
        return packed

    @classmethod
    def unpacked(cls, packed: bytes) -> Acl:
        positive, negative = msgpack.unpackb(packed, use_list=False)
        return cls(positive, negative)

    def rights_of(self, identity: Identity) -> Rights:
        """What the list gives a user, whatever else he may do as an owner or administrator."""
        members = identity.groups | {identity.user}
        return Rights(_union(self.positive, members) & ~_union(self.negative, members))

    @property
    def rights_of_anyone(self) -> Rights:
        """What nobody can lack, whoever he is."""
        given = _union(self.positive, frozenset({ANYUSER}))
        return Rights(given & ~_union(self.negative, None))

    def changed(self, changes: Iterable[tuple[int, int, bool]]) -> Acl:
        """With these entries (PT id, rights, negative) in place of what those ids had."""
        parts = (dict(self.positive), dict(self.negative))
        for who, rights, negative in changes:
            if rights & EVERYTHING:
                parts[negative][who] = rights & EVERYTHING
            else:
                parts[negative].pop(who, None)
        return Acl(*(tuple(sorted(part.items())) for part in parts))

    @property
    def size(self) -> int:
        return len(self.positive) + len(self.negative)


_ADMINISTRATORS_RIGHTS = int(ALL_RIGHTS) | SUPERUSER
NO_ENTRIES = Acl((), ())
"""Of what has lost its list: it is the administrators'."""
NEW_VOLUME = Acl(((ADMINISTRATORS, int(ALL_RIGHTS)),), ())
"""Of the root directory of a new volume: nobody but administrators, until one of them says otherwise."""


def _union(entries: tuple[Entry, ...], members: frozenset[int] | None) -> int:
    rights = 0
    for who, gives in entries:
        if members is None or who in members:
            rights |= gives
    return rights


def owns(identity: Identity, owner: int) -> bool:
    """Whether a file of that owner is the user's. Nobody owns what was made without a token."""
    return owner == identity.user and owner != ANONYMOUS


def rights_on_file(identity: Identity, given: int, owner: int) -> int:
    """What a user may do with a file, if the list of its directory gives him `given`.

    Who has put a file into a directory may read and write it there, also if he may not look into what others put
    there: so a drop box works.
    """
    if ADMINISTRATORS in identity.groups:
        return _ADMINISTRATORS_RIGHTS
    if given & INSERT and owns(identity, owner):
        return given | READ | WRITE | OWNER
    return given


def rights_on_directory(identity: Identity, given: int, owner: int, is_root: bool) -> int:
    """The same of a directory that has the list. Whose volume it is may always say who else may use it."""
    if ADMINISTRATORS in identity.groups:
        return _ADMINISTRATORS_RIGHTS
    if is_root and owns(identity, owner):
        return given | int(Rights.ADMINISTER)
    return given
