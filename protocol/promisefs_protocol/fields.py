"""Checks and conversions for the fields of messages.

A message is a NamedTuple whose annotations say what the wire may hold. msgpack packs
tuples as arrays, so encoding needs no code; `decoder(T)` builds, once per type, a function that turns
what msgpack unpacked into T or raises `FieldError`. Understood: int, bool, bytes, str, float, NamedTuples, `X | None`,
`A | B` of NamedTuple and int, `tuple[X, ...]`, and Annotated with the bounds below.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

T = TypeVar("T")
Decoder = Callable[[object], Any]


class FieldError(ValueError):
    """A value from the peer is of the wrong type or out of bounds."""


class NameTooLong(FieldError):
    """A name that is well formed but longer than the limit; ENAMETOOLONG rather than EINVAL."""


@dataclass(frozen=True)
class IntRange:
    low: int
    high: int


@dataclass(frozen=True)
class LengthRange:
    low: int
    high: int


@dataclass(frozen=True)
class NameCheck:
    """A directory entry's name: 1..limit bytes, no NUL, no '/', not '.' or '..'."""

    limit: int


def int_range(low: int, high: int) -> IntRange:
    return IntRange(low, high)


def length_range(low: int, high: int) -> LengthRange:
    """Bounds of the length of bytes, str or tuple, both inclusive."""
    return LengthRange(low, high)


def _type_error(expected: str, value: object) -> FieldError:
    return FieldError(f"expected {expected}, got {type(value).__name__}")


def _int_decoder(low: int, high: int) -> Decoder:
    def decode(value: object) -> int:
        if type(value) is not int:
            raise _type_error("int", value)
        if not low <= value <= high:
            raise FieldError(f"{value} is not within {low}..{high}")
        return value

    return decode


def _exact_decoder(cls: type) -> Decoder:
    def decode(value: object) -> object:
        if type(value) is not cls:
            raise _type_error(cls.__name__, value)
        return value

    return decode


def _sized_decoder(cls: type, low: int, high: int) -> Decoder:
    def decode(value: object) -> object:
        if type(value) is not cls:
            raise _type_error(cls.__name__, value)
        if not low <= len(value) <= high:  # type: ignore[arg-type]
            raise FieldError(f"length {len(value)} is not within {low}..{high}")  # type: ignore[arg-type]
        return value

    return decode


def _name_decoder(limit: int) -> Decoder:
    def decode(value: object) -> bytes:
        if type(value) is not bytes:
            raise _type_error("bytes", value)
        check_name(value, limit)
        return value

    return decode


def check_name(name: bytes, limit: int) -> None:
    """Raise FieldError (NameTooLong) unless `name` can be an entry of a directory."""
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise FieldError(f"{name[:40]!r} cannot be a name")
    if len(name) > limit:
        raise NameTooLong(f"a name of {len(name)} bytes; the limit is {limit}")


def _optional_decoder(inner: Decoder) -> Decoder:
    def decode(value: object) -> object:
        return None if value is None else inner(value)

    return decode


def _int_or_decoder(integer: Decoder, other: Decoder) -> Decoder:
    def decode(value: object) -> object:
        return integer(value) if type(value) is int else other(value)

    return decode


def _tuple_decoder(inner: Decoder, low: int, high: int) -> Decoder:
    def decode(value: object) -> tuple[object, ...]:
        if type(value) is not tuple:
            raise _type_error("array", value)
        if not low <= len(value) <= high:
            raise FieldError(f"{len(value)} elements, not within {low}..{high}")
        return tuple([inner(item) for item in value])

    return decode


def _pair_decoder(decoders: tuple[Decoder, ...]) -> Decoder:
    def decode(value: object) -> tuple[object, ...]:
        if type(value) is not tuple:
            raise _type_error("array", value)
        if len(value) != len(decoders):
            raise FieldError(f"{len(value)} elements instead of {len(decoders)}")
        return tuple([d(item) for d, item in zip(decoders, value, strict=True)])

    return decode


@functools.cache
def _message_decoder(cls: Any) -> Decoder:
    """Write the decoder's code out for this class and compile it, as `dataclasses` does.

    Calling a function for each integer of a status would be most of the work of a listing: integers are checked where
    they are, and what does not fit is given to the field's own decoder, which says what is wrong with it.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    names: tuple[str, ...] = cls._fields
    unpacked = "".join(f"f{position}, " for position in range(len(names)))
    known: dict[str, Any] = {"cls": cls, "new": tuple.__new__, "refuse": _not_an_array_for, "FieldError": FieldError}
    lines = ["def decode(value):", f"    if type(value) is not tuple or len(value) != {len(names)}: refuse(cls, value)"]
    if names:
        lines += [f"    {unpacked}= value", "    try:"]
    for position, name in enumerate(names):
        field, decode = f"f{position}", f"d{position}"
        known[decode] = _decoder_of(hints[name])
        if (bounds := _int_bounds(hints[name])) is not None:
            fits = f"type({field}) is int and {bounds.low} <= {field} <= {bounds.high}"
            lines.append(f"        if not ({fits}): {decode}({field})")
        else:
            lines.append(f"        {field} = {decode}({field})")
    if names:
        lines.append(f"    except FieldError as error: raise type(error)('{cls.__name__}: ' + str(error)) from None")
    lines.append(f"    return new(cls, ({unpacked}))")
    exec("\n".join(lines), known)
    decoder: Decoder = known["decode"]
    return decoder


def _not_an_array_for(cls: type, value: object) -> None:
    if type(value) is not tuple:
        raise _type_error(f"array for {cls.__name__}", value)
    count = len(cls._fields)  # type: ignore[attr-defined]
    raise FieldError(f"{cls.__name__} has {count} fields, got {len(value)}")


def _int_bounds(hint: Any) -> IntRange | None:
    """The bounds of a field that is an integer and nothing else."""
    if typing.get_origin(hint) is Annotated and isinstance(bounds := typing.get_args(hint)[1], IntRange):
        return bounds
    return None


def _decoder_of(hint: Any) -> Decoder:
    bounds: object = None
    if typing.get_origin(hint) is Annotated:
        hint, bounds = typing.get_args(hint)
    if isinstance(bounds, NameCheck):
        return _name_decoder(bounds.limit)
    if isinstance(bounds, IntRange):
        return _int_decoder(bounds.low, bounds.high)
    if isinstance(bounds, LengthRange) and hint in (bytes, str):
        return _sized_decoder(hint, bounds.low, bounds.high)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        rest = [a for a in args if a is not type(None)]
        if len(rest) == 1:
            return _optional_decoder(_decoder_of(rest[0]))
        integers = [a for a in rest if a is int or (typing.get_origin(a) is Annotated and a.__origin__ is int)]
        others = [a for a in rest if a not in integers]
        assert len(integers) == 1 and len(others) == 1 and len(rest) == len(args), hint
        return _int_or_decoder(_decoder_of(integers[0]), _decoder_of(others[0]))
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            assert isinstance(bounds, LengthRange), f"unbounded array: {hint}"
            return _tuple_decoder(_decoder_of(args[0]), bounds.low, bounds.high)
        return _pair_decoder(tuple(_decoder_of(a) for a in args))
    if hasattr(hint, "_fields"):
        return _message_decoder(hint)
    assert hint in (bool,), f"a field of a message needs bounds: {hint}"
    return _exact_decoder(hint)


def decoder(cls: type[T]) -> Callable[[object], T]:
    """Build the function that checks and converts an unpacked array into `cls`."""
    hint: Any = cls  # mypy takes type[T] for nothing that can be hashed
    return _message_decoder(hint)
