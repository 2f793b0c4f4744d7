"""What becomes of bytes that the server refuses: the data layer of a mount against a real server."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable

import pyfuse3
import pytest
import trio
from client_mount import ClientMount, World, new_file, settled
from promisefs_client.data.contents import BLOCK_BYTES, PAGE_BYTES, STORE_BYTES
from promisefs_client.data.filestore import RETRY_AFTER_S
from promisefs_client.errors import FsError
from promisefs_client.fuse.requests import Request, handling
from promisefs_client.rejects.quarantine import kept_in
from promisefs_client.vnodes.vnode import Vnode
from promisefs_protocol.abort import AbortCode, Aborted, errno_of
from promisefs_protocol.messages import FetchData, GetVolumeStatus, SetVolume, StoreData
from server_cell import in_background

ALICE, BOB = 1001, 1002
WHY = AbortCode.ACCES


async def opened(mount: ClientMount, vnode: Vnode, uid: int = ALICE, flags: int = os.O_RDWR) -> int:
    keys = mount.cell.keys
    keys.of(uid).local.update(keys.own.local)  # logged in, as whom does not matter
    mount.table.add_lookup(vnode)
    vnode = await mount.operations._count_as_open(vnode, flags)
    return int(mount.operations._give_handle(vnode, flags, uid).fh)


async def file_of(world: World, mount: ClientMount, content: bytes) -> Vnode:
    await new_file(world, content)
    vnode = await mount.names.lookup(mount.root, b"file")
    assert vnode is not None
    return vnode


async def written_back(mount: ClientMount, handle: int, offset: int, page: bytes) -> None:
    with handling(Request(from_page_cache=True)):
        await mount.operations.write(handle, offset, page)


async def errno_from(call: Awaitable[object]) -> int | None:
    """What the application is told."""
    try:
        await call
    except (pyfuse3.FUSEError, Aborted, FsError) as error:
        return int(error.errno)
    return None


def kept(mount: ClientMount) -> list[tuple[int, int, bytes]]:
    """(uid, offset, bytes) of all that is in the quarantine."""
    rejects, problems = kept_in(mount.rejects)
    assert problems == []
    return sorted((reject.reject.uid, offset, data) for reject in rejects for offset, data in reject.pieces())


async def test_a_refused_write_is_told_once_kept_and_excised(world: World, mount: ClientMount) -> None:
    vnode = await file_of(world, mount, b"server")
    handle = await opened(mount, vnode)
    await mount.operations.write(handle, 3, b"REFUSED")
    assert await mount.read(vnode) == b"serREFUSED"
    mount.session.refuse[StoreData] = WHY
    assert await errno_from(mount.operations.fsync(handle, False)) == errno.EACCES
    assert await mount.read(vnode) == b"server", "the server's bytes, and its size"
    assert vnode.size == 6 and not vnode.is_dirty
    assert mount.drops_of_pages(vnode)
    assert kept(mount) == [(ALICE, 3, b"REFUSED")]
    assert await errno_from(mount.operations.fsync(handle, False)) is None
    assert await errno_from(mount.operations.flush(handle)) is None
    mount.session.refuse.clear()
    await mount.operations.write(handle, 0, b"taken")
    assert await errno_from(mount.operations.fsync(handle, False)) is None
    assert await mount.read(vnode) == b"takenr"


async def test_what_the_timer_had_refused_is_told_by_the_next_call_of_each_open_file(
    world: World, mount: ClientMount
) -> None:
    vnode = await file_of(world, mount, b"")
    first, second, reader = (
        await opened(mount, vnode), await opened(mount, vnode), await opened(mount, vnode, flags=os.O_RDONLY)
    )  # fmt: skip
    await mount.operations.write(first, 0, b"x")
    mount.session.refuse[StoreData] = WHY
    await mount.files.store_quietly(vnode)
    later = await opened(mount, vnode)
    mount.session.refuse.clear()
    with handling(Request(from_page_cache=False)):
        assert await errno_from(mount.operations.write(first, 0, b"next")) == errno.EACCES
        assert await errno_from(mount.operations.write(first, 0, b"next")) is None
    assert await errno_from(mount.operations.flush(second)) == errno.EACCES
    assert await errno_from(mount.operations.flush(second)) is None
    for handle in (later, reader):
        assert await errno_from(mount.operations.flush(handle)) is None, "it wrote nothing before"
    assert await mount.read(vnode) == b"next"


async def test_bytes_written_while_a_store_is_refused_stay(world: World, mount: ClientMount) -> None:
    vnode = await file_of(world, mount, b"s" * 10)
    handle = await opened(mount, vnode)
    await mount.operations.write(handle, 0, b"old!")
    mount.session.refuses = lambda request: (
        WHY if type(request) is StoreData and len(mount.session.sent_of(StoreData)) == 1 else None
    )
    mount.session.hold_before[StoreData] = gate = trio.Event()
    async with in_background(mount.files.store(vnode, sync=False)) as storing:
        await settled()
        await mount.operations.write(handle, 2, b"new")
        gate.set()
        while not storing.done:
            await settled()
    assert isinstance(storing.error, Aborted)
    assert kept(mount) == [(ALICE, 0, b"old!")]
    assert await mount.read(vnode) == b"ssnewsssss"


async def test_stored_bytes_are_not_taken_back_with_refused_ones(world: World, mount: ClientMount) -> None:
    """The second of two megabytes is refused: the first is stored, and so is the size that it made."""
    vnode = await file_of(world, mount, b"")
    handle = await opened(mount, vnode)
    await mount.operations.write(handle, 0, b"1" * STORE_BYTES + b"2" * 10)
    mount.session.refuses = lambda request: AbortCode.DQUOT if type(request) is StoreData and request.offset else None
    assert await errno_from(mount.operations.fsync(handle, False)) == errno.EDQUOT
    assert vnode.size == STORE_BYTES
    assert await mount.read(vnode, STORE_BYTES - 1, 10) == b"1"
    assert kept(mount) == [(ALICE, STORE_BYTES, b"2" * 10)]


async def test_the_size_stays_if_somebody_else_has_extended_the_file(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"abc")
    vnode = await mount.names.lookup(mount.root, b"file")
    assert vnode is not None
    handle = await opened(mount, vnode)
    await mount.operations.write(handle, 8, b"XY")
    await other.store(fid, b"0123456789ABC")
    mount.session.refuse[StoreData] = WHY
    assert await errno_from(mount.operations.fsync(handle, False)) == errno.EACCES
    assert await mount.read(vnode) == b"0123456789ABC"
    assert vnode.size == 13


async def test_each_key_is_told_of_its_own_bytes(world: World, mount: ClientMount) -> None:
    vnode = await file_of(world, mount, b"." * 3 * PAGE_BYTES)
    alice, bob = await opened(mount, vnode, ALICE), await opened(mount, vnode, BOB)
    await mount.operations.write(alice, 0, b"alice")
    await mount.operations.write(bob, PAGE_BYTES, b"bob")
    await mount.operations.write(alice, 2 * PAGE_BYTES, b"ALICE")
    assert not mount.session.sent_of(StoreData)
    mount.session.refuses = lambda request: (
        AbortCode.PERM if type(request) is StoreData and request.offset == PAGE_BYTES else None
    )
    assert await errno_from(mount.operations.fsync(alice, False)) is None
    assert await errno_from(mount.operations.fsync(bob, False)) == errno.EPERM
    assert kept(mount) == [(BOB, PAGE_BYTES, b"bob")]
    assert (await mount.read(vnode)).replace(b".", b"") == b"aliceALICE"


async def test_a_page_with_bytes_of_another_key_is_stored_first(world: World, mount: ClientMount) -> None:
    vnode = await file_of(world, mount, b"." * 10)
    alice, bob = await opened(mount, vnode, ALICE), await opened(mount, vnode, BOB)
    await mount.operations.write(alice, 0, b"alice")
    await mount.operations.write(bob, 3, b"bob")
    assert [call.offset for call in mount.session.sent_of(StoreData)] == [0]
    mount.session.refuse[StoreData] = WHY
    assert await errno_from(mount.operations.fsync(bob, False)) == errno.EACCES
    assert await errno_from(mount.operations.fsync(alice, False)) is None
    assert await mount.read(vnode) == b"alice....."
    assert kept(mount) == [(BOB, 3, b"bob")]


async def test_what_a_mapping_wrote_is_excised_but_not_what_it_writes_afterwards(
    world: World, mount: ClientMount
) -> None:
    """The kernel writes the page back whole once more while it drops it, refused bytes included."""
    vnode = await file_of(world, mount, b"." * PAGE_BYTES)
    handle = await opened(mount, vnode)
    await mount.read(vnode)
    page = bytearray(b"." * PAGE_BYTES)
    page[:7] = b"REFUSED"
    await written_back(mount, handle, 0, bytes(page))
    mount.session.refuse[StoreData] = WHY
    mount.kernel.drops_end = trio.Event()
    async with in_background(errno_from(mount.operations.fsync(handle, False))) as syncing:
        while not mount.drops_of_pages(vnode):
            await settled()
        mount.session.refuse.clear()
        page[10:13] = b"new"  # stored into the mapping meanwhile
        await written_back(mount, handle, 0, bytes(page))
        mount.kernel.drops_end.set()
        while not syncing.done:
            await settled()
    assert kept(mount) == [(ALICE, 0, b"REFUSED")]
    await mount.operations.fsync(handle, False)
    assert (await mount.read(vnode))[:14] == b"..........new."


async def test_a_fetch_under_way_does_not_bring_refused_bytes_back(world: World, mount: ClientMount) -> None:
    """Readahead in flight when bytes are excised: what it brings is as the server has it, or is not taken."""
    vnode = await file_of(world, mount, b"s" * 2 * BLOCK_BYTES)
    handle = await opened(mount, vnode)
    mount.session.hold_after[FetchData] = gate = trio.Event()
    async with in_background(mount.read(vnode, BLOCK_BYTES, 10)) as reading:
        while not mount.session.sent_of(FetchData):
            await settled()
        await mount.operations.write(handle, BLOCK_BYTES, b"REFUSED")
        mount.session.refuse[StoreData] = WHY
        epoch = mount.files.contents(vnode).fill_epoch
        assert await errno_from(mount.operations.fsync(handle, False)) == errno.EACCES
        assert mount.files.contents(vnode).fill_epoch > epoch
        mount.session.hold_after.clear()
        gate.set()
        while not reading.done:
            await settled()
    assert await mount.read(vnode, BLOCK_BYTES, 10) == b"s" * 10


async def test_bytes_that_cannot_be_kept_stay_dirty(
    world: World, mount: ClientMount, caplog: pytest.LogCaptureFixture
) -> None:
    vnode = await file_of(world, mount, b"server")
    handle = await opened(mount, vnode)
    mount.rejects.write_bytes(b"a file in its place")
    await mount.operations.write(handle, 0, b"x")
    mount.session.refuse[StoreData] = WHY
    for _ in range(2):
        assert await errno_from(mount.operations.fsync(handle, False)) == errno.EACCES
        assert vnode.is_dirty and await mount.read(vnode) == b"xerver"
    assert mount.files.refuser.rejects.failures == 2
    assert "cannot be kept" in caplog.text
    mount.rejects.unlink()
    assert await errno_from(mount.operations.fsync(handle, False)) == errno.EACCES
    assert kept(mount) == [(ALICE, 0, b"x")]
    assert await mount.read(vnode) == b"server"


@pytest.mark.parametrize("code", [AbortCode.TOO_MANY, AbortCode.SHUTTING_DOWN, AbortCode.VNOVOL])
async def test_what_may_pass_leaves_the_bytes_dirty(world: World, mount: ClientMount, code: AbortCode) -> None:
    vnode = await file_of(world, mount, b"server")
    handle = await opened(mount, vnode)
    await mount.operations.write(handle, 0, b"x")
    mount.session.refuse[StoreData] = code
    assert await errno_from(mount.operations.fsync(handle, False))
    assert vnode.is_dirty and await mount.read(vnode) == b"xerver"
    assert RETRY_AFTER_S > 0 and not kept(mount)
    mount.session.refuse.clear()
    assert await errno_from(mount.operations.fsync(handle, False)) is None


async def test_what_is_left_when_a_mount_ends_is_kept(world: World, mount: ClientMount) -> None:
    vnode = await file_of(world, mount, b"server")
    handle = await opened(mount, vnode)
    await mount.operations.write(handle, 2, b"LEFT")
    assert await mount.files.refuser.keep_unstored([vnode], "the mount ended") == 4
    assert kept(mount) == [(ALICE, 2, b"LEFT")] and not vnode.is_dirty


async def test_bytes_under_a_lost_lock_are_kept(world: World, mount: ClientMount) -> None:
    vnode = await file_of(world, mount, b"server")
    handle = await opened(mount, vnode)
    await mount.operations.write(handle, 2, b"LOST")
    mount.files.void(vnode)
    assert not vnode.is_dirty
    with trio.fail_after(5):
        while kept(mount) != [(ALICE, 2, b"LOST")]:  # noqa: ASYNC110 (a thread writes it)
            await trio.sleep(0.01)


async def room_is_known(mount: ClientMount, handle: int) -> None:
    """A first write has the mount ask how much room there is."""
    await mount.operations.write(handle, 0, b"first")
    await mount.operations.fsync(handle, False)
    with trio.fail_after(5):
        while not mount.session.sent_of(GetVolumeStatus):
            await settled()
        await settled()


async def test_where_there_is_little_room_write_itself_fails(world: World, mount: ClientMount) -> None:
    vnode = await file_of(world, mount, b"")
    await world.server.administer(SetVolume("root", 100_000, None))
    handle = await opened(mount, vnode)
    await room_is_known(mount, handle)
    with handling(Request(from_page_cache=False)):
        assert await errno_from(mount.operations.write(handle, 0, b"x" * 100)) is None
        assert not vnode.is_dirty, "it went through"
        assert await errno_from(mount.operations.write(handle, 100, bytes(200_000))) == errno.EDQUOT
    assert await errno_from(mount.operations.fsync(handle, False)) is None, "it was told"
    assert vnode.size == 100 and await mount.read(vnode) == b"x" * 100
    assert kept(mount) == [], "nothing was taken"


async def test_where_there_is_room_writes_are_kept_back(world: World, mount: ClientMount) -> None:
    vnode = await file_of(world, mount, b"")
    handle = await opened(mount, vnode)
    await room_is_known(mount, handle)
    for _ in range(10):
        await mount.operations.write(handle, 0, b"x" * 1000)
    assert vnode.is_dirty
    assert len(mount.session.sent_of(GetVolumeStatus)) == 1, "asked again only after a while"


async def test_bytes_of_an_expired_token_wait_for_a_fresh_one(world: World, mount: ClientMount) -> None:
    vnode = await file_of(world, mount, b"server")
    handle = await opened(mount, vnode)
    mount.files.refuser.key_wait_s = 100.0
    mount.session.refuse[StoreData] = AbortCode.KEYEXPIRED
    await mount.operations.write(handle, 0, b"x")
    assert await errno_from(mount.operations.fsync(handle, False)) == errno.EKEYEXPIRED
    assert vnode.is_dirty and not kept(mount)
    mount.session.refuse.clear()  # a fresh token
    assert await errno_from(mount.operations.fsync(handle, False)) is None
    await mount.operations.write(handle, 0, b"y")
    mount.session.refuse[StoreData] = AbortCode.KEYEXPIRED
    mount.files.refuser.key_wait_s = 0.0
    assert await errno_from(mount.operations.fsync(handle, False)) == errno.EKEYEXPIRED
    assert not vnode.is_dirty and kept(mount) == [(ALICE, 0, b"y")]
    assert await mount.read(vnode) == b"xerver"


@pytest.mark.parametrize("code", [AbortCode.KEYREVOKED, AbortCode.KEYREJECTED])
async def test_bytes_of_a_token_that_is_no_good_do_not_wait(world: World, mount: ClientMount, code: AbortCode) -> None:
    vnode = await file_of(world, mount, b"server")
    handle = await opened(mount, vnode)
    mount.files.refuser.key_wait_s = 100.0
    await mount.operations.write(handle, 0, b"x")
    mount.session.refuse[StoreData] = code
    assert await errno_from(mount.operations.fsync(handle, False)) == errno_of(code)
    assert not vnode.is_dirty and kept(mount) == [(ALICE, 0, b"x")]
