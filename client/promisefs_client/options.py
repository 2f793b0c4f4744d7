"""What can be said about a mount: the source, and options as mount(8) passes them."""

from __future__ import annotations

import enum
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from promisefs_protocol.address import Address, AddressSyntaxError, parse_address
from promisefs_protocol.cell_file import CellFileError, load_cell_file

from .errors import ExitCode, UserError
from .rejects.quarantine import DEFAULT_LIMIT_BYTES, DEFAULT_MAX_AGE_S

DEFAULT_VOLUME = "root"

_SIZE = re.compile(r"(\d+)([KMG]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

_PASSED_ON = {"ro", "nosuid", "suid", "nodev", "noexec", "exec", "noatime", "allow_other", "allow_root"}
_IGNORED = {"rw", "defaults", "auto", "noauto", "_netdev", "nofail", "user", "nouser", "users", "async", "atime",
            "relatime", "norelatime", "diratime", "nodiratime", "dev", "default_permissions"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A volume, and who may have it."""

    cell: str | None  # its name; None: a server alone
    servers: tuple[Address, ...]
    volume: str

    @property
    def where(self) -> str:
        """The cell or the server, for people."""
        return str(self.servers[0]) if self.cell is None else f"the cell {self.cell}"

    def __str__(self) -> str:
        return f"{self.cell or self.servers[0]}/{self.volume}"


class LockScope(enum.StrEnum):
    """Among whom locks of fcntl(2) and flock(2) hold."""

    CELL = "cell"
    LOCAL = "local"
    OFF = "off"


@dataclass(frozen=True)
class MountOptions:
    """`-o` options of promisefs; sizes in bytes, times in seconds."""

    cache_bytes: int = 256 << 20
    timeout_s: float = 60.0
    ack_wait_s: float = 1.0
    cell_file: Path | None = None
    tls: bool = False
    ca: Path | None = None
    """CAs that the servers' certificates may be of; None: the system's."""
    locks: LockScope = LockScope.CELL
    posix: bool = False
    """The kernel checks mode bits, too, as on a local disk."""
    rejects: Path | None = None
    """The quarantine; None: `quarantine.default_directory`."""
    rejects_limit_bytes: int = DEFAULT_LIMIT_BYTES
    rejects_max_age_s: float = DEFAULT_MAX_AGE_S
    name: str = ""
    """What mount(8) shows as the source; empty: the volume and who has it."""
    key_wait_s: float = 300.0
    """How long bytes written under a token that has expired wait for a fresh one."""
    max_idle: int = 200_000
    metrics: Address | None = None
    metrics_insecure: bool = False
    fuse: frozenset[str] = frozenset()


def parse_source(text: str, cell_file: Path | None = None) -> Source:
    """HOST[:PORT][/VOLUME] or HOST:/VOLUME, IPv6 addresses in []; CELL[/VOLUME] with a cell file. Raise UserError."""
    form = "HOST[:PORT][/VOLUME]" if cell_file is None else "CELL[/VOLUME]"
    where, _, volume = text.partition("/")
    if "/" in text:
        where = where.removesuffix(":")  # HOST:/VOLUME, as it is written in fstab
    if "/" in volume:
        raise UserError(f"{text!r} is not {form}", ExitCode.USAGE)
    volume = volume or DEFAULT_VOLUME
    if cell_file is None:
        try:
            return Source(None, (parse_address(where),), volume)
        except AddressSyntaxError as error:
            raise UserError(f"{text!r} is not {form}: {error}", ExitCode.USAGE) from None
    try:
        cell = load_cell_file(cell_file)
    except CellFileError as error:
        raise UserError(str(error), ExitCode.USAGE) from None
    if where != cell.name:
        raise UserError(f"{cell_file} is of the cell {cell.name!r}, not {where!r}", ExitCode.USAGE)
    return Source(cell.name, tuple(server.address for server in cell.servers), volume)


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


def _parse_metrics(text: str) -> Address:
    try:
        return parse_address(text, lowest_port=0)
    except AddressSyntaxError as error:
        raise UserError(f"metrics=HOST:PORT: {error}", ExitCode.USAGE) from None


def _parse_days(name: str, text: str) -> float:
    match = re.fullmatch(r"(\d{1,5})d?", text)
    if match is None or not int(match[1]):
        raise UserError(f"{name}={text}: not a number of days like 30d", ExitCode.USAGE)
    return int(match[1]) * 86400.0


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
            case "cell":
                if not value:
                    raise UserError("cell=FILE: the file's name is missing", ExitCode.USAGE)
                options = replace(options, cell_file=Path(value))
            case "tls" if not value:
                options = replace(options, tls=True)
            case "ca":
                if not value:
                    raise UserError("ca=FILE: the file's name is missing", ExitCode.USAGE)
                options = replace(options, tls=True, ca=Path(value))
            case "locks":
                if value not in tuple(LockScope):
                    raise UserError(f"{item}: it is {', '.join(LockScope)}", ExitCode.USAGE)
                options = replace(options, locks=LockScope(value))
            case "fsname":
                options = replace(options, name=value)
            case "posix" if not value:
                options = replace(options, posix=True)
            case "metrics":
                options = replace(options, metrics=_parse_metrics(value))
            case _ if item == "metrics_insecure":
                options = replace(options, metrics_insecure=True)
            case "rejects":
                if not value:
                    raise UserError("rejects=DIR: the directory's name is missing", ExitCode.USAGE)
                options = replace(options, rejects=Path(value))
            case "key_wait":
                options = replace(options, key_wait_s=_parse_seconds(name, value))
            case "rejects_size":
                options = replace(options, rejects_limit_bytes=parse_size(value))
            case "rejects_age":
                options = replace(options, rejects_max_age_s=_parse_days(name, value))
            case _ if item in _PASSED_ON:
                fuse.add(item)
            case _ if item in _IGNORED or item.startswith(("x-", "comment=")):
                pass
            case _:
                raise UserError(f"option {item!r} is not known; see 'promisefs mount --help'", ExitCode.USAGE)
    return replace(options, fuse=frozenset(fuse))


def with_absolute_paths(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The same options for a process with another working directory."""

    def absolute(item: str) -> str:
        name, _, value = item.partition("=")
        return f"{name}={os.path.abspath(value)}" if name in ("cell", "rejects", "ca") and value else item

    return tuple(",".join(absolute(item) for item in text.split(",")) for text in texts)


def _at_least(minimum: int, value: int, item: str) -> int:
    if value < minimum:
        raise UserError(f"{item}: the least is {minimum >> 20}M", ExitCode.USAGE)
    return value
