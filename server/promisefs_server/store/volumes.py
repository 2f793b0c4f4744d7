"""Volumes: what they are called, where they begin, what becomes of them, and numbers for new vnodes.

A volume's number is `N << SERVER_BITS | k`: N is the number of the server that made it, k counts up there. So numbers
are unique in a cell without anybody's being asked, also after a move.

Invariants
I1  Only volumes that are HERE are served; `get` and `by_name` return no others.
I2  Rows and data files of a volume that is neither HERE nor LEAVING are worth nothing: whoever finds them deletes them
    (`volume_remains`).
I3  The row of a volume that has arrived is kept, whatever becomes of it, so a move that is taken up again knows.
I4  In memory is what is committed: each change is a transaction of its own, and memory follows it.
"""

from __future__ import annotations

import enum
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import is_volume_name

from promisefs_server.access.acl import NEW_VOLUME

from .acls import number_of
from .database import Database

VNODE_BITS = 40
VNODE_MASK = (1 << VNODE_BITS) - 1
SERVER_BITS = 16
MAX_VOLUMES = (1 << SERVER_BITS) - 1
"""Volumes that one server can make in its life."""
RESERVED_VNODES = 4096
"""Numbers taken from the store at a time, so that not every new file writes the volume's row. A crash skips some."""

ROOT_VOLUME_NAME = "root"
ROOT_VNODE = 1
DIRECTORY_SIZE_BYTES = 4096

_COLUMNS = "volume, name, root, next_vnode, incarnation, state, other_store, other_number, quota, read_only"


class VolumeState(enum.StrEnum):
    HERE = "here"
    """Served."""
    REMOVED = "removed"
    ARRIVING = "arriving"
    """Being copied from `other_store`. It is not known here yet: a start deletes what there is of it."""
    LEAVING = "leaving"
    """The copy in `other_store` is whole and about to be served there, or is already."""
    MOVED = "moved"
    """Served by `other_store`, or by whom that one says."""


LIVE = (VolumeState.HERE, VolumeState.LEAVING)
"""Whose names are taken, and whose rows are worth something (I2)."""


@dataclass(slots=True)
class Volume:
    volume: int
    name: str
    root: int
    incarnation: int
    next_vnode: int
    reserved_below: int
    state: VolumeState = VolumeState.HERE
    other_store: bytes | None = None
    other_number: int | None = None
    quota_bytes: int = 0
    """The most that `VolumeTable.usage` may grow to; 0: no bound."""
    read_only: bool = False

    @property
    def keys(self) -> tuple[int, int]:
        """The first and last vnode key that can belong to it."""
        return self.volume << VNODE_BITS, self.volume << VNODE_BITS | VNODE_MASK


