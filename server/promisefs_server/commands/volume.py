"""The commands promisefsd volume."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from pathlib import Path

import click
import trio
from promisefs_protocol.messages import (
    CreateVolume,
    ListVolumes,
    ListVolumesReply,
    RemoveVolume,
    RenameVolume,
    SetVolume,
    VolumeInfo,
)
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from promisefs_server.administration import control_socket
from promisefs_server.administration.stopped import StoppedServer
from promisefs_server.administration.volume_move import VolumeMove
from promisefs_server.errors import StoreLocked, VolumeError

from .asking import ask, say
from .failures import reported

WIDE = 200
"""Columns of a table that does not go to a terminal, so that nothing is wrapped."""

_EPILOG = "Exit codes: 0 done, 1 failure, 2 usage, 3 store, 5 no such volume, or it cannot be done with this one."
_DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))


@click.group(epilog=_EPILOG)
def volume() -> None:
    """Make, list, remove, rename and move volumes.

    DIR is a server's store. If the server runs, it is asked through the control socket in DIR; else the command works
    on the store itself. Only a move needs the servers to be stopped.
    """


@volume.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
def create(directory: Path, name: str) -> None:
    """Make the volume NAME, with an empty root directory that belongs to the server's user.

    \b
    Examples:
      promisefsd volume create /srv/promisefs projects
      promisefs mount localhost/projects ~/projects
    """
    with reported():
        entry = trio.run(ask, directory, CreateVolume(name))
        click.echo(f"made volume {entry.name}, number {entry.volume}")


@volume.command("list", epilog=_EPILOG)
@_DIRECTORY
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects; sizes in bytes.")
def list_(directory: Path, as_json: bool) -> None:
    """List the volumes in DIR, and those that have moved from there.

    \b
    Example:
      promisefsd volume list /srv/promisefs
    """
    with reported():
        volumes = trio.run(_list, directory)
        if as_json:
            click.echo(json.dumps([volume._asdict() for volume in volumes]))
            return
        console = Console() if sys.stdout.isatty() else Console(width=WIDE)
        table = Table("name", "number", "files", "size", "where", box=None, pad_edge=False, header_style="bold")
        for index in (1, 2, 3):
            table.columns[index].justify = "right"
        for info in volumes:
            where = f"moved to {info.moved_to}" if info.moved_to else "here"
            where += f", quota {decimal(info.quota)}" if info.quota else ""
            where += ", read-only" if info.read_only else ""
            table.add_row(escape(info.name), str(info.volume), str(info.files), decimal(info.size), escape(where))
        console.print(table)


@volume.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(directory: Path, name: str, yes: bool) -> None:
    """Remove the volume NAME with everything in it, for good.

    Mount points for it stay, and lead nowhere. The root volume cannot be removed.

    \b
    Examples:
      promisefsd volume remove /srv/promisefs projects
      promisefsd volume remove /srv/promisefs projects --yes
    """
    with reported():
        if not yes:
            _confirm(directory, name)
        trio.run(ask, directory, RemoveVolume(name))
        click.echo(f"removed volume {name}")


def _confirm(directory: Path, name: str) -> None:
    info = next((i for i in trio.run(_list, directory) if i.name == name and not i.moved_to), None)
    if info is None:
        raise VolumeError(f"no volume {name!r} here")
    if not sys.stdin.isatty():
        raise click.UsageError("there is nobody to ask: say --yes to remove it")
    click.confirm(f"Remove volume {name} with {info.files} files, {decimal(info.size)}, for good?", abort=True)


@volume.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("old")
@click.argument("new")
def rename(directory: Path, old: str, new: str) -> None:
    """Call the volume OLD by the name NEW.

    Mount points say names: those for OLD have to be made anew.

    \b
    Example:
      promisefsd volume rename /srv/promisefs projects old-projects
    """
    with reported():
        trio.run(ask, directory, RenameVolume(old, new))
        click.echo(f"renamed volume {old} to {new}")


@volume.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
@click.argument("size", metavar="SIZE")
def setquota(directory: Path, name: str, size: str) -> None:
    """Let the volume NAME grow to SIZE at most; 0 takes the bound away.

    SIZE is a number of bytes, or with K, M, G, T. What counts is the sizes of all files, directories and links,
    holes included, and 1 KiB for each. A volume that has more already keeps it, but does not grow.

    \b
    Example:
      promisefsd volume setquota /srv/promisefs projects 20G
    """
    with reported():
        match = re.fullmatch(r"(\d{1,15})([KMGT]?)(?:i?B)?", size, re.IGNORECASE)
        if match is None:
            raise click.UsageError(f"{size!r} is not a size like 20G")
        quota = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2].upper()]
        if quota >= 1 << 62:
            raise click.UsageError(f"{size!r} is too much")
        trio.run(ask, directory, SetVolume(name, quota, None))
        click.echo(f"volume {name} may grow to {decimal(quota)}" if quota else f"volume {name} has no quota")


@volume.command("set", epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
@click.option("--read-only/--read-write", "read_only", required=True, default=None, help="Whether anything may change.")
def set_(directory: Path, name: str, read_only: bool) -> None:
    """Have nothing in the volume NAME changed (EROFS), or let it be changed again.

    What clients have written and not stored when it becomes read-only is refused, and goes to their quarantines.

    \b
    Example:
      promisefsd volume set /srv/promisefs archive --read-only
    """
    with reported():
        trio.run(ask, directory, SetVolume(name, None, read_only))
        click.echo(f"volume {name} is {'read-only' if read_only else 'read-write'}")


@volume.command(epilog=_EPILOG)
@_DIRECTORY
@click.argument("name")
@click.argument("to_directory", metavar="TO_DIR", type=click.Path(path_type=Path))
def move(directory: Path, name: str, to_directory: Path) -> None:
    """Move the volume NAME from the store in DIR to the one in TO_DIR, another server's of the same cell.

    Both servers must be stopped. Clients find the volume by themselves when the servers run again. If the command is
    interrupted, at whatever point, run it again: it goes on from there.

    \b
    Example:
      promisefsd volume move /srv/alpha projects /srv/beta
    """
    with reported():
        if directory.exists() and to_directory.exists() and directory.samefile(to_directory):
            raise VolumeError(f"{directory} and {to_directory} are the same")
        click.echo(trio.run(_move, directory, name, to_directory))


async def _move(directory: Path, name: str, to_directory: Path) -> str:
    """Move a volume. Return what has become of it, for people."""
    for folder in (directory, to_directory):
        if (stream := await control_socket.connect(folder)) is not None:
            await stream.aclose()
            raise StoreLocked(f"a server runs on {folder}: stop it first, a volume is moved between stopped servers")
    with StoppedServer(directory, say) as source, StoppedServer(to_directory, say) as target:
        plan = VolumeMove(source.store, target.store, name)
        number = target.store.membership.number
        result = (
            f"volume {name} had moved to server {number}"
            if plan.arrived
            else (f"volume {name} is on server {number} now, in {to_directory}")
        )
        console = Console(stderr=True)
        columns = TextColumn("copying"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("copying", total=None)
            try:
                await plan.run(
                    source.wait_for_leases, lambda done, total: bar.update(task, completed=done, total=total)
                )
            except (OSError, sqlite3.Error) as error:
                raise VolumeError(f"not finished: {error}. {plan.situation}") from None
            except KeyboardInterrupt:
                raise VolumeError(f"not finished. {plan.situation}") from None
        return result


async def _list(directory: Path) -> list[VolumeInfo]:
    volumes: list[VolumeInfo] = []
    more = True
    while more:
        reply: ListVolumesReply = await ask(directory, ListVolumes(volumes[-1].volume if volumes else 0))
        volumes += reply.volumes
        more = reply.more
    return volumes
