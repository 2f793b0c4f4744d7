"""Failures an application or a person sees."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit status of `promisefs`; documented in the README. 2 is click's, for wrong usage."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    MOUNTPOINT = 3  # missing, not a directory, not empty, or not a promisefs mount
    SERVER = 4  # not reachable, no such volume, or it speaks another protocol
    FUSE = 5  # no /dev/fuse, no fusermount3, or the kernel refused the mount
    BUSY = 6  # the mount is in use, or holds data that cannot be stored


class UserError(Exception):
    """Something for the person at the keyboard: one line that says what to do, and an exit code."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILURE) -> None:
        super().__init__(message)
        self.code = code


class FsError(Exception):
    """An operation fails with this errno."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


class ServerUnavailable(Exception):
    """The server did not answer before the deadline; whether it carried the call out is not known."""
