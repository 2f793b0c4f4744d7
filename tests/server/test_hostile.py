"""Bad peers: each gets a clear refusal or a closed connection, and everybody else is served on."""

from __future__ import annotations

import logging
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from promisefs_protocol import fields
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.connection import HEADER, MAX_FRAME_BYTES
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import (
    METHODS,
    PROTOCOL_VERSION,
    FetchStatus,
    Hello,
    InlineBulkStatus,
    Lookup,
    Operation,
    Role,
)
from promisefs_protocol.transport import ConnectionLost
from promisefs_server.promises.hosts import Host
from server_cell import LEASE_S, Cell, in_background, running_cell, settled
from trio.testing import MockClock


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"uniquifier": 1}, AbortCode.VNOVNODE),
        ({"vnode": 999}, AbortCode.VNOVNODE),
        ({"vnode": 2**40 - 1}, AbortCode.VNOVNODE),
        ({"volume": 2}, AbortCode.VNOVOL),
        ({"volume": 2**23 - 1}, AbortCode.VNOVOL),
    ],
)
async def test_forged_fids(cell: Cell, change: dict[str, int], code: AbortCode) -> None:
    a = await cell.connected()
    forged = a.root._replace(**change)
    for call in (
        a.stat(forged),
        a.fetch(forged),
        a.store(forged, b"x"),
        a.truncate(forged, 1),
        a.lookup(b"x", forged),
        a.create(b"x", forged),
        a.mkdir(b"x", forged),
        a.unlink(b"x", forged),
        a.rename((a.root, b"x"), (forged, b"y")),
        a.rename((forged, b"x"), (a.root, b"y")),
        a.link(forged, b"x"),
    ):
        with pytest.raises(Aborted) as refusal:
            await call
        of_two = AbortCode.NOENT if forged.volume == a.root.volume else AbortCode.XDEV
        assert refusal.value.code in (code, of_two)
    reply = await a.call(InlineBulkStatus((a.root, forged)))
    assert reply.entries[0].fid == a.root and reply.entries[1] == code


@pytest.mark.parametrize(
    ("oldest", "newest", "code"),
    [(3, 9, AbortCode.BAD_VERSION), (0, 1, AbortCode.BAD_VERSION), (5, 1, AbortCode.BAD_VERSION), (0, 7, None)],
)
async def test_versions(cell: Cell, oldest: int, newest: int, code: AbortCode | None) -> None:
    client = await cell.connected()
    peer = await client.open_peer()
    hello = Hello("promisefs", oldest, newest, client.uuid, Role.CALLS, "")
    if code is None:
        reply, _ = await peer.call(hello)
        assert reply.version == PROTOCOL_VERSION
    else:
        with pytest.raises(Aborted) as refusal:
            await peer.call(hello)
        assert refusal.value.code == code


async def test_a_context_that_was_not_made_on_this_connection(cell: Cell) -> None:
    client = await cell.connected()
    for context in (2, -1, 2**63):
        with pytest.raises(Aborted) as refusal:
            await client.calls.call(FetchStatus(client.root), context=context)
        assert refusal.value.code == AbortCode.KEYREJECTED


async def test_hello_comes_first_and_in_time(mock_clock: MockClock, folder: Path) -> None:
    async with running_cell(folder) as cell:
        client = cell.client()
        peer = await client.open_peer()
        with pytest.raises(Aborted) as refusal:
            await peer.call(FetchStatus(Fid(1, 1, 1)))
        assert refusal.value.code == AbortCode.NOT_INTRODUCED
        for wrong in (
            client.hello_as(Role.CALLS)._replace(magic="nfs"),
            client.hello_as("boss"),
        ):
            with pytest.raises(Aborted) as refusal:
                await peer.call(wrong)
            assert refusal.value.code == AbortCode.BAD_MESSAGE
        async with in_background(peer.wait_closed()) as closed:
            mock_clock.jump(11)
            await settled()
            assert closed.done


