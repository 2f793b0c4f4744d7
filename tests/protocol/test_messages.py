"""Every message survives the wire; what the table of methods promises."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from message_strategies import ALL_MESSAGES, messages_of, same
from promisefs_protocol.fields import FieldError, decoder
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import (
    MAX_LIST,
    METHOD_OF_REQUEST,
    METHODS,
    FetchStatus,
    GiveUpCallBacks,
    Operation,
    Role,
)


def unpacked(message: object) -> object:
    return msgpack.unpackb(msgpack.packb(message), use_list=False)


@pytest.mark.parametrize("cls", ALL_MESSAGES, ids=lambda cls: cls.__name__)
def test_round_trip(cls: type[Any]) -> None:
    decode = decoder(cls)

    @given(messages_of(cls))
    def check(message: Any) -> None:
        decoded = decode(unpacked(message))
        assert same(decoded, message)

    check()


@pytest.mark.parametrize("cls", [c for c in ALL_MESSAGES if c._fields], ids=lambda cls: cls.__name__)
def test_a_field_more_or_less_is_refused(cls: type[Any]) -> None:
    decode = decoder(cls)

    @given(messages_of(cls), st.data())
    def check(message: Any, data: st.DataObject) -> None:
        gone = data.draw(st.integers(0, len(message) - 1))
        with pytest.raises(FieldError):
            decode(tuple(message[:gone]) + tuple(message[gone + 1 :]))
        with pytest.raises(FieldError):
            decode((*message, None))
        broken = list(message)
        broken[gone] = 1.5  # no field is a float
        with pytest.raises(FieldError):
            decode(tuple(broken))

    check()


def test_lists_end_at_their_bound() -> None:
    fid = Fid(1, 1, 1)
    decode = METHODS["FS.GiveUpCallBacks"].decode_request
    full = GiveUpCallBacks((fid,) * MAX_LIST)
    assert same(decode(unpacked(full)), full)
    with pytest.raises(FieldError):
        decode((((1, 1, 1),) * (MAX_LIST + 1),))


def test_each_request_belongs_to_one_method() -> None:
    assert len(METHOD_OF_REQUEST) == len(METHODS)
    for method in METHODS.values():
        assert METHOD_OF_REQUEST[method.request] is method


def test_changes_of_names_carry_an_operation_and_nothing_else_does() -> None:
    for method in METHODS.values():
        hints = method.request.__annotations__
        first = next(iter(hints), None)
        assert method.names_once == (first == "operation"), method.name
        assert "operation" not in list(hints)[1:]


def test_enumerations_travel_as_plain_values() -> None:
    assert unpacked((Role.CALLS,)) == ("calls",)
    decoded = METHODS["FS.Lookup"].decode_request(unpacked(((1, 2, 3), b"n")))
    assert type(decoded.directory) is Fid


@pytest.mark.parametrize(
    "fid", [(0, 1, 0), (2**23, 1, 0), (1, 0, 0), (1, 2**40, 0), (1, 1, -1), (1, 1, 2**32), (True, 1, 1)]
)
def test_fids_outside_the_cell_are_refused(fid: object) -> None:
    with pytest.raises(FieldError):
        METHODS["FS.FetchStatus"].decode_request((fid,))


def test_operation_decodes() -> None:
    assert same(decoder(Operation)((7, 3, False)), Operation(7, 3, False))
    assert FetchStatus(Fid(1, 2, 3)).fid.vnode == 2
