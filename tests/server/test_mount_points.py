"""Mount points: names that stand for volumes, and what may be done with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import S_IFMNT, Fid, PromisedStatus
from promisefs_protocol.messages import (
    FetchDirectory,
    MakeMountPoint,
    Operation,
    RemoveMountPoint,
    RenameFlags,
    SetXattr,
)
from server_cell import Cell, Client, running_cell


async def code(awaitable: object) -> AbortCode:
    with pytest.raises(Aborted) as refusal:
        await awaitable  # type: ignore[misc]
    return AbortCode(refusal.value.code)


async def make(client: Client, name: bytes, volume: str = "projects", directory: Fid | None = None) -> PromisedStatus:
    reply = await client.call(MakeMountPoint(client.op(), directory or client.root, name, volume))
    entry: PromisedStatus = reply.entry
    return entry


async def test_a_mount_point_is_a_name_with_a_volume(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    before = (await b.stat(b.root)).status
    made = await make(a, b"p")
    assert b.broken() == {a.root}, "the directory's names have changed"
    status = made.status
    assert status.is_mount_point and not (status.is_dir or status.is_file or status.is_symlink)
    assert (status.mode, status.nlink, status.size) == (S_IFMNT | 0o755, 1, len("projects"))
    assert await a.fetch(made.fid) == b"projects" and made.promise_s > 0
    found = await b.lookup(b"p")
    assert found is not None and (found.fid, found.status) == (made.fid, status)
    after = await b.call(FetchDirectory(b.root, b"", 10))
    assert after.entries == ((b"p", after.entries[0][1]),) and after.entries[0][1].fid == made.fid
    assert after.directory.status.nlink == before.nlink, "it is no subdirectory"


async def test_it_goes_with_a_call_of_its_own_only(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    made = await make(a, b"p")
    await b.stat(made.fid)
    assert await code(a.unlink(b"p")) == AbortCode.BUSY
    assert await code(a.rmdir(b"p")) == AbortCode.BUSY
    assert await a.lookup(b"p") is not None
    reply = await a.call(RemoveMountPoint(a.op(), a.root, b"p"))
    assert reply.entry.fid == made.fid and reply.entry.status.nlink == 0 and reply.entry.promise_s == 0
    assert made.fid in b.broken()
    assert await code(a.stat(made.fid)) == AbortCode.VNOVNODE
    assert await a.lookup(b"p") is None
    assert cell.server.store.database.rows("SELECT * FROM orphan_holders") == []


async def test_only_mount_points_go_with_it(cell: Cell) -> None:
    a = await cell.connected()
    await a.create(b"f")
    await a.mkdir(b"d")
    for name, expected in ((b"f", AbortCode.INVAL), (b"d", AbortCode.INVAL), (b"none", AbortCode.NOENT)):
        assert await code(a.call(RemoveMountPoint(a.op(), a.root, name))) == expected
    assert await a.lookup(b"f") is not None and await a.lookup(b"d") is not None


@pytest.mark.parametrize("volume", ["", "a/b", "x" * 65, "a b", "#root"])
async def test_names_that_no_volume_can_have(cell: Cell, volume: str) -> None:
    a = await cell.connected()
    assert await code(make(a, b"p", volume)) == AbortCode.INVAL
    assert await a.lookup(b"p") is None


async def test_the_name_must_be_free(cell: Cell) -> None:
    a = await cell.connected()
    await a.create(b"f")
    assert await code(make(a, b"f")) == AbortCode.EXIST
    await make(a, b"p")
    assert await code(make(a, b"p")) == AbortCode.EXIST
    assert await code(a.mkdir(b"p")) == AbortCode.EXIST


async def test_what_is_refused_on_one(cell: Cell) -> None:
    a = await cell.connected()
    fid = (await make(a, b"p")).fid
    d = await a.mkdir(b"d")
    await a.create(b"f", d.fid)
    assert await code(a.link(fid, b"l")) == AbortCode.PERM
    assert await code(a.store(fid, b"x")) == AbortCode.INVAL
    assert await code(a.truncate(fid, 0)) == AbortCode.PERM
    assert await code(a.chmod(fid, 0o700)) == AbortCode.PERM
    assert await code(a.call(SetXattr(fid, b"user.x", 0), b"")) == AbortCode.PERM
    assert await code(a.lookup(b"x", fid)) == AbortCode.NOTDIR
    assert await code(a.create(b"x", fid)) == AbortCode.NOTDIR
    assert await code(make(a, b"x", directory=fid)) == AbortCode.NOTDIR
    assert await a.fetch(fid) == b"projects"


async def test_renaming(cell: Cell) -> None:
    a = await cell.connected()
    fid = (await make(a, b"p")).fid
    d = await a.mkdir(b"d")
    f = await a.create(b"f")
    await a.mkdir(b"empty")
    await a.mkdir(b"full")
    full = await a.lookup(b"full")
    assert full is not None
    await a.create(b"x", full.fid)
    root = a.root
    # Nothing is renamed over one, or exchanged with one.
    for name in (b"f", b"empty"):
        assert await code(a.rename((root, name), (root, b"p"))) == AbortCode.BUSY
        for pair in (((root, name), (root, b"p")), ((root, b"p"), (root, name))):
            assert await code(a.rename(*pair, flags=RenameFlags.EXCHANGE)) == AbortCode.BUSY
    assert await code(a.rename((root, b"f"), (root, b"p"), flags=RenameFlags.NOREPLACE)) == AbortCode.EXIST
    # In other respects it is renamed as the directory that it looks like.
    assert await code(a.rename((root, b"p"), (root, b"f"))) == AbortCode.NOTDIR
    assert await code(a.rename((root, b"p"), (root, b"full"))) == AbortCode.NOTEMPTY
    nlink = (await a.stat(root)).status.nlink
    moved = await a.rename((root, b"p"), (d.fid, b"q"))
    assert moved.moved.fid == fid and moved.old_directory.status.nlink == nlink
    assert (await a.stat(d.fid)).status.nlink == 2
    replaced = await a.rename((d.fid, b"q"), (root, b"empty"))
    assert replaced.replaced.status.nlink == 0 and (await a.stat(root)).status.nlink == nlink - 1
    found = await a.lookup(b"empty")
    assert found is not None and found.fid == fid and await a.fetch(fid) == b"projects"
    assert await a.lookup(b"f") is not None and (await a.stat(f.fid)).status.nlink == 1


async def test_a_directory_with_one_is_not_empty(cell: Cell) -> None:
    a = await cell.connected()
    d = await a.mkdir(b"d")
    await make(a, b"p", directory=d.fid)
    assert await code(a.rmdir(b"d")) == AbortCode.NOTEMPTY


async def test_made_and_removed_exactly_once(cell: Cell) -> None:
    a = await cell.connected()
    make_it = MakeMountPoint(Operation(10**6, 0, False), a.root, b"p", "projects")
    first = await a.call(make_it)
    again = await a.call(make_it._replace(operation=Operation(10**6, 0, True)))
    assert again.entry.fid == first.entry.fid
    remove = RemoveMountPoint(Operation(10**6 + 1, 0, False), a.root, b"p")
    await a.call(remove)
    await make(a, b"p")
    await a.call(remove._replace(operation=Operation(10**6 + 1, 0, True)))
    assert await a.lookup(b"p") is not None


async def test_it_survives_a_crash(folder: Path) -> None:
    async with running_cell(folder, clean=False) as cell:
        a = await cell.connected()
        fid = (await make(a, b"p")).fid
    async with running_cell(folder) as cell:
        a = await cell.connected(a.uuid)
        assert (await a.stat(fid)).status.is_mount_point and await a.fetch(fid) == b"projects"
