"""Operations on names happen exactly once, however often the call is repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.messages import CreateFile, MakeDir, Operation, RemoveFile
from server_cell import Cell, running_cell


async def test_a_repetition_gets_the_first_reply_without_promises(cell: Cell) -> None:
    a = await cell.connected()
    request = CreateFile(Operation(1, 0, False), a.root, b"f", 0o644, 0, 0)
    first = await a.call(request)
    again = await a.call(request._replace(operation=Operation(1, 0, True)))
    assert again.entry.fid == first.entry.fid and again.entry.status == first.entry.status
    assert first.entry.promise_s > 0 and again.entry.promise_s == 0


async def test_a_repeated_removal_does_not_remove_its_successor(cell: Cell) -> None:
    a = await cell.connected()
    b = await cell.connected()
    await a.create(b"f")
    remove = RemoveFile(Operation(100, 0, False), a.root, b"f", None)
    await a.call(remove)
    successor = await b.create(b"f")
    await a.call(remove._replace(operation=Operation(100, 0, True)))
    found = await a.lookup(b"f")
    assert found is not None and found.fid == successor.fid


async def test_a_repetition_of_what_never_arrived_is_carried_out(cell: Cell) -> None:
    a = await cell.connected()
    await a.call(CreateFile(Operation(7, 0, True), a.root, b"f", 0o644, 0, 0))
    assert await a.lookup(b"f") is not None


async def test_a_number_belongs_to_one_operation(cell: Cell) -> None:
    a = await cell.connected()
    await a.call(CreateFile(Operation(1, 0, False), a.root, b"f", 0o644, 0, 0))
    with pytest.raises(Aborted) as refusal:
        await a.call(MakeDir(Operation(1, 0, True), a.root, b"d", 0o755, 0, 0))
    assert refusal.value.code == AbortCode.INVAL
    with pytest.raises(Aborted):
        await a.call(MakeDir(Operation(1, 0, False), a.root, b"d", 0o755, 0, 0))
    assert await a.lookup(b"d") is None
    # Another client's numbers are its own.
    b = await cell.connected()
    await b.call(MakeDir(Operation(1, 0, False), b.root, b"d", 0o755, 0, 0))


async def test_replies_survive_a_crash_and_go_when_done_with(folder: Path) -> None:
    async with running_cell(folder, clean=False) as cell:
        a = await cell.connected()
        first = await a.call(CreateFile(Operation(1, 0, False), a.root, b"f", 0o644, 0, 0))
        uuid = a.uuid
    async with running_cell(folder) as cell:
        a = await cell.connected(uuid)
        again = await a.call(CreateFile(Operation(1, 0, True), a.root, b"f", 0o644, 0, 0))
        assert again.entry.fid == first.entry.fid
        await a.call(CreateFile(Operation(200, 200, False), a.root, b"g", 0o644, 0, 0))
        kept = cell.server.store.database.rows("SELECT number FROM replies")
        assert kept == [(200,)]


async def test_a_repetition_waits_for_the_breaks_of_the_first_time(cell: Cell) -> None:
    a = await cell.connected()
    b = await cell.connected()
    await b.stat(b.root)
    b.acknowledge = trio.Event()
    request = CreateFile(Operation(1, 0, False), a.root, b"f", 0o644, 0, 0)
    with trio.move_on_after(0.1) as impatient:
        await a.call(request)
    assert impatient.cancelled_caught
    with trio.move_on_after(0.1) as impatient:
        await a.call(request._replace(operation=Operation(1, 0, True)))
    assert impatient.cancelled_caught, "the reply came before the break was acknowledged"
    b.acknowledge.set()
    await a.call(request._replace(operation=Operation(1, 0, True)))


async def test_replies_are_bounded(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promisefs_server.store.replies.MAX_KEPT", 100)
    monkeypatch.setattr("promisefs_server.store.replies.DONE_BATCH", 10)
    a, b = await cell.connected(), await cell.connected()

    async def create(number: int, done_below: int) -> None:
        await a.call(CreateFile(Operation(number, done_below, False), a.root, b"%d" % number, 0o644, 0, 0))

    for number in range(1, 101):
        await create(number, 0)
    for _ in range(2):
        with pytest.raises(Aborted) as refusal:
            await create(101, 0)
        assert refusal.value.code == AbortCode.TOO_MANY
    assert await a.lookup(b"101") is None, "what is refused has not happened"
    await a.call(CreateFile(Operation(5, 0, True), a.root, b"5", 0o644, 0, 0))  # a repetition needs no room
    await b.create(b"another's")
    await create(101, 51)
    rows = "SELECT count(*) FROM replies JOIN hosts USING (host) WHERE uuid = ?"
    assert cell.server.store.database.rows(rows, (a.uuid,)) == [(51,)]
    for number in range(102, 151):
        await create(number, 51)
    with pytest.raises(Aborted):
        await create(151, 51)