async def test_hosts_are_bounded(mock_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promisefs_server.service.MAX_HOSTS", 3)
    a, b, c = [await cell.connected() for _ in range(3)]
    f = (await b.create(b"f")).fid
    await b.unlink(b"f", keep_open=True)
    for client in (b, c):
        await client.calls.close()
        await client.callbacks.close()
    await settled()
    with pytest.raises(Aborted) as refusal:
        await cell.connected()
    assert refusal.value.code == AbortCode.TOO_MANY, "their leases are running"
    mock_clock.jump(LEASE_S + 0.1)
    cell.server.note_silence(1)
    d = await cell.connected()
    assert {host.uuid for host in cell.server.hosts} == {a.uuid, b.uuid, d.uuid}, "c has gone, b has a file open"
    with pytest.raises(Aborted) as refusal:
        await cell.connected()
    assert refusal.value.code == AbortCode.TOO_MANY
    assert (await a.stat(f)).status.nlink == 0


async def test_connections_are_bounded(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await cell.connected()
    monkeypatch.setattr("promisefs_server.service.MAX_CONNECTIONS", 2)
    with pytest.raises(ConnectionLost):
        await cell.connected()
    await a.stat(a.root)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        HEADER.pack(MAX_FRAME_BYTES + 1),
        HEADER.pack(0),
        HEADER.pack(3) + b"\xc1\xc1\xc1",
        HEADER.pack(1) + b"\x90",
        HEADER.pack(5) + b"\xdd\xff\xff\xff\xff",
        HEADER.pack(4) + b"\x94\x01\x05\xc0",
    ],
)
async def test_garbage_closes_only_its_own_connection(
    cell: Cell, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    a = await cell.connected()
    stream = await cell.stream()
    await stream.send_all(data)
    if data != HEADER.pack(4) + b"\x94\x01\x05\xc0":
        with trio.fail_after(5):
            assert await stream.receive_some() == b""
        assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    await stream.aclose()
    await a.stat(a.root)


# Fuzz


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """What the field may hold."""
    bounds: object = None
    if typing.get_origin(hint) is Annotated:
        hint, bounds = typing.get_args(hint)
    if isinstance(bounds, fields.NameCheck):
        return st.sampled_from([b"a", b"b", b"c", b"d"])
    if isinstance(bounds, fields.IntRange):
        edges = [bounds.low, bounds.high, min(bounds.high, max(bounds.low, 0)), min(bounds.high, max(bounds.low, 1))]
        return st.sampled_from(edges) | st.integers(bounds.low, bounds.high)
    if hint is bytes:
        assert isinstance(bounds, fields.LengthRange)
        return st.binary(min_size=bounds.low, max_size=min(bounds.high, 40))
    if hint is str:
        return st.text(max_size=10)
    if hint is bool:
        return st.booleans()
    if hint is Fid:
        return st.sampled_from(FIDS)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([st.none() if a is type(None) else values_of(a) for a in arguments])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*[values_of(a) for a in arguments])
    if hint is Operation:
        return st.builds(Operation, st.integers(0, 20), st.integers(0, 2**64 - 1), st.booleans())
    hints = typing.get_type_hints(hint, include_extras=True)
    return st.builds(hint, *[values_of(hints[name]) for name in hint._fields])


FIDS = [Fid(1, 1, 0), *[Fid(1, n, 0) for n in range(2, 9)], Fid(1, 999, 5), Fid(9, 1, 1)]
"""The uniquifier 0 stands for the right one."""
REQUESTS = st.one_of([values_of(m.request) for m in METHODS.values() if not m.name.startswith("CB.C")])
CALLS = st.lists(st.tuples(REQUESTS, st.none() | st.binary(max_size=30)), max_size=40)


