"""`promisefs rejects`: what could not be stored, from the quarantine. Works without the mount, but for `restore`."""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from promisefs_client.errors import ExitCode, UserError
from promisefs_client.rejects.quarantine import KeptReject, default_directory, discard, kept_in
from promisefs_client.rejects.reject import NoReject, Reject

from .control_client import ask
from .mounts import MountEntry, find_mount, list_mounts
from .status_view import console, printable

F = TypeVar("F", bound=Callable[..., Any])

SHOWN_BYTES = 512
"""Of each range, where bytes are shown."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rejects of one file that were refused together, whoever wrote them."""

    parts: tuple[KeptReject, ...]

    @property
    def name(self) -> str:
        return self.first.event

    @property
    def first(self) -> Reject:
        return self.parts[0].reject

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(offset, length), ascending, joined where they touch."""
        joined: list[tuple[int, int]] = []
        for offset, length in sorted(range_ for part in self.parts for range_ in part.reject.ranges):
            if joined and joined[-1][0] + joined[-1][1] == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((offset, length))
        return joined

    @property
    def size_bytes(self) -> int:
        return sum(part.reject.size_bytes for part in self.parts)

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """Oldest first: where ranges overlap the later bytes were written later."""
        try:
            for part in self.parts:
                yield from part.pieces()
        except (OSError, NoReject) as error:
            raise UserError(f"the reject {self.name} cannot be read: {error}") from None

    def report(self) -> dict[str, Any]:
        first = self.first
        return {
            "id": self.name,
            "source": first.source,
            "path": first.path,
            "fid": first.fid,
            "inode": first.ino,
            "uids": sorted({part.reject.uid for part in self.parts}),
            "at": first.at_ns / 1e9,
            "errno": first.errno,
            "why": first.why,
            "data_version": first.data_version,
            "bytes": self.size_bytes,
            "ranges": self.ranges,
        }


def _with_directory(function: F) -> F:
    return click.option(
        "--dir",
        "directory",
        type=click.Path(file_okay=False, path_type=Path),
        default=None,
        help="The quarantine of a mount that is gone and had another one than the usual (rejects=DIR).",
    )(function)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def rejects() -> None:
    """Bytes that could not be stored, and are kept on this machine.

    A server may refuse what was written: no room, over quota, read-only, no right any more, the file removed elsewhere.
    The program that wrote it got the error; the bytes are here, until they are restored or discarded.
    """


@rejects.command(name="list", epilog="\b\nExamples:\n  promisefs rejects list\n  promisefs rejects list /mnt --json")
@click.argument("mountpoint", required=False)
@_with_directory
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
def list_(mountpoint: str | None, directory: Path | None, as_json: bool) -> None:
    """List rejects, oldest first: of one mount, or of all."""
    groups = _groups(directory, mountpoint)
    if as_json:
        click.echo(json.dumps([group.report() for group in groups]))
        return
    if not groups:
        click.echo("nothing was refused")
        return
    table = Table(box=None)
    for title in ("id", "when", "of uid", "bytes", "why", "file"):
        table.add_column(title, overflow="fold")
    for group in groups:
        first = group.first
        table.add_row(
            group.name,
            time.strftime("%F %T", time.localtime(first.at_ns / 1e9)),
            ", ".join(str(uid) for uid in group.report()["uids"]),
            decimal(group.size_bytes),
            first.error,
            Text(printable(f"{first.source}{first.path}")),
        )
    console().print(table)


@rejects.command(
    epilog="\b\nExamples:\n  promisefs rejects show 1f2e3d4c\n  promisefs rejects show 1f2e3d4c -o lost.bin"
)
@click.argument("id", metavar="ID")
@_with_directory
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the bytes to a new file, each at its place."
)
@click.option("--json", "as_json", is_flag=True, help="For programs: one object.")
def show(id: str, directory: Path | None, output: Path | None, as_json: bool) -> None:
    """Show what is known of a reject, and how its bytes begin."""
    group = _group(directory, id)
    if output is not None:
        _write_out(group, output)
        return
    if as_json:
        click.echo(json.dumps(group.report()))
        return
    report = group.report()
    for key, value in report.items():
        if key == "at":
            value = time.strftime("%F %T", time.localtime(value))
        elif key == "ranges":
            value = ", ".join(f"{offset}-{offset + length}" for offset, length in value)
        elif key == "uids":
            value = ", ".join(str(uid) for uid in value)
        click.echo(f"{key.replace('_', ' ')}: {printable(str(value))}")
    for offset, data in group.pieces():
        click.echo(f"bytes from {offset} on:")
        click.echo(_shown(data))


@rejects.command()
@click.argument("id", metavar="ID")
@_with_directory
@click.option("--file", "path", help="Compare with this file, if it is called something else by now.")
def diff(id: str, directory: Path | None, path: str | None) -> None:
    """Compare the file as it is now with what it would be with the refused bytes. Exit code 1 if they differ."""
    group = _group(directory, id)
    where = path or _path_now(group)
    differs = False
    for offset, data in group.pieces():
        with _opened(where, os.O_RDONLY) as file:
            now = os.pread(file.fileno(), len(data), offset)
        if now == data:
            continue
        differs = True
        click.echo(f"@@ bytes {offset}-{offset + len(data)} of {printable(where)}")
        for line in difflib.unified_diff(_shown(now).split("\n"), _shown(data).split("\n"), "now", "refused", n=0):
            click.echo(line.rstrip("\n"))
    if differs:
        sys.exit(ExitCode.FAILURE)


@rejects.command(
    epilog="\b\nExamples:\n  promisefs rejects restore 1f2e3d4c\n  promisefs rejects restore --force 1f2e3d4c"
)
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@_with_directory
@click.option("--file", "path", help="Write to this file, which is made if it is not there.")
@click.option("--force", is_flag=True, help="Also over what was changed since, without asking.")
def restore(ids: tuple[str, ...], directory: Path | None, path: str | None, force: bool) -> None:
    """Write the refused bytes, and nothing else, into their file again; then they are no reject any more.

    The file is the one on the mount from which it was refused. If it was changed since, this asks first.
    """
    if path is not None and len(ids) > 1:
        raise UserError("--file goes with one ID", ExitCode.USAGE)
    for id in ids:
        group = _group(directory, id)
        where = path or _path_now(group)
        with _opened(where, os.O_RDWR | (0 if path is None else os.O_CREAT)) as file:
            found = os.fstat(file.fileno())
            if path is None and found.st_ino != group.first.ino:
                raise UserError(f"{where} is another file by now: --file names the one to write to")
            changed = found.st_size > 0 if path is not None else found.st_mtime_ns != group.first.mtime_ns
            if changed and not force:
                _confirm(where, group)
            try:
                for offset, data in group.pieces():
                    _write_all(file.fileno(), data, offset)
                os.fsync(file.fileno())
            except OSError as error:
                raise UserError(f"{where}: {error.strerror}: the reject {group.name} is kept") from None
        discard(group.parts)
        click.echo(f"{group.size_bytes} bytes restored to {printable(where)}")


@rejects.command(name="discard")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@_with_directory
@click.option("--all", "everything", is_flag=True, help="All of them, without asking.")
def discard_(ids: tuple[str, ...], directory: Path | None, everything: bool) -> None:
    """Delete rejects for good."""
    if bool(ids) == everything:
        raise UserError("name what to discard by its ID, or --all", ExitCode.USAGE)
    groups = _groups(directory, None) if everything else [_group(directory, id) for id in ids]
    for group in groups:
        discard(group.parts)
    click.echo(f"{len(groups)} discarded, {sum(group.size_bytes for group in groups)} bytes")


# Finding


def _groups(directory: Path | None, mountpoint: str | None) -> list[Group]:
    source = None
    if mountpoint is not None:
        found = _quarantine_of(find_mount(mountpoint))
        if found is None:
            raise UserError(f"{mountpoint}: its process is of an older version and has no quarantine")
        place, source = found
        places = [directory or place]
    else:
        places = [directory] if directory else _usual_places()
    parts: dict[str, list[KeptReject]] = {}
    for place in places:
        try:
            kept_here, problems = kept_in(place)
        except OSError as error:
            raise UserError(f"{place}: {error.strerror}") from None
        for problem in problems:
            click.echo(f"promisefs: {printable(problem)}", err=True)
        for kept in kept_here:
            if source is None or kept.reject.source == source:
                parts.setdefault(kept.reject.event, []).append(kept)
    return sorted((Group(tuple(group)) for group in parts.values()), key=lambda group: group.first.at_ns)


def _usual_places() -> list[Path]:
    """Where this user's mounts keep rejects, those of mounts that are there now among them."""
    places = {default_directory(): None}
    for entry in list_mounts():
        if os.geteuid() in (0, entry.owner):
            with suppress(UserError):
                if place := ask(entry, "status").get("quarantine"):  # a mount of an older version has none
                    places[Path(place)] = None
    return list(places)


