"""The command promisefsd backup."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from promisefs_server.administration.backup import back_up
from promisefs_server.errors import ExitCode, StoreError
from promisefs_server.salvage.problems import Severity
from promisefs_server.store.database import DATABASE_NAME
from promisefs_server.store.store import store_errors

from .failures import reported

_EPILOG = "Exit codes: 0 done; 1 failure; 2 usage; 3 store missing, or DEST there; 6 the copy is damaged."


@click.command(epilog=_EPILOG)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("target", metavar="DEST", type=click.Path(path_type=Path))
def backup(directory: Path, target: Path) -> None:
    """Copy the store in DIR to the new directory DEST, also while it is being served.

    The copy is a store: it is checked when it is done, and to restore it is to serve it, or a copy of it. Removed files
    take room until the backup is done. If it is interrupted, run it again; it begins anew.

    \b
    Examples:
      promisefsd backup /srv/promisefs /backup/promisefs-$(date +%F)
      promisefsd serve /backup/promisefs-2026-11-27
    """
    with reported():
        if not (directory / DATABASE_NAME).is_file():
            raise StoreError(f"{directory} is no promisefs store")
        console = Console(stderr=True)
        columns = TextColumn("copying"), BarColumn(), MofNCompleteColumn()
        with (
            store_errors(directory),
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        ):
            task = bar.add_task("copying", total=None)
            report = back_up(directory, target, lambda done, total: bar.update(task, completed=done, total=total))
        if not report.is_sound:
            wrong = report.count(Severity.DAMAGE) + report.count(Severity.LOSS)
            click.echo(
                f"promisefsd: {target} is made, but has {wrong} problems: see 'promisefsd check' of it and {directory}",
                err=True,
            )
            sys.exit(ExitCode.DAMAGE)
        click.echo(f"{target} is a sound copy of {directory}")
