"""Names: looking them up, listing them, and every change of them, with the checks of POSIX.

Every method that changes something runs within a transaction of the caller's and returns the rows as they are after
it. Each change of a directory's names raises its data version by exactly one, also when a rename within one
directory changes two of them. No method's cost depends on how many names a directory has.
"""

from __future__ import annotations

import stat
from typing import NamedTuple

from promisefs_protocol.abort import AbortCode, Aborted

from .database import Database
from .places import Places
from .vnodes import COLUMNS, Vnode, VnodeTable
from .volumes import DIRECTORY_SIZE_BYTES

MAX_LINKS = 2**31
"""Names of one file, or subdirectories of one directory."""

_LOOKUP = "SELECT vnode FROM entries WHERE directory = ? AND name = ?"
_PAGE = (
    f"SELECT name, {', '.join('v.' + c.strip() for c in COLUMNS.split(','))}"
    " FROM entries JOIN vnodes AS v USING (vnode) WHERE directory = ? AND name > ? ORDER BY name LIMIT ?"
)


class Removed(NamedTuple):
    directory: Vnode
    entry: Vnode
    """As it is without the name; its row is still there, also with nlink 0."""


class Renamed(NamedTuple):
    old_directory: Vnode
    new_directory: Vnode
    moved: Vnode
    replaced: Vnode | None
    """A file with nlink 0 still has its row; a directory that was replaced has none."""

    changed: bool
    """False if both names stood for the same file: nothing was done."""


