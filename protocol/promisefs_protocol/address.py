"""Addresses as people write them: HOST:PORT, HOST, [HOST]:PORT or [HOST], the brackets around an IPv6 address."""

from __future__ import annotations

import re
from typing import NamedTuple

DEFAULT_PORT = 7654
MAX_PORT = 65535

_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\[\]/\s]+)\]|(?P<host>[^:/\[\]\s]+))(?::(?P<port>[0-9]{1,5}))?")


class AddressSyntaxError(ValueError):
    """Not an address. The message is one line for people."""


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(text: str, default_port: int = DEFAULT_PORT, *, lowest_port: int = 1) -> Address:
    """Read an address; without a port it is `default_port`. Names are not looked up. Raise AddressSyntaxError."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        if text.count(":") > 1 and "[" not in text:
            raise AddressSyntaxError(f"{text!r}: write an IPv6 address as [HOST]:PORT")
        raise AddressSyntaxError(f"{text!r} is not HOST:PORT")
    port = default_port if match["port"] is None else int(match["port"])
    if not lowest_port <= port <= MAX_PORT:
        raise AddressSyntaxError(f"{text!r}: there is no port {port}")
    return Address(match["v6"] or match["host"], port)
