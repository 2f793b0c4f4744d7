"""The command promisefsd check."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import trio
from rich.console import Console

from promisefs_server.administration.stopped import StoppedServer
from promisefs_server.errors import ExitCode, StoreError, StoreLocked
from promisefs_server.salvage import salvager
from promisefs_server.salvage.paths import Paths
from promisefs_server.salvage.problems import Problem, Report, Severity
from promisefs_server.store.database import DATABASE_NAME, open_for_reading
from promisefs_server.store.datafiles import DataFiles
from promisefs_server.store.store import DATA_NAME, locked, store_errors

from .failures import reported

SHOWN = 10
"""Of each rule, in text."""

_EPILOG = "Exit codes: 0 sound, or repaired; 1 failure; 2 usage; 3 store missing or in use; 6 damage is left."


@click.command(epilog=_EPILOG)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--repair", is_flag=True, help="Mend what can be mended. The server must be stopped.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object.")
def check(directory: Path, repair: bool, as_json: bool) -> None:
    """Check the store in DIR: names, links, sizes, data files, counters.

    Without --repair nothing is changed, and the server may run. What a crash leaves behind and the next start clears up
    is a note; damage can be repaired; a loss cannot. Files and directories that have lost their names get new ones in
    lost+found. Before a repair the database is copied to DIR/store.sqlite.before-repair.

    \b
    Examples:
      promisefsd check /srv/promisefs
      promisefsd check /srv/promisefs --repair
    """
    with reported():
        console = Console(stderr=True)
        with console.status("checking") if console.is_terminal else contextlib.nullcontext():
            report, left, paths = _repaired(directory) if repair else _checked(directory)
        if as_json:
            click.echo(json.dumps(_as_object(report, left, paths)))
        else:
            _print(directory, report, left, paths, repair)
        sys.exit(ExitCode.OK if left.is_sound else ExitCode.DAMAGE)


def _checked(folder: Path) -> tuple[Report, Report, dict[int, str]]:
    with _for_reading(folder) as (connection, stopped):
        files = DataFiles(folder / DATA_NAME)
        if stopped:
            (clean,) = connection.execute("SELECT clean FROM store").fetchone() or (0,)
            report = salvager.check(connection, files, clean=bool(clean))
        else:
            report = salvager.check_live(connection, files)
        return report, report, _paths(connection, report)


@contextlib.contextmanager
def _for_reading(folder: Path) -> Iterator[tuple[sqlite3.Connection, bool]]:
    """Have the database open, and the store locked if no server runs; whether none does."""
    with store_errors(folder), contextlib.ExitStack() as stack:
        if not (folder / DATABASE_NAME).is_file() or not (folder / DATA_NAME).is_dir():
            raise StoreError(f"{folder} is no promisefs store, or parts of it are missing")
        try:
            stack.enter_context(locked(folder))
            stopped = True
        except StoreLocked:
            stopped = False
        yield stack.enter_context(closing(open_for_reading(folder / DATABASE_NAME))), stopped


def _repaired(folder: Path) -> tuple[Report, Report, dict[int, str]]:
    return trio.run(_repair, folder)


async def _repair(folder: Path) -> tuple[Report, Report, dict[int, str]]:
    """Return what was wrong, what is left of it, and paths."""
    with StoppedServer(folder, lambda text: click.echo(f"promisefsd: {text}", err=True)) as stopped:
        store = stopped.store
        connection = store.database.connection
        with store_errors(folder):
            report = salvager.check(connection, store.files, clean=store.was_clean)
            left = report
            if report.count(Severity.DAMAGE):
                await stopped.wait_for_leases()
                report = salvager.repair(store)
                left = salvager.check(connection, store.files, clean=store.was_clean)
            return report, left, _paths(connection, report)


def _paths(connection: sqlite3.Connection, report: Report) -> dict[int, str]:
    keys = {problem.vnode for problem in report.problems if problem.vnode}
    try:
        paths = Paths(connection, keys)
        return {key: paths[key] for key in keys}
    except sqlite3.Error:
        # The database is too damaged for that.
        return {key: f"vnode {key}" for key in keys}


def _as_object(report: Report, left: Report, paths: dict[int, str]) -> dict[str, Any]:
    def rows(of: Report) -> list[dict[str, Any]]:
        return [
            {"rule": rule, "severity": severity, "count": count}
            for (rule, severity), count in sorted(of.counts.items())
        ]

    problems = [
        {"rule": p.rule, "severity": p.severity, "path": paths.get(p.vnode), "text": p.text} for p in report.problems
    ]
    return {"sound": left.is_sound, "found": rows(report), "left": rows(left), "problems": problems}


def _print(folder: Path, report: Report, left: Report, paths: dict[int, str], repair: bool) -> None:
    shown: dict[tuple[str, Severity], int] = {}
    for problem in report.problems:
        counted = (problem.rule, problem.severity)
        shown[counted] = shown.get(counted, 0) + 1
        if shown[counted] <= SHOWN:
            click.echo(_line(problem, paths))
        elif shown[counted] == SHOWN + 1:
            click.echo(f"{problem.severity}: ... and {report.counts[counted] - SHOWN} more of {problem.rule}")
    damage, loss, notes = (report.count(severity) for severity in (Severity.DAMAGE, Severity.LOSS, Severity.NOTE))
    if not damage and not loss:
        click.echo(f"{folder} is sound" + (f", {notes} notes" if notes else ""))
    elif repair:
        left_count = left.count(Severity.DAMAGE) + left.count(Severity.LOSS)
        click.echo(f"{folder}: {damage + loss} problems, {left_count} are left")
    else:
        click.echo(f"{folder}: {damage} problems that --repair mends, {loss} that it cannot mend")


def _line(problem: Problem, paths: dict[int, str]) -> str:
    where = f"{paths[problem.vnode]}: " if problem.vnode else ""
    return f"{problem.severity}: {where}{problem.text}"
