"""A mount's side of logging in: its users hand in their tokens, see them, and take them back.

Whose token it is the kernel says (SO_PEERCRED of the control socket), so nobody can hand one in for, see, or take away
that of somebody else.
"""

from __future__ import annotations

import re
import time
from typing import Any

from promisefs_client.control.control_server import UserCommand
from promisefs_client.data.filestore import FileStore
from promisefs_client.errors import ExitCode, UserError
from promisefs_client.network.cell import Cell
from promisefs_client.options import MountOptions
from promisefs_client.vnodes.vnode_table import KernelWork

from .key import UserToken

_TOKEN = re.compile(r"[A-Za-z0-9._-]{1,2048}")


class Logins:
    def __init__(self, cell: Cell, files: FileStore, options: MountOptions) -> None:
        self._cell = cell
        self._options = options
        self._files = files

    @property
    def commands(self) -> dict[str, UserCommand]:
        return {"login": self.login, "tokens": self.tokens, "logout": self.logout, "servers": self.servers}

    async def servers(self, uid: int, args: dict[str, Any]) -> list[dict[str, Any]]:
        """How to reach the servers of this mount."""
        ca = None if self._options.ca is None else str(self._options.ca)
        return [
            {"address": str(session.address), "tls": self._options.tls, "ca": ca}
            for session in self._cell.sessions.values()
        ]

    async def login(self, uid: int, args: dict[str, Any]) -> dict[str, Any]:
        """Take a token in. Return whether it is for a server of this mount."""
        store, token = _read(args)
        accepted = any(
            session.store == store and token.may_go_to(str(session.address), self._options.tls)
            for session in self._cell.sessions.values()
        )
        if accepted:
            self._cell.keys.log_in(uid, store, token)
            self._forget_what_was_shown()
        return {"accepted": accepted}

    async def logout(self, uid: int, args: dict[str, Any]) -> None:
        """Store what is not stored yet, then forget the user's tokens."""
        await self._files.store_all()
        if self._cell.keys.log_out(uid):
            self._forget_what_was_shown()

    async def tokens(self, uid: int, args: dict[str, Any]) -> list[dict[str, Any]]:
        """What this user has here; no secrets."""
        return [
            {"name": t.name, "user": t.user, "server": t.server, "expires": t.expires_s, "serial": t.serial}
            for t in self._cell.keys.tokens_of(uid)
            if t.expires_s > time.time()
        ]

    def _forget_what_was_shown(self) -> None:
        """The kernel knows by whose rights it got something no more than that it did."""
        if self._cell.kernel.has_epochs:
            self._cell.kernel.drop_every_name()
        known = [KernelWork(vnode.ino, True, True, 0) for vnode in self._cell.table if vnode.lookups]
        self._cell.start(self._cell.drop, known)


def _read(args: dict[str, Any]) -> tuple[bytes, UserToken]:
    """Raise UserError."""
    try:
        store, token = bytes.fromhex(args["store"]), str(args["token"])
        found = UserToken(
            token.encode(), int(args["user"]), str(args["name"]), str(args["serial"]), str(args["server"]),
            int(args["expires_s"]), bool(args["tls"]),
        )  # fmt: skip
    except (KeyError, ValueError, TypeError):
        raise UserError("the request was not understood", ExitCode.USAGE) from None
    if not _TOKEN.fullmatch(token) or len(store) != 16:
        raise UserError("that is no token", ExitCode.USAGE)
    return store, found
