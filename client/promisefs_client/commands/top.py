"""`promisefs top`: what mounts do, live."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
from promisefs_protocol.observe.live_screen import Draw, NoTerminal, show

from promisefs_client.errors import ExitCode, UserError
from promisefs_client.observe.activity import NEEDED, activity

from .control_client import MountIsSilent
from .mounts import MountEntry, find_mount, list_mounts
from .status_view import fetch_status, place_of
from .top_view import mount_screen, overview_screen


class _Observed:
    """One mount, and what it said of itself the last time."""

    def __init__(self) -> None:
        self._report: dict[str, Any] | None = None
        self._at_s = 0.0

    def look(self, entry: MountEntry) -> dict[str, Any]:
        """What it has done since the last look. Raise UserError."""
        report, now_s = fetch_status(entry), time.monotonic()
        if not report.keys() >= NEEDED:
            raise UserError(f"{entry.mountpoint}: its process is of another version, which cannot be watched")
        seconds = report["mounted_s"] if self._report is None else now_s - self._at_s
        state = activity(self._report, report, seconds)
        self._report, self._at_s = report, now_s
        return {"time": round(time.time(), 3), **state}


def _looks_at_one(entry: MountEntry) -> Iterator[dict[str, Any]]:
    observed = _Observed()
    while True:
        try:
            yield observed.look(entry)
        except MountIsSilent as error:
            yield {**place_of(entry), "error": str(error)}


def _looks_at_all() -> Iterator[list[dict[str, Any]]]:
    observed: dict[str, _Observed] = {}
    while True:
        entries = {entry.device: entry for entry in list_mounts()}
        observed = {device: observed.get(device) or _Observed() for device in entries}
        states = []
        for device, entry in entries.items():
            try:
                states.append(observed[device].look(entry))
            except UserError as error:
                states.append({**place_of(entry), "error": str(error)})
        yield states


@click.command(
    epilog="\b\nExamples:\n  promisefs top\n  promisefs top /mnt/home\n  promisefs top /mnt/home --json --interval 10"
)
@click.argument("mountpoint", type=click.STRING, required=False)  # not click.Path: that would touch the mount
@click.option(
    "--interval", "interval_s", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, metavar="SECONDS"
)
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many intervals.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="For programs: one object an interval, or a list of them without MOUNTPOINT.",
)
def top(mountpoint: str | None, interval_s: float, count: int | None, as_json: bool) -> None:
    """Show what one mount does, or all of them, live.

    The first picture is of all that was done since the mount began, the others of one interval each.
    """
    looks: Iterator[Any] = _looks_at_all() if mountpoint is None else _looks_at_one(find_mount(mountpoint))
    if as_json:
        _print_looks(looks, interval_s, count)
        return
    screen: Callable[..., Any] = overview_screen if mountpoint is None else mount_screen

    def next_picture() -> Draw:
        state = next(looks)
        return lambda size: screen(state, size)

    try:
        show(next_picture, interval_s, count)
    except NoTerminal:
        raise UserError("top draws on a terminal; for programs there is --json", ExitCode.USAGE) from None
    except KeyboardInterrupt:
        return


def _print_looks(looks: Iterator[Any], interval_s: float, count: int | None) -> None:
    try:
        for number, look in enumerate(looks, 1):
            click.echo(json.dumps(look))
            if number == count:
                return
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return