def _group(directory: Path | None, id: str) -> Group:
    found = [group for group in _groups(directory, None) if id and group.name.startswith(id)]
    if not found:
        raise UserError(f"no reject {id!r}: 'promisefs rejects list' shows what there is")
    if len(found) > 1:
        raise UserError(f"{id!r} is the beginning of {len(found)} IDs: give more of it")
    return found[0]


def _path_now(group: Group) -> str:
    """Where the file was last known to be, on a mount of its source. Raise UserError."""
    first = group.first
    mounts = [entry for entry in list_mounts() if entry.root == "/" and _is_of(entry, first.source)]
    if not mounts:
        raise UserError(f"{first.source} is not mounted here: mount it, or name the file with --file")
    if "?" in first.path.split("/")[:1]:
        raise UserError("what the file is called was not known: --file names it")
    return mounts[0].mountpoint.rstrip("/") + first.path


def _quarantine_of(entry: MountEntry) -> tuple[Path, str] | None:
    """Where a mount keeps rejects, and of which source; None if its process is too old to say. Raise UserError."""
    status = ask(entry, "status")
    if "quarantine_source" not in status:
        return None
    return Path(status["quarantine"]), str(status["quarantine_source"])


def _is_of(entry: MountEntry, source: str) -> bool:
    """Whether it is a mount of that source, whatever it is called."""
    if os.geteuid() not in (0, entry.owner):
        return False
    try:
        found = _quarantine_of(entry)
    except UserError:
        return False
    return found is not None and found[1] == source