def with_right_uniquifiers(value: Any, cell: Cell) -> Any:
    if isinstance(value, Fid):
        if value.uniquifier:
            return value
        vnode = cell.server.store.vnodes.find(value.volume << 40 | value.vnode)
        return value if vnode is None else vnode.fid
    if isinstance(value, tuple):
        items = [with_right_uniquifiers(item, cell) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield lambda: tmp_path_factory.mktemp("fuzz") / "store"


@settings(max_examples=60, deadline=None)
@given(calls=CALLS)
def test_any_calls_leave_the_server_alive_and_its_store_sound(
    folders: Any, calls: list[tuple[Any, bytes | None]]
) -> None:
    async def main() -> None:
        async with running_cell(folders(), lease_s=1.0) as cell:
            a = await cell.connected()
            for request, bulk in calls:
                try:
                    with trio.fail_after(20):
                        await a.calls.call(with_right_uniquifiers(request, cell), bulk)
                except Aborted as refusal:
                    assert refusal.code != AbortCode.INTERNAL, request
                    if refusal.code == AbortCode.NOT_INTRODUCED and "first" in refusal.message:
                        a = await cell.connected()
                except ConnectionLost:
                    a = await cell.connected()
            b = await cell.connected()
            f = await b.create(b"good")
            await b.store(f.fid, b"alive")
            assert await b.fetch(f.fid) == b"alive"
            check_store(cell)

    trio.run(main)


def check_store(cell: Cell) -> None:
    """What has to hold of every store."""
    rows = cell.server.store.database.rows
    assert rows("SELECT * FROM entries WHERE vnode NOT IN (SELECT vnode FROM vnodes)") == []
    assert rows("SELECT * FROM entries WHERE directory NOT IN (SELECT vnode FROM vnodes)") == []
    named = dict(rows("SELECT vnode, count(*) FROM entries GROUP BY vnode"))
    subdirectories = dict(
        rows("SELECT directory, count(*) FROM entries JOIN vnodes USING (vnode) WHERE mode & 61440 = 16384 GROUP BY 1")
    )
    for vnode, mode, nlink, parent in rows("SELECT vnode, mode, nlink, parent FROM vnodes"):
        if mode & 0o170000 == 0o040000:
            assert nlink == 2 + subdirectories.get(vnode, 0)
            if parent != vnode:
                assert rows(f"SELECT directory FROM entries WHERE vnode = {vnode}") == [(parent,)]
        else:
            assert nlink == named.get(vnode, 0)
            if not nlink:
                assert rows(f"SELECT count(*) FROM orphan_holders WHERE vnode = {vnode}") != [(0,)]
    assert (
        rows(
            "SELECT v.vnode FROM vnodes v WHERE xattr_count <> (SELECT count(*) FROM xattrs x WHERE x.vnode = v.vnode)"
        )
        == []
    )
    cell.server.promises.check_invariants()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes_leave_the_server_alive(folders: Any, pieces: list[bytes]) -> None:
    async def main() -> None:
        async with running_cell(folders()) as cell:
            stream = await cell.stream()
            for piece in pieces:
                try:
                    await stream.send_all(HEADER.pack(len(piece)) + piece)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    break
            a = await cell.connected()
            await a.stat(a.root)

    trio.run(main)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_arguments_are_refused_clearly(folders: Any, data: st.DataObject) -> None:
    """Well-framed calls with arguments of any type."""
    import msgpack

    leaf = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=9) | st.text(max_size=9)
    anything = st.recursive(leaf, lambda inner: st.lists(inner, max_size=7), max_leaves=20)
    calls = data.draw(
        st.lists(st.tuples(st.sampled_from(sorted(METHODS)) | st.text(max_size=9), anything), min_size=1, max_size=8)
    )

    async def main() -> None:
        async with running_cell(folders()) as cell:
            stream = await cell.stream()
            for xid, (method, arguments) in enumerate(calls):
                frame = msgpack.packb([0, xid, 0, method, arguments, None])
                await stream.send_all(HEADER.pack(len(frame)) + frame)
            answers = b""
            with trio.fail_after(10):
                while answers.count(b"\x94\x02") + answers.count(b"\x94\x01") < len(calls):
                    more = await stream.receive_some()
                    assert more, "the connection was closed"
                    answers += more
            a = await cell.connected()
            assert await a.call(Lookup(a.root, b"none")) is not None

    trio.run(main)


def test_what_a_host_calls_itself_makes_one_line_of_a_log() -> None:
    assert str(Host(1, b"u" * 16, "a\nERROR all is lost")) == r"'a\nERROR all is lost' (75757575)"
