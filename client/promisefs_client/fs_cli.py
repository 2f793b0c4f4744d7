"""`promisefs fs`: mount points, in the words of AFS's `fs`."""

from __future__ import annotations

import os
import sys

import click

from .control_client import ask
from .errors import ExitCode, UserError
from .mounts import MountEntry, list_mounts

WAIT_S = 120.0
"""The mount waits for its servers up to its `timeout`."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def fs() -> None:
    """Mount points: directories that stand for volumes."""


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


def _inside_mount(path: str) -> tuple[MountEntry, str]:
    """The mount that a path is in, and the path from its root. Its last name is not looked up. Raise UserError."""
    parent, name = os.path.split(os.path.abspath(path))
    whole = os.path.join(os.path.realpath(parent), name)
    mounts = [entry for entry in list_mounts() if whole.startswith(entry.mountpoint.rstrip("/") + "/")]
    if not mounts:
        raise UserError(f"{path} is not in a promisefs mount", ExitCode.MOUNTPOINT)
    entry = max(mounts, key=lambda entry: len(entry.mountpoint))
    return entry, whole[len(entry.mountpoint.rstrip("/")) + 1 :]
