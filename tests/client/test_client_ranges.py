"""Holes, reserved room and copies against a real server: what is cached here, and what is dirty, stays in line."""

from __future__ import annotations

import errno
import os

import pyfuse3
import pytest
import trio
from client_mount import ClientMount, World, new_file, settled
from promisefs_client.data import ranges
from promisefs_client.data.contents import BLOCK_BYTES, PAGE_BYTES
from promisefs_client.errors import ServerUnavailable
from promisefs_client.vnodes.vnode import Vnode
from promisefs_protocol.abort import AbortCode
from promisefs_protocol.messages import CopyRange, Fallocate, FallocateMode, FetchData, Seek, StoreData
from server_cell import in_background

ALLOCATE, KEEP, ZERO = FallocateMode.ALLOCATE, FallocateMode.KEEP_SIZE, FallocateMode.ZERO_RANGE
PUNCH = FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE
WHOLE = 3 * BLOCK_BYTES


@pytest.fixture(autouse=True)
def kernel_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that there is not goes on at once."""
    monkeypatch.setattr(ranges, "KERNEL_PAUSES_S", (0.001,))


async def open_handle(mount: ClientMount, vnode: Vnode, flags: int = os.O_WRONLY) -> int:
    return await mount.open_handle(vnode, flags)


async def errno_of(call: object) -> int:
    with pytest.raises(pyfuse3.FUSEError) as failure:
        await call  # type: ignore[misc]
    return int(failure.value.errno)


@pytest.mark.parametrize("mode", [PUNCH, ZERO])
async def test_zeros_replace_what_is_cached(world: World, mount: ClientMount, mode: int) -> None:
    await new_file(world, b"x" * WHOLE)
    vnode = await mount.open(b"file")
    assert await mount.read(vnode) == b"x" * WHOLE
    fetches = len(mount.session.sent_of(FetchData))
    handle = await open_handle(mount, vnode)
    await mount.operations.fallocate(vnode.ino, handle, mode, BLOCK_BYTES + 10, 1000)
    assert mount.cell.valid(vnode)
    expected = b"x" * (BLOCK_BYTES + 10) + bytes(1000) + b"x" * (2 * BLOCK_BYTES - 1010)
    assert await mount.read(vnode) == expected
    assert len(mount.session.sent_of(FetchData)) == fetches + 1, "only what has changed is fetched again"
    await settled()
    assert not mount.drops_of_pages(vnode), "the kernel makes its pages zeros by itself"


@pytest.mark.parametrize("change", ["punch", "copy"])
async def test_a_fetch_from_before_brings_nothing_back(world: World, mount: ClientMount, change: str) -> None:
    other, _ = await new_file(world, b"x" * WHOLE)
    await other.store((await other.create(b"source")).fid, b"s" * 1000)
    vnode, source = await mount.open(b"file"), await mount.open(b"source")
    handle, from_handle = await open_handle(mount, vnode), await open_handle(mount, source, os.O_RDONLY)
    mount.session.hold_after[FetchData] = gate = trio.Event()
    async with in_background(mount.read(vnode, 0, 100)) as reading:
        del mount.session.hold_after[FetchData]
        if change == "punch":
            await mount.operations.fallocate(vnode.ino, handle, PUNCH, 0, 1000)
        else:
            assert (
                await mount.operations.copy_file_range(source.ino, from_handle, 0, vnode.ino, handle, 0, 1000, 0)
                == 1000
            )
        gate.set()
        await settled()
        assert reading.done
    expected = bytes(100) if change == "punch" else b"s" * 100
    assert await mount.read(vnode, 0, 100) == expected
    assert reading.result == expected, "it looks again"


async def test_dirty_bytes_are_stored_first(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"x" * 1000)
    vnode = await mount.open(b"file")
    handle = await open_handle(mount, vnode)
    await mount.operations.write(handle, 900, b"d" * 200)
    await mount.operations.fallocate(vnode.ino, handle, PUNCH, 950, 100)
    expected = b"x" * 900 + b"d" * 50 + bytes(100) + b"d" * 50
    assert [type(call) for call in mount.session.sent if type(call) in (StoreData, Fallocate)] == [StoreData, Fallocate]
    assert await mount.read(vnode) == await other.fetch(fid) == expected
    assert not vnode.is_dirty and vnode.size == 1100


async def test_room_that_is_reserved(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"x" * 1000)
    vnode = await mount.open(b"file")
    handle = await open_handle(mount, vnode)
    assert await mount.read(vnode) == b"x" * 1000
    version = vnode.status.version
    await mount.operations.fallocate(vnode.ino, handle, KEEP, 0, 1 << 20)
    assert (vnode.size, vnode.status.version) == (1000, version) and vnode.status.allocated >= 1 << 20
    await mount.operations.fallocate(vnode.ino, handle, ALLOCATE, 0, 2000)
    assert vnode.size == 2000 and vnode.kernel_size.least == 2000
    assert await mount.read(vnode) == await other.fetch(fid) == b"x" * 1000 + bytes(1000)
    assert len(mount.session.sent_of(FetchData)) == 1, "the bytes are as they were"


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_a_page_written_back_late_brings_nothing_back(world: World, mount: ClientMount, when: str) -> None:
    """It was read before or meanwhile, and stored into beside the hole, before the kernel made the hole zeros."""
    other, fid = await new_file(world, b"x" * 4 * PAGE_BYTES)
    vnode = await mount.open(b"file")
    handle = await open_handle(mount, vnode, os.O_RDWR)
    if when == "before":
        assert await mount.read(vnode) == b"x" * 4 * PAGE_BYTES
    mount.kernel.drops_end = trio.Event()
    mount.session.hold_before[Fallocate] = gate = trio.Event()
    punch = mount.operations.fallocate(vnode.ino, handle, PUNCH, PAGE_BYTES + 100, 2 * PAGE_BYTES)
    async with in_background(punch):
        assert await mount.read(vnode) == b"x" * 4 * PAGE_BYTES
        gate.set()
        await settled()
    assert mount.drops_of_pages(vnode) == 1
    page = b"x" * 50 + b"mapped" + b"x" * (PAGE_BYTES - 56)
    await mount.operations.write(handle, PAGE_BYTES, page)
    mount.kernel.drops_end.set()
    await settled()
    await mount.operations.fsync(handle, False)
    expected = bytearray(b"x" * 4 * PAGE_BYTES)
    expected[PAGE_BYTES + 50 : PAGE_BYTES + 56] = b"mapped"
    expected[PAGE_BYTES + 100 : 3 * PAGE_BYTES + 100] = bytes(2 * PAGE_BYTES)
    assert await other.fetch(fid) == await mount.read(vnode) == expected


@pytest.mark.parametrize("change", ["punch", "copy"])
async def test_a_page_written_back_meanwhile_brings_nothing_back(world: World, mount: ClientMount, change: str) -> None:
    other, fid = await new_file(world, b"x" * 4 * PAGE_BYTES)
    await other.store((await other.create(b"source")).fid, b"s" * PAGE_BYTES)
    vnode, source = await mount.open(b"file"), await mount.open(b"source")
    from_handle = await open_handle(mount, source, os.O_RDONLY)
    handle = await open_handle(mount, vnode, os.O_RDWR)
    assert await mount.read(vnode) == b"x" * 4 * PAGE_BYTES
    kind = Fallocate if change == "punch" else CopyRange
    mount.session.hold_after[kind] = gate = trio.Event()
    changing = (
        mount.operations.fallocate(vnode.ino, handle, PUNCH, PAGE_BYTES, PAGE_BYTES)
        if change == "punch"
        else mount.operations.copy_file_range(source.ino, from_handle, 0, vnode.ino, handle, PAGE_BYTES, PAGE_BYTES, 0)
    )
    async with in_background(changing) as call:
        page = b"mapped" + b"x" * (2 * PAGE_BYTES - 6)
        await mount.operations.write(handle, PAGE_BYTES, page)
        await mount.operations.write(handle, 0, b"before" + b"x" * (PAGE_BYTES - 6))
        gate.set()
        await settled()
        assert call.done and call.error is None
    await mount.operations.fsync(handle, False)
    data = await other.fetch(fid)
    assert data[PAGE_BYTES : 2 * PAGE_BYTES] == (bytes(PAGE_BYTES) if change == "punch" else b"s" * PAGE_BYTES)
    assert data[:6] == b"before", "what was stored beside the range is not lost"
    assert await mount.read(vnode) == data


async def test_zeros_in_the_kernel_do_not_stay_over_what_came_later(world: World, mount: ClientMount) -> None:
    """The kernel goes on with its answer only when another mount's store, and its break, have passed."""
    other, fid = await new_file(world, b"x" * 1000)
    vnode = await mount.open(b"file")
    handle = await open_handle(mount, vnode)
    assert await mount.read(vnode) == b"x" * 1000
    mount.session.hold_after[Fallocate] = gate = trio.Event()
    async with in_background(mount.operations.fallocate(vnode.ino, handle, PUNCH, 0, 500)) as call:
        await other.store(fid, b"later")
        drops = mount.drops_of_pages(vnode)
        gate.set()
        await settled()
        assert call.done
    assert mount.drops_of_pages(vnode) > drops
    assert await mount.read(vnode) == b"later" + bytes(495) + b"x" * 500


