"""Files that lose their last name while open here: the server must keep exactly those."""

from __future__ import annotations

import pytest
import trio
from client_mount import ClientMount, World, settled
from promisefs_client.errors import ServerUnavailable
from promisefs_client.network import cell
from promisefs_protocol.abort import AbortCode
from promisefs_protocol.messages import GiveUpOpen, RemoveFile, Rename
from server_cell import in_background


@pytest.mark.parametrize("way", ["removed", "renamed over"])
async def test_a_name_that_stands_for_an_open_file_by_now_costs_that_one_nothing(
    world: World, mount: ClientMount, way: str
) -> None:
    """The mount removes what it takes for a closed file; another mount has just given the name to an open one."""
    other = await world.server.connected()
    closed, opened = await other.create(b"name"), await other.create(b"open")
    await other.create(b"new")
    await other.store(opened.fid, b"kept")
    vnode = await mount.open(b"open")
    assert (await mount.names.lookup(mount.root, b"name")).fid == closed.fid  # type: ignore[union-attr]
    mount.session.hold_before[RemoveFile] = mount.session.hold_before[Rename] = gate = trio.Event()
    if way == "removed":
        removal = mount.names.remove_file(mount.root, b"name")
    else:
        removal = mount.names.rename(mount.root, b"new", mount.root, b"name", 0)
    async with in_background(removal) as pending:
        await other.rename((other.root, b"open"), (other.root, b"name"))
        gate.set()
        await settled()
        assert pending.done and pending.error is None
    assert vnode.deleted and vnode.kept
    assert await mount.read(vnode) == b"kept"
    mount.close(vnode)
    await settled()
    assert [call.fids for call in mount.session.sent_of(GiveUpOpen)] == [(opened.fid,)]
    assert world.server.server.store.vnodes.find(vnode.fid.volume << 40 | vnode.fid.vnode) is None


async def test_a_file_kept_for_nothing_is_given_up_at_once(world: World, mount: ClientMount) -> None:
    """The name stood for a file that is open here; by now it stands for one that is not."""
    other = await world.server.connected()
    await other.create(b"name")
    unknown = await other.create(b"unknown")
    await mount.open(b"name")
    mount.session.hold_before[RemoveFile] = gate = trio.Event()
    async with in_background(mount.names.remove_file(mount.root, b"name")):
        await other.rename((other.root, b"unknown"), (other.root, b"name"), keep_open=True)
        gate.set()
        await settled()
    assert [call.fids for call in mount.session.sent_of(GiveUpOpen)] == [(unknown.fid,)]


async def test_a_removal_without_an_answer_is_given_up_at_the_last_close(world: World, mount: ClientMount) -> None:
    other = await world.server.connected()
    made = await other.create(b"name")
    vnode = await mount.open(b"name")
    mount.session.lose_reply.add(RemoveFile)
    with pytest.raises(ServerUnavailable):
        await mount.names.remove_file(mount.root, b"name")
    mount.close(vnode)
    await settled()
    assert [call.fids for call in mount.session.sent_of(GiveUpOpen)] == [(made.fid,)]


async def test_a_server_that_could_not_be_told_of_closed_files_is_told_again(
    world: World, mount: ClientMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell, "GIVE_UP_RETRY_S", 0.01)
    other = await world.server.connected()
    vnodes = []
    for name in (b"1", b"2", b"3"):
        await other.create(name)
        vnodes.append(await mount.open(name))
        await other.unlink(name)
    assert all(vnode.kept for vnode in vnodes)
    keys = [vnode.fid.volume << 40 | vnode.fid.vnode for vnode in vnodes]
    mount.session.refuse[GiveUpOpen] = AbortCode.IO
    for vnode in vnodes:
        mount.close(vnode)
    with trio.fail_after(10):
        while len(mount.session.sent_of(GiveUpOpen)) < 3:  # noqa: ASYNC110 (nothing says it)
            await trio.sleep(0.01)
    assert len(mount.cell.closings) == 3
    assert all(world.server.server.store.vnodes.find(key) is not None for key in keys)
    del mount.session.refuse[GiveUpOpen]
    with trio.fail_after(10):
        while len(mount.cell.closings):  # noqa: ASYNC110 (nothing says it)
            await trio.sleep(0.01)
    assert all(world.server.server.store.vnodes.find(key) is None for key in keys)
    told = len(mount.session.sent_of(GiveUpOpen))
    await trio.sleep(0.05)
    assert len(mount.session.sent_of(GiveUpOpen)) == told
