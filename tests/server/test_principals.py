"""Users and groups: the protection database, and who may change what in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.identity_messages import (
    AddToGroup,
    ChangeOwner,
    CreateGroup,
    CreateUser,
    DeletePrincipal,
    Examine,
    IdToName,
    ListEntries,
    ListMembership,
    NameToId,
    RemoveFromGroup,
    RenamePrincipal,
    SetDisabled,
)
from promisefs_protocol.principals import ADMINISTRATORS, ANYUSER, AUTHUSER
from promisefs_server.identity.identity_file import IdentityFile
from promisefs_server.identity.principals import Principals
from server_cell import Cell
from test_tokens import code_of, commands, token_of, user_of


@pytest.fixture
def principals(tmp_path: Path) -> Any:
    file = IdentityFile(tmp_path)
    yield Principals(file)
    file.close()


def test_the_groups_of_a_user(principals: Principals) -> None:
    alice = principals.create_user("alice", 1001, 0)
    staff = principals.create_group("staff", principals.find("system:administrators"), 0)
    friends = principals.create_group("alice:friends", alice, 0)
    assert principals.identity(1001).groups == {ANYUSER, AUTHUSER}
    principals.add(alice, friends)
    principals.add(friends, staff)
    assert principals.identity(1001).groups == {ANYUSER, AUTHUSER, friends.id, staff.id}
    principals.add(alice, principals.find("system:administrators"))
    assert principals.identity(1001).administrator
    principals.remove(alice, friends)
    assert principals.identity(1001).groups == {ANYUSER, AUTHUSER, ADMINISTRATORS}
    principals.set_disabled(1001, True)
    with pytest.raises(Aborted) as refusal:
        principals.identity(1001)
    assert refusal.value.code == AbortCode.KEYREVOKED


def test_groups_are_nested_one_level(principals: Principals) -> None:
    admin = principals.find("system:administrators")
    a, b, c = [principals.create_group(name, admin, 0) for name in "abc"]
    principals.add(a, b)
    for member, group in ((b, c), (c, a), (a, a)):
        with pytest.raises(Aborted) as refusal:
            principals.add(member, group)
        assert refusal.value.code == AbortCode.INVAL, (member.name, group.name)
    principals.add(c, b)


def test_ids_are_never_used_twice(principals: Principals) -> None:
    for make in (
        lambda name: principals.create_user(name, None, 0),
        lambda name: principals.create_group(name, principals.find("system:administrators"), 0),
    ):
        first = make("x")
        principals.delete(first)
        assert make("x").id != first.id
        principals.delete(principals.find("x"))


def test_names_follow_their_owners(principals: Principals) -> None:
    alice, bob = principals.create_user("alice", None, 0), principals.create_user("bob", None, 0)
    principals.create_group("alice:friends", alice, 0)
    principals.rename(alice, "alicia")
    group = principals.find("alicia:friends")
    assert principals.change_owner(group, bob).name == "bob:friends"


@pytest.mark.parametrize("name", ["", "a b", "a:b", "-x", "x/y", "x\n", "ä", "local", "x" * 64])
def test_names_that_no_user_can_have(principals: Principals, name: str) -> None:
    with pytest.raises(Aborted) as refusal:
        principals.create_user(name, None, 0)
    assert refusal.value.code == AbortCode.INVAL


def test_what_is_built_in_stays(principals: Principals) -> None:
    for name in ("system:administrators", "system:anyuser", "system:authuser", "anonymous"):
        with pytest.raises(Aborted):
            principals.delete(principals.find(name))
        with pytest.raises(Aborted):
            principals.rename(principals.find(name), "other")
    with pytest.raises(Aborted):
        principals.add(principals.create_user("x", None, 0), principals.find("system:anyuser"))


ALLOWED, DENIED = None, AbortCode.ACCES
CALLS: list[tuple[Any, AbortCode | None, AbortCode | None]] = [
    (CreateUser("new", None), DENIED, DENIED),
    (CreateGroup("alice:more", "alice"), ALLOWED, DENIED),
    (CreateGroup("system:more", None), DENIED, DENIED),
    (CreateGroup("more", None), DENIED, DENIED),
    (AddToGroup("bob", "alice:friends"), ALLOWED, DENIED),
    (RemoveFromGroup("carol", "alice:friends"), ALLOWED, DENIED),
    (AddToGroup("alice", "system:administrators"), DENIED, DENIED),
    (RenamePrincipal("alice:friends", "alice:foes"), ALLOWED, DENIED),
    (ChangeOwner("alice:friends", "bob"), ALLOWED, DENIED),
    (DeletePrincipal("alice:friends"), ALLOWED, DENIED),
    (DeletePrincipal("bob"), DENIED, DENIED),
    (SetDisabled("bob", True), DENIED, DENIED),
    (ListMembership("alice"), ALLOWED, DENIED),
    (ListMembership("alice:friends"), ALLOWED, ALLOWED),
    (ListEntries(None, True, True), DENIED, DENIED),
    (Examine("alice"), ALLOWED, ALLOWED),
    (NameToId(("alice", "x")), ALLOWED, ALLOWED),
    (IdToName((1001, -1)), ALLOWED, ALLOWED),
]


@pytest.mark.parametrize(("request_", "owners", "others"), CALLS, ids=lambda value: type(value).__name__)
async def test_who_may_do_what(cell: Cell, request_: Any, owners: Any, others: Any) -> None:
    """As somebody else, as the owner of the group, and as an administrator, who may do everything."""
    for name in ("alice", "bob", "carol", "admin"):
        await user_of(cell, name)
    await cell.administer(AddToGroup("admin", "system:administrators"))
    await cell.administer(CreateGroup("alice:friends", None))
    await cell.administer(AddToGroup("carol", "alice:friends"))
    codes = []
    for name in ("bob", "alice"):
        peer = await commands(cell)
        await peer.present(await token_of(cell, name))
        codes.append(await code_of(peer, request_))
    assert codes == [others, owners]
    if owners is DENIED:
        peer = await commands(cell)
        await peer.present(await token_of(cell, "admin"))
        assert await code_of(peer, request_) is None


async def test_entries_are_paged_and_described(cell: Cell) -> None:
    await user_of(cell, "alice")
    entries = (await cell.administer(ListEntries(None, True, True))).entries
    assert [entry.name for entry in entries] == [
        "system:administrators", "system:authuser", "system:anyuser", "alice", "anonymous"
    ]  # fmt: skip
    assert (await cell.administer(NameToId(("alice", "x")))).ids == (1000, None)
    assert (await cell.administer(IdToName((1000, 77)))).names == ("alice", "77")
