"""The protection database: users, groups, and who is in which.

Invariants
I1  An id is given once: what an access list says of somebody who was deleted never holds for somebody else.
I2  Groups are nested one level: a group that is in another one contains no groups, and one that contains groups is in
    none. So the groups of a user are those that it is in, and those that these are in.
I3  `owner:name` is a group of the user or group of that name, or of a system group's; it changes its name with it.
I4  An Identity that was given by `identity` is that of the latest commit: every change drops them all.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Sequence

from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.identity_messages import MAX_ENTRIES, Principal
from promisefs_protocol.principals import ADMINISTRATORS, ANONYMOUS, ANYUSER, AUTHUSER

from .identity import NOBODY, SERVER, SERVER_USER, Identity
from .identity_file import IdentityFile

_USER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,62}")
_GROUP_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.@-]*:)?[A-Za-z0-9_][A-Za-z0-9_.@-]*")
_IMPLICIT = (ANYUSER, AUTHUSER)
"""Groups whose members nobody lists."""
_BUILT_IN = (ANONYMOUS, ANYUSER, AUTHUSER, ADMINISTRATORS)
MAX_IDENTITIES = 10_000
"""Identities remembered."""
_COLUMNS = "id, name, owner, creator, disabled, generation, password"


class Record:
    """A row."""

    __slots__ = ("creator", "disabled", "generation", "id", "name", "owner", "password")

    def __init__(
        self, id: int, name: str, owner: int, creator: int, disabled: int, generation: int, password: str | None
    ) -> None:
        self.id = id
        self.name = name
        self.owner = owner
        self.creator = creator
        self.disabled = bool(disabled)
        self.generation = generation
        self.password = password

    @property
    def is_group(self) -> bool:
        return self.id < 0


class Principals:
    """Every method is atomic and raises Aborted, sqlite3.Error; who may do what is decided elsewhere."""

    def __init__(self, file: IdentityFile) -> None:
        self._file = file
        self._identities: dict[int, Identity] = {}
        self._records: dict[int, Record] = {}

    # Looking up

    def find(self, name: str) -> Record:
        """Abort NOENT."""
        row = self._file.execute(f"SELECT {_COLUMNS} FROM principals WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise Aborted(AbortCode.NOENT, f"there is no user or group {name!r}")
        return Record(*row)

    def user(self, name: str) -> Record:
        record = self.find(name)
        if record.is_group or record.id == ANONYMOUS:
            raise Aborted(AbortCode.INVAL, f"{name} is no user who could log in")
        return record

    def group(self, name: str) -> Record:
        record = self.find(name)
        if not record.is_group:
            raise Aborted(AbortCode.INVAL, f"{name} is a user, not a group")
        return record

    def by_id(self, number: int) -> Record | None:
        """The record, which must not be changed; remembered until the next change."""
        record = self._records.get(number)
        if record is None:
            row = self._file.execute(f"SELECT {_COLUMNS} FROM principals WHERE id = ?", (number,)).fetchone()
            if row is None:
                return None
            if len(self._records) >= MAX_IDENTITIES:
                self._records.clear()
            record = self._records[number] = Record(*row)
        return record

    def name_of(self, number: int) -> str:
        if number == SERVER_USER:
            return SERVER.name
        record = self.by_id(number)
        return str(number) if record is None else record.name

    def id_of(self, name: str) -> int:
        """Abort NOENT."""
        return self.find(name).id

    def ids_of(self, names: Iterable[str]) -> tuple[int | None, ...]:
        return tuple(self._id_of(name) for name in names)

    def _id_of(self, name: str) -> int | None:
        row = self._file.execute("SELECT id FROM principals WHERE name = ?", (name,)).fetchone()
        return None if row is None else int(row[0])

    def identity(self, user: int) -> Identity:
        """Who that user is now (I4). Abort KEYREVOKED if there is no such user any more, or it is disabled."""
        identity = self._identities.get(user)
        if identity is not None:
            return identity
        if user == SERVER_USER:
            return SERVER
        record = self.by_id(user)
        if record is None or record.disabled:
            raise Aborted(AbortCode.KEYREVOKED, "the user of this token does not exist any more, or is disabled")
        direct = self._groups_with(user)
        around = [group for inner in direct for group in self._groups_with(inner)]
        identity = Identity(user, record.name, NOBODY.groups | {AUTHUSER, *direct, *around})
        if len(self._identities) >= MAX_IDENTITIES:
            self._identities.clear()
        self._identities[user] = identity
        return identity

    def _groups_with(self, member: int) -> list[int]:
        return [row[0] for row in self._file.rows("SELECT group_id FROM members WHERE member = ?", (member,))]

    def _members_of(self, group: int) -> list[int]:
        return [row[0] for row in self._file.rows("SELECT member FROM members WHERE group_id = ?", (group,))]

    def membership(self, record: Record) -> list[str]:
        """Names of a user's groups, or of a group's members."""
        if not record.is_group:
            return sorted(self.name_of(number) for number in self._groups_with(record.id))
        if record.id in _IMPLICIT:
            return []
        return sorted(self.name_of(number) for number in self._members_of(record.id))

    def entry(self, record: Record) -> Principal:
        """For people."""
        found = self._members_of(record.id) if record.is_group else self._groups_with(record.id)
        return Principal(
            record.id, record.name, record.owner, self.name_of(record.owner), self.name_of(record.creator),
            len(found), record.disabled, record.password is not None,
        )  # fmt: skip

    def entries(self, after: int | None, *, users: bool, groups: bool) -> tuple[Sequence[Principal], bool]:
        """Entries with greater ids, and whether there are more."""
        least = -(2**31) if after is None else after
        rows = self._file.rows(
            f"SELECT {_COLUMNS} FROM principals WHERE id > ? AND (id > 0 AND ? OR id < 0 AND ?) ORDER BY id LIMIT ?",
            (least, users, groups, MAX_ENTRIES + 1),
        )
        return tuple(self.entry(Record(*row)) for row in rows[:MAX_ENTRIES]), len(rows) > MAX_ENTRIES

    # Changing

    def create_user(self, name: str, number: int | None, creator: int) -> Record:
        """Abort EXIST, INVAL."""
        if not _USER_NAME.fullmatch(name) or name == SERVER.name:
            raise Aborted(AbortCode.INVAL, f"{name!r} can be no user's name: letters, digits, '_', '.', '@' and '-'")
        if number is not None and (number <= 0 or number == ANONYMOUS):
            raise Aborted(AbortCode.INVAL, f"{number} can be no user's id")
        with self._file.transaction():
            (unused,) = self._file.execute("SELECT user FROM next_ids").fetchone()
            number = self._free_id(unused, 1) if number is None else number
            self._insert(number, name, ADMINISTRATORS, creator)
            self._file.execute("UPDATE next_ids SET user = max(user, ?)", (number + 1,))
        return self._changed(name)

    def create_group(self, name: str, owner: Record, creator: int) -> Record:
        """Abort EXIST, INVAL."""
        prefix, colon, _ = name.partition(":")
        if not _GROUP_NAME.fullmatch(name) or len(name) > 63:
            raise Aborted(AbortCode.INVAL, f"{name!r} can be no group's name: OWNER:NAME, or for administrators NAME")
        if colon and prefix != owner.name.partition(":")[0] and prefix != "system":
            raise Aborted(AbortCode.INVAL, f"a group of {owner.name} is called {owner.name.partition(':')[0]}:NAME")
        with self._file.transaction():
            (unused,) = self._file.execute("SELECT group_id FROM next_ids").fetchone()
            number = self._free_id(unused, -1)
            self._insert(number, name, owner.id, creator)
            self._file.execute("UPDATE next_ids SET group_id = ?", (number - 1,))
        return self._changed(name)

    def _free_id(self, number: int, step: int) -> int:
        while self.by_id(number) is not None or number == ANONYMOUS:
            number += step
        return number

    def _insert(self, number: int, name: str, owner: int, creator: int) -> None:
        try:
            self._file.execute("INSERT INTO principals VALUES (?, ?, ?, ?, 0, 0, NULL)", (number, name, owner, creator))
        except sqlite3.IntegrityError:
            raise Aborted(AbortCode.EXIST, f"the name {name} or the id {number} is taken") from None

    def delete(self, record: Record) -> None:
        """With its memberships. Abort PERM for what is built in, NOTEMPTY while it owns groups."""
        self._check_not_built_in(record)
        owned = self._file.execute("SELECT name FROM principals WHERE owner = ? AND id <> ?", (record.id,) * 2)
        if (group := owned.fetchone()) is not None:
            raise Aborted(AbortCode.NOTEMPTY, f"{record.name} owns {group[0]}: delete that, or give it away, first")
        with self._file.transaction():
            self._file.execute("DELETE FROM members WHERE member = ? OR group_id = ?", (record.id,) * 2)
            self._file.execute("DELETE FROM principals WHERE id = ?", (record.id,))
        self._forget()

    def rename(self, record: Record, new: str) -> Record:
        """With the groups that are called after it (I3). Abort EXIST, INVAL, PERM."""
        self._check_not_built_in(record)
        pattern = _GROUP_NAME if record.is_group else _USER_NAME
        old_prefix, new_prefix = record.name.partition(":")[0], new.partition(":")[0]
        if not pattern.fullmatch(new) or len(new) > 63 or (record.is_group and old_prefix != new_prefix):
            raise Aborted(AbortCode.INVAL, f"{record.name} cannot be called {new!r}")
        try:
            with self._file.transaction():
                self._file.execute("UPDATE principals SET name = ? WHERE id = ?", (new, record.id))
                if not record.is_group:
                    self._file.execute(
                        "UPDATE principals SET name = ? || substr(name, ?) WHERE id < 0 AND substr(name, 1, ?) = ?",
                        (new, len(record.name) + 1, len(record.name) + 1, record.name + ":"),
                    )
        except sqlite3.IntegrityError:
            raise Aborted(AbortCode.EXIST, f"the name {new} is taken") from None
        return self._changed(new)

    def change_owner(self, record: Record, owner: Record) -> Record:
        """Of a group, whose name then begins with the new owner's. Abort EXIST, PERM."""
        self._check_not_built_in(record)
        prefix, colon, rest = record.name.partition(":")
        name = f"{owner.name.partition(':')[0]}:{rest}" if colon else prefix
        try:
            with self._file.transaction():
                self._file.execute(
                    "UPDATE principals SET owner = ?, name = ? WHERE id = ?", (owner.id, name, record.id)
                )
        except sqlite3.IntegrityError:
            raise Aborted(AbortCode.EXIST, f"the name {name} is taken") from None
        return self._changed(name)

    def add(self, member: Record, group: Record) -> None:
        """Abort EXIST, INVAL (I2)."""
        if group.id in _IMPLICIT or member.id in _BUILT_IN:
            raise Aborted(AbortCode.INVAL, f"{member.name} cannot be put into {group.name}")
        if member.is_group:
            nested = any(number < 0 for number in self._members_of(member.id)) or self._groups_with(group.id)
            if nested or member.id == group.id:
                raise Aborted(AbortCode.INVAL, "groups are nested one level: a group in a group contains only users")
        try:
            with self._file.transaction():
                self._file.execute("INSERT INTO members VALUES (?, ?)", (group.id, member.id))
        except sqlite3.IntegrityError:
            raise Aborted(AbortCode.EXIST, f"{member.name} is in {group.name} already") from None
        self._forget()

    def remove(self, member: Record, group: Record) -> None:
        """Abort NOENT."""
        with self._file.transaction():
            done = self._file.execute("DELETE FROM members WHERE group_id = ? AND member = ?", (group.id, member.id))
        if not done.rowcount:
            raise Aborted(AbortCode.NOENT, f"{member.name} is not in {group.name}")
        self._forget()

    def set_password(self, user: int, hashed: str) -> None:
        self._update(user, "password = ?", hashed)

    def set_disabled(self, user: int, disabled: bool) -> None:
        self._update(user, "disabled = ?", int(disabled))

    def next_generation(self, user: int) -> None:
        """All tokens that were given so far are of an old one."""
        self._update(user, "generation = generation + ?", 1)

    def _update(self, user: int, what: str, value: object) -> None:
        with self._file.transaction():
            self._file.execute(f"UPDATE principals SET {what} WHERE id = ?", (value, user))
        self._forget()

    def _changed(self, name: str) -> Record:
        self._forget()
        return self.find(name)

    def _forget(self) -> None:
        self._identities.clear()
        self._records.clear()

    @staticmethod
    def _check_not_built_in(record: Record) -> None:
        if record.id in _BUILT_IN:
            raise Aborted(AbortCode.PERM, f"{record.name} is built in")
