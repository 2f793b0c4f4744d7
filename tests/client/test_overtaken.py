"""Replies to our own changes that come late: another mount's change, its break and what followed came before them."""

from __future__ import annotations

import os

import trio
from client_mount import ClientMount, World, settled
from promisefs_client.attributes import attributes_of
from promisefs_client.vnode import Vnode
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import StoreData
from server_cell import Client, in_background


async def shared_file(world: World, mount: ClientMount, content: bytes) -> tuple[Client, Fid, Vnode]:
    """Another mount, a file that it made, and our vnode of it, open."""
    other = await world.server.connected()
    made = await other.create(b"file")
    await other.store(made.fid, content)
    vnode = await mount.open(b"file")
    assert await mount.read(vnode) == content
    return other, made.fid, vnode


async def test_a_store_that_was_overtaken_does_not_bring_its_bytes_back(world: World, mount: ClientMount) -> None:
    """It covers all that the server had of the block; what others wrote over it must not be shown as it was stored."""
    other, fid, vnode = await shared_file(world, mount, b"old")
    mount.session.hold_after[StoreData] = gate = trio.Event()
    await mount.files.write(vnode, 0, b"abc")
    async with in_background(mount.files.store(vnode, sync=False)) as storing:
        await other.store(fid, b"X", 0)
        await mount.cell.validate(vnode)
        gate.set()
        await settled()
        assert storing.done and storing.error is None
    assert mount.cell.valid(vnode)
    assert await mount.read(vnode) == b"Xbc"


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
