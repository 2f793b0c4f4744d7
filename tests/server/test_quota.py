"""Quotas of volumes, exact to the byte, and read-only volumes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import (
    MUTATIONS,
    AppendData,
    CopyRange,
    CreateFile,
    Fallocate,
    FallocateMode,
    GetVolumeStatus,
    Link,
    ListVolumes,
    MakeDir,
    MakeMountPoint,
    RemoveDir,
    RemoveFile,
    RemoveMountPoint,
    RemoveXattr,
    Rename,
    SetVolume,
    SetXattr,
    StoreACL,
    StoreData,
    StoreStatus,
    Symlink,
)
from server_cell import Cell, Client, running_cell

ROOM = 100_000
EACH = 1024
DIRECTORY = 4096


async def code(awaitable: Any) -> int:
    with pytest.raises(Aborted) as caught:
        await awaitable
    return caught.value.code


async def used(a: Client) -> int:
    return int((await a.call(GetVolumeStatus(a.root.volume))).used)


async def with_quota(cell: Cell, size_bytes: int) -> tuple[Client, Fid]:
    """A client, and a file of 10 bytes in a volume that may grow by so much."""
    a = await cell.connected()
    fid = (await a.create(b"file")).fid
    await a.store(fid, b"x" * 10)
    await cell.administer(SetVolume("root", await used(a) + size_bytes, None))
    return a, fid


async def test_a_volume_takes_the_sizes_of_all_that_is_in_it(cell: Cell) -> None:
    a = await cell.connected()
    assert await used(a) == DIRECTORY + EACH
    fid = (await a.create(b"f")).fid
    await a.store(fid, b"x" * 100)
    await a.store(fid, b"y" * 50, 80)
    await a.mkdir(b"d")
    await a.symlink(b"l", b"target")
    await a.link(fid, b"f2")
    assert await used(a) == 2 * DIRECTORY + 4 * EACH + 130 + 6
    await a.truncate(fid, 7)
    await a.unlink(b"l")
    await a.unlink(b"f2")
    assert await used(a) == 2 * DIRECTORY + 3 * EACH + 7
    await a.unlink(b"f")
    await a.rmdir(b"d")
    await cell.server.deletions.finish()
    assert await used(a) == DIRECTORY + EACH
    cell.server.check_store_invariants()


async def test_it_grows_to_the_last_byte_and_no_further(cell: Cell) -> None:
    a, fid = await with_quota(cell, ROOM)
    await a.store(fid, b"x" * ROOM, 10)
    before = await a.stat(fid)
    assert await code(a.store(fid, b"x", ROOM + 10)) == AbortCode.DQUOT
    assert await code(a.store(fid, b"x" * 2 * ROOM, 10)) == AbortCode.DQUOT
    assert (await a.stat(fid)).status == before.status, "a refusal changes nothing"
    await a.store(fid, b"over" * 10, 100)  # what does not grow is taken
    await a.truncate(fid, 10)
    await a.store(fid, b"y" * ROOM, 10)


GROWTHS: list[Callable[[Client, Fid], Any]] = [
    lambda a, fid: a.store(fid, b"x" * (ROOM + 1), 10),
    lambda a, fid: a.call(AppendData(a.op(), fid, None), b"x" * (ROOM + 1)),
    lambda a, fid: a.truncate(fid, ROOM + 11),
    lambda a, fid: a.call(Fallocate(fid, FallocateMode(0), 0, ROOM + 11)),
    lambda a, fid: a.call(Fallocate(fid, FallocateMode.ZERO_RANGE, 0, ROOM + 11)),
    lambda a, fid: a.call(CopyRange(fid, ROOM + 1, fid, 0, 10)),
]
CREATIONS: list[Callable[[Client, Fid], Any]] = [
    lambda a, fid: a.create(b"new"),
    lambda a, fid: a.mkdir(b"new"),
    lambda a, fid: a.symlink(b"new", b"t"),
    lambda a, fid: a.call(MakeMountPoint(a.op(), a.root, b"new", "volume")),
]


@pytest.mark.parametrize("grow", GROWTHS)
async def test_every_kind_of_growth_is_bounded(cell: Cell, grow: Callable[[Client, Fid], Any]) -> None:
    a, fid = await with_quota(cell, ROOM)
    before, took = await a.stat(fid), await used(a)
    assert await code(grow(a, fid)) == AbortCode.DQUOT
    assert (await a.stat(fid)).status == before.status
    assert await a.fetch(fid) == b"x" * 10
    assert await used(a) == took
    await cell.administer(SetVolume("root", 0, None))
    await grow(a, fid)


@pytest.mark.parametrize("create", CREATIONS)
async def test_every_kind_of_creation_is_bounded(cell: Cell, create: Callable[[Client, Fid], Any]) -> None:
    a, fid = await with_quota(cell, EACH - 1)
    assert await code(create(a, fid)) == AbortCode.DQUOT
    assert await a.lookup(b"new") is None
    await a.link(fid, b"another name costs nothing")
    await cell.administer(SetVolume("root", 0, None))
    await create(a, fid)


async def test_a_volume_that_is_over_its_quota_can_be_emptied(cell: Cell) -> None:
    a, fid = await with_quota(cell, ROOM)
    await cell.administer(SetVolume("root", 1, None))
    assert await code(a.store(fid, b"x", 10)) == AbortCode.DQUOT
    await a.store(fid, b"y" * 10)
    await a.truncate(fid, 5)
    await a.unlink(b"file")


async def test_df_shows_the_quota_as_the_size(cell: Cell) -> None:
    a, _ = await with_quota(cell, ROOM)
    status = await a.call(GetVolumeStatus(a.root.volume))
    assert status.quota - status.used == ROOM
    assert status.blocks == status.quota // status.block_bytes
    assert status.blocks_free == status.blocks_available == ROOM // status.block_bytes


async def test_the_usage_is_exact_after_anything(cell: Cell) -> None:
    """Refused and accepted changes at random, some of them from several calls at once."""
    a, _ = await with_quota(cell, ROOM)
    chance = random.Random(3)
    fids: list[tuple[bytes, Fid]] = []
    refused = 0
    for number in range(400):
        try:
            match chance.randrange(5):
                case 0:
                    name = b"%d" % number
                    fids.append((name, (await a.create(name)).fid))
                case 1 if fids:
                    await a.store(chance.choice(fids)[1], bytes(chance.randrange(20_000)), chance.randrange(30_000))
                case 2 if fids:
                    await a.truncate(chance.choice(fids)[1], chance.randrange(40_000))
                case 3 if fids:
                    await a.call(AppendData(a.op(), chance.choice(fids)[1], None), bytes(chance.randrange(1, 9000)))
                case 4 if len(fids) > 3:
                    await a.unlink(fids.pop(chance.randrange(len(fids)))[0])
        except Aborted as refusal:
            assert refusal.code == AbortCode.DQUOT
            refused += 1
        cell.server.check_store_invariants()
    assert refused > 10
    assert await used(a) <= (await a.call(GetVolumeStatus(a.root.volume))).quota


async def test_a_read_only_volume_refuses_every_mutation(cell: Cell) -> None:
    a = await cell.connected()
    fid, directory = (await a.create(b"file")).fid, (await a.mkdir(b"dir")).fid
    await a.store(fid, b"text")
    requests: list[tuple[Any, bytes | None]] = [
        (StoreData(fid, 0, None, False), b"x"),
        (AppendData(a.op(), fid, None), b"x"),
        (StoreStatus(fid, 0o600, None, None, None, None, None), None),
        (StoreACL(directory, (), False), None),
        (Fallocate(fid, 0, 0, 10), None),
        (CopyRange(fid, 0, fid, 2, 1), None),
        (SetXattr(fid, b"user.a", 0), b"x"),
        (RemoveXattr(fid, b"user.a"), None),
        (CreateFile(a.op(), a.root, b"new", 0o100644, 0, 0), None),
        (MakeDir(a.op(), a.root, b"new", 0o755, 0, 0), None),
        (MakeMountPoint(a.op(), a.root, b"new", "v"), None),
        (Symlink(a.op(), a.root, b"new", b"t", 0, 0), None),
        (Link(a.op(), fid, a.root, b"new"), None),
        (RemoveFile(a.op(), a.root, b"file", None), None),
        (RemoveDir(a.op(), a.root, b"dir"), None),
        (RemoveMountPoint(a.op(), a.root, b"m"), None),
        (Rename(a.op(), a.root, b"file", a.root, b"new", 0, None), None),
    ]
    assert {type(request) for request, _ in requests} == set(MUTATIONS)
    inits = a.inits
    await cell.administer(SetVolume("root", None, True))
    assert a.inits == inits + 1, "clients are told before the command returns"
    before = await a.stat(fid)
    for request, bulk in requests:
        assert await code(a.call(request, bulk)) == AbortCode.ROFS, request
    assert (await a.stat(fid)).status == before.status and await a.fetch(fid) == b"text"
    assert (await a.call(GetVolumeStatus(a.root.volume))).read_only
    await cell.administer(SetVolume("root", None, False))
    await a.store(fid, b"X")


async def test_both_survive_a_restart(folder: Path) -> None:
    async with running_cell(folder) as cell:
        await cell.administer(SetVolume("root", 12345, True))
    async with running_cell(folder) as cell:
        (info,) = (await cell.administer(ListVolumes(0))).volumes
        assert (info.quota, info.read_only) == (12345, True)
