"""A kernel that may believe in more than a file has is made to ask."""

from __future__ import annotations

import os

from client_mount import ClientMount, World, new_file


async def test_before_a_break_of_an_open_file_is_acknowledged(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    mount.kernel.believed_size = 1
    await other.truncate(fid, 1)
    assert mount.kernel.asked == [vnode.ino]
    assert (vnode.kernel_size.least, vnode.kernel_size.most) == (1, 1)
    await other.truncate(fid, 1)
    assert mount.kernel.asked == [vnode.ino]


async def test_when_a_file_is_opened(world: World, mount: ClientMount) -> None:
    """Attributes that the kernel was told meanwhile it may have thrown away."""
    other, fid = await new_file(world, b"abc")
    vnode = await mount.names.lookup(mount.root, b"file")
    assert vnode is not None
    vnode = mount.table.add_lookup(vnode)
    vnode.kernel_size.believes(3)
    await other.truncate(fid, 1)
    vnode.kernel_size.told(1)
    assert mount.kernel.asked == []
    mount.kernel.believed_size = 1
    await mount.open_handle(vnode, os.O_RDONLY)
    assert mount.kernel.asked == [vnode.ino]


async def test_again_while_it_goes_on_believing(world: World, mount: ClientMount) -> None:
    """It throws the answer away while a write makes the file longer."""
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    mount.kernel.believed_size = 3
    await other.truncate(fid, 1)
    assert len(mount.kernel.asked) > 1
    assert vnode.kernel_size.most == 3


async def test_not_again_if_that_cannot_be_done(world: World, mount: ClientMount) -> None:
    other, fid = await new_file(world, b"abc")
    vnode = await mount.open(b"file")
    await other.truncate(fid, 1)
    assert mount.kernel.asked == [vnode.ino]
    assert await mount.read(vnode) == b"a"
