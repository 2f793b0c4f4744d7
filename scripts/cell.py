"""`scripts/cell`: one server and some mounts in the background, for trying things out by hand."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click
from cell_lib import mounts
from cell_lib.cell import Cell, CellError
from rich.console import Console

DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
console = Console(highlight=False, soft_wrap=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run a promisefs cell in DIR: store in DIR/store, logs in DIR/*.log, mounts at DIR/m1 to DIR/mN.

    Exit status: 0 done; 1 it failed, or did not end in good order (said why); 2 usage.

    \b
    Examples:
      scripts/cell up /tmp/c --mounts 3
      scripts/cell status /tmp/c
      scripts/cell down /tmp/c
    """


@main.command()
@DIRECTORY
@click.option("--mounts", "mount_count", type=click.IntRange(0, 64), default=2, show_default=True, help="How many.")
@click.option("-o", "mount_options", default="", metavar="OPTIONS", help="For each mount, as promisefs mount -o.")
@click.option("--lease", metavar="SECONDS", help="For the server, as promisefsd serve --lease.")
def up(directory: Path, mount_count: int, mount_options: str, lease: str | None) -> None:
    """Start the server on a free port of the loopback interface, and the mounts."""
    if reason := mounts.why_fuse_is_unusable():
        raise CellError(reason)
    before = Cell.load(directory)
    if before and before.runs():
        raise CellError(f"a cell runs there already; first: scripts/cell down {directory}")
    if before:
        before.down()
    cell = Cell(directory)
    if below := mounts.fuse_mounts_below(cell.directory):
        raise CellError(f"{below[0].mountpoint} is mounted already")
    cell.up(mount_count, server_options=["--lease", lease] if lease else [], mount_options=mount_options)
    show(cell)


@main.command()
@DIRECTORY
def down(directory: Path) -> None:
    """Unmount, stop the server. Store and logs stay. Nothing to do is no error."""
    cell = Cell.load(directory)
    if cell is None:
        console.print(f"nothing runs in {directory}")
        return
    if complaints := cell.down():
        raise CellError("it is down, but not all ended in good order: " + "; ".join(complaints))
    console.print(f"down; the store stays in {cell.store}")


@main.command()
@DIRECTORY
def status(directory: Path) -> None:
    """Show what runs. Exit status 1 if anything is missing."""
    cell = Cell.load(directory)
    if cell is None:
        raise CellError(f"nothing runs in {directory}")
    show(cell)
    if not cell.runs():
        raise CellError(f"not all of it is there any more; scripts/cell down {directory} tidies up")


def show(cell: Cell) -> None:
    state = f"pid {cell.server_pid}" if cell.server_runs() else "[red]gone[/red]"
    console.print(f"server  {cell.address}  {state}  log {cell.directory / 'server.log'}")
    for mount in cell.mounts.values():
        state = f"pid {mount.pid}" if mounts.fuse_mount_at(mount.mountpoint) else "[red]gone[/red]"
        console.print(f"mount   {mount.mountpoint}  {state}  log {cell.directory / mount.name}.log")


def run() -> None:
    # A second process may take a half-made cell down, but it should not have to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        main.main(standalone_mode=True, prog_name="scripts/cell")
    except (CellError, OSError) as problem:
        print(f"cell: {problem}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run()