async def test_a_change_of_unknown_outcome(world: World, mount: ClientMount) -> None:
    await new_file(world, b"x" * 1000)
    vnode = await mount.open(b"file")
    handle = await open_handle(mount, vnode)
    assert await mount.read(vnode) == b"x" * 1000
    mount.session.lose_reply.add(Fallocate)
    assert await errno_of(mount.operations.fallocate(vnode.ino, handle, PUNCH, 0, 500)) == errno.ETIMEDOUT
    assert not mount.cell.valid(vnode)
    assert await mount.read(vnode) == bytes(500) + b"x" * 500
    await settled()
    assert mount.drops_of_pages(vnode)
    mount.session.lose_reply.clear()
    mount.session.refuse[Fallocate] = AbortCode.IO  # bytes may have changed before it failed
    assert await errno_of(mount.operations.fallocate(vnode.ino, handle, PUNCH, 0, 600)) == errno.EIO
    assert not mount.cell.valid(vnode)


async def test_a_failed_store_is_a_failed_change(world: World, mount: ClientMount) -> None:
    await new_file(world, b"x" * 1000)
    vnode = await mount.open(b"file")
    handle = await open_handle(mount, vnode)
    await mount.operations.write(handle, 0, b"dirty")
    mount.session.refuse[StoreData] = AbortCode.NOSPC
    assert await errno_of(mount.operations.fallocate(vnode.ino, handle, PUNCH, 0, 500)) == errno.ENOSPC
    assert not mount.session.sent_of(Fallocate)
    mount.session.refuse.clear()
    with pytest.raises(ServerUnavailable):
        mount.session.lose_reply.add(Fallocate)
        await mount.operations._ranges.fallocate(vnode, PUNCH, 0, 1)
    assert not vnode.is_dirty


