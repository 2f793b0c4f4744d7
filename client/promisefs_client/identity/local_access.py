"""What a mount lets local processes do, by the rights that its server has told. Core: no I/O.

The server checks everything again. Here it is decided what may be answered from caches, and what the kernel asks
before there is anything to call the server for: open(2), access(2). Mode bits count as AFS has it: those of the owner,
for everybody but administrators, and for the owner, too, who may change them.
"""

from __future__ import annotations

import errno
import os

from promisefs_protocol.rights import INSERT, LOOKUP, READ, SUPERUSER, WRITE, Rights

from promisefs_client.errors import FsError

_EXECUTE = 0o111


def require(rights: int, enough: int) -> None:
    """Raise FsError(EACCES) unless there is one of these rights."""
    if not rights & enough:
        raise FsError(errno.EACCES)


def require_open(rights: int, mode: int, flags: int) -> None:
    """Raise FsError(EACCES) unless a file of that mode may be opened with these flags of open(2)."""
    how = flags & os.O_ACCMODE
    wanted = 0 if how == os.O_WRONLY else os.R_OK
    if how != os.O_RDONLY or flags & os.O_TRUNC:
        wanted |= os.W_OK
    if not may_access_file(rights, mode, wanted):
        raise FsError(errno.EACCES)


def may_access_file(rights: int, mode: int, wanted: int) -> bool:
    """access(2) of anything that is no directory."""
    if wanted & os.X_OK and not mode & _EXECUTE:
        return False  # for administrators, too, as for root on a local disk
    if rights & SUPERUSER:
        return True
    if wanted & os.R_OK and not (rights & READ and mode & 0o400):
        return False
    if wanted & os.W_OK and not (rights & WRITE and mode & 0o200):
        return False
    return not wanted & os.X_OK or bool(rights & READ and mode & 0o100)


def may_access_directory(rights: int, wanted: int) -> bool:
    """access(2) and chdir(2) of a directory. Its mode bits do not matter."""
    if wanted & (os.R_OK | os.X_OK) and not rights & LOOKUP:
        return False
    return not wanted & os.W_OK or bool(rights & (INSERT | Rights.DELETE))
