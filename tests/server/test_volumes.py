"""Several volumes in one store: making, renaming and removing them while clients use them, and what a crash leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import (
    CreateVolume,
    FetchStatus,
    GetEntryByID,
    GetEntryByName,
    GetVolumeStatus,
    InlineBulkStatus,
    ListVolumes,
    RemoveVolume,
    RenameVolume,
    SetXattr,
    VolumeEntry,
    VolumeInfo,
)
from promisefs_protocol.transport import ConnectionLost
from promisefs_server.administration import control_socket
from promisefs_server.errors import StoreError
from promisefs_server.store.datafiles import DataFiles
from promisefs_server.store.membership import ALONE, Membership
from promisefs_server.store.store import Store
from promisefs_server.store.volume_remains import VolumeRemains
from server_cell import LEASE_S, Cell, Client, in_background, running_cell, settled
from trio.testing import MockClock

BETA = Membership("example.org", 1, False)
LISTED = ListVolumes(0)
TABLES = ("volumes", "vnodes", "entries", "xattrs", "orphan_holders")


async def code(awaitable: object) -> AbortCode:
    with pytest.raises(Aborted) as refusal:
        await awaitable  # type: ignore[misc]
    return AbortCode(refusal.value.code)


def rows_of(store: Store, volume: int) -> dict[str, int]:
    """How many rows of each table belong to a volume."""
    low, high = volume << 40, (volume + 1) << 40
    found = {}
    for table, key in zip(TABLES[1:], ("vnode", "directory", "vnode", "vnode"), strict=True):
        ((count,),) = store.database.rows(f"SELECT count(*) FROM {table} WHERE {key} >= ? AND {key} < ?", (low, high))
        if count:
            found[table] = count
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Return when it holds. A socket takes its time, and a clock that only the test moves cannot limit it."""
    for _ in range(1000):
        if condition():
            return
        await settled()
    raise AssertionError("it does not come to that")


async def fill(client: Client, root: Fid) -> list[Fid]:
    """Make something of every kind below `root`. Return what was made."""
    d = await client.mkdir(b"d", root)
    f = await client.create(b"f", d.fid)
    await client.store(f.fid, b"bytes of f")
    await client.call(SetXattr(f.fid, b"user.x", 0), b"value")
    g = await client.create(b"g", root)
    await client.store(g.fid, b"x" * 10_000, 5)
    return [root, d.fid, f.fid, g.fid]


async def test_a_volume_is_a_tree_of_its_own(cell: Cell) -> None:
    a = await cell.connected()
    made = await cell.administer(CreateVolume("second"))
    assert (made.name, made.volume, made.root.volume) == ("second", 2, 2)
    assert made == await a.call(GetEntryByName("second")) == await a.call(GetEntryByID(2))
    assert (await a.call(GetEntryByID(1))).name == "root"
    f = await a.create(b"f", made.root)
    await a.store(f.fid, b"two")
    g = await a.create(b"f")
    await a.store(g.fid, b"one")
    assert f.fid.volume == 2 and g.fid.volume == 1 and f.fid.vnode == 2
    assert (await a.fetch(f.fid), await a.fetch(g.fid)) == (b"two", b"one")
    assert (await a.call(GetVolumeStatus(2))).name == "second"
    assert await code(a.link(f.fid, b"l")) == AbortCode.XDEV
    assert await code(a.rename((a.root, b"f"), (made.root, b"g"))) == AbortCode.XDEV
    # Compared before anything is looked up, so it does not matter where the other volume is.
    assert await code(a.link(f.fid._replace(volume=99), b"l")) == AbortCode.XDEV
    assert a.breaks == [] and a.inits == 1, "making a volume concerns nobody"


async def test_volumes_are_listed_with_what_is_in_them(cell: Cell) -> None:
    a = await cell.connected()
    made = await cell.administer(CreateVolume("second"))
    await fill(a, made.root)
    reply = await cell.administer(LISTED)
    assert reply.volumes == (
        VolumeInfo("root", 1, 1, 0, "", 0, False),
        VolumeInfo("second", 2, 4, 10 + 10_005, "", 0, False),
    )
    assert not reply.more
    assert (await cell.administer(ListVolumes(1))).volumes == reply.volumes[1:]


