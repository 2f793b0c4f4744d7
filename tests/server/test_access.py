"""Who may do what: each right with each operation, allowed and denied; what a change of a list is told to whom."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid, PromisedStatus
from promisefs_protocol.locks import WHOLE_FILE, Lock, LockKind, LockOwner
from promisefs_protocol.messages import (
    AppendData,
    CopyRange,
    CreateFile,
    Fallocate,
    FetchACL,
    FetchData,
    FetchDirectory,
    FetchStatus,
    GetLock,
    GetVolumeStatus,
    GetXattr,
    InlineBulkStatus,
    Link,
    ListXattrs,
    Lookup,
    MakeDir,
    MakeMountPoint,
    RemoveDir,
    RemoveFile,
    RemoveMountPoint,
    RemoveXattr,
    Rename,
    RenameFlags,
    Seek,
    SetLock,
    SetVolumeStatus,
    SetXattr,
    StoreACL,
    StoreData,
    StoreStatus,
    Symlink,
    WhoAmI,
)
from promisefs_protocol.principals import ADMINISTRATORS, ANONYMOUS, ANYUSER, AUTHUSER
from promisefs_protocol.rights import ALL_RIGHTS, AclEntry, Rights, rights_text
from promisefs_server.access.access_control import AccessControl
from promisefs_server.identity.caller import Caller
from promisefs_server.identity.identity import Identity
from promisefs_server.store.acls import number_of
from promisefs_server.store.store import Store
from server_cell import Cell, Client, in_background, settled

NOBODY = Identity(ANONYMOUS, "anonymous", frozenset({ANYUSER}))
ALICE = Identity(1001, "alice", frozenset({ANYUSER, AUTHUSER}))
ADMIN = Identity(1, "admin", frozenset({ANYUSER, AUTHUSER, ADMINISTRATORS}))
R, W, INS, L, D, K, A = (
    Rights.READ, Rights.WRITE, Rights.INSERT, Rights.LOOKUP, Rights.DELETE, Rights.LOCK, Rights.ADMINISTER
)  # fmt: skip


EXCHANGE = int(RenameFlags.EXCHANGE)


async def call_as(cell: Cell, client: Client, identity: Identity, request: Any, bulk: bytes | None = None) -> Any:
    """Have the server carry out a call of this client's as if `identity` had made it."""
    host = cell.server.hosts.by_uuid(client.uuid)
    assert host is not None
    caller = Caller(cell.server.breaker.contact(host), identity)
    result = cell.server.operations[type(request)](caller, request, bulk)
    reply, data = result if isinstance(result, tuple) else await result()
    return data if isinstance(request, FetchData) else reply


async def set_acl(client: Client, directory: Fid, clear: bool = True, **rights: Rights) -> None:
    entries = tuple(AclEntry(name.replace("_", ":"), int(bits), False) for name, bits in rights.items())
    await client.call(StoreACL(directory, entries, clear))


