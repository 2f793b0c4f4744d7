"""Access control lists: what they give whom, and how people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from promisefs_protocol.principals import ADMINISTRATORS, ANONYMOUS, ANYUSER, AUTHUSER
from promisefs_protocol.rights import (
    ALL_RIGHTS,
    EVERYTHING,
    OWNER,
    SUPERUSER,
    AclEntry,
    Rights,
    acl_text,
    may_read,
    may_write,
    parse_acl,
    parse_rights,
    rights_text,
)
from promisefs_server.access.acl import NO_ENTRIES, Acl, rights_on_directory, rights_on_file
from promisefs_server.identity.identity import Identity

ALICE, BOB, STAFF = 1001, 1002, -5
R, W, INS, L, D = Rights.READ, Rights.WRITE, Rights.INSERT, Rights.LOOKUP, Rights.DELETE

ids = st.sampled_from([ALICE, BOB, STAFF, ANYUSER, AUTHUSER])
bits = st.integers(0, 127)
acls = st.builds(lambda changes: NO_ENTRIES.changed(changes), st.lists(st.tuples(ids, bits, st.booleans()), max_size=8))


def user(who: int, *groups: int) -> Identity:
    return Identity(who, f"user{who}", frozenset({ANYUSER, AUTHUSER, *groups}))


NOBODY = Identity(ANONYMOUS, "anonymous", frozenset({ANYUSER}))


@pytest.mark.parametrize(
    ("who", "gets"),
    [(user(ALICE), R | L | W), (user(BOB), R), (user(BOB, STAFF), R | L | INS), (NOBODY, R | L), (user(77), R | L)],
)
def test_union_without_negative(who: Identity, gets: Rights) -> None:
    acl = NO_ENTRIES.changed(
        [(ALICE, int(W), False), (ANYUSER, int(R | L), False), (STAFF, int(INS | L), False), (BOB, int(L), True)]
    )
    if who.user == BOB and STAFF in who.groups:
        gets = R | INS  # the negative entry takes what the group gives, too
    assert acl.rights_of(who) == gets


@given(acls, st.sets(ids))
def test_rights_are_what_the_entries_say(acl: Acl, groups: set[int]) -> None:
    members = {ANYUSER, *groups}
    identity = Identity(BOB, "bob", frozenset(members))
    for bit in Rights(127):
        given_by = any(rights & bit for who, rights in acl.positive if who in members | {BOB})
        taken_by = any(rights & bit for who, rights in acl.negative if who in members | {BOB})
        assert bool(acl.rights_of(identity) & bit) is (given_by and not taken_by)
        # What anyone has nobody lacks.
        assert not acl.rights_of_anyone & bit or acl.rights_of(identity) & bit


@given(acls, ids, bits, st.booleans())
def test_a_change_is_of_one_entry(acl: Acl, who: int, rights: int, negative: bool) -> None:
    changed = acl.changed([(who, rights, negative)])
    part = dict(changed.negative if negative else changed.positive)
    assert part.get(who, 0) == rights and 0 not in part.values()
    assert changed.changed([(who, 0, negative)]) == acl.changed([(who, 0, negative)])
    assert Acl.unpacked(changed.packed()) == changed


@given(st.integers(0, 2**32 - 1))
def test_letters_and_back(number: int) -> None:
    rights = number & EVERYTHING
    assert parse_rights(rights_text(rights)) == rights


def test_words() -> None:
    assert [rights_text(parse_rights(word)) for word in ("read", "write", "all", "none", "kl")] == [
        "rl", "rlidwk", "rlidwka", "", "lk",
    ]  # fmt: skip
    assert parse_rights("all") == ALL_RIGHTS
    for wrong in ("rx", "Read", "r l", "-r"):
        with pytest.raises(ValueError, match="rights are letters"):
            parse_rights(wrong)


names = st.from_regex(r"[a-z]{1,5}(:[a-z]{1,5})?", fullmatch=True)


@given(st.lists(st.tuples(names, bits, st.booleans()), max_size=6, unique_by=lambda e: (e[0], e[2])))
def test_lists_as_text_and_back(entries: list[tuple[str, int, bool]]) -> None:
    acl = [AclEntry(*entry) for entry in entries]
    assert parse_acl(acl_text(acl)) == tuple(sorted(acl, key=lambda entry: entry.negative))


def test_lists_are_written_as_by_afs() -> None:
    acl = (AclEntry("system:anyuser", 9, False), AclEntry("bob", 2, True), AclEntry("alice", 127, False))
    assert acl_text(acl) == "2\n1\nsystem:anyuser\t9\nalice\t127\nbob\t2\n"


@pytest.mark.parametrize(
    "text",
    ["", "1", "1\n0", "0\n0\nalice 1", "1\n0\nalice", "1\n0\nalice rl", "2\n0\nalice 1\nalice 2", "1\n0\nalice 128",
     "-1\n2\nalice 1", "1\n0\nalice -1", "201\n0\n" + "".join(f"u{i} 1\n" for i in range(201))],
)  # fmt: skip
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"a list has|no such rights|named twice"):
        parse_acl(text)


def test_owners() -> None:
    alice, admin = user(ALICE), user(BOB, ADMINISTRATORS)
    assert rights_on_file(alice, INS, ALICE) == INS | R | W | OWNER
    assert rights_on_file(alice, INS, BOB) == INS
    assert rights_on_file(alice, L, ALICE) == L  # without `i` an owner is like everybody else
    assert rights_on_file(NOBODY, INS, ANONYMOUS) == INS  # all without a token are one user
    assert rights_on_file(admin, 0, ALICE) == ALL_RIGHTS | SUPERUSER
    assert rights_on_directory(alice, L, ALICE, is_root=False) == L
    assert rights_on_directory(alice, L, ALICE, is_root=True) == L | Rights.ADMINISTER
    assert rights_on_directory(alice, L, BOB, is_root=True) == L


@pytest.mark.parametrize(
    ("rights", "mode", "reads", "writes"),
    [
        (R | W, 0o600, True, True), (R | W, 0o400, True, False), (R | W, 0o200, False, True), (R, 0o600, True, False),
        (W, 0o600, False, True), (R | W, 0o077, False, False), (R | W | OWNER, 0, True, True), (L, 0o777, False, False),
        (SUPERUSER, 0, True, True),
    ],
)  # fmt: skip
def test_owners_mode_bits_hold_for_all(rights: int, mode: int, reads: bool, writes: bool) -> None:
    assert (may_read(rights, mode), may_write(rights, mode)) == (reads, writes)
