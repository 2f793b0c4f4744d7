"""Identifiers and the status of a vnode, as they travel and as both sides keep them."""

from __future__ import annotations

import re
import stat
from typing import Annotated, NamedTuple

from .fields import int_range, length_range
from .rights import RightsBits

MAX_NAME_BYTES = 255
"""Longest name of a directory entry; Linux NAME_MAX."""

MAX_SYMLINK_BYTES = 4095
"""Longest symlink target; Linux PATH_MAX less the NUL."""

MAX_XATTR_NAME_BYTES = 255
MAX_XATTR_VALUE_BYTES = 65536
"""Linux XATTR_NAME_MAX and XATTR_SIZE_MAX."""

MAX_FILE_BYTES = 2**63 - 1

S_IFMNT = 0o160000
"""Type bits of a mount point, in `Status.mode`: a value that st_mode does not use."""

_VOLUME_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

U32 = Annotated[int, int_range(0, 2**32 - 1)]
U64 = Annotated[int, int_range(0, 2**64 - 1)]
Mode = Annotated[int, int_range(0, 0o177777)]
"""st_mode: type bits (S_IFMT) and twelve permission bits."""
Size = Annotated[int, int_range(0, MAX_FILE_BYTES)]
"""Offset or size in a file, in bytes."""
TimeNs = Annotated[int, int_range(-(2**63), 2**63 - 1)]
"""Nanoseconds since the epoch."""
Uuid = Annotated[bytes, length_range(16, 16)]


def is_volume_name(name: str) -> bool:
    """Whether a volume can have this name: 1 to 64 letters, digits, '.', '_' and '-'."""
    return _VOLUME_NAME.fullmatch(name) is not None


class Fid(NamedTuple):
    """Names one vnode in a cell: volume, number in the volume, uniquifier.

    Vnode numbers are never used twice in a volume; the uniquifier guards against
    forged and mistaken fids.
    """

    volume: Annotated[int, int_range(1, 2**23 - 1)]
    vnode: Annotated[int, int_range(1, 2**40 - 1)]
    uniquifier: U32

    def __str__(self) -> str:
        return f"{self.volume}.{self.vnode}.{self.uniquifier}"


class Status(NamedTuple):
    """What a server says about one vnode (AFSFetchStatus).

    Two statuses of one fid are ordered by `ctime_ns`, which the server makes strictly
    greater at every change. Data is the same iff `incarnation` and `data_version` are.
    """

    mode: Mode
    uid: U32
    gid: U32
    nlink: U32
    size: Size
    allocated: Size  # bytes on disk; less than size if the file has holes
    data_version: U64  # of the bytes, the names or the symlink target; +1 at each change
    incarnation: U64  # of the volume; bumped after an unclean start of the server
    atime_ns: TimeNs
    mtime_ns: TimeNs
    ctime_ns: TimeNs
    xattr_count: U32

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_mount_point(self) -> bool:
        """It stands for the root of a volume; its data is that one's name."""
        return stat.S_IFMT(self.mode) == S_IFMNT

    @property
    def version(self) -> tuple[int, int]:
        """What must be equal for cached data to be current."""
        return (self.incarnation, self.data_version)


class PromisedStatus(NamedTuple):
    """A status with the server's promise to tell before it goes stale.

    `promise_s` counts from when the client *sent* the call; 0 means no promise. The promise covers the rights, too: the
    caller's, and those that everybody has.
    """

    fid: Fid
    status: Status
    promise_s: U32
    rights: RightsBits = 0  # with SUPERUSER and OWNER
    rights_of_anyone: RightsBits = 0
