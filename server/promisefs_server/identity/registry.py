"""Everything that a server knows of who is who: the parts of this room, opened and closed together."""

from __future__ import annotations

import time
from pathlib import Path

import trio

from .authority import Authority
from .contexts import Contexts
from .identity import NOBODY, SERVER, Identity
from .identity_file import IdentityFile
from .login_limits import LoginLimits
from .passwords import Passwords
from .principals import Principals

NO_CONTEXT = 0


class Registry:
    def __init__(self, folder: Path, store: bytes, run: int, *, trusts_everybody: bool = False) -> None:
        """Of the store in a folder that this process has locked. Raise StoreError, OSError, sqlite3.Error.

        `trusts_everybody`: who has no token is taken for whoever runs the server.
        """
        self._without_token = SERVER if trusts_everybody else NOBODY
        self._file = IdentityFile(folder)
        try:
            self.principals = Principals(self._file)
            self.authority = Authority(self._file, self.principals, store.hex(), run)
        except BaseException:
            self._file.close()
            raise
        self.passwords = Passwords()
        self.limits = LoginLimits()

    def identity(self, contexts: Contexts, context: int) -> Identity:
        """Who calls under a number. Abort KEYREJECTED, KEYEXPIRED, KEYREVOKED."""
        if context == NO_CONTEXT:
            return self._without_token
        return self.authority.check(contexts.claims(context), time.time())

    async def make_durable(self) -> None:
        """Return when every change so far is on disk. Raise OSError."""
        await trio.to_thread.run_sync(self._file.sync)

    def close(self) -> None:
        self._file.close()
