"""Hypothesis strategies for messages, built from their annotations, so that a new message is covered at once."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, NamedTuple

from hypothesis import strategies as st
from promisefs_protocol.fields import IntRange, LengthRange, NameCheck
from promisefs_protocol.messages import METHODS

TEXT = st.characters(exclude_categories=["Cs"])
LONGEST_LIST_DRAWN = 5

ALL_MESSAGES: list[type[Any]] = sorted(
    {cls for m in METHODS.values() for cls in (m.request, m.reply)}, key=lambda cls: cls.__name__
)


def is_name(value: bytes) -> bool:
    return b"/" not in value and b"\0" not in value and value not in (b".", b"..")


def strategy_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field annotated `hint` may hold, its bounds included."""
    bounds: object = None
    if typing.get_origin(hint) is Annotated:
        hint, bounds = typing.get_args(hint)
    match bounds:
        case NameCheck(limit):
            return st.binary(min_size=1, max_size=limit).filter(is_name)
        case IntRange(low, high):
            return st.integers(low, high) | st.sampled_from([low, high])
        case LengthRange(low, high):
            if hint is bytes:
                return st.binary(min_size=low, max_size=high)
            if hint is str:
                return st.text(TEXT, min_size=low, max_size=high)
            return st.lists(
                strategy_of(typing.get_args(hint)[0]), min_size=low, max_size=min(high, LONGEST_LIST_DRAWN)
            ).map(tuple)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return st.one_of([st.none() if a is type(None) else strategy_of(a) for a in typing.get_args(hint)])
    if typing.get_origin(hint) is tuple:
        return st.tuples(*[strategy_of(a) for a in typing.get_args(hint)])
    if hint is bool:
        return st.booleans()
    return messages_of(hint)


def messages_of(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Instances of the NamedTuple `cls`, all fields within bounds."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields: tuple[str, ...] = cls._fields
    return st.tuples(*[strategy_of(hints[name]) for name in fields]).map(cls._make)


def same(a: object, b: object) -> bool:
    """Equal in type too, all the way down: a NamedTuple equals any tuple of the same values."""
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class Exchange(NamedTuple):
    """One call and its reply."""

    request: Any
    reply: Any
    request_bulk: bytes | None
    reply_bulk: bytes | None


BULKS = st.none() | st.binary(max_size=64) | st.sampled_from([bytes(16384), bytes(16385), bytes(1 << 20)])

exchanges: st.SearchStrategy[Exchange] = st.sampled_from(list(METHODS.values())).flatmap(
    lambda m: st.builds(Exchange, messages_of(m.request), messages_of(m.reply), BULKS, BULKS)
)
