"""Field decoders: what is taken, what is refused, and that nothing is converted by accident."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import pytest
from promisefs_protocol.fields import (
    FieldError,
    NameCheck,
    NameTooLong,
    check_name,
    decoder,
    int_range,
    length_range,
)

Small = Annotated[int, int_range(-3, 3)]


class Inner(NamedTuple):
    a: Small
    b: bool


class Outer(NamedTuple):
    inner: Inner
    maybe: Small | None
    either: Inner | Small
    many: Annotated[tuple[Inner, ...], length_range(1, 2)]
    pair: tuple[Small, Inner]
    data: Annotated[bytes, length_range(1, 4)]
    text: Annotated[str, length_range(0, 2)]
    name: Annotated[bytes, NameCheck(5)]


IN = (1, True)
GOOD = (IN, None, 3, (IN,), (2, IN), b"ab", "x", b"name")
decode = decoder(Outer)


def test_all_fields_get_their_types() -> None:
    value = decode(GOOD)
    assert value == GOOD
    assert type(value) is Outer
    assert type(value.inner) is Inner
    assert type(value.many[0]) is Inner
    assert type(value.pair[1]) is Inner
    assert value.either == 3
    assert type(decode((*GOOD[:2], IN, *GOOD[3:])).either) is Inner


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("inner", (1,)),
        ("inner", (1, True, 0)),
        ("inner", (4, True)),
        ("inner", (-4, True)),
        ("inner", (1.0, True)),
        ("inner", (True, True)),
        ("inner", (1, 1)),
        ("inner", (1, None)),
        ("inner", None),
        ("inner", 7),
        ("inner", b"\x01\x02"),
        ("inner", "ab"),
        ("inner", {}),
        ("maybe", 4),
        ("maybe", False),
        ("maybe", ()),
        ("either", None),
        ("either", 4),
        ("either", True),
        ("either", (9, True)),
        ("many", ()),
        ("many", (IN, IN, IN)),
        ("many", (IN, 3)),
        ("many", None),
        ("pair", (2,)),
        ("pair", (2, IN, 2)),
        ("pair", (IN, 2)),
        ("data", b""),
        ("data", b"abcde"),
        ("data", "ab"),
        ("data", None),
        ("text", "abc"),
        ("text", b"a"),
        ("name", b""),
        ("name", b"."),
        ("name", b".."),
        ("name", b"a/b"),
        ("name", b"a\0b"),
        ("name", b"toolong"),
        ("name", "name"),
    ],
)
def test_what_does_not_fit_is_refused(field: str, bad: object) -> None:
    value = list(GOOD)
    value[Outer._fields.index(field)] = bad  # type: ignore[call-overload]
    with pytest.raises(FieldError):
        decode(tuple(value))


@pytest.mark.parametrize("bad", [None, 5, b"", "text", (), GOOD[:-1], (*GOOD, 1), list(GOOD)])
def test_a_message_must_be_an_array_of_the_right_length(bad: object) -> None:
    with pytest.raises(FieldError):
        decode(bad)


def test_a_name_that_is_only_too_long_says_so_through_the_whole_message() -> None:
    with pytest.raises(NameTooLong):
        decode((*GOOD[:-1], b"sixsix"))
    with pytest.raises(FieldError) as caught:
        decode((*GOOD[:-1], b"six/six"))
    assert not isinstance(caught.value, NameTooLong)


@pytest.mark.parametrize("name", [b"a", b"...", b".a", b"\xff\xfe", b" ", b"\n", b"x" * 255])
def test_names_are_any_bytes_but_nul_and_slash(name: bytes) -> None:
    check_name(name, 255)


def test_a_field_without_bounds_is_a_defect_of_the_message() -> None:
    class Unbounded(NamedTuple):
        number: int

    class UnboundedArray(NamedTuple):
        numbers: tuple[Small, ...]

    for cls in (Unbounded, UnboundedArray):
        # The classes are local: annotations are strings that only resolve with this function's names.
        cls.__annotations__ = {"number": int} if cls is Unbounded else {"numbers": tuple[Small, ...]}
        with pytest.raises(AssertionError):
            decoder(cls)
