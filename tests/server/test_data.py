"""Bytes: what is written is read, holes are zeros, versions label bytes that are never older than they say."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import MAX_FILE_BYTES
from promisefs_protocol.messages import FetchData, StoreData, StoreStatus, Sync
from promisefs_server.store.datafiles import DataFile
from promisefs_server.store.vnodes import key_of
from server_cell import Cell, in_background, running_cell, settled

MIB = 1 << 20


async def test_store_fetch_and_status(cell: Cell) -> None:
    a = await cell.connected()
    f = await a.create(b"f")
    stored = await a.store(f.fid, b"hello")
    assert stored.status.size == 5 and stored.status.data_version == f.status.data_version + 1
    assert stored.status.ctime_ns > f.status.ctime_ns
    assert await a.fetch(f.fid) == b"hello"
    assert await a.fetch(f.fid, 3, 100) == b"lo"
    assert await a.fetch(f.fid, 5, 100) == b"" == await a.fetch(f.fid, MAX_FILE_BYTES, 1)
    before = await a.stat(f.fid)
    assert (await a.store(f.fid, b"")).status == before.status


async def test_given_times_are_kept_to_the_nanosecond(cell: Cell) -> None:
    a = await cell.connected()
    f = await a.create(b"f")
    reply = await a.call(StoreData(f.fid, 0, 123456789_987654321, False), b"x")
    assert reply.entry.status.mtime_ns == 123456789_987654321
    reply = await a.call(StoreStatus(f.fid, None, 1, 2, None, -5, 7))
    status = reply.entry.status
    assert (status.uid, status.gid, status.atime_ns, status.mtime_ns) == (1, 2, -5, 7)


async def test_sparse_and_huge(cell: Cell) -> None:
    a = await cell.connected()
    f = await a.create(b"f")
    stored = await a.store(f.fid, b"end", 5 << 30)
    assert stored.status.size == (5 << 30) + 3
    assert stored.status.allocated < MIB
    assert await a.fetch(f.fid, 5 << 30, 10) == b"end"
    assert await a.fetch(f.fid, 1 << 30, MIB) == bytes(MIB)
    grown = await a.truncate(f.fid, MAX_FILE_BYTES)
    assert grown.status.size == MAX_FILE_BYTES and grown.status.allocated < MIB
    with pytest.raises(Aborted) as refusal:
        await a.store(f.fid, b"xx", MAX_FILE_BYTES - 1)
    assert refusal.value.code == AbortCode.FBIG
    assert (await a.truncate(f.fid, 0)).status.allocated == 0


async def test_too_far_for_the_disk_changes_no_size(cell: Cell) -> None:
    a = await cell.connected()
    f = await a.create(b"f")
    await a.store(f.fid, b"abc")
    with pytest.raises(Aborted) as refusal:
        await a.store(f.fid, b"x", MAX_FILE_BYTES - 1)
    assert refusal.value.code in (AbortCode.FBIG, AbortCode.NOSPC)
    assert (await a.stat(f.fid)).status.size == 3
    assert await a.fetch(f.fid) == b"abc"


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.integers(0, 40000), st.integers(1, 20000)),
        st.tuples(st.just("truncate"), st.integers(0, 60000), st.just(0)),
    ),
    max_size=12,
)


@given(CHANGES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_leaves_the_bytes_of_a_model(tmp_path_factory: pytest.TempPathFactory, changes: list) -> None:  # type: ignore[type-arg]
    async def main() -> None:
        async with running_cell(tmp_path_factory.mktemp("cell") / "store") as cell:
            a = await cell.connected()
            fid = (await a.create(b"f")).fid
            model = bytearray()
            for number, (what, position, length) in enumerate(changes):
                if what == "store":
                    data = bytes([number + 1]) * length
                    model.extend(bytes(max(0, position - len(model))))
                    model[position : position + length] = data
                    status = (await a.store(fid, data, position)).status
                else:
                    model.extend(bytes(max(0, position - len(model))))
                    del model[position:]
                    status = (await a.truncate(fid, position)).status
                assert status.size == len(model)
                assert await a.fetch(fid) == bytes(model)

    trio.run(main)


class HeldWrites:
    """Writes to data files stop until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        write = DataFile.write

        def held(file: DataFile, data: bytes, offset: int) -> None:
            self.begun.set()
            assert self.go_on.wait(20)
            if self.failure is not None:
                write(file, data[: len(data) // 2], offset)
                raise self.failure
            write(file, data, offset)

        monkeypatch.setattr(DataFile, "write", held)

    async def wait_begun(self) -> None:
        assert await trio.to_thread.run_sync(self.begun.wait, 20)


BIG = b"n" * 100_000


async def test_readers_are_told_the_old_status_until_the_bytes_are_there(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = await a.create(b"f")
    old = (await a.store(f.fid, b"o" * 10)).status
    held = HeldWrites(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.store, f.fid, BIG)
        await held.wait_begun()
        seen = await b.stat(f.fid)
        assert seen.status == old and seen.promise_s > 0
        found = await b.lookup(b"f")
        assert found is not None and found.status == old
        entry, data = await b.calls.call(FetchData(f.fid, 0, MIB))
        assert entry.entry.status == old and len(data or b"") == 10
        assert b.breaks == []
        held.go_on.set()
    assert b.broken() == {f.fid}, "who read during the store is told after it"
    assert (await b.stat(f.fid)).status.data_version == old.data_version + 1
    assert await b.fetch(f.fid) == BIG


async def test_a_change_of_status_waits_for_the_store(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = await a.create(b"f")
    held = HeldWrites(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.store, f.fid, BIG)
        await held.wait_begun()
        async with in_background(b.chmod(f.fid, 0o600)) as chmod, in_background(b.unlink(b"f")) as unlink:
            await trio.sleep(0.05)
            assert not chmod.done and not unlink.done
            held.go_on.set()
            with trio.fail_after(10):
                while not (chmod.done and unlink.done):  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert unlink.error is None
    with pytest.raises(Aborted) as refusal:
        await a.stat(f.fid)
    assert refusal.value.code == AbortCode.VNOVNODE


@pytest.mark.parametrize(
    ("failure", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EIO, "broken"), errno.EIO),
        (RuntimeError("can't start new thread"), errno.EIO),
    ],
)
async def test_a_failed_write_is_told_everyone(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, failure: Exception, number: int
) -> None:
    """Half of the bytes may be there, so the old version must not be trusted; the size is the old one."""
    a, b = await cell.connected(), await cell.connected()
    f = await a.create(b"f")
    old = (await a.store(f.fid, b"o" * 10)).status
    await b.stat(f.fid)
    held = HeldWrites(monkeypatch)
    held.failure = failure
    held.go_on.set()
    with pytest.raises(Aborted) as refusal:
        await a.store(f.fid, BIG)
    assert refusal.value.errno == number
    assert b.broken() == {f.fid}
    now = (await b.stat(f.fid)).status
    assert now.data_version > old.data_version and now.size == 10
    monkeypatch.undo()
    await a.truncate(f.fid, 200_000)
    assert (await a.fetch(f.fid))[10:] == bytes(200_000 - 10), "bytes of the failed write came to light"


async def test_a_store_whose_caller_went_away_is_told_all_the_same(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await cell.connected(), await cell.connected()
    f = await a.create(b"f")
    await b.stat(f.fid)
    held = HeldWrites(monkeypatch)
    async with in_background(a.store(f.fid, BIG)):
        await held.wait_begun()
        await a.calls.close()
        held.go_on.set()
        with trio.fail_after(10):
            while b.broken() != {f.fid}:  # noqa: ASYNC110
                await trio.sleep(0.01)
    assert await b.fetch(f.fid) == BIG


async def test_sync_waits_for_the_disk(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await cell.connected()
    f = await a.create(b"f")
    synced = []
    sync = DataFile.sync
    monkeypatch.setattr(DataFile, "sync", lambda file: (synced.append(file.key), sync(file)))
    await a.store(f.fid, b"x")
    assert synced == []
    await a.call(Sync((f.fid,)))
    assert len(synced) == 1
    durability = cell.server.durability
    assert durability._durable_commits == cell.server.store.database.commits
    assert not cell.server.store.files.unsynced and not cell.server.store.files.unsynced_folders
    await a.call(Sync((f.fid,)))
    assert len(synced) == 1, "nothing was written since"
    await a.store(f.fid, b"y", sync=True)
    assert len(synced) == 2 and durability._durable_commits == cell.server.store.database.commits


async def test_a_failed_sync_is_not_hidden(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not by a second one that claims success: the kernel tells of lost pages once."""
    a, b = await cell.connected(), await cell.connected()
    f = await a.create(b"f")
    g = await a.create(b"g")

    def fail(file: DataFile) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(DataFile, "sync", fail)
    with pytest.raises(Aborted) as refusal:
        await a.store(f.fid, b"x", sync=True)
    assert refusal.value.code == AbortCode.IO
    monkeypatch.undo()
    for client in (a, b):
        with pytest.raises(Aborted) as refusal:
            await client.call(Sync((f.fid,)))
        assert refusal.value.code == AbortCode.IO
    with pytest.raises(Aborted):
        await b.store(f.fid, b"y", sync=True)
    await a.store(g.fid, b"x", sync=True)
    assert cell.server.durability.failed, "the store must not be marked clean"


async def test_a_sync_that_could_not_begin_is_made_up_for(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await cell.connected()
    f = await a.create(b"f")
    await a.store(f.fid, b"x")
    synced = []
    sync = DataFile.sync
    monkeypatch.setattr(DataFile, "sync", lambda file: (synced.append(file.key), sync(file)))
    failing = [OSError(errno.EMFILE, "too many open files"), RuntimeError("can't start new thread")]

    def fail(*args: object, **kwargs: object) -> None:
        raise failing[0]

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(cell.server.store.files, "pin", fail)
            with pytest.raises(Aborted):
                await a.call(Sync((f.fid,)))
        failing.pop(0)
    assert not synced
    await a.call(Sync((f.fid,)))
    assert len(synced) == 1 and not cell.server.durability.failed


async def test_group_commit_is_shared(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await cell.connected()
    calls = []
    fdatasync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append(fd), fdatasync(fd)))
    fids = [(await a.create(b"%d" % i)).fid for i in range(20)]
    async with trio.open_nursery() as nursery:
        for _ in fids:
            nursery.start_soon(a.call, Sync(()))
    assert len(calls) <= 3


async def test_descriptors_are_bounded(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promisefs_server.store.datafiles.MAX_OPEN_FILES", 5)
    a = await cell.connected()
    fids = [(await a.create(b"%d" % i)).fid for i in range(20)]
    async with trio.open_nursery() as nursery:
        for fid in fids:
            nursery.start_soon(a.store, fid, BIG)
    for fid in fids:
        assert await a.fetch(fid) == BIG
    assert len(cell.server.store.files) <= 5
    assert not len(cell.server.locks)


async def test_garbage_is_cut_before_a_store_beyond_the_end_is_committed(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash between the two would leave it within the new size."""
    a = await cell.connected()
    f = await a.create(b"f")
    await a.store(f.fid, b"good")
    path = cell.server.store.files.path(key_of(f.fid))
    path.write_bytes(b"goodGARBAGE")
    held = HeldWrites(monkeypatch)
    async with in_background(a.store(f.fid, b"end", 100)) as store:
        await held.wait_begun()
        assert cell.server.store.vnodes.get(f.fid).size == 103
        assert path.read_bytes() == b"good"
        held.go_on.set()
        with trio.fail_after(5):
            while not store.done:
                await settled()
        assert (await a.fetch(f.fid))[:100] == b"good" + bytes(96)


async def test_data_files_go_with_their_vnodes(cell: Cell, folder: Path) -> None:
    a = await cell.connected()
    for i in range(3):
        await a.store((await a.create(b"%d" % i)).fid, b"x")
        await a.unlink(b"%d" % i)
    with trio.fail_after(10):
        while [p for p in (folder / "data").rglob("*") if p.is_file()]:  # noqa: ASYNC110
            await trio.sleep(0.01)
