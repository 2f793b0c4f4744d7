"""docs/protocol.md says what the code does."""

from __future__ import annotations

import pytest
from method_table import DOCUMENT, TABLES, written
from promisefs_protocol.connection import MAX_FRAME_BYTES, MAX_OPEN_CALLS
from promisefs_protocol.messages import MAX_BULK_BYTES, MAX_LIST, METHODS, PROTOCOL_VERSION
from promisefs_protocol.transport import MAX_CALLS_SERVED


@pytest.mark.parametrize("name", list(TABLES))
def test_tables_are_current(name: str) -> None:
    assert written(DOCUMENT.read_text(), name) == TABLES[name](), "run python tests/protocol/method_table.py"


def test_every_method_is_listed() -> None:
    text = DOCUMENT.read_text()
    for name in METHODS:
        assert f"| {name} |" in text


@pytest.mark.parametrize(
    "sentence",
    [
        f"Protocol version {PROTOCOL_VERSION}.",
        f"at most {MAX_FRAME_BYTES:,} bytes",
        f"at most {MAX_BULK_BYTES:,} bytes",
        f"{MAX_OPEN_CALLS:,} calls open",
        f"{MAX_CALLS_SERVED} calls at a time",
        f"{MAX_LIST:,} elements",
    ],
)
def test_numbers_are_current(sentence: str) -> None:
    assert sentence in " ".join(DOCUMENT.read_text().split())
