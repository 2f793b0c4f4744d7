"""`promisefs trace`: follows a mount's events at the terminal."""

from __future__ import annotations

import json
import time
from typing import Any

import click
from promisefs_protocol.observe.tracing import Event, described

from .control_client import Asked
from .mounts import find_mount
from .status_view import printable

_EVENTS = sorted(event.value for event in Event)
_EXAMPLES = (
    "\b\nExamples:\n  promisefs trace /mnt/home\n  promisefs trace /mnt/home --event cb_break --event dv_mismatch\n"
    "  promisefs trace /mnt/home --fid 1.23.4567 --json"
)


@click.command(epilog=_EXAMPLES)
@click.argument("mountpoint", type=click.STRING)  # not click.Path: that would touch the mount
@click.option(
    "--event",
    "events",
    multiple=True,
    metavar="EVENT",
    type=click.Choice(_EVENTS),
    help="Only these; repeatable. " + ", ".join(_EVENTS) + ".",
)
@click.option("--fid", "fids", multiple=True, help="Only about these; repeatable. 'promisefs fs examine' tells them.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line.")
def trace(mountpoint: str, events: tuple[str, ...], fids: tuple[str, ...], as_json: bool) -> None:
    """Follow what happens to promises, data versions and calls of a mount, until Ctrl-C or its end.

    Costs the mount nothing while nobody does it. If more happens than can be shown, what is left out is counted.
    """
    with Asked(find_mount(mountpoint)) as mount:
        try:
            for records in mount.follow("trace", {"events": events, "fids": fids}):
                for record in records:
                    click.echo(json.dumps(record) if as_json else _line(record))
        except KeyboardInterrupt:
            return


def _line(record: dict[str, Any]) -> str:
    if record["event"] == "lost":
        return f"{record['count']} events are left out here"
    whole, fraction = divmod(record["time"], 1)
    return f"{time.strftime('%T', time.localtime(whole))}.{int(fraction * 1e6):06} {printable(described(record))}"
