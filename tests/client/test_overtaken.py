"""Replies to our own changes that come late: another mount's change, its break and what followed came before them."""

from __future__ import annotations

import os

import trio
from client_mount import ClientMount, World, settled
from promisefs_client.data.contents import PAGE_BYTES
from promisefs_client.fuse.attributes import attributes_of
from promisefs_client.vnodes.vnode import Vnode
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import FetchStatus, StoreData
from server_cell import Client, Pending, in_background


async def shared_file(world: World, mount: ClientMount, content: bytes) -> tuple[Client, Fid, Vnode]:
    """Another mount, a file that it made, and our vnode of it, open."""
    other = await world.server.connected()
    made = await other.create(b"file")
    await other.store(made.fid, content)
    vnode = await mount.open(b"file")
    assert await mount.read(vnode) == content
    return other, made.fid, vnode


async def ended(pending: Pending) -> None:
    with trio.fail_after(20):
        while not pending.done:
            await settled()
    assert pending.error is None


async def test_a_store_that_was_overtaken_does_not_bring_its_bytes_back(world: World, mount: ClientMount) -> None:
    """It covers all that the server had of the block; what others wrote over it must not be shown as it was stored."""
    other, fid, vnode = await shared_file(world, mount, b"old")
    mount.session.hold_after[StoreData] = gate = trio.Event()
    await mount.files.write(vnode, 0, b"abc")
    async with in_background(mount.files.store(vnode, sync=False)) as storing:
        await other.store(fid, b"X", 0)
        await mount.cell.validate(vnode)
        gate.set()
        await ended(storing)
    assert mount.cell.valid(vnode)
    assert await mount.read(vnode) == b"Xbc"


async def test_what_the_kernel_was_given_over_a_newer_version_is_dropped(world: World, mount: ClientMount) -> None:
    """Until the reply comes nobody knows which of two stores was first: bytes on their way are shown on top."""
    other, fid, vnode = await shared_file(world, mount, b"old")
    mount.session.hold_after[StoreData] = gate = trio.Event()
    await mount.files.write(vnode, 0, b"abc")
    async with in_background(mount.files.store(vnode, sync=False)) as storing:
        await other.store(fid, b"X", 0)
        assert await mount.read(vnode) == b"abc"
        before = mount.drops_of_pages(vnode)
        gate.set()
        await ended(storing)
        await settled()
    assert mount.drops_of_pages(vnode) == before + 1
    assert await mount.read(vnode) == b"Xbc"


async def test_a_page_made_of_bytes_that_were_overtaken_undoes_nothing(world: World, mount: ClientMount) -> None:
    """The kernel writes it back when it is told to drop it."""
    other, fid, vnode = await shared_file(world, mount, b"o" * PAGE_BYTES)
    handle = await mount.open_handle(vnode, os.O_RDWR)
    mount.session.hold_after[StoreData] = gate = trio.Event()
    await mount.files.write(vnode, 0, b"abc")
    async with in_background(mount.files.store(vnode, sync=False)) as storing:
        await other.store(fid, b"X", 0)
        page = bytearray(await mount.read(vnode))
        page[9] = ord("M")
        mount.kernel.drops_end = trio.Event()
        gate.set()
        await ended(storing)
        await mount.operations.write(handle, 0, bytes(page))
        mount.kernel.drops_end.set()
        await settled()
    await mount.operations.fsync(handle, False)
    assert (await other.fetch(fid))[:10] == b"XbcooooooM"


async def test_a_file_is_opened_with_a_promise_though_a_break_overtook_the_first(
    world: World, mount: ClientMount
) -> None:
    """Else its mapping would never be told of growth, nor of anything."""
    other = await world.server.connected()
    made = await other.create(b"file")
    await other.store(made.fid, b"abc")
    vnode = await mount.names.lookup(mount.root, b"file")
    assert vnode is not None
    attributes_of(mount.table.add_lookup(vnode), 0, 0)
    await other.store(made.fid, b"ABC")
    mount.session.hold_after[FetchStatus] = gate = trio.Event()
    async with in_background(mount.open_handle(vnode, os.O_RDWR)) as opening:
        await other.store(made.fid, b"X", 0)
        await other.store(made.fid, b"de", 3)
        del mount.session.hold_after[FetchStatus]
        gate.set()
        await ended(opening)
    assert mount.cell.valid(vnode)
    assert mount.kernel.bytes_shown == [(vnode.ino, 4, b"e")]


async def test_what_the_kernel_may_not_have_taken_is_not_what_it_was_told(world: World, mount: ClientMount) -> None:
    """Of two answers to requests that were made at the same time it takes the one that it looks at first."""
    other, fid, vnode = await shared_file(world, mount, b"abc")
    mount.close(vnode)
    await other.store(fid, b"de", 3)
    await mount.cell.validate(vnode)
    assert attributes_of(vnode, 0, 0).st_size == 5
    await mount.open_handle(vnode, os.O_RDWR)
    assert mount.kernel.bytes_shown == [(vnode.ino, 4, b"e")]


async def test_a_kernel_that_forgot_a_file_believes_what_it_is_told_next(world: World, mount: ClientMount) -> None:
    other, fid, vnode = await shared_file(world, mount, b"abc")
    mount.close(vnode)
    await other.store(fid, b"de", 3)
    mount.table.forget(vnode.ino, vnode.lookups)
    entry = await mount.operations.lookup(mount.root.ino, b"file", None)  # type: ignore[arg-type]
    assert entry.st_size == 5
    await mount.open_handle(vnode, os.O_RDWR)
    assert mount.kernel.bytes_shown == []


async def test_growth_that_a_read_found_first_is_with_the_kernel_before_the_break_is_acknowledged(world: World) -> None:
    """Who stores into the mapping after that must not have it cut off at the old end."""
    mount = await world.mount(ack_wait_s=20)
    other, fid, vnode = await shared_file(world, mount, b"abc")
    handle = await mount.open_handle(vnode, os.O_RDWR)
    mount.kernel.drops_end, mount.kernel.stores_end = trio.Event(), trio.Event()
    async with in_background(other.store(fid, b"de", 3)) as storing:
        await mount.operations.read(handle, 0, 5)
        mount.kernel.drops_end.set()
        await settled()
        assert mount.kernel.bytes_shown == [(vnode.ino, 4, b"e")]
        assert not storing.done
        mount.kernel.stores_end.set()
        await ended(storing)
