"""Tokens of one user on this machine, kept for commands and for mounts that are made later.

One file for each server, `token-STORE` in the user's runtime directory, which nobody else can use and which goes with
the session or the machine, as tickets do. A token is given only to the address that it was got from, besides the store
that it is for: a stranger could say that they are that store. One that was got over TLS is never sent without.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from promisefs_protocol.runtime_directory import NotPrivate, directories, opened, read_private, write_private

from promisefs_client.errors import UserError

from .key import UserToken

MAX_FILE_BYTES = 16384
_NAME = re.compile(r"token-([0-9a-f]{32})")


def save(store: bytes, token: UserToken) -> None:
    """Raise UserError if there is no place for it."""
    said = token._asdict() | {"token": token.token.decode()}
    problems = []
    for directory in directories(os.geteuid()):
        try:
            write_private(directory, f"token-{store.hex()}", json.dumps(said).encode())
            return
        except NotPrivate as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{directory}: {error.strerror}")
    raise UserError(f"no place for the token: {'; '.join(problems)}")


def saved(store: bytes) -> UserToken | None:
    """The token of this user for a store, unless it has expired."""
    token = _load(store)
    return token if token is not None and token.expires_s > time.time() else None


def _load(store: bytes) -> UserToken | None:
    owner = os.geteuid()
    for directory in directories(owner):
        with suppress(NotPrivate, ValueError, KeyError, TypeError):
            content = read_private(directory, f"token-{store.hex()}", owner, MAX_FILE_BYTES)
            if content is not None:
                said = json.loads(content)
                return UserToken(
                    str(said["token"]).encode(), int(said["user"]), str(said["name"]), str(said["serial"]),
                    str(said["server"]), int(said["expires_s"]), bool(said["tls"]),
                )  # fmt: skip
    return None


def all_saved() -> Iterator[tuple[bytes, UserToken]]:
    """Every token of this user, with the store that it is for; those that have expired, too."""
    seen: set[bytes] = set()
    for directory in directories(os.geteuid()):
        with suppress(OSError, NotPrivate), opened(directory, os.geteuid()) as place:
            for name in sorted(os.listdir(place)):
                match = _NAME.fullmatch(name)
                if match is None or (store := bytes.fromhex(match[1])) in seen:
                    continue
                seen.add(store)
                token = _load(store)
                if token is not None:
                    yield store, token


def forget(store: bytes) -> None:
    _remove(lambda name: name == f"token-{store.hex()}")


def forget_all() -> None:
    _remove(lambda name: _NAME.fullmatch(name) is not None)


def _remove(wanted: Callable[[str], bool]) -> None:
    for directory in directories(os.geteuid()):
        with suppress(OSError, NotPrivate), opened(directory, os.geteuid()) as place:
            for name in os.listdir(place):
                if wanted(name):
                    with suppress(FileNotFoundError):
                        os.unlink(f"{place}/{name}")