class VolumeTable:
    """All volumes that are or were here, in memory."""

    def __init__(self, database: Database, server: int) -> None:
        self._database = database
        self._server = server
        self._by_number: dict[int, Volume] = {}
        for number, name, root, next_vnode, incarnation, state, other, other_number, quota, read_only in database.rows(
            f"SELECT {_COLUMNS} FROM volumes"
        ):
            self._by_number[number] = Volume(
                number,
                name,
                root,
                incarnation,
                next_vnode,
                next_vnode,
                VolumeState(state),
                other,
                other_number,
                quota,
                bool(read_only),
            )

    # Reading

    def get(self, number: int) -> Volume:
        """The volume, which is here. Abort VNOVOL or VMOVED."""
        volume = self._by_number.get(number)
        if volume is not None and volume.state is VolumeState.HERE:
            return volume
        if volume is None or volume.state in (VolumeState.REMOVED, VolumeState.ARRIVING):
            raise Aborted(AbortCode.VNOVOL, f"no volume {number} here")
        raise Aborted(AbortCode.VMOVED, f"volume {number} has moved to server {volume.other_number}")

    def by_name(self, name: str) -> Volume:
        """The volume, which is here. Abort VNOVOL."""
        for volume in self.in_state(VolumeState.HERE):
            if volume.name == name:
                return volume
        raise Aborted(AbortCode.VNOVOL, f"no volume {name!r} here")

    def record(self, number: int) -> Volume | None:
        """What is known of a volume, in whatever state."""
        return self._by_number.get(number)

    def in_state(self, *states: VolumeState) -> list[Volume]:
        """In the order of their numbers."""
        return [volume for _, volume in sorted(self._by_number.items()) if volume.state in states]

    # Numbers for new vnodes

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

    # Changing; a transaction each

    def create(self, name: str, uid: int, gid: int, now_ns: int) -> Volume:
        """Make a volume with an empty root directory. Abort INVAL, EXIST, NOSPC."""
        self._check_new_name(name)
        ((count,),) = self._database.rows("SELECT next_volume FROM store")
        if count > MAX_VOLUMES:
            raise Aborted(AbortCode.NOSPC, f"this server has made {MAX_VOLUMES} volumes, and no number is used twice")
        with self._database.transaction():
            volume = insert_volume(self._database, self._server << SERVER_BITS | count, name, uid, gid, now_ns)
            self._database.execute("UPDATE store SET next_volume = ?", (count + 1,))
        self._by_number[volume.volume] = volume
        return volume

    def rename(self, name: str, new_name: str) -> Volume:
        """Abort VNOVOL, PERM, INVAL, EXIST."""
        volume = self.by_name(name)
        _check_not_root(volume, "renamed")
        if new_name != name:
            self._check_new_name(new_name)
            with self._database.transaction():
                self._database.execute("UPDATE volumes SET name = ? WHERE volume = ?", (new_name, volume.volume))
            volume.name = new_name
        return volume

    def remove(self, name: str) -> Volume:
        """From now on it is not there; what is left of it can be deleted (I2). Abort VNOVOL, PERM."""
        volume = self.by_name(name)
        _check_not_root(volume, "removed")
        self.set_state(volume, VolumeState.REMOVED)
        return volume

    def usage_bytes(self, number: int) -> int:
        """What a volume takes: the sizes of all that is in it, and 1024 for each."""
        found = self._database.execute("SELECT bytes FROM usage WHERE volume = ?", (number,)).fetchone()
        return int(found[0]) if found else 0

    def check_quota(self, number: int, growth_bytes: int) -> None:
        """Abort DQUOT if a volume may not grow so much: before something is done that the transaction cannot undo."""
        quota = self.get(number).quota_bytes
        if growth_bytes > 0 and quota and self.usage_bytes(number) + growth_bytes > quota:
            raise Aborted(AbortCode.DQUOT, "the volume's quota is used up")

    def check_writable(self, number: int) -> None:
        """Abort ROFS; whether the volume is here at all is for others to say."""
        volume = self._by_number.get(number)
        if volume is not None and volume.read_only:
            raise Aborted(AbortCode.ROFS, f"volume {volume.name} is read-only")

    def set_quota(self, name: str, quota_bytes: int) -> Volume:
        """0: no bound. It may be less than what is used: then nothing grows. Abort VNOVOL."""
        volume = self.by_name(name)
        with self._database.transaction():
            self._database.execute("UPDATE volumes SET quota = ? WHERE volume = ?", (quota_bytes, volume.volume))
        volume.quota_bytes = quota_bytes
        return volume

    def set_read_only(self, name: str, read_only: bool) -> Volume:
        """Abort VNOVOL."""
        volume = self.by_name(name)
        with self._database.transaction():
            self._database.execute("UPDATE volumes SET read_only = ? WHERE volume = ?", (read_only, volume.volume))
        volume.read_only = read_only
        return volume

    def set_state(
        self, volume: Volume, state: VolumeState, other_store: bytes | None = None, other_number: int | None = None
    ) -> None:
        with self._database.transaction():
            self._database.execute(
                "UPDATE volumes SET state = ?, other_store = ?, other_number = ? WHERE volume = ?",
                (state, other_store, other_number, volume.volume),
            )
        volume.state, volume.other_store, volume.other_number = state, other_store, other_number

    def expect(self, volume: Volume) -> None:
        """Note a volume that is ARRIVING, in place of what was known of it."""
        assert volume.state is VolumeState.ARRIVING
        row = (
            volume.volume, volume.name, volume.root, volume.next_vnode, volume.incarnation, volume.state,
            volume.other_store, volume.other_number, volume.quota_bytes, volume.read_only,
        )  # fmt: skip
        with self._database.transaction():
            self._database.execute(
                f"INSERT OR REPLACE INTO volumes ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row
            )
        self._by_number[volume.volume] = volume

    def forget(self, volume: Volume) -> None:
        """It did not arrive."""
        assert volume.state is VolumeState.ARRIVING
        with self._database.transaction():
            self._database.execute("DELETE FROM volumes WHERE volume = ?", (volume.volume,))
        del self._by_number[volume.volume]

    def _check_new_name(self, name: str) -> None:
        if not is_volume_name(name):
            raise Aborted(AbortCode.INVAL, f"{name!r}: a name has 1 to 64 letters, digits, '.', '_' and '-'")
        if name == ROOT_VOLUME_NAME:
            raise Aborted(AbortCode.INVAL, "the root volume is made with the store of the cell's first server")
        check_free(name, self.in_state(*LIVE))

    def check_invariants(self) -> None:
        """Assert I4, and that the usage is what there is."""
        counted = "SELECT vnode >> 40, sum(size + 1024) FROM vnodes GROUP BY 1 EXCEPT SELECT volume, bytes FROM usage"
        assert not self._database.rows(counted), "usage"
        rows = {
            row[0]: row[1:]
            for row in self._database.rows("SELECT volume, name, root, state, incarnation, next_vnode FROM volumes")
        }
        there = {v.volume: (v.name, v.root, v.state, v.incarnation, v.reserved_below) for v in self._by_number.values()}
        assert rows == there, "I4"
        assert all(v.next_vnode <= v.reserved_below for v in self._by_number.values())


def check_free(name: str, volumes: Iterable[Volume]) -> None:
    """Abort EXIST if one of the volumes has the name."""
    for volume in volumes:
        if volume.name == name:
            raise Aborted(AbortCode.EXIST, f"there is a volume {name!r} already, number {volume.volume}")


def _check_not_root(volume: Volume, what: str) -> None:
    if volume.name == ROOT_VOLUME_NAME:
        raise Aborted(AbortCode.PERM, f"the root volume cannot be {what}")


def insert_volume(database: Database, number: int, name: str, uid: int, gid: int, now_ns: int) -> Volume:
    """Insert a volume with an empty root directory. Within a transaction."""
    root = number << VNODE_BITS | ROOT_VNODE
    volume = Volume(number, name, root, 1, ROOT_VNODE + 1, ROOT_VNODE + 1)
    database.execute(
        f"INSERT INTO volumes ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, NULL, NULL, 0, 0)",
        (number, name, root, volume.next_vnode, volume.incarnation, volume.state),
    )
    database.execute(
        "INSERT INTO vnodes (vnode, uniquifier, mode, uid, gid, nlink, size, sparse, data_version,"
        " atime_ns, mtime_ns, ctime_ns, xattr_count, parent, acl, target)"
        " VALUES (?, ?, ?, ?, ?, 2, ?, 0, 1, ?, ?, ?, 0, ?, ?, NULL)",
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
            number_of(database, NEW_VOLUME),
        ),
    )
    return volume