# Holes that are found


async def test_seeking_sees_what_is_dirty(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"")
    await other.truncate(fid, 1 << 20)
    vnode = await mount.open(b"file")
    handle = await open_handle(mount, vnode)
    assert await errno_of(mount.operations.lseek(vnode.ino, handle, 0, os.SEEK_DATA)) == errno.ENXIO
    await mount.operations.write(handle, 1 << 19, b"d")
    assert await mount.operations.lseek(vnode.ino, handle, 0, os.SEEK_DATA) == 1 << 19
    assert await mount.operations.lseek(vnode.ino, handle, 0, os.SEEK_HOLE) == 0
    await mount.operations.write(handle, 1 << 20, b"d")
    assert await mount.operations.lseek(vnode.ino, handle, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 1
    assert await errno_of(mount.operations.lseek(vnode.ino, handle, (1 << 20) + 1, os.SEEK_HOLE)) == errno.ENXIO
    assert await errno_of(mount.operations.lseek(vnode.ino, handle, 0, os.SEEK_END)) == errno.EINVAL
    assert not mount.drops_of_pages(vnode)


async def test_seeking_has_mapped_pages_written_back(world: World, mount: ClientMount) -> None:
    await new_file(world, b"x")
    vnode = await mount.open(b"file")
    handle = await open_handle(mount, vnode, os.O_RDWR)
    assert await mount.operations.lseek(vnode.ino, handle, 0, os.SEEK_DATA) == 0
    assert mount.drops_of_pages(vnode) == 1
    assert len(mount.session.sent_of(Seek)) == 1


# Copies


async def test_a_copy_takes_what_is_dirty(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"t" * 1000)
    await other.store((await other.create(b"source")).fid, b"s" * 1000)
    vnode, source = await mount.open(b"file"), await mount.open(b"source")
    handle, from_handle = await open_handle(mount, vnode), await open_handle(mount, source, os.O_RDWR)
    assert await mount.read(vnode) == b"t" * 1000
    await mount.operations.write(handle, 0, b"dirty target")
    await mount.operations.write(from_handle, 1000, b"dirty source")
    copied = await mount.operations.copy_file_range(source.ino, from_handle, 500, vnode.ino, handle, 600, 5000, 0)
    assert copied == 512
    assert (
        await mount.read(vnode)
        == await other.fetch(fid)
        == (b"dirty target" + b"t" * 588 + b"s" * 500 + b"dirty source")
    )
    assert vnode.size == vnode.kernel_size.least == 1112
    assert await mount.operations.copy_file_range(source.ino, from_handle, 1012, vnode.ino, handle, 0, 1, 0) == 0


async def test_a_copy_within_a_file(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, bytes(range(200)))
    vnode = await mount.open(b"file")
    handle = await open_handle(mount, vnode)
    await mount.operations.write(handle, 200, b"d" * 50)
    assert await mount.operations.copy_file_range(vnode.ino, handle, 150, vnode.ino, handle, 0, 100, 0) == 100
    assert (
        await mount.read(vnode)
        == await other.fetch(fid)
        == (bytes(range(150, 200)) + b"d" * 50 + bytes(range(100, 200)) + b"d" * 50)
    )


async def test_the_kernel_copies_beside_what_may_be_stored_into_mappings(world: World, mount: ClientMount) -> None:
    other, _ = await new_file(world, b"t" * 4 * PAGE_BYTES)
    await other.store((await other.create(b"source")).fid, b"s" * 2 * PAGE_BYTES)
    vnode, source = await mount.open(b"file"), await mount.open(b"source")
    handle, from_handle = await open_handle(mount, vnode, os.O_RDWR), await open_handle(mount, source, os.O_RDONLY)

    def copy(offset: int, length: int) -> object:
        return mount.operations.copy_file_range(source.ino, from_handle, 0, vnode.ino, handle, offset, length, 0)

    for offset, length in ((1, PAGE_BYTES), (PAGE_BYTES, PAGE_BYTES - 1)):
        assert await errno_of(copy(offset, length)) == errno.EOPNOTSUPP
    assert not mount.session.sent_of(CopyRange)
    assert await copy(PAGE_BYTES, PAGE_BYTES) == PAGE_BYTES  # type: ignore[misc]
    assert await copy(4 * PAGE_BYTES, 100) == 100  # type: ignore[misc]
    await mount.operations.release(handle)
    handle = await open_handle(mount, vnode)
    assert await copy(1, PAGE_BYTES) == PAGE_BYTES  # type: ignore[misc]


async def test_privileges_go(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"x" * 1000)
    vnode = await mount.open(b"file")
    context = pyfuse3.RequestContext()
    handle = (await mount.operations.open(vnode.ino, os.O_WRONLY, context)).fh
    mount.operations._open_files[handle].keeps_privileges = False
    for change in (
        lambda: mount.operations.fallocate(vnode.ino, handle, PUNCH, 0, 1),
        lambda: mount.operations.copy_file_range(vnode.ino, handle, 0, vnode.ino, handle, 10, 1, 0),
    ):
        await other.chmod(fid, 0o4755)
        await mount.cell.validate(vnode)
        await change()
        assert (await other.stat(fid)).status.mode & 0o7777 == 0o755
