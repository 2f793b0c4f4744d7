"""One reject: bytes of a file that could not be stored, and what is known of them. Core: no I/O.

In the quarantine each is a file of its own: a line that names the format, a line of JSON, then the bytes of its ranges
one after the other. Rejects of one event, which a large file may have thousands of, share their `event`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

MAGIC = b"promisefs reject 1\n"
MAX_HEADER_BYTES = 16 << 20


class NoReject(Exception):
    """A file that is no reject, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Reject:
    event: str
    source: str
    """What was mounted."""
    path: str
    """From the root of the mount, as far as it was known; "?" stands for what was not."""
    fid: str
    ino: int
    uid: int
    """Whose: the user as whom it was written."""
    at_ns: int
    errno: int
    why: str
    data_version: int
    mtime_ns: int
    """Both the file's at the server, when the bytes were refused, as far as it was known."""
    ranges: tuple[tuple[int, int], ...]
    """(offset, length), ascending."""

    @property
    def size_bytes(self) -> int:
        return sum(length for _, length in self.ranges)

    @property
    def end(self) -> int:
        offset, length = self.ranges[-1]
        return offset + length

    @property
    def error(self) -> str:
        return os.strerror(self.errno)


_FIELDS = tuple(name for name in Reject.__dataclass_fields__ if name != "ranges")


def encode_header(reject: Reject) -> bytes:
    """What comes before the bytes."""
    fields = {name: getattr(reject, name) for name in _FIELDS}
    return MAGIC + json.dumps({**fields, "ranges": reject.ranges}).encode("ascii") + b"\n"


def decode_header(line: bytes) -> Reject:
    """The line after MAGIC. Raise NoReject."""
    try:
        fields = json.loads(line)
        ranges = tuple((int(offset), int(length)) for offset, length in fields.pop("ranges"))
        reject = Reject(ranges=ranges, **fields)
        for name in _FIELDS:
            if type(getattr(reject, name)).__name__ != Reject.__annotations__[name]:
                raise NoReject(f"{name} is no {Reject.__annotations__[name]}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NoReject(str(error)) from None
    end = 0
    for offset, length in ranges:
        if offset < end or length <= 0:
            raise NoReject("its ranges are not in order")
        end = offset + length
    if not ranges:
        raise NoReject("it has no ranges")
    return reject