async def test_pages_of_volumes(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promisefs_server.administration.administration.MAX_PAGE_VOLUMES", 2)
    for name in "abc":
        await cell.administer(CreateVolume(name))
    first = await cell.administer(LISTED)
    second = await cell.administer(ListVolumes(first.volumes[-1].volume))
    assert [i.name for i in (*first.volumes, *second.volumes)] == ["root", "a", "b", "c"]
    assert first.more and not second.more


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 65, "é", "a\n", "root"])
async def test_names_that_volumes_cannot_have(cell: Cell, name: str) -> None:
    assert await code(cell.administer(CreateVolume(name))) in (AbortCode.INVAL, AbortCode.EXIST)
    await cell.administer(CreateVolume("good-Name_1.x"))
    assert await code(cell.administer(RenameVolume("good-Name_1.x", name))) in (AbortCode.INVAL, AbortCode.EXIST)
    assert len((await cell.administer(LISTED)).volumes) == 2


async def test_refusals(cell: Cell) -> None:
    await cell.administer(CreateVolume("a"))
    await cell.administer(CreateVolume("b"))
    assert await code(cell.administer(CreateVolume("a"))) == AbortCode.EXIST
    assert await code(cell.administer(RenameVolume("a", "b"))) == AbortCode.EXIST
    assert await code(cell.administer(RenameVolume("none", "c"))) == AbortCode.VNOVOL
    assert await code(cell.administer(RenameVolume("root", "c"))) == AbortCode.PERM
    assert await code(cell.administer(RemoveVolume("root"))) == AbortCode.PERM
    assert await code(cell.administer(RemoveVolume("none"))) == AbortCode.VNOVOL
    assert [i.name for i in (await cell.administer(LISTED)).volumes] == ["root", "a", "b"]


async def test_administration_is_for_the_control_socket_only(cell: Cell, folder: Path) -> None:
    a = await cell.connected()
    for request in (CreateVolume("x"), LISTED, RemoveVolume("x"), RenameVolume("x", "y")):
        assert await code(a.call(request)) == AbortCode.NOT_INTRODUCED
    for request in (FetchStatus(a.root), GetEntryByName("root"), a.hello_as("calls")):
        assert await code(cell.administer(request)) == AbortCode.NOT_INTRODUCED
    assert (folder / "control").stat().st_mode & 0o777 == 0o600
    await cell.shut_down()
    assert not (folder / "control").exists()
    assert await control_socket.connect(folder) is None


async def test_the_number_of_control_connections_is_bounded(cell: Cell, folder: Path) -> None:
    streams = [await control_socket.connect(folder) for _ in range(20)]
    with trio.fail_after(10):
        for stream in streams[16:]:
            assert stream is not None and await stream.receive_some(1) == b""
    for stream in streams:
        assert stream is not None
        with trio.move_on_after(0.01) as waiting:
            await stream.receive_some(1)
        assert waiting.cancelled_caught == (stream in streams[:16])
        await stream.aclose()
    with trio.fail_after(10):
        while True:
            with suppress(ConnectionLost):
                await cell.administer(LISTED)
                break


