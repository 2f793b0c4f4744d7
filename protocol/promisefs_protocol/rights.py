"""Rights on a directory and the files in it, as AFS has them, and how people write them.

A directory's access control list gives rights to users and groups; a file has none of its own, it uses the list of the
directory that it is in. What each right is for is in docs/access.md.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Annotated, NamedTuple

from .fields import int_range, length_range

MAX_ACL_ENTRIES = 200
"""Most entries in one list, positive and negative ones together."""


class Rights(enum.IntFlag):
    """Bits of AFS's (prs_fs.h)."""

    READ = 1  # r: a file's bytes
    WRITE = 2  # w: a file's bytes and mode
    INSERT = 4  # i: new names
    LOOKUP = 8  # l: names, statuses, symlinks, the list itself
    DELETE = 16  # d: names that go
    LOCK = 32  # k
    ADMINISTER = 64  # a: the list
    A = 1 << 24  # for applications: nothing here looks at these
    B = 1 << 25
    C = 1 << 26
    D = 1 << 27
    E = 1 << 28
    F = 1 << 29
    G = 1 << 30
    H = 1 << 31


READ, WRITE, INSERT, LOOKUP = int(Rights.READ), int(Rights.WRITE), int(Rights.INSERT), int(Rights.LOOKUP)
"""Plain integers, for what is done with every status: with flags it would take several times as long."""
NO_RIGHTS = Rights(0)
ALL_RIGHTS = Rights(127)
"""What there are words for: rlidwka."""
EVERYTHING = Rights(0xFF00007F)
SUPERUSER = 1 << 8
"""In `PromisedStatus.rights`: the caller is an administrator, whom nothing stops."""
OWNER = 1 << 9
"""There, too: the file is the caller's own, and he has `i` where it is."""

_LETTERS = {
    "r": Rights.READ,
    "l": Rights.LOOKUP,
    "i": Rights.INSERT,
    "d": Rights.DELETE,
    "w": Rights.WRITE,
    "k": Rights.LOCK,
    "a": Rights.ADMINISTER,
    **{letter: Rights[letter] for letter in "ABCDEFGH"},
}
"""In the order in which they are written."""
_WORDS = {"read": "rl", "write": "rlidwk", "all": "rlidwka", "none": ""}

RightsBits = Annotated[int, int_range(0, 2**32 - 1)]
"""`Rights` as they travel."""


def parse_rights(text: str) -> Rights:
    """`rlidwka` and A to H in any order, or read, write, all, none. Raise ValueError."""
    rights = NO_RIGHTS
    for letter in _WORDS.get(text, text):
        if letter not in _LETTERS:
            raise ValueError(f"{text!r}: rights are letters of rlidwkaABCDEFGH, or read, write, all or none")
        rights |= _LETTERS[letter]
    return rights


def rights_text(rights: int) -> str:
    """The letters, in AFS's order; empty if there are none."""
    return "".join(letter for letter, bit in _LETTERS.items() if rights & bit)


def may_read(rights: int, mode: int) -> bool:
    """Whether a server gives the caller a file's bytes. The mode bits of the owner hold for everybody else, too."""
    return bool(rights & SUPERUSER or (rights & READ and (mode & 0o400 or rights & OWNER)))


def may_write(rights: int, mode: int) -> bool:
    """The same of changing them. The owner may: who makes a file that is read-only has yet to fill it."""
    return bool(rights & SUPERUSER or (rights & WRITE and (mode & 0o200 or rights & OWNER)))


class AclEntry(NamedTuple):
    """What an access control list gives one user or group, or with `negative` takes away. Without rights: no entry."""

    name: Annotated[str, length_range(1, 255)]  # a number, if who had it is there no more
    rights: RightsBits
    negative: bool


CHANGES_ONLY = "+\n"
"""Before a list as text: nothing but its entries is to change."""
AclEntries = Annotated[tuple[AclEntry, ...], length_range(0, MAX_ACL_ENTRIES)]


def acl_text(entries: Iterable[AclEntry]) -> str:
    """A list as AFS writes it: the numbers of positive and negative entries, and each with its rights as a number."""
    parts = [[e for e in entries if e.negative is negative] for negative in (False, True)]
    lines = [str(len(part)) for part in parts]
    lines += [f"{entry.name}\t{entry.rights}" for part in parts for entry in part]
    return "\n".join(lines) + "\n"


def parse_acl(text: str) -> tuple[AclEntry, ...]:
    """What `acl_text` writes. Raise ValueError."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    try:
        counts = [int(line[0]) for line in lines[:2]]
        pairs = [(name, int(rights)) for name, rights in lines[2:]]
    except (ValueError, IndexError):
        raise ValueError("a list has two numbers of entries, and then a name and a number on each line") from None
    if len(counts) != 2 or sum(counts) != len(pairs) or min(counts) < 0 or len(pairs) > MAX_ACL_ENTRIES:
        raise ValueError(f"a list has as many entries as it says, at most {MAX_ACL_ENTRIES}")
    entries = tuple(AclEntry(name, rights, place >= counts[0]) for place, (name, rights) in enumerate(pairs))
    if any(rights & ~EVERYTHING or len(name) > 255 for name, rights in pairs):
        raise ValueError("there are no such rights")
    if len({(entry.name, entry.negative) for entry in entries}) != len(entries):
        raise ValueError("somebody is named twice")
    return entries