class Directories:
    def __init__(self, database: Database, vnodes: VnodeTable) -> None:
        self._database = database
        self._vnodes = vnodes
        self.places = Places(database)

    # Reading

    def lookup(self, directory: Vnode, name: bytes) -> Vnode | None:
        row = self._database.execute(_LOOKUP, (directory.key, name)).fetchone()
        return None if row is None else self._vnodes.find(row[0])

    def page(self, directory: Vnode, after: bytes, limit: int) -> list[tuple[bytes, Vnode]]:
        rows = self._database.execute(_PAGE, (directory.key, after, limit)).fetchall()
        return [(row[0], Vnode._make(row[1:])) for row in rows]

    def keys_of_files(self, directory: Vnode, after: bytes, limit: int) -> list[tuple[bytes, int]]:
        """Names after `after`, and the vnodes that they stand for."""
        return self._database.rows(
            "SELECT name, vnode FROM entries WHERE directory = ? AND name > ? ORDER BY name LIMIT ?",
            (directory.key, after, limit),
        )

    def _existing(self, directory: Vnode, name: bytes) -> Vnode:
        vnode = self.lookup(directory, name)
        if vnode is None:
            raise Aborted(AbortCode.NOENT, f"no such name in {directory.fid}")
        return vnode

    def _is_empty(self, directory: Vnode) -> bool:
        row = self._database.execute("SELECT 1 FROM entries WHERE directory = ? LIMIT 1", (directory.key,))
        return row.fetchone() is None

    def _is_within(self, directory: Vnode, ancestor: Vnode) -> bool:
        """Whether `directory` is `ancestor` or somewhere below it."""
        key = directory.key
        while key != ancestor.key:
            row = self._database.execute("SELECT parent FROM vnodes WHERE vnode = ?", (key,)).fetchone()
            if row is None or row[0] == key:
                return False
            key = row[0]
        return True

    # Changing one directory

    def _check_free(self, directory: Vnode, name: bytes) -> None:
        if self._database.execute(_LOOKUP, (directory.key, name)).fetchone() is not None:
            raise Aborted(AbortCode.EXIST, f"the name exists in {directory.fid}")

    def _insert_name(self, directory: Vnode, name: bytes, key: int) -> None:
        self._database.execute("INSERT INTO entries VALUES (?, ?, ?)", (directory.key, name, key))

    def _delete_name(self, directory: Vnode, name: bytes) -> None:
        self._database.execute("DELETE FROM entries WHERE directory = ? AND name = ?", (directory.key, name))

    def _names_changed(self, directory: Vnode, subdirectories: int, now_ns: int) -> Vnode:
        """Write the directory's row after a change of its names that brought so many subdirectories more."""
        if directory.nlink + subdirectories > MAX_LINKS:
            raise Aborted(AbortCode.MLINK, f"too many directories in {directory.fid}")
        changed = directory._replace(
            nlink=directory.nlink + subdirectories,
            data_version=directory.data_version + 1,
            mtime_ns=now_ns,
            ctime_ns=directory.later(now_ns),
        )
        self._vnodes.update(changed)
        return changed

    def create(
        self, directory: Vnode, name: bytes, mode: int, uid: int, gid: int, target: bytes | None, now_ns: int
    ) -> tuple[Vnode, Vnode]:
        """Make a vnode of whatever type with its first name. Return (directory, entry). Abort EXIST, MLINK."""
        self._check_free(directory, name)
        is_dir = stat.S_ISDIR(mode)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            if is_dir:
                mode |= stat.S_ISGID
        nlink, size, acl = (2, DIRECTORY_SIZE_BYTES, directory.acl) if is_dir else (1, len(target or b""), 0)
        entry = self._vnodes.insert(directory.volume, mode, uid, gid, nlink, size, directory.key, acl, target, now_ns)
        self._insert_name(directory, name, entry.key)
        return self._names_changed(directory, int(is_dir), now_ns), entry

    def link(self, directory: Vnode, name: bytes, vnode: Vnode, now_ns: int) -> tuple[Vnode, Vnode]:
        """Give a file another name. Return (directory, file). Abort PERM, NOENT, MLINK, EXIST."""
        assert vnode.volume == directory.volume
        if vnode.is_dir or vnode.is_mount_point:
            raise Aborted(AbortCode.PERM, "directories and mount points have one name")
        if vnode.nlink == 0:
            raise Aborted(AbortCode.NOENT, f"{vnode.fid} has lost its last name")
        if vnode.nlink >= MAX_LINKS:
            raise Aborted(AbortCode.MLINK, f"{vnode.fid} has too many names")
        self._check_free(directory, name)
        self._insert_name(directory, name, vnode.key)
        self.places.added(vnode, directory.key)
        linked = vnode._replace(nlink=vnode.nlink + 1, ctime_ns=vnode.later(now_ns))
        self._vnodes.update(linked)
        return self._names_changed(directory, 0, now_ns), linked

    def remove_file(self, directory: Vnode, name: bytes, now_ns: int) -> Removed:
        """Abort NOENT, ISDIR, BUSY."""
        entry = self._existing(directory, name)
        _check_not_mount_point(entry)
        if entry.is_dir:
            raise Aborted(AbortCode.ISDIR, "it is a directory")
        self._delete_name(directory, name)
        return Removed(self._names_changed(directory, 0, now_ns), self._one_name_less(entry, directory, now_ns))

    def remove_mount_point(self, directory: Vnode, name: bytes, now_ns: int) -> Removed:
        """Abort NOENT, INVAL. Its row is gone: it cannot be open anywhere."""
        entry = self._existing(directory, name)
        if not entry.is_mount_point:
            raise Aborted(AbortCode.INVAL, "it is not a mount point")
        self._delete_name(directory, name)
        self._vnodes.delete(entry.key)
        gone = entry._replace(nlink=0, ctime_ns=entry.later(now_ns))
        return Removed(self._names_changed(directory, 0, now_ns), gone)

    def _one_name_less(self, vnode: Vnode, directory: Vnode, now_ns: int) -> Vnode:
        unlinked = vnode._replace(
            nlink=vnode.nlink - 1,
            ctime_ns=vnode.later(now_ns),
            parent=self.places.removed(vnode, directory.key),
            acl=directory.acl if vnode.nlink == 1 else 0,
        )
        self._vnodes.update(unlinked)
        return unlinked

    def remove_dir(self, directory: Vnode, name: bytes, now_ns: int) -> Removed:
        """Abort NOENT, NOTDIR, NOTEMPTY, BUSY."""
        entry = self._existing(directory, name)
        _check_not_mount_point(entry)
        if not entry.is_dir:
            raise Aborted(AbortCode.NOTDIR, "it is not a directory")
        if not self._is_empty(entry):
            raise Aborted(AbortCode.NOTEMPTY, "the directory is not empty")
        self._delete_name(directory, name)
        self._vnodes.delete(entry.key)
        gone = entry._replace(nlink=0, ctime_ns=entry.later(now_ns))
        return Removed(self._names_changed(directory, -1, now_ns), gone)

    # Changing two

    def rename(
        self, old_directory: Vnode, old_name: bytes, new_directory: Vnode, new_name: bytes,
        *, noreplace: bool, exchange: bool, now_ns: int,
    ) -> Renamed:  # fmt: skip
        """renameat2(2). Abort NOENT, EXIST, ISDIR, NOTDIR, NOTEMPTY, INVAL, BUSY, MLINK."""
        assert old_directory.volume == new_directory.volume
        if noreplace and exchange:
            raise Aborted(AbortCode.INVAL, "NOREPLACE and EXCHANGE exclude each other")
        moved = self._existing(old_directory, old_name)
        replaced = self.lookup(new_directory, new_name)
        if replaced is None and exchange:
            raise Aborted(AbortCode.NOENT, "there is nothing to exchange with")
        if replaced is not None and noreplace:
            raise Aborted(AbortCode.EXIST, "the new name exists")
        if moved.is_dir and self._is_within(new_directory, moved):
            raise Aborted(AbortCode.INVAL, "a directory cannot be moved below itself")
        if replaced is not None and replaced.key == moved.key:
            return Renamed(old_directory, new_directory, moved, None, False)
        if replaced is not None:
            _check_not_mount_point(replaced)
        if exchange:
            assert replaced is not None
            _check_not_mount_point(moved)
            if replaced.is_dir and self._is_within(old_directory, replaced):
                raise Aborted(AbortCode.INVAL, "a directory cannot be moved below itself")
        elif replaced is not None:
            self._check_replaceable(moved, replaced)
        return self._carry_out(old_directory, old_name, new_directory, new_name, moved, replaced, exchange, now_ns)

    def _check_replaceable(self, moved: Vnode, replaced: Vnode) -> None:
        # Whoever renames a mount point sees a directory.
        looks_like_dir = moved.is_dir or moved.is_mount_point
        if replaced.is_dir:
            if not looks_like_dir:
                raise Aborted(AbortCode.ISDIR, "the new name is a directory")
            if not self._is_empty(replaced):
                raise Aborted(AbortCode.NOTEMPTY, "the directory is not empty")
        elif looks_like_dir:
            raise Aborted(AbortCode.NOTDIR, "the new name is not a directory")

    def _carry_out(
        self, old_directory: Vnode, old_name: bytes, new_directory: Vnode, new_name: bytes,
        moved: Vnode, replaced: Vnode | None, exchange: bool, now_ns: int,
    ) -> Renamed:  # fmt: skip
        point = "UPDATE entries SET vnode = ? WHERE directory = ? AND name = ?"
        if replaced is None:
            self._insert_name(new_directory, new_name, moved.key)
        else:
            self._database.execute(point, (moved.key, new_directory.key, new_name))
        if exchange:
            assert replaced is not None
            self._database.execute(point, (replaced.key, old_directory.key, old_name))
        else:
            self._delete_name(old_directory, old_name)

        moved_dirs, replaced_dirs = int(moved.is_dir), int(replaced is not None and replaced.is_dir)
        more_in_old = (replaced_dirs if exchange else 0) - moved_dirs
        more_in_new = moved_dirs - replaced_dirs
        if old_directory.key == new_directory.key:
            old_after = new_after = self._names_changed(old_directory, more_in_old + more_in_new, now_ns)
        else:
            old_after = self._names_changed(old_directory, more_in_old, now_ns)
            new_after = self._names_changed(new_directory, more_in_new, now_ns)

        moved = self._moved_to(moved, old_directory, new_directory, now_ns)
        if replaced is not None:
            if exchange:
                replaced = self._moved_to(replaced, new_directory, old_directory, now_ns)
            elif replaced.is_dir:
                self._vnodes.delete(replaced.key)
                replaced = replaced._replace(nlink=0, ctime_ns=replaced.later(now_ns))
            else:
                replaced = self._one_name_less(replaced, new_directory, now_ns)
        return Renamed(old_after, new_after, moved, replaced, True)

    def _moved_to(self, vnode: Vnode, old: Vnode, new: Vnode, now_ns: int) -> Vnode:
        parent = new.key if vnode.is_dir else self.places.moved(vnode, old.key, new.key)
        moved = vnode._replace(parent=parent, ctime_ns=vnode.later(now_ns))
        self._vnodes.update(moved)
        return moved


def _check_not_mount_point(vnode: Vnode) -> None:
    if vnode.is_mount_point:
        raise Aborted(AbortCode.BUSY, "it is a mount point")