class Scene:
    """Directories d and e, files d/file and d/other, and d/sub, d/link, d/point, all of an administrator's."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.d: Fid
        self.e: Fid
        self.file: Fid
        self.other: Fid
        self.sub: Fid
        self.link: Fid
        self.point: Fid

    async def made(self) -> Scene:
        c = self.client
        self.d, self.e = (await c.mkdir(b"d")).fid, (await c.mkdir(b"e")).fid
        self.file, self.other = (await c.create(b"file", self.d)).fid, (await c.create(b"other", self.d)).fid
        self.sub = (await c.mkdir(b"sub", self.d)).fid
        self.link = (await c.call(Symlink(c.op(), self.d, b"link", b"target", 0, 0))).entry.fid
        self.point = (await c.call(MakeMountPoint(c.op(), self.d, b"point", "elsewhere"))).entry.fid
        await c.create(b"there", self.e)
        await c.store(self.file, b"bytes")
        await c.call(SetXattr(self.file, b"user.x", 0), b"value")
        await c.call(SetXattr(self.d, b"user.x", 0), b"value")
        await set_acl(c, self.sub)
        return self


def _lock(kind: LockKind) -> Callable[[Scene], Any]:
    return lambda s: SetLock(s.file, LockOwner(False, 1), Lock(int(kind), *WHOLE_FILE, 1), 1, False)


def _status(s: Scene, fid: Fid, **what: Any) -> StoreStatus:
    fields = dict.fromkeys(("mode", "uid", "gid", "size", "atime_ns", "mtime_ns"))
    return StoreStatus(fid, **{**fields, **what})


op = Client.op
CASES: dict[str, tuple[Callable[[Scene], Any], Rights, bytes | None]] = {
    "status of the directory": (lambda s: FetchStatus(s.d), L, None),
    "names": (lambda s: FetchDirectory(s.d, b"", 10), L, None),
    "a name that is there": (lambda s: Lookup(s.d, b"file"), L, None),
    "a name that is not": (lambda s: Lookup(s.d, b"nothing"), L, None),
    "status of a directory in it": (lambda s: FetchStatus(s.sub), L, None),
    "a symlink": (lambda s: FetchData(s.link, 0, 100), L, None),
    "what a mount point stands for": (lambda s: FetchData(s.point, 0, 100), L, None),
    "the list": (lambda s: FetchACL(s.d), L, None),
    "the list, by a file": (lambda s: FetchACL(s.file), L, None),
    "attributes of the directory": (lambda s: GetXattr(s.d, b"user.x"), L, None),
    "bytes": (lambda s: FetchData(s.file, 0, 100), R, None),
    "holes": (lambda s: Seek(s.file, 0, True), R, None),
    "an attribute": (lambda s: GetXattr(s.file, b"user.x"), R, None),
    "names of attributes": (lambda s: ListXattrs(s.file), R, None),
    "store": (lambda s: StoreData(s.file, 0, None, False), W, b"new"),
    "append": (lambda s: AppendData(s.client.op(), s.file, None), W, b"new"),
    "truncate": (lambda s: _status(s, s.file, size=1), W, None),
    "reserve": (lambda s: Fallocate(s.file, 0, 0, 10), W, None),
    "chmod": (lambda s: _status(s, s.file, mode=0o600), W, None),
    "chgrp": (lambda s: _status(s, s.file, gid=5), W, None),
    "utimes": (lambda s: _status(s, s.file, mtime_ns=1), W, None),
    "chmod of the directory": (lambda s: _status(s, s.d, mode=0o700), W, None),
    "setxattr": (lambda s: SetXattr(s.file, b"user.y", 0), W, b"v"),
    "removexattr": (lambda s: RemoveXattr(s.file, b"user.x"), W, None),
    "copy": (lambda s: CopyRange(s.other, 0, s.file, 0, 5), R | W, None),
    "write lock": (_lock(LockKind.WRITE), W, None),
    "read lock": (_lock(LockKind.READ), K, None),
    "create": (lambda s: CreateFile(s.client.op(), s.d, b"new", 0o100644, 0, 0), INS, None),
    "create what is there": (lambda s: CreateFile(s.client.op(), s.d, b"file", 0o100644, 0, 0), INS, None),
    "mkdir": (lambda s: MakeDir(s.client.op(), s.d, b"new", 0o755, 0, 0), INS, None),
    "symlink": (lambda s: Symlink(s.client.op(), s.d, b"new", b"t", 0, 0), INS, None),
    "mount point": (lambda s: MakeMountPoint(s.client.op(), s.d, b"new", "v"), INS | A, None),
    "link": (lambda s: Link(s.client.op(), s.file, s.d, b"new"), INS | L, None),
    "unlink": (lambda s: RemoveFile(s.client.op(), s.d, b"file", None), D, None),
    "unlink what is not there": (lambda s: RemoveFile(s.client.op(), s.d, b"nothing", None), D, None),
    "rmdir": (lambda s: RemoveDir(s.client.op(), s.d, b"sub"), D, None),
    "remove a mount point": (lambda s: RemoveMountPoint(s.client.op(), s.d, b"point"), D, None),
    "rename": (lambda s: Rename(s.client.op(), s.d, b"file", s.d, b"new", 0, None), D | INS, None),
    "rename over": (lambda s: Rename(s.client.op(), s.d, b"file", s.d, b"other", 0, None), D | INS, None),
    "exchange": (
        lambda s: Rename(s.client.op(), s.d, b"file", s.d, b"other", EXCHANGE, None), D | INS, None,
    ),
    "set the list": (lambda s: StoreACL(s.d, (AclEntry("system:anyuser", int(L), False),), False), A, None),
}  # fmt: skip
"""What is done, the rights on the directory that it takes, each of them and no other, and bytes that go with it."""

EXPECTED_REFUSALS = {
    "create what is there": AbortCode.EXIST,
    "unlink what is not there": AbortCode.NOENT,
}
"""Of calls that fail with all rights, too: then for what they are, without rights with EACCES as all others."""


@pytest.mark.parametrize("case", CASES)
async def test_each_right_with_each_operation(cell: Cell, case: str) -> None:
    make, needed, bulk = CASES[case]
    client = await cell.connected()
    scene = await Scene(client).made()
    request = make(scene)
    for missing in needed:
        await set_acl(client, scene.d, system_authuser=ALL_RIGHTS & ~missing)
        if missing in (W, K) and case == "read lock":
            await set_acl(client, scene.d, system_authuser=ALL_RIGHTS & ~(W | K))
        elif missing == L and case == "link":
            await set_acl(client, scene.d, system_authuser=ALL_RIGHTS & ~(L | R))  # `r` will do
        elif missing == L and case == "the list":
            await set_acl(client, scene.d, system_authuser=ALL_RIGHTS & ~(L | A))
        elif missing == L and case == "the list, by a file":
            await set_acl(client, scene.d, system_authuser=ALL_RIGHTS & ~(L | A))
        with pytest.raises(Aborted) as refusal:
            await call_as(cell, client, ALICE, request, bulk)
        assert refusal.value.code == AbortCode.ACCES, rights_text(missing)
    await set_acl(client, scene.d, system_authuser=needed)
    with pytest.raises(Aborted) as refusal:
        await call_as(cell, client, NOBODY, request, bulk)
    assert refusal.value.code == AbortCode.ACCES, "without a token"
    expected = EXPECTED_REFUSALS.get(case)
    if expected is None:
        await call_as(cell, client, ALICE, request, bulk)
    else:
        with pytest.raises(Aborted) as refusal:
            await call_as(cell, client, ALICE, request, bulk)
        assert refusal.value.code == expected


@pytest.mark.parametrize(
    ("make", "in_d", "in_e"),
    [
        (lambda s: Rename(s.client.op(), s.d, b"file", s.e, b"new", 0, None), D, INS),
        (lambda s: Rename(s.client.op(), s.d, b"file", s.e, b"there", 0, None), D, INS | D),
        (
            lambda s: Rename(s.client.op(), s.d, b"file", s.e, b"there", int(RenameFlags.EXCHANGE), None),
            D | INS,
            D | INS,
        ),
        (lambda s: Link(s.client.op(), s.file, s.e, b"new"), L | D, INS),
    ],
    ids=["rename", "rename over", "exchange", "link"],
)
async def test_between_two_directories(cell: Cell, make: Callable[[Scene], Any], in_d: Rights, in_e: Rights) -> None:
    client = await cell.connected()
    scene = await Scene(client).made()
    request = make(scene)
    lacking = [(in_d & ~right, in_e) for right in in_d] + [(in_d, in_e & ~right) for right in in_e]
    for on_d, on_e in lacking:
        await set_acl(client, scene.d, system_authuser=on_d)
        await set_acl(client, scene.e, system_authuser=on_e)
        with pytest.raises(Aborted) as refusal:
            await call_as(cell, client, ALICE, request)
        assert refusal.value.code == AbortCode.ACCES
    await set_acl(client, scene.d, system_authuser=in_d)
    await set_acl(client, scene.e, system_authuser=in_e)
    await call_as(cell, client, ALICE, request)


async def test_every_operation_is_in_the_table(cell: Cell) -> None:
    """Or asks for no right: then there is nothing to learn or change by it."""
    free = {"CancelLock", "ExtendLock", "GetEntryByID", "GetEntryByName", "ReleaseLock", "Sync", "WhoAmI"}
    elsewhere = {"InlineBulkStatus", "GetLock", "GetVolumeStatus", "SetVolumeStatus"}  # in the test that follows
    client = await cell.connected()
    scene = await Scene(client).made()
    tested = {type(make(scene)).__name__ for make, _, _ in CASES.values()}
    assert {kind.__name__ for kind in cell.server.operations} == tested | free | elsewhere


async def test_status_of_a_file_takes_l_or_r(cell: Cell) -> None:
    client = await cell.connected()
    scene = await Scene(client).made()
    lock = GetLock(scene.file, LockOwner(False, 1), Lock(0, *WHOLE_FILE, 1))
    for rights, allowed in ((L, True), (R, True), (ALL_RIGHTS & ~(L | R), False)):
        await set_acl(client, scene.d, system_authuser=rights)
        for request in (FetchStatus(scene.file), lock):
            try:
                await call_as(cell, client, ALICE, request)
            except Aborted as refusal:
                assert refusal.code == AbortCode.ACCES and not allowed
            else:
                assert allowed
        reply = await call_as(cell, client, ALICE, InlineBulkStatus((scene.file, scene.e)))
        assert isinstance(reply.entries[0], PromisedStatus) is allowed
        assert reply.entries[1] == AbortCode.ACCES
    with pytest.raises(Aborted, match="ACCES"):
        await call_as(cell, client, ALICE, GetVolumeStatus(client.root.volume))
    await set_acl(client, client.root, system_authuser=L)
    await call_as(cell, client, ALICE, GetVolumeStatus(client.root.volume))
    # A directory is seen by who may list it, or the one that it is in.
    await call_as(cell, client, ALICE, FetchStatus(scene.e))
    await set_acl(client, client.root)
    await set_acl(client, scene.d, system_authuser=L)
    await call_as(cell, client, ALICE, FetchStatus(scene.sub))


async def test_quotas_and_names_of_callers(cell: Cell) -> None:
    client = await cell.connected()
    await set_acl(client, client.root, system_authuser=ALL_RIGHTS)
    change = SetVolumeStatus(client.root.volume, 1 << 20)
    with pytest.raises(Aborted, match="ACCES"):
        await call_as(cell, client, ALICE, change)
    await call_as(cell, client, ADMIN, change)
    assert (await client.call(GetVolumeStatus(client.root.volume))).quota == 1 << 20
    who = await call_as(cell, client, NOBODY, WhoAmI(client.root.volume))
    assert who == (ANONYMOUS, "anonymous", ("system:anyuser",))
    who = await call_as(cell, client, ADMIN, WhoAmI(client.root.volume))
    assert who.groups == ("system:administrators", "system:anyuser", "system:authuser")


async def test_files_belong_to_their_maker(cell: Cell) -> None:
    client = await cell.connected()
    await set_acl(client, client.root, system_anyuser=L | INS | R)
    for identity, owner in ((ALICE, 1001), (NOBODY, ANONYMOUS), (ADMIN, 4711)):
        name = identity.name.encode()
        made = await call_as(cell, client, identity, CreateFile(client.op(), client.root, name, 0o100444, 4711, 7))
        assert (made.entry.status.uid, made.entry.status.gid) == (owner, 7)
    mine = await client.lookup(b"alice")
    theirs = await client.lookup(b"admin")
    assert mine is not None and theirs is not None
    # A drop box: the owner fills his read-only file, and nobody else's.
    await call_as(cell, client, ALICE, StoreData(mine.fid, 0, None, False), b"mine")
    assert await call_as(cell, client, ALICE, FetchData(mine.fid, 0, 10)) == b"mine"
    for fid, identity in ((theirs.fid, ALICE), (mine.fid, NOBODY)):
        with pytest.raises(Aborted, match="ACCES"):
            await call_as(cell, client, identity, StoreData(fid, 0, None, False), b"x")


async def test_only_administrators_give_away_or_set_ids(cell: Cell) -> None:
    client = await cell.connected()
    await set_acl(client, client.root, system_authuser=ALL_RIGHTS)
    file = (await client.create(b"f", mode=0o106755)).fid
    for what in ({"uid": 1001}, {"mode": 0o104755}):
        if "mode" in what:
            await client.chmod(file, 0o755)
        with pytest.raises(Aborted, match="PERM"):
            await call_as(cell, client, ALICE, _status(None, file, **what))  # type: ignore[arg-type]
    with pytest.raises(Aborted, match="PERM"):
        await call_as(cell, client, ALICE, CreateFile(client.op(), client.root, b"g", 0o102755, 0, 0))
    await call_as(cell, client, ALICE, _status(None, file, uid=1000, mode=0o700))  # type: ignore[arg-type]
    await client.chmod(file, 0o6755)
    await call_as(cell, client, ALICE, StoreData(file, 0, None, False), b"mine runs as somebody else")
    assert (await client.stat(file)).status.mode == 0o100755
    await call_as(cell, client, ADMIN, _status(None, file, uid=1001))  # type: ignore[arg-type]
    assert (await client.stat(file)).status.uid == 1001


async def test_the_owner_of_a_volume_may_set_the_list_of_its_root(cell: Cell) -> None:
    client = await cell.connected()
    await call_as(cell, client, ADMIN, _status(None, client.root, uid=1001))  # type: ignore[arg-type]
    sub = await client.mkdir(b"sub")
    await call_as(cell, client, ADMIN, _status(None, sub.fid, uid=1001))  # type: ignore[arg-type]
    mine = StoreACL(client.root, (AclEntry("system:authuser", int(L), False),), False)
    with pytest.raises(Aborted, match="ACCES"):
        await call_as(cell, client, ALICE, mine._replace(fid=sub.fid))
    await call_as(cell, client, ALICE, mine)
    await call_as(cell, client, ALICE, Lookup(client.root, b"sub"))


async def test_new_directories_have_their_parents_list(cell: Cell) -> None:
    client = await cell.connected()
    await set_acl(client, client.root, system_authuser=L | INS, system_anyuser=L)
    before = len(cell.server.store.database.rows("SELECT 1 FROM acls"))
    sub = await client.mkdir(b"sub")
    assert (await client.call(FetchACL(sub.fid))).acl == (await client.call(FetchACL(client.root))).acl
    assert len(cell.server.store.database.rows("SELECT 1 FROM acls")) == before
    await set_acl(client, sub.fid, clear=False, system_anyuser=Rights(0))
    assert (await client.call(FetchACL(sub.fid))).acl == (AclEntry("system:authuser", int(L | INS), False),)
    assert (await client.call(FetchACL(client.root))).acl[1].name == "system:anyuser"


async def test_mistakes_in_a_list_change_nothing(cell: Cell) -> None:
    client = await cell.connected()
    file = await client.create(b"f")
    before = (await client.call(FetchACL(client.root))).acl
    for fid, name, code in (
        (client.root, "no-such-user", AbortCode.NOENT), (file.fid, "system:anyuser", AbortCode.NOTDIR)
    ):  # fmt: skip
        with pytest.raises(Aborted) as refusal:
            await client.call(StoreACL(fid, (AclEntry(name, int(R), False),), True))
        assert refusal.value.code == code
    assert (await client.call(FetchACL(client.root))).acl == before


async def test_a_new_list_is_told_before_it_is_answered(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    d = (await a.mkdir(b"d")).fid
    inside, outside = (await a.create(b"f", d)).fid, (await a.create(b"g")).fid
    for fid in (d, inside, outside):
        await b.stat(fid)
    await a.stat(inside)
    b.acknowledge = trio.Event()
    async with in_background(a.call(StoreACL(d, (AclEntry("system:anyuser", int(L), False),), False))) as change:
        assert b.broken() == {d, inside}
        assert a.broken() == {d, inside}, "others on the caller's own host go by it, too"
        assert not change.done
        # Whoever is let in by it is in at once.
        await call_as(cell, b, NOBODY, Lookup(d, b"f"))
        b.acknowledge.set()
        await settled()
        assert change.done and change.error is None
        assert change.result.entry.rights_of_anyone == L


async def test_statuses_carry_the_callers_rights(cell: Cell) -> None:
    client = await cell.connected()
    await set_acl(client, client.root, system_authuser=L | INS, system_anyuser=L)
    made = (await call_as(cell, client, ALICE, CreateFile(client.op(), client.root, b"f", 0o100644, 0, 0))).entry
    told = (await call_as(cell, client, NOBODY, Lookup(client.root, b"f"))).entry
    assert Rights(made.rights & 127) == L | INS | R | W and told.rights == L == made.rights_of_anyone


# Files with names in several directories


async def test_a_file_uses_the_list_of_where_it_was_made(cell: Cell) -> None:
    client = await cell.connected()
    scene = await Scene(client).made()
    await set_acl(client, scene.e, system_authuser=ALL_RIGHTS)
    await client.link(scene.file, b"l", scene.e)
    cell.server.store.directories.places.check_invariants()

    async def reads() -> bool:
        try:
            return bool(await call_as(cell, client, ALICE, FetchData(scene.file, 0, 10)))
        except Aborted as refusal:
            assert refusal.code == AbortCode.ACCES
            return False

    await set_acl(client, scene.d)
    assert not await reads()
    await client.rename((scene.e, b"l"), (scene.e, b"m"))
    assert not await reads(), "only that name has changed"
    await client.unlink(b"file", scene.d)
    assert await reads()
    await client.rename((scene.e, b"m"), (scene.d, b"file"))
    assert not await reads()
    cell.server.store.directories.places.check_invariants()


async def test_an_unlinked_file_keeps_its_rights(cell: Cell) -> None:
    client = await cell.connected()
    await set_acl(client, client.root, system_anyuser=L)
    d = (await client.mkdir(b"d")).fid
    await set_acl(client, d, system_authuser=R | L)
    file = (await client.create(b"f", d)).fid
    await client.store(file, b"bytes")
    await client.unlink(b"f", d, keep_open=True)
    await client.rmdir(b"d")
    assert await call_as(cell, client, ALICE, FetchData(file, 0, 10)) == b"bytes"
    with pytest.raises(Aborted, match="ACCES"):
        await call_as(cell, client, NOBODY, FetchData(file, 0, 10))


def test_checks_cost_microseconds(tmp_path: Path) -> None:
    """Nothing is looked up in the database twice."""
    store = Store.open(tmp_path / "store", time.time_ns())
    try:
        access = AccessControl(store.acls, store.vnodes)
        root = store.vnodes.find(store.volumes.by_name("root").root)
        assert root is not None
        access.rights(ALICE, root)
        access.rights_of_anyone(root)
        store.database.execute = None  # type: ignore[assignment]
        assert access.rights(ALICE, root) == 0 == access.rights_of_anyone(root)
        assert access.rights(ADMIN, root) & A
    finally:
        store.database.execute = store.database._connection.execute
        store.close(clean=False)


async def test_lists_that_nobody_uses_go_at_the_next_start(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", time.time_ns())
    with store.database.transaction():
        unused = number_of(store.database, store.acls.get(1).changed([(7, 1, False)]))
    assert store.acls.get(unused).size == 2
    store.close(clean=True)
    store = Store.open(tmp_path / "store", time.time_ns())
    assert [row[0] for row in store.database.rows("SELECT acl FROM acls")] == [1]
    store.close(clean=True)
