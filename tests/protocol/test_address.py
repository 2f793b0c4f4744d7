"""Addresses as people write them."""

from __future__ import annotations

import pytest
from promisefs_protocol.address import DEFAULT_PORT, Address, AddressSyntaxError, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("alpha", "alpha", DEFAULT_PORT),
        ("alpha.example.org:1", "alpha.example.org", 1),
        ("127.0.0.1:65535", "127.0.0.1", 65535),
        ("[::1]", "::1", DEFAULT_PORT),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
    ],
)
def test_what_is_understood(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == Address(host, port)
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", ":1", "a:", "a:x", "a:65536", "a:0", "a:-1", "a:٣", "[::1", "::1", "[]:1", "a b:1", "a/b:1", "a:1:2"]
)
def test_what_is_not(text: str) -> None:
    with pytest.raises(AddressSyntaxError) as caught:
        parse_address(text)
    assert "\n" not in str(caught.value) and repr(text) in str(caught.value)


def test_port_0_is_for_those_who_listen() -> None:
    assert parse_address("a:0", lowest_port=0).port == 0
