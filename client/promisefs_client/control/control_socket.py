"""Where the control socket of a mount is, who may use it, and what is said on it; for both ends.

Each mount's process listens on a unix socket named after the mount's device number, which mountinfo tells without
touching the mount, in a directory that only the mount's owner (and root) can enter (`runtime_directory`).

What is said: the mount's process begins with a line that lists the commands it knows, so that who asks knows at once
that it runs. Then one request, {"command": NAME, "args": {...}}, and one answer, {"result": ...} or
{"error": TEXT, "code": EXIT_CODE}; each is one line of JSON. A command that goes on answers with any number of lines
{"item": ...} before that, until who asked closes the connection.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from promisefs_protocol import runtime_directory
from promisefs_protocol.runtime_directory import directories

from promisefs_client.errors import UserError

MAX_REQUEST_BYTES = 65536
_UCRED = struct.Struct("3i")


class PeerProcess(NamedTuple):
    """Who is at the other end, by the kernel's word: as of its connect() or listen() (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> PeerProcess:
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return PeerProcess(pid, uid)


@contextmanager
def opened(directory: str, owner: int) -> Iterator[str]:
    """Give a path through a descriptor of the directory. Raise OSError, UserError if others could use it."""
    try:
        with runtime_directory.opened(directory, owner) as place:
            yield place
    except runtime_directory.NotPrivate as error:
        raise UserError(str(error)) from None


def shared_directory(owner: int) -> str:
    """Where mounts of this user that others may use listen for these: everybody may connect, only the owner listen."""
    return "/run/promisefs-shared" if owner == 0 else f"/tmp/promisefs-shared-{owner}"


@contextmanager
def opened_shared(directory: str, owner: int) -> Iterator[str]:
    """As `opened`, of a directory that others may enter."""
    try:
        with runtime_directory.opened(directory, owner, others_may=0o055) as place:
            yield place
    except runtime_directory.NotPrivate as error:
        raise UserError(str(error)) from None


class BoundSocket:
    """The listening socket of one mount, in the first directory that can be used.

    Or `shared`: one that every user may connect to.
    """

    def __init__(self, device: str, *, shared: bool = False) -> None:
        """Raise UserError if no directory can be used."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._device = device
        self._owner = os.geteuid()
        problems: list[str] = []
        self.shared = shared
        self._open = opened_shared if shared else opened
        for directory in [shared_directory(self._owner)] if shared else directories(self._owner):
            try:
                with suppress(FileExistsError):
                    os.mkdir(directory, 0o700)
                    os.chmod(directory, 0o755 if shared else 0o700)  # whatever the umask
                self._bind(directory)
                return
            except UserError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{directory}: {error.strerror}")
        self.socket.close()
        raise UserError(f"no place for the mount's control socket: {'; '.join(problems)}")

    def _bind(self, directory: str) -> None:
        """Take the name whoever had it: the device is ours, so he is dead or not mounted any more."""
        with self._open(directory, self._owner) as place:
            name, new = f"{place}/{self._device}", f"{place}/new.{os.getpid()}"
            with suppress(FileNotFoundError):
                os.unlink(new)
            self.socket.bind(new)
            os.chmod(new, 0o666)  # the directory says who may connect
            self.socket.listen()
            os.rename(new, name)  # so nobody ever finds one that nobody listens on yet
            self._inode = os.lstat(name).st_ino
            self._directory = directory

    def remove(self) -> None:
        """Nobody is to find it any more. Another mount may have its name by now; then that stays."""
        with suppress(OSError, UserError), self._open(self._directory, self._owner) as place:
            name = f"{place}/{self._device}"
            if os.lstat(name).st_ino == self._inode:
                os.unlink(name)