# Bytes


def _opened(path: str, flags: int) -> Any:
    try:
        return open(os.open(path, flags | os.O_CLOEXEC), "r+b" if flags & os.O_RDWR else "rb", buffering=0)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: --file names another") from None


def _confirm(where: str, group: Group) -> None:
    question = f"{printable(where)} was changed since: write {group.size_bytes} refused bytes over what is there now?"
    if not sys.stdin.isatty():
        raise UserError(f"{where} was changed since: look at 'promisefs rejects diff {group.name}', then --force")
    if not click.confirm(question):
        raise UserError("nothing was changed")


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _write_out(group: Group, output: Path) -> None:
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            for offset, data in group.pieces():
                _write_all(file.fileno(), data, offset)
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}") from None


def _shown(data: bytes) -> str:
    """Text as text, else as hexadecimal; only the beginning of much."""
    more = f"\n... {len(data) - SHOWN_BYTES} bytes more" if len(data) > SHOWN_BYTES else ""
    data = data[:SHOWN_BYTES]
    try:
        text = data.decode()
        if "\0" not in text:
            return "\n".join(printable(line) for line in text.split("\n")) + more
    except UnicodeDecodeError:
        pass
    return "\n".join(data[at : at + 32].hex(" ", 4) for at in range(0, len(data), 32)) + more
