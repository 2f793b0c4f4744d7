"""What can be said about a mount: the source, and options as mount(8) passes them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from promisefs_protocol.address import Address, AddressSyntaxError, parse_address

from .errors import ExitCode, UserError

DEFAULT_VOLUME = "root"

_SIZE = re.compile(r"(\d+)([KMG]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

_PASSED_ON = {"ro", "nosuid", "suid", "nodev", "noexec", "exec", "noatime", "allow_other", "allow_root"}
_IGNORED = {"rw", "defaults", "auto", "noauto", "_netdev", "nofail", "user", "nouser", "users", "async", "atime",
            "relatime", "norelatime", "diratime", "nodiratime", "dev", "default_permissions"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    address: Address
    volume: str

    def __str__(self) -> str:
        return f"{self.address}/{self.volume}"


@dataclass(frozen=True)
class MountOptions:
    """`-o` options of promisefs; sizes in bytes, times in seconds."""

    cache_bytes: int = 256 << 20
    timeout_s: float = 60.0
    ack_wait_s: float = 1.0
    max_idle: int = 200_000
    fuse: frozenset[str] = frozenset()


def parse_source(text: str) -> Source:
    """HOST[:PORT][/VOLUME], with [] around an IPv6 address. Raise UserError."""
    where, _, volume = text.partition("/")
    if "/" in volume:
        raise UserError(f"{text!r} is not HOST[:PORT][/VOLUME]", ExitCode.USAGE)
    try:
        address = parse_address(where)
    except AddressSyntaxError as error:
        raise UserError(f"{text!r} is not HOST[:PORT][/VOLUME]: {error}", ExitCode.USAGE) from None
    return Source(address, volume or DEFAULT_VOLUME)


def parse_size(text: str) -> int:
    """A number of bytes, or with K, M or G. Raise UserError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UserError(f"{text!r} is not a size like 512M", ExitCode.USAGE)
    return int(match[1]) * _UNITS[match[2].upper()]


def _parse_seconds(name: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise UserError(f"{name}={text}: not a number of seconds", ExitCode.USAGE)
    return seconds


def parse_options(texts: tuple[str, ...]) -> MountOptions:
    """Read any number of comma-separated lists. Raise UserError for what is not understood."""
    options = MountOptions()
    fuse: set[str] = set()
    for item in (item for text in texts for item in text.split(",") if item):
        name, _, value = item.partition("=")
        match name:
            case "cache":
                options = replace(options, cache_bytes=_at_least(16 << 20, parse_size(value), item))
            case "timeout":
                options = replace(options, timeout_s=_parse_seconds(name, value))
            case "ack_wait":
                options = replace(options, ack_wait_s=_parse_seconds(name, value))
            case _ if item in _PASSED_ON:
                fuse.add(item)
            case _ if item in _IGNORED or item.startswith(("x-", "comment=")):
                pass
            case _:
                raise UserError(f"option {item!r} is not known; see 'promisefs mount --help'", ExitCode.USAGE)
    return replace(options, fuse=frozenset(fuse))


def _at_least(minimum: int, value: int, item: str) -> int:
    if value < minimum:
        raise UserError(f"{item}: the least is {minimum >> 20}M", ExitCode.USAGE)
    return value
