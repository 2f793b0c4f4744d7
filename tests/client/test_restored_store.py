"""A store brought back from an older backup: what was said before is no measure of what is said now."""

from __future__ import annotations

import shutil
from pathlib import Path

import trio
from client_mount import ClientMount, settled
from promisefs_client.network.servers import Server
from promisefs_protocol.messages import START_ID_BITS
from server_cell import running_cell


async def test_nothing_of_before_is_trusted_when_an_older_store_is_served(tmp_path: Path) -> None:
    folder, backup = tmp_path / "store", tmp_path / "backup"
    async with trio.open_nursery() as nursery:
        async with running_cell(folder, lease_s=1.0) as server:
            other = await server.connected()
            made = await other.create(b"file")
            await other.store(made.fid, b"backup")
        shutil.copytree(folder, backup)
        async with running_cell(folder, lease_s=1.0) as server:
            mount = ClientMount(server, ack_wait_s=1.0, timeout_s=30.0, now=trio.current_time)
            await mount.connect(nursery)
            other = await server.connected()
            for version in range(3):
                await other.store(made.fid, b"%d newer" % version)
            await other.create(b"later")
            vnode = await mount.open(b"file")
            assert await mount.read(vnode) == b"2 newer"
            assert await mount.names.lookup(mount.root, b"later") is not None
            mount.server = None
        shutil.rmtree(folder)
        shutil.copytree(backup, folder)
        async with running_cell(folder, lease_s=1.0) as server:
            mount.server = server
            drops = mount.drops_of_pages(vnode)
            with trio.fail_after(10):
                while not mount.session.connected:  # noqa: ASYNC110 (it has no event for it)
                    await trio.sleep(0.01)
            await settled()
            assert mount.drops_of_pages(vnode) > drops
            assert await mount.read(vnode) == b"backup"
            assert vnode.status.size == 6
            assert await mount.names.lookup(mount.root, b"later") is None
            mount.check_invariants()
            mount.server = None
        nursery.cancel_scope.cancel()


def test_which_runs_of_a_server_are_of_an_older_store() -> None:
    server = Server("test")
    for start_id in (5 << START_ID_BITS | 77, 5 << START_ID_BITS | 77, 6 << START_ID_BITS | 3):
        server.met(start_id)
        assert not server.restored
    server.met(6 << START_ID_BITS | 4)
    assert server.restored
    server.restored = False
    server.met(2 << START_ID_BITS | 1)
    assert server.restored
