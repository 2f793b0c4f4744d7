"""Fallocate, Seek and CopyRange: bytes, sizes, room on the disk, who is told, and what happens half-way."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import MAX_FILE_BYTES, Fid, PromisedStatus
from promisefs_protocol.messages import Changed, CopyRange, CopyRangeReply, Fallocate, FallocateMode, Seek, Sync
from promisefs_server.operations import ranges as operations_ranges
from promisefs_server.store import ballast, ranges
from promisefs_server.store.ballast import Ballast
from promisefs_server.store.vnodes import key_of
from server_cell import Cell, Client, in_background, running_cell, settled

KIB = 1024
MIB = 1024 * KIB
ALLOCATE, KEEP, ZERO = FallocateMode.ALLOCATE, FallocateMode.KEEP_SIZE, FallocateMode.ZERO_RANGE
PUNCH = FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE
TOLD = {ALLOCATE: Changed.STATUS, PUNCH: Changed.STATUS | Changed.DATA, ZERO: Changed.STATUS | Changed.DATA}


async def fallocate(client: Client, fid: Fid, mode: int, offset: int, length: int) -> PromisedStatus:
    entry: PromisedStatus = (await client.call(Fallocate(fid, mode, offset, length))).entry
    return entry


async def seek(client: Client, fid: Fid, offset: int, *, hole: bool = False) -> int | None:
    found: int | None = (await client.call(Seek(fid, offset, hole))).offset
    return found


async def copy(client: Client, source: Fid, source_offset: int, fid: Fid, offset: int, length: int) -> CopyRangeReply:
    reply: CopyRangeReply = await client.call(CopyRange(fid, offset, source, source_offset, length))
    return reply


async def file_with(client: Client, data: bytes, name: bytes = b"f") -> Fid:
    fid = (await client.create(name)).fid
    if data:
        await client.store(fid, data)
    return fid


class Held:
    """A function of `ranges` that waits before it begins, and may fail half-way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.failure: OSError | None = None
        real = getattr(ranges, name)

        def held(*arguments: Any) -> None:
            self.begun.set()
            assert self.go_on.wait(20)
            if self.failure is not None:
                real(*arguments[:-1], arguments[-1] // 2)
                raise self.failure
            real(*arguments)

        monkeypatch.setattr(ranges, name, held)

    async def wait_begun(self) -> None:
        assert await trio.to_thread.run_sync(self.begun.wait, 20)


# Room on the disk


async def test_a_hole_is_zeros_and_frees_room(cell: Cell) -> None:
    a = await cell.connected()
    fid = await file_with(a, b"x" * MIB)
    before = (await a.stat(fid)).status
    after = (await fallocate(a, fid, PUNCH, 128 * KIB + 1, 512 * KIB)).status
    assert after.size == MIB and after.data_version == before.data_version + 1
    assert after.ctime_ns > before.ctime_ns and after.mtime_ns > before.mtime_ns
    assert after.allocated <= before.allocated - 500 * KIB
    expected = b"x" * (128 * KIB + 1) + bytes(512 * KIB) + b"x" * (384 * KIB - 1)
    assert await a.fetch(fid) == expected


async def test_the_last_block_is_freed_too(cell: Cell) -> None:
    a = await cell.connected()
    fid = await file_with(a, b"x" * (64 * KIB + 1))
    assert (await fallocate(a, fid, PUNCH, 0, MIB)).status.allocated == 0
    assert await a.fetch(fid) == bytes(64 * KIB + 1)


async def test_zeros_keep_their_room(cell: Cell) -> None:
    a = await cell.connected()
    fid = await file_with(a, b"x" * MIB)
    status = (await fallocate(a, fid, ZERO, 100, 512 * KIB)).status
    assert status.size == MIB and status.allocated >= MIB
    assert await a.fetch(fid) == b"x" * 100 + bytes(512 * KIB) + b"x" * (512 * KIB - 100)


@pytest.mark.parametrize("mode", [ALLOCATE, KEEP, ZERO, ZERO | KEEP])
async def test_room_is_reserved_on_disk(cell: Cell, mode: int) -> None:
    a = await cell.connected()
    fid = await file_with(a, b"abc")
    before = (await a.stat(fid)).status
    status = (await fallocate(a, fid, mode, 1, MIB)).status
    grown = not mode & KEEP
    assert status.size == (MIB + 1 if grown else 3)
    assert (status.data_version > before.data_version) == bool(grown or mode & ZERO)
    assert os.stat(cell.server.store.files.path(key_of(fid))).st_blocks * 512 >= MIB
    assert status.allocated >= MIB
    expected = b"a\0\0" if mode & ZERO else b"abc"
    assert await a.fetch(fid, 0, 10) == expected + bytes(7 if grown else 0)


async def test_what_lay_behind_the_end_does_not_come_to_light(cell: Cell) -> None:
    """A crash between a store and the commit of its size leaves such garbage."""
    a = await cell.connected()
    for number, mode in enumerate((ALLOCATE, ZERO)):
        fid = await file_with(a, b"abc", b"f%d" % number)
        with cell.server.store.files.path(key_of(fid)).open("ab") as file:
            file.write(b"garbage" * 10000)
        await fallocate(a, fid, mode, 20, 100)
        assert await a.fetch(fid) == b"abc" + bytes(117)
    source = await file_with(a, b"s", b"source")
    fid = await file_with(a, b"abc", b"target")
    with cell.server.store.files.path(key_of(fid)).open("ab") as file:
        file.write(b"garbage")
    assert (await copy(a, source, 0, fid, 8, 5)).copied == 1
    assert await a.fetch(fid) == b"abc" + bytes(5) + b"s"


async def test_what_is_reserved_does_not_outgrow_a_full_disk(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await cell.connected()
    fid = await file_with(a, b"abc")
    source = await file_with(a, b"abc", b"source")
    monkeypatch.setattr(ballast, "POLL_S", 0.0)
    monkeypatch.setattr(Ballast, "available_bytes", lambda self: ballast.BALLAST_BYTES + MIB)
    for refused in (fallocate(a, fid, ALLOCATE, 0, MIB + 1), fallocate(a, fid, ZERO, 0, MIB + 1)):
        with pytest.raises(Aborted) as refusal:
            await refused
        assert refusal.value.code == AbortCode.NOSPC
    monkeypatch.setattr(Ballast, "available_bytes", lambda self: 0)
    with pytest.raises(Aborted) as refusal:
        await copy(a, source, 0, fid, 0, 3)
    assert refusal.value.code == AbortCode.NOSPC
    await fallocate(a, fid, PUNCH, 0, 2)  # frees space: never refused
    assert await a.fetch(fid) == b"\0\0c"


async def test_a_disk_that_can_do_nothing_of_this(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not on this disk")

    monkeypatch.setattr(ranges, "_fallocate", unsupported)
    monkeypatch.setattr(os, "copy_file_range", unsupported)
    monkeypatch.setattr(ranges, "PIECE_BYTES", 1000)
    a = await cell.connected()
    fid = await file_with(a, b"x" * 5000)
    await fallocate(a, fid, PUNCH, 1000, 2500)
    await fallocate(a, fid, ZERO, 4999, 2)
    expected = b"x" * 1000 + bytes(2500) + b"x" * 1499 + bytes(2)
    assert await a.fetch(fid) == expected
    with pytest.raises(Aborted) as refusal:
        await fallocate(a, fid, ALLOCATE, 0, 1)
    assert refusal.value.code == AbortCode.NOTSUP
    other = await file_with(a, b"", b"other")
    assert (await copy(a, fid, 1, other, 0, 5001)).copied == 5000
    assert await a.fetch(other) == expected[1:]


@pytest.mark.parametrize(
    "mode", [FallocateMode.PUNCH_HOLE, PUNCH | ZERO, 8, 9, 32, 64, ALLOCATE | 128]
)  # collapse, insert, unshare
async def test_other_modes_are_not_supported(cell: Cell, mode: int) -> None:
    a = await cell.connected()
    fid = await file_with(a, b"abc")
    with pytest.raises(Aborted) as refusal:
        await fallocate(a, fid, mode, 0, 1)
    assert refusal.value.code == AbortCode.NOTSUP


async def test_what_cannot_be(cell: Cell) -> None:
    a = await cell.connected()
    fid = await file_with(a, b"abcdef")
    directory = (await a.mkdir(b"d")).fid
    for call, code in (
        (Fallocate(fid, ALLOCATE, MAX_FILE_BYTES, 1), AbortCode.FBIG),
        (Fallocate(fid, PUNCH, MAX_FILE_BYTES, 1), AbortCode.FBIG),
        (Fallocate(fid, ALLOCATE, 0, 0), AbortCode.BAD_MESSAGE),
        (Fallocate(directory, ALLOCATE, 0, 1), AbortCode.ISDIR),
        (Seek(directory, 0, False), AbortCode.ISDIR),
        (CopyRange(directory, 0, fid, 0, 1), AbortCode.ISDIR),
        (CopyRange(fid, 1, fid, 0, 2), AbortCode.INVAL),
        (CopyRange(fid, MAX_FILE_BYTES, fid, 0, 2), AbortCode.FBIG),
        (CopyRange(fid, 0, fid._replace(volume=fid.volume + 1), 0, 2), AbortCode.XDEV),
        (CopyRange(fid, 0, fid._replace(uniquifier=fid.uniquifier ^ 1), 0, 2), AbortCode.VNOVNODE),
    ):
        with pytest.raises(Aborted) as refusal:
            await a.call(call)
        assert refusal.value.code == code, call
    assert await a.fetch(fid) == b"abcdef"


# Who is told


@pytest.mark.parametrize("mode", TOLD)
async def test_others_are_told_before_the_reply(cell: Cell, mode: FallocateMode) -> None:
    a, b = await cell.connected(), await cell.connected()
    fid = await file_with(a, b"x" * 10000)
    await b.stat(fid)
    b.acknowledge = trio.Event()
    async with in_background(fallocate(a, fid, mode, 100, 200)) as call:
        assert [(item.fid, item.changed) for item in b.breaks] == [(fid, TOLD[mode])]
        assert not call.done
        b.acknowledge.set()
        await settled()
        assert call.done and call.error is None
    assert a.breaks == []


async def test_a_copy_breaks_promises_on_its_target_only(cell: Cell) -> None:
    a, b = await cell.connected(), await cell.connected()
    source, fid = await file_with(a, b"new", b"source"), await file_with(a, b"old")
    for each in (source, fid):
        await b.stat(each)
    await copy(a, source, 0, fid, 0, 3)
    assert [(item.fid, item.changed, item.size) for item in b.breaks] == [(fid, Changed.STATUS | Changed.DATA, 3)]


@pytest.mark.parametrize("what", ["punch", "zero", "copy"])
async def test_the_old_status_is_told_while_bytes_change(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Bytes may be newer than their label, never older; and a label that is out has its break."""
    a, b = await cell.connected(), await cell.connected()
    fid, source = await file_with(a, b"x" * 10000), await file_with(a, b"s" * 10, b"source")
    before = (await a.stat(fid)).status
    held = Held(monkeypatch, what)
    change = (
        copy(a, source, 0, fid, 0, 10)
        if what == "copy"
        else fallocate(a, fid, PUNCH if what == "punch" else ZERO, 0, 10)
    )
    async with in_background(change) as call:
        await held.wait_begun()
        assert (await b.stat(fid)).status == before
        held.go_on.set()
        await call.wait_done()
        assert call.error is None
    assert b.broken() == {fid}
    assert (await b.stat(fid)).status.data_version == before.data_version + 1
    assert await b.fetch(fid, 0, 11) == (b"s" * 10 if what == "copy" else bytes(10)) + b"x"


@pytest.mark.parametrize("what", ["punch", "zero", "copy"])
async def test_a_failure_half_way_is_known_to_everyone(cell: Cell, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    a, b = await cell.connected(), await cell.connected()
    fid, source = await file_with(a, b"x" * 10000), await file_with(a, b"s" * 10, b"source")
    before = (await b.stat(fid)).status
    held = Held(monkeypatch, what)
    held.failure = OSError(errno.EIO, "broken disk")
    held.go_on.set()
    with pytest.raises(Aborted) as refusal:
        await (
            copy(a, source, 0, fid, 9995, 10)
            if what == "copy"
            else fallocate(a, fid, PUNCH if what == "punch" else ZERO, 9995, 10)
        )
    assert refusal.value.code == AbortCode.IO
    assert b.broken() == {fid}
    after = (await b.stat(fid)).status
    assert after.data_version > before.data_version and after.size == 10000


async def test_a_store_waits_for_a_copy_out_of_the_file(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await cell.connected()
    source, fid = await file_with(a, b"old", b"source"), await file_with(a, b"")
    held = Held(monkeypatch, "copy")
    async with in_background(copy(a, source, 0, fid, 0, 3)) as copying:
        await held.wait_begun()
        async with in_background(a.store(source, b"new")) as store:
            assert not store.done
            held.go_on.set()
            await settled()
            assert store.done and copying.done
    assert (await a.fetch(fid), await a.fetch(source)) == (b"old", b"new")


# Holes that are found


async def test_holes_and_data_are_found(cell: Cell) -> None:
    a = await cell.connected()
    fid = (await a.create(b"f")).fid
    assert await seek(a, fid, 0) is None and await seek(a, fid, 0, hole=True) is None
    await a.truncate(fid, MIB)
    assert await seek(a, fid, 5) is None and await seek(a, fid, 5, hole=True) == 5
    await a.store(fid, b"x" * 64 * KIB, 256 * KIB)
    assert await seek(a, fid, 0) == 256 * KIB and await seek(a, fid, 0, hole=True) == 0
    assert await seek(a, fid, 256 * KIB + 1) == 256 * KIB + 1
    assert await seek(a, fid, 256 * KIB + 1, hole=True) == 320 * KIB
    assert await seek(a, fid, 400 * KIB) is None
    assert await seek(a, fid, 400 * KIB, hole=True) == 400 * KIB
    assert await seek(a, fid, MIB) is None and await seek(a, fid, MIB, hole=True) is None
    await a.store(fid, b"x", MIB - 1)
    assert await seek(a, fid, MIB - 1, hole=True) == MIB
    await fallocate(a, fid, PUNCH, 0, MIB)
    assert await seek(a, fid, 0) is None


async def test_garbage_behind_the_end_is_no_data(cell: Cell) -> None:
    a = await cell.connected()
    fid = await file_with(a, b"abc")
    with cell.server.store.files.path(key_of(fid)).open("ab") as file:
        file.write(b"garbage" * 100)
    assert await seek(a, fid, 0, hole=True) == 3
    assert await seek(a, fid, 3) is None


# Copies


async def test_copies_end_where_the_source_ends(cell: Cell) -> None:
    a = await cell.connected()
    source, fid = await file_with(a, b"0123456789", b"source"), await file_with(a, b"")
    assert (await copy(a, source, 8, fid, 3, 100)).copied == 2
    assert await a.fetch(fid) == b"\0\0\x0089"
    version = (await a.stat(fid)).status.data_version
    assert (await copy(a, source, 10, fid, 0, 1)).copied == 0
    assert (await copy(a, source, 0, fid, 0, 0)).copied == 0
    assert (await a.stat(fid)).status.data_version == version
    assert (await copy(a, source, 0, source, 5, 5)).copied == 5
    assert await a.fetch(source) == b"0123401234"


async def test_holes_at_the_sources_end_are_copied_over_data(cell: Cell) -> None:
    a = await cell.connected()
    source, fid = await file_with(a, b"ab", b"source"), await file_with(a, b"x" * 10)
    await a.truncate(source, 6)
    assert (await copy(a, source, 1, fid, 2, 100)).copied == 5
    assert await a.fetch(fid) == b"xxb\0\0\0\0xxx"
    empty = (await a.create(b"empty")).fid
    await a.truncate(empty, 4)
    assert (await copy(a, empty, 0, fid, 0, 4)).copied == 4
    assert await a.fetch(fid) == b"\0\0\0\0\0\0\0xxx"


async def test_long_copies_go_in_pieces(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations_ranges, "MAX_COPY_BYTES", 1000)
    a = await cell.connected()
    data = os.urandom(2500)
    source, fid = await file_with(a, data, b"source"), await file_with(a, b"")
    copied = []
    while reply := (await copy(a, source, sum(copied), fid, sum(copied), 5000)).copied:
        copied.append(reply)
    assert copied == [1000, 1000, 500] and await a.fetch(fid) == data


# Afterwards


async def test_all_of_it_is_durable_after_a_sync(cell: Cell) -> None:
    a = await cell.connected()
    source, fid = await file_with(a, b"x" * 10000, b"source"), await file_with(a, b"x" * 10000)
    for change in (
        Fallocate(fid, PUNCH, 0, 5000),
        Fallocate(fid, KEEP, 0, MIB),
        Fallocate(fid, ZERO, 6000, 10),
        CopyRange(fid, 0, source, 0, 100),
    ):
        await a.call(Sync((fid,)))
        assert not cell.server.store.files.unsynced & {key_of(fid)}
        await a.call(change)
        assert cell.server.store.files.unsynced & {key_of(fid)}, change


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["store", "truncate", "copy", ALLOCATE, KEEP, PUNCH, ZERO, ZERO | KEEP]),
        st.integers(0, 40000),
        st.integers(1, 20000),
        st.integers(0, 40000),
    ),
    max_size=12,
)


@given(CHANGES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_leaves_the_bytes_of_a_model(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[Any, int, int, int]]
) -> None:
    async def main() -> None:
        async with running_cell(tmp_path_factory.mktemp("cell") / "store") as cell:
            a = await cell.connected()
            fid = (await a.create(b"f")).fid
            model = bytearray()

            def grow(size: int) -> None:
                model.extend(bytes(max(0, size - len(model))))

            for number, (what, offset, length, other) in enumerate(changes):
                end = offset + length
                if what == "store":
                    grow(end)
                    model[offset:end] = bytes([number + 1]) * length
                    await a.store(fid, bytes([number + 1]) * length, offset)
                elif what == "truncate":
                    grow(offset)
                    del model[offset:]
                    await a.truncate(fid, offset)
                elif what == "copy":
                    length = max(0, min(length, len(model) - other, abs(offset - other)))
                    grow(offset + length if length else 0)
                    model[offset : offset + length] = model[other : other + length]
                    assert (await copy(a, fid, other, fid, offset, length)).copied == length
                else:
                    if not what & KEEP:
                        grow(end)
                    if what & (PUNCH | ZERO) & ~KEEP:
                        stop = min(end, len(model))
                        model[offset:stop] = bytes(max(0, stop - offset))
                    await fallocate(a, fid, what, offset, length)
                assert await a.fetch(fid) == bytes(model)
                for offset in (0, other):
                    data, hole = await seek(a, fid, offset), await seek(a, fid, offset, hole=True)
                    assert (hole is None) == (offset >= len(model))
                    assert not any(model[offset : len(model) if data is None else data])
                    assert hole is None or offset <= hole <= len(model)

    trio.run(main)


async def test_a_restart_finds_it_all(folder: Path) -> None:
    async with running_cell(folder) as cell:
        a = await cell.connected()
        fid = await file_with(a, b"x" * 100_000)
        await fallocate(a, fid, PUNCH, 0, 65536)
        status = (await fallocate(a, fid, KEEP, MIB, 65536)).status
    async with running_cell(folder) as cell:
        a = await cell.connected()
        again = (await a.stat(fid)).status
        assert (again.size, again.allocated) == (status.size, status.allocated)
        assert await a.fetch(fid) == bytes(65536) + b"x" * (100_000 - 65536)
