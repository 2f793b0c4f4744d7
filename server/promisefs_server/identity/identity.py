"""Who a call is made by, as the protection database has it. Core: no I/O, no clock."""

from __future__ import annotations

from typing import NamedTuple

from promisefs_protocol.principals import ADMINISTRATORS, ANONYMOUS, ANYUSER


class Identity(NamedTuple):
    """One user at one moment: a change of membership makes another one."""

    user: int  # PT id
    name: str
    groups: frozenset[int]  # PT ids; system:anyuser always, system:authuser with a token

    @property
    def administrator(self) -> bool:
        """Whether the user may do everything."""
        return ADMINISTRATORS in self.groups


UNCHECKED = Identity(ANONYMOUS, "anonymous", frozenset({ANYUSER, ADMINISTRATORS}))
"""Everybody, as long as nobody has to say who they are."""
