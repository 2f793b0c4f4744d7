"""Abort codes: how a server says no, and what errno that is to an application.

The one table, used both ways. Numbers are the protocol's own and never change their meaning;
names follow AFS (VNOVNODE...) where AFS has one, else errno.
"""

from __future__ import annotations

import enum
import errno


class AbortCode(enum.IntEnum):
    VNOVNODE = 102  # no such vnode: removed, or a forged or stale fid
    VNOVOL = 103
    VMOVED = 111
    VOFFLINE = 106
    PERM = 1
    NOENT = 2
    IO = 5
    AGAIN = 11  # another's lock is in the way
    ACCES = 13
    BUSY = 16
    EXIST = 17
    XDEV = 18
    NOTDIR = 20
    ISDIR = 21
    INVAL = 22
    FBIG = 27
    NOSPC = 28
    ROFS = 30
    MLINK = 31
    DEADLK = 35  # the owner of a lock in the way waits, maybe through others, for one of the caller's
    NAMETOOLONG = 36
    NOLCK = 37  # too many locks, or too many waiting
    NOTEMPTY = 39
    LOOP = 40
    NODATA = 61
    NOTSUP = 95
    DQUOT = 122
    XATTR_TOO_BIG = 123  # E2BIG
    KEYEXPIRED = 127  # the caller's token
    KEYREVOKED = 128  # it, or all of its user's; or the user is gone
    KEYREJECTED = 129  # it is not one of this cell's
    CHANGED = 124  # another client has changed the file's bytes since the version named
    UNKNOWN_METHOD = 200
    BAD_MESSAGE = 201  # arguments of the wrong type, number or size
    BAD_VERSION = 202  # no protocol version in common
    NOT_INTRODUCED = 203  # a call before HELLO, or on the wrong connection
    NO_CALLBACKS = 204  # the client's callbacks connection is missing
    SHUTTING_DOWN = 205
    TOO_MANY = 206  # a limit of the server's is reached
    INTERNAL = 207  # a defect of the server; it has logged it


_ERRNO: dict[AbortCode, int] = {
    AbortCode.VNOVNODE: errno.ESTALE,
    AbortCode.VNOVOL: errno.ENODEV,
    AbortCode.VMOVED: errno.ENODEV,
    AbortCode.VOFFLINE: errno.ENODEV,
    AbortCode.PERM: errno.EPERM,
    AbortCode.NOENT: errno.ENOENT,
    AbortCode.IO: errno.EIO,
    AbortCode.AGAIN: errno.EAGAIN,
    AbortCode.ACCES: errno.EACCES,
    AbortCode.BUSY: errno.EBUSY,
    AbortCode.EXIST: errno.EEXIST,
    AbortCode.XDEV: errno.EXDEV,
    AbortCode.NOTDIR: errno.ENOTDIR,
    AbortCode.ISDIR: errno.EISDIR,
    AbortCode.INVAL: errno.EINVAL,
    AbortCode.FBIG: errno.EFBIG,
    AbortCode.NOSPC: errno.ENOSPC,
    AbortCode.ROFS: errno.EROFS,
    AbortCode.MLINK: errno.EMLINK,
    AbortCode.DEADLK: errno.EDEADLK,
    AbortCode.NAMETOOLONG: errno.ENAMETOOLONG,
    AbortCode.NOLCK: errno.ENOLCK,
    AbortCode.NOTEMPTY: errno.ENOTEMPTY,
    AbortCode.LOOP: errno.ELOOP,
    AbortCode.NODATA: errno.ENODATA,
    AbortCode.NOTSUP: errno.EOPNOTSUPP,
    AbortCode.DQUOT: errno.EDQUOT,
    AbortCode.XATTR_TOO_BIG: errno.E2BIG,
    AbortCode.KEYEXPIRED: errno.EKEYEXPIRED,
    AbortCode.KEYREVOKED: errno.EKEYREVOKED,
    AbortCode.KEYREJECTED: errno.EKEYREJECTED,
    AbortCode.CHANGED: errno.EBUSY,
    AbortCode.UNKNOWN_METHOD: errno.EOPNOTSUPP,
    AbortCode.BAD_MESSAGE: errno.EINVAL,
    AbortCode.BAD_VERSION: errno.EPROTONOSUPPORT,
    AbortCode.NOT_INTRODUCED: errno.EPROTO,
    AbortCode.NO_CALLBACKS: errno.EPROTO,
    AbortCode.SHUTTING_DOWN: errno.ESHUTDOWN,
    AbortCode.TOO_MANY: errno.EAGAIN,
    AbortCode.INTERNAL: errno.EIO,
}

_CODE: dict[int, AbortCode] = {number: code for code, number in reversed(_ERRNO.items())}
_CODE[errno.EOPNOTSUPP] = AbortCode.NOTSUP
_CODE[errno.EIO] = AbortCode.IO
_CODE[errno.EINVAL] = AbortCode.INVAL


class Aborted(Exception):
    """The peer refused the call: an expected outcome, not a fault."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        name = name_of(self.code)
        return f"{name}: {self.message}" if self.message else name

    @property
    def errno(self) -> int:
        return errno_of(self.code)


def name_of(code: int) -> str:
    """What a code is called; "abort N" for one of a newer peer's."""
    try:
        return AbortCode(code).name
    except ValueError:
        return f"abort {code}"


def errno_of(code: int) -> int:
    """The errno for an abort code; EIO for a code of a newer peer's that is not known here."""
    try:
        return _ERRNO[AbortCode(code)]
    except ValueError:
        return errno.EIO


def code_of(number: int) -> AbortCode:
    """The abort code for an errno of the server's own store; IO for one that has none."""
    return _CODE.get(number, AbortCode.IO)
