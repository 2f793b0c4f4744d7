"""Volumes: what they are called, where they begin, and numbers for new vnodes."""

from __future__ import annotations

import secrets
import stat
from dataclasses import dataclass

from promisefs_protocol.abort import AbortCode, Aborted

from .database import Database

VNODE_BITS = 40
VNODE_MASK = (1 << VNODE_BITS) - 1
RESERVED_VNODES = 4096
"""Numbers taken from the store at a time, so that not every new file writes the volume's row. A crash skips some."""

ROOT_VOLUME = 1
ROOT_VOLUME_NAME = "root"
ROOT_VNODE = 1
DIRECTORY_SIZE_BYTES = 4096


@dataclass(slots=True)
class Volume:
    volume: int
    name: str
    root: int
    incarnation: int
    next_vnode: int
    reserved_below: int


class VolumeTable:
    """All volumes, in memory; there are few."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._by_number: dict[int, Volume] = {}
        for number, name, root, next_vnode, incarnation in database.rows(
            "SELECT volume, name, root, next_vnode, incarnation FROM volumes"
        ):
            self._by_number[number] = Volume(number, name, root, incarnation, next_vnode, next_vnode)

    def get(self, number: int) -> Volume:
        volume = self._by_number.get(number)
        if volume is None:
            raise Aborted(AbortCode.VNOVOL, f"no volume {number} here")
        return volume

    def by_name(self, name: str) -> Volume:
        for volume in self._by_number.values():
            if volume.name == name:
                return volume
        raise Aborted(AbortCode.VNOVOL, f"no volume {name!r} here")

    def reserve(self, number: int) -> None:
        """See to it that `new_key` has a number. A transaction of its own now and then, so call it outside of any."""
        volume = self.get(number)
        if volume.next_vnode < volume.reserved_below:
            return
        below = volume.next_vnode + RESERVED_VNODES
        if below > VNODE_MASK:
            raise Aborted(AbortCode.NOSPC, f"volume {volume.name} has used all its vnode numbers")
        with self._database.transaction():
            self._database.execute("UPDATE volumes SET next_vnode = ? WHERE volume = ?", (below, number))
        volume.reserved_below = below

    def new_key(self, number: int) -> int:
        """A vnode key never used before; `reserve` must have been called."""
        volume = self._by_number[number]
        assert volume.next_vnode < volume.reserved_below
        key = number << VNODE_BITS | volume.next_vnode
        volume.next_vnode += 1
        return key


def make_root_volume(database: Database, uid: int, gid: int, now_ns: int) -> None:
    """Insert volume 1, "root", with an empty root directory. Within a transaction."""
    root = ROOT_VOLUME << VNODE_BITS | ROOT_VNODE
    database.execute(
        "INSERT INTO volumes (volume, name, root, next_vnode, incarnation) VALUES (?, ?, ?, ?, 1)",
        (ROOT_VOLUME, ROOT_VOLUME_NAME, root, ROOT_VNODE + 1),
    )
    database.execute(
        "INSERT INTO vnodes (vnode, uniquifier, mode, uid, gid, nlink, size, sparse, data_version,"
        " atime_ns, mtime_ns, ctime_ns, xattr_count, parent, target)"
        " VALUES (?, ?, ?, ?, ?, 2, ?, 0, 1, ?, ?, ?, 0, ?, NULL)",
        (
            root,
            secrets.randbits(32),
            stat.S_IFDIR | 0o755,
            uid,
            gid,
            DIRECTORY_SIZE_BYTES,
            now_ns,
            now_ns,
            now_ns,
            root,
        ),
    )