async def test_a_folder_with_a_long_name(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    async with running_cell(folder) as cell:
        assert (await cell.administer(CreateVolume("a"))).volume == 2


async def test_what_a_crash_left_of_the_socket_does_not_matter(folder: Path) -> None:
    async with running_cell(folder):
        (folder / "kept").hardlink_to(folder / "control")
    (folder / "kept").rename(folder / "control")
    async with running_cell(folder) as cell:
        await cell.administer(LISTED)


# Clients are told


async def test_after_a_rename_no_client_goes_by_the_old_name(cell: Cell, mock_clock: MockClock) -> None:
    await cell.administer(CreateVolume("a"))
    a, b = await cell.connected(), await cell.connected()
    await b.stat(b.root)
    b.acknowledge_init = trio.Event()
    async with in_background(cell.administer(RenameVolume("a", "b"))) as rename:
        await until(lambda: a.inits == b.inits == 2)
        await settled()
        assert not rename.done, "b may still go by what it knew"
        async with in_background(b.call(GetEntryByName("b"))) as found:
            assert not found.done, "before it has forgotten, b learns nothing"
            b.acknowledge_init.set()
            await until(lambda: found.done)
            assert found.result.volume == 2
        await until(lambda: rename.done)
        assert rename.result == VolumeEntry("b", 2, found.result.root)
    assert await code(a.call(GetEntryByName("a"))) == AbortCode.VNOVOL


async def test_a_client_that_does_not_answer_is_waited_for_one_lease(cell: Cell, mock_clock: MockClock) -> None:
    await cell.administer(CreateVolume("a"))
    b = await cell.connected()
    b.acknowledge_init = trio.Event()
    async with in_background(cell.administer(RemoveVolume("a"))) as removal:
        await until(lambda: b.inits == 2)
        mock_clock.jump(LEASE_S - 0.1)
        await settled()
        assert not removal.done
        mock_clock.jump(0.2)
        await until(lambda: removal.done)
        assert removal.error is None


# Removing


async def test_removing_a_volume_removes_everything_of_it_and_nothing_else(cell: Cell) -> None:
    a = await cell.connected()
    made = await cell.administer(CreateVolume("second"))
    store = cell.server.store
    fids = await fill(a, made.root)
    mine = await fill(a, a.root)
    before = rows_of(store, 1)
    orphan = await a.create(b"o", made.root)
    a.open_fids.add(orphan.fid)
    await a.unlink(b"o", made.root, keep_open=True)
    assert rows_of(store, 2)["orphan_holders"] == 1 and len(rows_of(store, 2)) == 4
    assert store.files.volume_folders(2)
    await cell.administer(RemoveVolume("second"))
    for fid in (*fids, orphan.fid):
        assert await code(a.stat(fid)) == AbortCode.VNOVOL
        assert await code(a.store(fid, b"x")) == AbortCode.VNOVOL
    assert await code(a.create(b"x", made.root)) == AbortCode.VNOVOL
    assert await code(a.call(GetEntryByName("second"))) == AbortCode.VNOVOL
    assert (await a.call(InlineBulkStatus((fids[1], a.root)))).entries[0] == AbortCode.VNOVOL
    with trio.fail_after(10):
        while rows_of(store, 2):
            await settled()
    assert not store.files.volume_folders(2) and not (store.files.folder / "2").exists()
    assert rows_of(store, 1) == before and await a.fetch(mine[2]) == b"bytes of f"
    again = await cell.administer(CreateVolume("second"))
    assert again.volume == 3, "numbers are not used twice"


async def test_a_store_that_is_under_way_when_its_volume_is_removed(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await cell.connected()
    made = await cell.administer(CreateVolume("second"))
    f = await a.create(b"f", made.root)
    store = cell.server.store
    begun, go_on = trio.Event(), trio.Event()
    real = trio.to_thread.run_sync

    async def slow(function: object, *arguments: object, **options: object) -> object:
        if getattr(function, "func", function).__name__ == "write":  # type: ignore[attr-defined]
            begun.set()
            await go_on.wait()
        return await real(function, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("promisefs_server.operations.data.trio.to_thread.run_sync", slow)
    async with in_background(a.store(f.fid, b"x" * 100_000)) as storing:
        await begun.wait()
        await cell.administer(RemoveVolume("second"))
        with trio.fail_after(10):
            while rows_of(store, 2):
                await settled()
        go_on.set()
        with trio.fail_after(10):
            while not storing.done:
                await settled()
        assert isinstance(storing.error, Aborted) and storing.error.code == AbortCode.VNOVOL
    assert not rows_of(store, 2) and not store.files.volume_folders(2) and not len(store.files)
    # Nor is there anything left that could make later syncs fail.
    g = await a.create(b"g")
    await a.store(g.fid, b"y", sync=True)


async def test_a_removal_goes_on_after_a_crash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(remains: VolumeRemains) -> None:
        await trio.sleep_forever()

    with monkeypatch.context() as patch:
        patch.setattr(VolumeRemains, "run", never)
        async with running_cell(folder, clean=False) as cell:
            a = await cell.connected()
            made = await cell.administer(CreateVolume("second"))
            await fill(a, made.root)
            await cell.administer(RemoveVolume("second"))
    async with running_cell(folder) as cell:
        a = await cell.connected()
        assert await code(a.call(GetEntryByID(2))) == AbortCode.VNOVOL
        store = cell.server.store
        with trio.fail_after(10):
            while rows_of(store, 2) or (folder / "data" / "2").exists():
                await settled()


async def test_files_of_others_in_a_removed_volume_stay(
    cell: Cell, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = await cell.connected()
    made = await cell.administer(CreateVolume("second"))
    await fill(a, made.root)
    (inner,) = cell.server.store.files.volume_folders(2)
    (inner / "note").write_text("mine")
    await cell.administer(RemoveVolume("second"))
    with trio.fail_after(10):
        while rows_of(cell.server.store, 2):
            await settled()
    assert [path.name for path in inner.iterdir()] == ["note"]
    assert "has not made" in caplog.text


async def test_data_files_that_cannot_be_deleted_are_tried_again_at_the_next_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(files: DataFiles, key: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(DataFiles, "delete", fails)
        async with running_cell(folder) as cell:
            a = await cell.connected()
            await fill(a, (await cell.administer(CreateVolume("second"))).root)
            await cell.administer(RemoveVolume("second"))
            await until(lambda: "only after the next start" in caplog.text)
            assert rows_of(cell.server.store, 2), "rows go after the files"
    async with running_cell(folder) as cell:
        with trio.fail_after(10):
            while rows_of(cell.server.store, 2) or (folder / "data" / "2").exists():
                await settled()


async def test_nothing_is_deleted_before_the_removal_is_durable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cell(folder, clean=False) as cell:
        a = await cell.connected()
        await fill(a, (await cell.administer(CreateVolume("second"))).root)

        def fails(descriptor: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("promisefs_server.store.durability.os.fdatasync", fails)
        assert await code(cell.administer(RemoveVolume("second"))) == AbortCode.IO
        await settled()
        assert rows_of(cell.server.store, 2) and cell.server.store.files.volume_folders(2)


# Which server of which cell


async def test_a_server_of_a_cell_numbers_its_volumes_apart_from_others(folder: Path) -> None:
    async with running_cell(folder, membership=BETA) as cell:
        assert (await cell.administer(LISTED)).volumes == (), "the first server makes the root volume"
        a = cell.client()
        a.volume = ""
        await a.connect()
        assert await code(a.call(GetEntryByName("root"))) == AbortCode.VNOVOL
        made = await cell.administer(CreateVolume("a"))
        assert made.volume == made.root.volume == 1 << 16 | 1
        f = await a.create(b"f", made.root)
        assert await code(a.call(GetEntryByID(1))) == AbortCode.VNOVOL
        assert await code(a.create(b"f", Fid(1, 1, 7))) == AbortCode.VNOVOL
    async with running_cell(folder, membership=BETA) as cell:
        a = cell.client(a.uuid)
        a.volume = ""
        await a.connect()
        assert (await a.stat(f.fid)).status == f.status


async def test_the_lowest_number_makes_the_root_volume(folder: Path) -> None:
    async with running_cell(folder, membership=Membership("example.org", 3, True)) as cell:
        a = await cell.connected()
        assert a.root.volume == 3 << 16 | 1
        assert (await cell.administer(CreateVolume("a"))).volume == 3 << 16 | 2


async def test_a_store_keeps_its_cell_and_number(folder: Path) -> None:
    async with running_cell(folder, membership=BETA):
        pass
    for other in (ALONE, Membership("example.org", 2, False), Membership("example.net", 1, False)):
        with pytest.raises(
            StoreError, match=r"belongs to server 1 of the cell 'example\.org', and cannot be served as"
        ):
            Store.open(folder, 0, other)
    async with running_cell(folder, membership=BETA):
        pass


async def test_a_lone_store_is_of_no_cell(folder: Path) -> None:
    async with running_cell(folder):
        pass
    with pytest.raises(StoreError, match="belongs to a server without a cell"):
        Store.open(folder, 0, Membership("example.org", 0, True))


async def test_volume_numbers_end(cell: Cell) -> None:
    with cell.server.store.database.transaction():
        cell.server.store.database.execute("UPDATE store SET next_volume = 65535")
    assert (await cell.administer(CreateVolume("last"))).volume == 65535
    assert await code(cell.administer(CreateVolume("more"))) == AbortCode.NOSPC


async def test_garbage_on_the_control_socket(cell: Cell, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    stream = await control_socket.connect(folder)
    assert stream is not None
    await stream.send_all(b"\xff" * 100)
    with trio.fail_after(10):
        assert await stream.receive_some(10) == b""
    await stream.aclose()
    assert "closing the connection" in caplog.text
    await cell.administer(LISTED)
