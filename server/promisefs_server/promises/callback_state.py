"""Promises saved between a clean shutdown and the next start, so that a planned restart costs clients nothing.

The file: MAGIC, SHA-256 of the rest, then msgpack of

    [server uuid, how often the server had been started, nanoseconds since the epoch,
     [[host uuid, stale, in doubt, past unknown, vnode keys, seconds left, recalled vnode keys, locks], ...]]

where keys are arrays of big-endian 64 bit numbers, and seconds of as many 32 bit numbers. It is used at most once:
whoever loads it deletes it first, and it counts only if it was written by the very run before. The time between is not
taken off the promises: the wall clock may have been set meanwhile, and to keep one for too long does no harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgpack
from promisefs_protocol.fields import FieldError

from promisefs_server.store.syncing import sync_path

log = logging.getLogger(__name__)

STATE_NAME = "callback-state"
MAGIC = b"promisefs callback state 3\n"
MAX_AGE_S = 30 * 60
MAX_STATE_BYTES = 256 << 20


class SavedHost(NamedTuple):
    uuid: bytes
    stale: bool
    in_doubt: bool
    """Stale, and its lease had not ended."""
    unknown: bool
    """`Host.past_unknown`."""
    promises: list[tuple[int, int]]
    """(vnode key, seconds left when it was saved); none of a stale host."""
    recalled: list[int]
    """`Host.recalled`."""
    locks: bool
    """It held locks, or may have."""


def save(path: Path, server: bytes, starts: int, now_ns: int, hosts: Iterable[SavedHost]) -> None:
    """Write the file durably. Raise OSError."""
    packed_hosts = []
    for host in hosts:
        keys = _packed("Q", [key for key, _ in host.promises])
        seconds = _packed("I", [left for _, left in host.promises])
        packed_hosts.append(
            [host.uuid, host.stale, host.in_doubt, host.unknown, keys, seconds, _packed("Q", host.recalled), host.locks]
        )
    body = msgpack.packb([server, starts, now_ns, packed_hosts])
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "wb") as file:
        file.write(MAGIC + hashlib.sha256(body).digest() + body)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def forget(folder: Path) -> None:
    """Delete saved promises, durably: at the next start every host is stale, and is told. Raise OSError."""
    (folder / STATE_NAME).unlink(missing_ok=True)
    sync_path(folder)


def take(path: Path, server: bytes, starts: int, now_ns: int) -> list[SavedHost] | None:
    """Load the hosts that run number `starts` of this server saved, and delete the file, whatever it is.

    Return None, having logged why, if it cannot be used.
    """
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_STATE_BYTES else b""
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("saved promises are not used: %s", error)
        return None
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    try:
        return _checked(content, server, starts, now_ns)
    except FieldError as error:
        log.warning("saved promises are not used: %s", error)
        return None


def _checked(content: bytes, server: bytes, starts: int, now_ns: int) -> list[SavedHost]:
    digest_end = len(MAGIC) + 32
    body = content[digest_end:]
    if not content.startswith(MAGIC) or content[len(MAGIC) : digest_end] != hashlib.sha256(body).digest():
        raise FieldError(f"{STATE_NAME} is damaged")
    saved_server, saved_starts, saved_ns, packed_hosts = msgpack.unpackb(body, max_bin_len=MAX_STATE_BYTES)
    if saved_server != server or saved_starts != starts:
        raise FieldError("they are not from the run before this one")
    age_s = (now_ns - saved_ns) // 1_000_000_000
    if not 0 <= age_s < MAX_AGE_S:
        raise FieldError(f"they are {age_s} s old; the limit is {MAX_AGE_S}")
    hosts = []
    for uuid, stale, in_doubt, unknown, keys, seconds, recalled, locks in packed_hosts:
        promises = list(zip(_unpacked("Q", keys), _unpacked("I", seconds), strict=True))
        hosts.append(SavedHost(uuid, stale, in_doubt, unknown, promises, list(_unpacked("Q", recalled)), locks))
    return hosts


def _packed(code: str, numbers: list[int]) -> bytes:
    packed = array(code, numbers)
    if sys.byteorder == "little":
        packed.byteswap()
    return packed.tobytes()


def _unpacked(code: str, packed: bytes) -> array[int]:
    numbers: array[int] = array(code)
    numbers.frombytes(packed)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers
