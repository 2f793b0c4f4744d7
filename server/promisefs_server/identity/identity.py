"""Who a call is made by, as the protection database has it. Core: no I/O, no clock."""

from __future__ import annotations

from typing import NamedTuple

from promisefs_protocol.principals import ADMINISTRATORS, ANONYMOUS, ANYUSER, AUTHUSER


class Identity(NamedTuple):
    """One user at one moment: a change of membership makes another one."""

    user: int  # PT id
    name: str
    groups: frozenset[int]  # PT ids; system:anyuser always, system:authuser with a token

    @property
    def administrator(self) -> bool:
        """Whether the user may do everything."""
        return ADMINISTRATORS in self.groups

    @property
    def authenticated(self) -> bool:
        """Whether a token says who it is."""
        return AUTHUSER in self.groups


NOBODY = Identity(ANONYMOUS, "anonymous", frozenset({ANYUSER}))
"""Everybody without a token."""
SERVER_USER = 0
SERVER = Identity(SERVER_USER, "local", frozenset({ANYUSER, AUTHUSER, ADMINISTRATORS}))
"""Whoever runs the server: who can read its store could make any token, so nothing is kept from them."""
