"""Connections joined by a fake link: calls, replies, aborts, however the bytes are split."""

from __future__ import annotations

from typing import Any

import pytest
from fake_link import Link, joined
from hypothesis import given, settings
from hypothesis import strategies as st
from message_strategies import Exchange, exchanges, same
from promisefs_protocol.abort import AbortCode
from promisefs_protocol.connection import (
    MAX_OPEN_CALLS,
    AbortReceived,
    CallReceived,
    Connection,
    LocalProtocolError,
    RemoteProtocolError,
    ReplyReceived,
)
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import MAX_BULK_BYTES, Empty, FetchStatus, Probe, Sync

FID = Fid(1, 2, 3)


def draw_cuts(data: st.DataObject, size: int) -> list[int]:
    return data.draw(st.lists(st.integers(0, size), max_size=8))


@settings(max_examples=150, deadline=None)
@given(st.lists(exchanges, max_size=4), st.data())
def test_calls_and_replies_survive_any_splitting_and_order(script: list[Exchange], data: st.DataObject) -> None:
    link = Link()
    xids = []
    for exchange in script:
        xid, pieces = link.client.send_call(exchange.request, exchange.request_bulk, context=len(xids))
        xids.append(xid)
        link.to_server += joined(pieces)
    assert link.client.open_calls == len(script)
    calls: list[Any] = link.pass_to_server(draw_cuts(data, len(link.to_server)))
    assert [c.xid for c in calls] == xids
    assert [c.context for c in calls] == list(range(len(script)))
    for call, exchange in zip(calls, script, strict=True):
        assert type(call) is CallReceived
        assert same(call.request, exchange.request)
        assert call.bulk == exchange.request_bulk
    order = data.draw(st.permutations(range(len(script))))
    for i in order:
        if data.draw(st.booleans()):
            link.to_client += joined(link.server.send_reply(xids[i], script[i].reply, script[i].reply_bulk))
        else:
            link.to_client += joined(link.server.send_abort(xids[i], AbortCode.NOENT, "no"))
    answers: list[Any] = link.pass_to_client(draw_cuts(data, len(link.to_client)))
    assert [a.xid for a in answers] == [xids[i] for i in order]
    for answer, i in zip(answers, order, strict=True):
        if type(answer) is ReplyReceived:
            assert same(answer.reply, script[i].reply)
            assert answer.bulk == script[i].reply_bulk
        else:
            assert answer == AbortReceived(xids[i], AbortCode.NOENT, "no")
    assert link.client.open_calls == 0


def test_one_byte_at_a_time_and_bytes_wanted() -> None:
    link = Link()
    _, pieces = link.client.send_call(FetchStatus(FID), b"x" * 100)
    data = joined(pieces)
    for i in range(len(data) - 1):
        assert link.server.receive(data[i : i + 1]) == []
        assert link.server.bytes_wanted == (len(data) - i - 1 if i >= 3 else 0)
    (event,) = link.server.receive(data[-1:])
    assert isinstance(event, CallReceived)
    assert link.server.bytes_wanted == 0


@pytest.mark.parametrize("size", [0, 1, 16384, 16385, MAX_BULK_BYTES])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bulk_of_every_kind_and_size(size: int, kind: type[Any]) -> None:
    link = Link()
    content = bytes(i % 251 for i in range(size))
    _, pieces = link.client.send_call(Probe(), kind(content))
    link.to_server += joined(pieces)
    (event,) = link.pass_to_server()
    assert isinstance(event, CallReceived)
    assert event.bulk == content
    assert type(event.bulk) is bytes


def test_large_bulk_is_not_copied_into_the_frame() -> None:
    bulk = memoryview(bytes(100_000))
    _, pieces = Connection().send_call(Probe(), bulk)
    assert pieces[1] is bulk


def test_bulk_beyond_the_limit_changes_nothing() -> None:
    connection = Connection()
    with pytest.raises(LocalProtocolError):
        connection.send_call(Probe(), bytes(MAX_BULK_BYTES + 1))
    assert connection.open_calls == 0
    assert connection.send_call(Probe())[0] == 1


