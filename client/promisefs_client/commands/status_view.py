"""`promisefs status`: what mounts say of themselves (`status`), fetched and shown to people."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from .control_client import ask
from .mounts import MountEntry

_SERVER = "servers"
_FEATURES = "features"
_CACHES = "caches"
_FOR_PROGRAMS = ("bucket_bounds_s",)
_WIDE = 1000
"""Columns where the output goes to no terminal: rich would take 80, and break paths to fit."""


def console() -> Console:
    """For what is shown on stdout; in a pipe or file each mount has one line."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE)


def fetch_status(entry: MountEntry) -> dict[str, Any]:
    """Ask the process behind a mount. Raise UserError."""
    report: dict[str, Any] = ask(entry, "status")
    return {**place_of(entry), **report}


def place_of(entry: MountEntry) -> dict[str, Any]:
    """What the kernel says about the mount; its process does not know where it was moved to."""
    return {"mountpoint": entry.mountpoint, "source": entry.source, "device": entry.device}


def mount_table(state: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for key, value in state.items():
        if key in _FOR_PROGRAMS or key.endswith("_latency"):
            continue
        if key == _SERVER:
            for server in value:
                table.add_row("server", Text(f"{server['address']}: {describe_server(server)}"))
        else:
            if key == _CACHES:
                value = ", ".join(f"{name} {hit_rate(counted)}" for name, counted in value.items())
            elif key == _FEATURES:
                value = ", ".join(name for name, on in value.items() if on) or "none"
            elif isinstance(value, dict):
                value = ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
            table.add_row(key.replace("_", " "), Text(printable(str(value))))
    return table


def overview(states: list[dict[str, Any]]) -> Table:
    """One line for each mount; why one does not answer is for below the table: columns are narrow."""
    table = Table(box=None)
    for title in ("mountpoint", "source", "server", "open", "dirty", "cached", "promises"):
        table.add_column(title, overflow="fold")
    for state in states:
        where = [Text(printable(state["mountpoint"])), Text(printable(state["source"]))]
        if "error" in state:
            table.add_row(*where, "no answer", "", "", "", "")
            continue
        table.add_row(
            *where,
            Text("; ".join(describe_server(server) for server in state[_SERVER])),
            str(state["open_files"]),
            decimal(state["dirty_bytes"]),
            decimal(state["cache_bytes"]),
            str(state["promises"]),
        )
    return table


def describe_server(server: dict[str, Any]) -> str:
    waiting = ""
    if server["waiting"]:
        waiting = f", {server['waiting']} operations waiting, the longest for {server['longest_wait_s']:g} s"
    if server["connected"]:
        return f"connected{waiting}"
    if not server["connects"]:
        return f"not connected yet{waiting}"
    since = time.strftime("%F %T", time.localtime(time.time() - server["disconnected_s"]))
    lease = f", its lease runs {server['lease_left_s']:g} s more" if server["lease_left_s"] else ""
    return f"NOT CONNECTED since {since}{lease}{waiting}"


def hit_rate(counted: dict[str, int]) -> str:
    asked = counted["hits"] + counted["misses"]
    return f"{100 * counted['hits'] / asked:.1f}%" if asked else "-"


def error_line(state: dict[str, Any]) -> Text:
    return Text(printable(state["error"]))


def printable(text: str) -> str:
    """Names are bytes; what is no text, or would move the cursor, is shown escaped."""
    characters = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in characters)
