"""The cell file: which servers a cell has. Servers and clients read the same one.

    name = "example.org"

    [[server]]
    number = 0
    address = "alpha.example.org:7654"

    [[server]]
    number = 1
    address = "beta.example.org:7654"

A server keeps its number for ever: it is part of the numbers of the volumes made there, and so of every fid and inode
number. Its address may change.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .address import Address, AddressSyntaxError, parse_address

MAX_SERVER_NUMBER = 127
"""Volume numbers have 23 bits, 16 of them the server's own to give out."""
MAX_CELL_FILE_BYTES = 1 << 20

_CELL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


class CellFileError(Exception):
    """The cell file cannot be used. The message is one line for people, with the file's path."""


@dataclass(frozen=True, slots=True)
class CellServer:
    number: int
    host: str
    port: int

    @property
    def address(self) -> Address:
        return Address(self.host, self.port)


@dataclass(frozen=True, slots=True)
class CellFile:
    name: str
    servers: tuple[CellServer, ...]
    """In the file's order; at least one."""

    def server(self, number: int) -> CellServer | None:
        return next((server for server in self.servers if server.number == number), None)


def load_cell_file(path: Path) -> CellFile:
    """Read and check the file. Raise CellFileError."""
    try:
        if path.stat().st_size > MAX_CELL_FILE_BYTES:
            raise CellFileError(f"{path} is no cell file: it has more than {MAX_CELL_FILE_BYTES} bytes")
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CellFileError(f"cannot read the cell file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CellFileError(f"{path} is not TOML: {error}") from None
    try:
        return _cell_of(content)
    except (_Wrong, AddressSyntaxError) as error:
        raise CellFileError(f"{path}: {error}") from None


class _Wrong(Exception):
    """What is wrong in the file."""


def _cell_of(content: dict[str, Any]) -> CellFile:
    _check_keys(content, {"name", "server"}, "")
    name = content["name"]
    if not isinstance(name, str) or not _CELL_NAME.fullmatch(name):
        raise _Wrong(f"the cell's name {name!r} is not 1 to 255 letters, digits, '.', '_' and '-'")
    tables = content["server"]
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise _Wrong("servers are written as [[server]] tables, at least one")
    servers = tuple(_server_of(table, index) for index, table in enumerate(tables, 1))
    numbers: set[int] = set()
    addresses: set[tuple[str, int]] = set()
    for server in servers:
        if server.number in numbers:
            raise _Wrong(f"two servers have the number {server.number}")
        if (server.host.lower(), server.port) in addresses:
            raise _Wrong(f"two servers have the address {server.address}")
        numbers.add(server.number)
        addresses.add((server.host.lower(), server.port))
    return CellFile(name, servers)


def _server_of(table: dict[str, Any], index: int) -> CellServer:
    where = f"[[server]] table {index}"
    _check_keys(table, {"number", "address"}, f" in {where}")
    number, address = table["number"], table["address"]
    if type(number) is not int or not 0 <= number <= MAX_SERVER_NUMBER:
        raise _Wrong(f"the number {number!r} in {where} is not within 0..{MAX_SERVER_NUMBER}")
    if not isinstance(address, str):
        raise _Wrong(f'the address {address!r} in {where} is not a text like "alpha.example.org:7654"')
    return CellServer(number, *parse_address(address))


def _check_keys(table: dict[str, Any], wanted: set[str], where: str) -> None:
    for key in table:
        if key not in wanted:
            raise _Wrong(f"{key!r}{where} is not known; there are {', '.join(sorted(wanted))}")
    for key in sorted(wanted):
        if key not in table:
            raise _Wrong(f"{key!r} is missing{where}")