def test_a_message_that_cannot_be_packed_changes_nothing() -> None:
    connection = Connection()
    with pytest.raises(TypeError):
        connection.send_call(FetchStatus(object()))  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        connection.send_call(FetchStatus(Fid(2**64, 1, 1)))
    assert connection.open_calls == 0
    assert connection.send_call(Probe())[0] == 1


def test_open_calls_are_bounded_and_abandoned_ones_count() -> None:
    connection = Connection()
    for _ in range(MAX_OPEN_CALLS):
        xid, _ = connection.send_call(Probe())
    connection.forget_call(xid)
    with pytest.raises(LocalProtocolError):
        connection.send_call(Probe())
    assert connection.open_calls == MAX_OPEN_CALLS
    connection.receive(joined(Connection().send_reply(xid, Empty())))
    connection.send_call(Probe())


@pytest.mark.parametrize("abort", [False, True])
def test_the_answer_to_an_abandoned_call_is_dropped_once(abort: bool) -> None:
    link = Link()
    xid, _ = link.client.send_call(Probe())
    link.client.forget_call(xid)
    assert link.client.open_calls == 1
    answer = link.server.send_abort(xid, 5, "no") if abort else link.server.send_reply(xid, Empty())
    assert link.client.receive(joined(answer)) == []
    assert link.client.open_calls == 0
    with pytest.raises(RemoteProtocolError):
        link.client.receive(joined(answer))


def test_a_reply_to_an_abandoned_call_need_not_fit() -> None:
    connection = Connection()
    xid, _ = connection.send_call(FetchStatus(FID))
    connection.forget_call(xid)
    assert connection.receive(joined(Connection().send_reply(xid, Empty()))) == []


def test_forgetting_a_call_that_is_not_open_is_nothing() -> None:
    connection = Connection()
    connection.forget_call(4)
    assert connection.open_calls == 0


@pytest.mark.parametrize("xid", [0, 2, -1, 2**63])
@pytest.mark.parametrize("abort", [False, True])
def test_an_answer_to_a_call_that_was_never_made_ends_the_connection(xid: int, abort: bool) -> None:
    connection = Connection()
    connection.send_call(Probe())
    answer = connection.send_abort(xid, 5, "") if abort else connection.send_reply(xid, Empty())
    with pytest.raises(RemoteProtocolError, match="not open"):
        connection.receive(joined(answer))


def test_a_reply_of_the_wrong_kind_ends_the_connection() -> None:
    connection = Connection()
    xid, _ = connection.send_call(FetchStatus(FID))
    with pytest.raises(RemoteProtocolError, match="FetchStatus"):
        connection.receive(joined(connection.send_reply(xid, Empty())))


def test_abort_messages_are_cut_and_always_encodable() -> None:
    """File names that are not UTF-8 reach messages as lone surrogates."""
    link = Link()
    shown: list[str] = []
    for message in ("\U0001f600" * 1000, "\udcff" * 1000, "a\udcffb"):
        xid, _ = link.client.send_call(Probe())
        (event,) = link.client.receive(joined(link.server.send_abort(xid, 5, message)))
        assert isinstance(event, AbortReceived)
        assert 3 <= len(event.message) <= 255
        shown.append(event.message)
    assert shown[-1] == "a\\udcffb"


def test_both_sides_number_their_own_calls() -> None:
    link = Link()
    xid, pieces = link.client.send_call(Sync((FID,)))
    link.to_server += joined(pieces)
    other, pieces = link.server.send_call(Probe())
    link.to_client += joined(pieces)
    assert xid == other == 1
    assert isinstance(link.pass_to_server()[0], CallReceived)
    assert isinstance(link.pass_to_client()[0], CallReceived)
    assert link.client.receive(joined(link.server.send_reply(1, Empty()))) == [ReplyReceived(1, Empty(), None)]
    assert link.server.open_calls == 1
