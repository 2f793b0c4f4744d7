"""What a mount knows of rights: whose, under which promise, and what it tells the kernel that everybody may see."""

from __future__ import annotations

import os

import pytest
from promisefs_client.data.contents import PageCache
from promisefs_client.errors import FsError
from promisefs_client.identity.key import Credentials
from promisefs_client.identity.local_access import may_access_directory, may_access_file, require_open
from promisefs_client.network.servers import Server
from promisefs_client.vnodes.vnode import Vnode
from promisefs_client.vnodes.vnode_table import MAX_KEYS_OF_VNODE, VnodeTable
from promisefs_client.vnodes.volumes import Volumes
from promisefs_protocol.ids import Fid, PromisedStatus, Status
from promisefs_protocol.messages import Break, Changed
from promisefs_protocol.rights import ALL_RIGHTS, OWNER, SUPERUSER, Rights

ROOT, FILE = Fid(1, 1, 1), Fid(1, 2, 7)
LOOK, READ, WRITE = Rights.LOOKUP, Rights.READ, Rights.WRITE
ALICE, BOB = Credentials(), Credentials()


def status(ctime: int = 1, mode: int = 0o100644) -> Status:
    return Status(mode, 0, 0, 1, 0, 0, 1, 1, 0, 0, ctime, 0)


@pytest.fixture
def table() -> VnodeTable:
    server, volumes = Server("alpha"), Volumes()
    server.lease_until = 1e9
    mounted = volumes.learn(1, "root", ROOT, server)
    return VnodeTable(PageCache(1 << 20), volumes, mounted, status(mode=0o040755), max_idle=100)


def told(
    table: VnodeTable,
    key: Credentials,
    rights: int,
    *,
    ctime: int = 1,
    promise_s: int = 1000,
    now: float = 0.0,
    anyone: int = 0,
) -> Vnode:
    mark = table.volumes[1].server.begin_call(now, key)
    try:
        return table.install(PromisedStatus(FILE, status(ctime), promise_s, rights, anyone), mark)
    finally:
        mark.server.end_call(mark)


def test_rights_are_known_of_who_has_asked(table: VnodeTable) -> None:
    vnode = told(table, ALICE, READ | LOOK)
    assert (vnode.rights_of(ALICE), vnode.rights_of(BOB)) == (READ | LOOK, None)
    told(table, BOB, LOOK)
    assert (vnode.rights_of(ALICE), vnode.rights_of(BOB)) == (READ | LOOK, LOOK)


def test_they_end_with_the_promise(table: VnodeTable) -> None:
    vnode = told(table, ALICE, READ)
    table.break_promises(vnode.server, [Break(FILE, Changed.STATUS, 1)])
    assert not table.valid(vnode, 0.0)
    told(table, BOB, LOOK)
    assert vnode.rights_of(ALICE) is None, "hers may be others by now"
    told(table, ALICE, READ, now=2000.0)
    assert vnode.rights_of(BOB) is None, "the promise had run out"
    told(table, BOB, READ, promise_s=0, now=2000.0)
    assert vnode.rights_of(BOB) is None, "nobody would tell us of a change"


def test_they_end_with_a_change_that_was_made_here(table: VnodeTable) -> None:
    """Of which nobody tells us: a file that is moved or given away has other rights."""
    vnode = told(table, BOB, READ)
    told(table, ALICE, READ, ctime=2)
    assert vnode.rights_of(BOB) is None


def test_what_a_break_has_overtaken_is_not_kept(table: VnodeTable) -> None:
    vnode = told(table, BOB, READ)
    mark = vnode.server.begin_call(0.0, ALICE)
    table.break_promises(vnode.server, [Break(FILE, Changed.STATUS, 1)])
    table.install(PromisedStatus(FILE, status(2), 1000, READ, READ), mark)
    assert vnode.rights_of(ALICE) is None and not table.valid(vnode, 0.0)


def test_a_bounded_number_of_keys(table: VnodeTable) -> None:
    keys = [Credentials() for _ in range(MAX_KEYS_OF_VNODE + 3)]
    for key in keys:
        vnode = told(table, key, READ)
    assert [vnode.rights_of(key) for key in keys] == [None] * 3 + [READ] * MAX_KEYS_OF_VNODE


def test_the_kernel_of_a_shared_mount_keeps_what_everybody_may_see(table: VnodeTable) -> None:
    vnode = told(table, ALICE, READ | LOOK)
    assert table.remaining_s(vnode, 0.0) > 0
    table.shared = True
    assert table.remaining_s(vnode, 0.0) == 0
    told(table, ALICE, READ | LOOK, ctime=2, anyone=LOOK)
    assert table.remaining_s(vnode, 0.0) > 0
    told(table, ALICE, READ | LOOK, ctime=3, anyone=READ)
    assert table.remaining_s(vnode, 0.0) == 0


# What local processes may do


@pytest.mark.parametrize(
    ("rights", "mode", "wanted", "may"),
    [
        (READ, 0o600, os.R_OK, True), (READ, 0o600, os.W_OK, False), (READ | WRITE, 0o400, os.W_OK, False),
        (READ | WRITE | OWNER, 0o400, os.W_OK, False), (READ | WRITE, 0o200, os.R_OK, False),
        (READ, 0o500, os.X_OK, True), (READ, 0o600, os.X_OK, False), (READ, 0o077, os.X_OK, False),
        (ALL_RIGHTS | SUPERUSER, 0, os.R_OK | os.W_OK, True), (ALL_RIGHTS | SUPERUSER, 0o600, os.X_OK, False),
        (ALL_RIGHTS | SUPERUSER, 0o010, os.X_OK, True), (0, 0o777, os.F_OK, True),
    ],
)  # fmt: skip
def test_access_to_files(rights: int, mode: int, wanted: int, may: bool) -> None:
    assert may_access_file(rights, mode, wanted) is may


@pytest.mark.parametrize(
    ("rights", "wanted", "may"),
    [
        (LOOK, os.R_OK | os.X_OK, True), (READ | WRITE, os.X_OK, False), (LOOK, os.W_OK, False),
        (Rights.INSERT, os.W_OK, True), (Rights.DELETE, os.W_OK, True), (0, os.F_OK, True),
    ],
)  # fmt: skip
def test_access_to_directories(rights: int, wanted: int, may: bool) -> None:
    assert may_access_directory(rights, wanted) is may


@pytest.mark.parametrize(
    ("flags", "needs"),
    [
        (os.O_RDONLY, READ), (os.O_WRONLY, WRITE), (os.O_RDWR, READ | WRITE), (os.O_RDONLY | os.O_TRUNC, READ | WRITE),
        (os.O_WRONLY | os.O_APPEND, WRITE),
    ],
)  # fmt: skip
def test_what_open_takes(flags: int, needs: Rights) -> None:
    require_open(needs, 0o600, flags)
    for missing in needs:
        with pytest.raises(FsError):
            require_open(ALL_RIGHTS & ~missing, 0o600, flags)
