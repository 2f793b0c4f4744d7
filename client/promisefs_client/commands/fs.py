"""`promisefs fs`: mount points and volumes, in the words of AFS's `fs`; access control lists are in `acls`."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import click

from promisefs_client.errors import ExitCode, UserError

from .acls import copyacl, getcalleraccess, listacl, setacl, whoami
from .control_client import ask
from .mounts import MountEntry, find_mount, list_mounts
from .status_view import printable

WAIT_S = 120.0
"""The mount waits for its servers up to its `timeout`."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def fs() -> None:
    """Volumes and the mount points that stand for them, and who may do what."""


@fs.command(epilog="\b\nExample:\n  promisefs fs mkmount /mnt/projects/atlas atlas")
@click.argument("directory", metavar="DIR")
@click.argument("volume")
def mkmount(directory: str, volume: str) -> None:
    """Have DIR, which must not exist, stand for a volume of that name in the cell. The volume may be made later."""
    entry, path = _inside_mount(directory)
    ask(entry, "mkmount", {"path": path, "volume": volume}, WAIT_S)


@fs.command()
@click.argument("directories", metavar="DIR...", nargs=-1, required=True)
def lsmount(directories: tuple[str, ...]) -> None:
    """Say which volumes mount points stand for."""
    failed = False
    for directory in directories:
        try:
            entry, path = _inside_mount(directory)
            volume = ask(entry, "lsmount", {"path": path}, WAIT_S)["volume"]
            click.echo(f"'{directory}' is a mount point for volume '#{volume}'")
        except UserError as error:
            click.echo(f"promisefs: {error}", err=True)
            failed = True
    if failed:
        sys.exit(ExitCode.FAILURE)


@fs.command()
@click.argument("directories", metavar="DIR...", nargs=-1, required=True)
def rmmount(directories: tuple[str, ...]) -> None:
    """Remove mount points. The volumes stay as they are."""
    for directory in directories:
        entry, path = _inside_mount(directory)
        ask(entry, "rmmount", {"path": path}, WAIT_S)


@fs.command(epilog="\b\nExample:\n  promisefs fs whereis /mnt/projects/atlas")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
def whereis(paths: tuple[str, ...]) -> None:
    """Say on which servers files are. Mount points are followed, symbolic links at the end of PATH are not."""
    failed = False
    for path in paths:
        try:
            found = _ask_about(path, "whereis")
            click.echo(f"File {printable(path)} is on host {found['server']}")
        except UserError as error:
            click.echo(f"promisefs: {printable(str(error))}", err=True)
            failed = True
    if failed:
        sys.exit(ExitCode.FAILURE)


@fs.command(epilog="\b\nExamples:\n  promisefs fs examine /mnt/projects/atlas\n  promisefs fs examine --json .")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object.")
def examine(path: str, as_json: bool) -> None:
    """Show the fid of a file, and the volume and server that it is on."""
    found = _ask_about(path, "examine")
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"File {printable(path)} ({found['fid']}) contained in volume {found['volume']}")
    click.echo(f"Volume status for vid = {found['volume']} named {found['name']}")
    click.echo(f"The volume is on host {found['server']} and has {found['files']} files")
    click.echo(f"The partition has {found['available_kib']} blocks available out of {found['total_kib']}")


@fs.command(epilog="\b\nExample:\n  promisefs fs listquota /mnt/projects/atlas")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
def listquota(paths: tuple[str, ...]) -> None:
    """Show how much the volumes of files may take, and take; in KiB."""
    click.echo(f"{'Volume Name':25}{'Quota':>12}{'Used':>12} %Used   Partition")
    for path in paths or (".",):
        found = _ask_about(path, "examine")
        quota, used, total = found["quota_kib"], found["used_kib"], found["total_kib"]
        share = f"{round(100 * used / quota)}%" if quota else "0%"
        disk = f"{round(100 * (total - found['available_kib']) / total)}%" if total else "0%"
        click.echo(f"{found['name']:25}{quota or 'no limit':>12}{used:>12}{share:>6}{disk:>12}")


@fs.command(epilog="\b\nExamples:\n  promisefs fs setquota /mnt/projects/atlas 20G\n  promisefs fs setquota . 0")
@click.argument("path")
@click.argument("size")
def setquota(path: str, size: str) -> None:
    """Bound what the volume of PATH takes.

    SIZE is in KiB, or has K, M, G or T after it; 0: no bound. For administrators.
    """
    match = re.fullmatch(r"(\d{1,15})([KMGT]?)", size, re.IGNORECASE)
    if match is None:
        raise UserError(f"{size!r} is no size like 500M", ExitCode.USAGE)
    kib = int(match[1]) << {"": 0, "K": 0, "M": 10, "G": 20, "T": 30}[match[2].upper()]
    _ask_about(path, "setquota", kib=kib)


@fs.command(epilog="\b\nExample:\n  promisefs fs flush /mnt/projects/atlas")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
def flush(paths: tuple[str, ...]) -> None:
    """Forget what is cached of files and directories. What is not stored yet is kept, and stored as ever."""
    for path in paths:
        _ask_about(path, "flush")


@fs.command()
@click.argument("mountpoints", metavar="[MOUNTPOINT]...", nargs=-1)
def checkservers(mountpoints: tuple[str, ...]) -> None:
    """Say which servers of mounts cannot be reached; of all your mounts if none is named."""
    entries = [find_mount(path) for path in mountpoints] or [e for e in list_mounts() if e.owner == os.geteuid()]
    away = {
        server["address"]: None
        for entry in entries
        for server in ask(entry, "status", {})["servers"]
        if not server["connected"]
    }
    if not away:
        click.echo("All servers are running.")
        return
    click.echo(f"These servers unavailable due to network or server problems: {', '.join(away)}.")
    sys.exit(ExitCode.FAILURE)


def _ask_about(path: str, command: str, **more: Any) -> dict[str, Any]:
    """What the mount's process says of a path, the mountpoint itself among them. Raise UserError."""
    try:
        entry = find_mount(path)
        inside = entry.root.strip("/")
    except UserError:
        entry, inside = _inside_mount(path)
    answer: dict[str, Any] = ask(entry, command, {"path": inside, **more}, WAIT_S)
    return answer


def _inside_mount(path: str) -> tuple[MountEntry, str]:
    """The mount that a path is in, and the path from the root of its tree. The last name is not looked up.

    Raise UserError.
    """
    parent, name = os.path.split(os.path.abspath(path))
    whole = os.path.join(os.path.realpath(parent), name)
    mounts = [entry for entry in list_mounts() if whole.startswith(entry.mountpoint.rstrip("/") + "/")]
    if not mounts:
        raise UserError(f"{path} is not in a promisefs mount", ExitCode.MOUNTPOINT)
    entry = max(mounts, key=lambda entry: len(entry.mountpoint))
    below = whole[len(entry.mountpoint.rstrip("/")) + 1 :]
    return entry, f"{entry.root.strip('/')}/{below}"  # a bind mount begins at another root


fs.add_command(whoami)
for command, short in (
    (listacl, "la"), (setacl, "sa"), (copyacl, "ca"), (getcalleraccess, "gca"), (listquota, "lq"), (setquota, "sq")
):  # fmt: skip
    fs.add_command(command)
    fs.add_command(command, short)
