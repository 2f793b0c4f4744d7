"""What `promisefsd top` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from promisefs_protocol.observe.live_screen import (
    Size,
    bytes_text,
    duration,
    heading,
    milliseconds,
    number,
    pace_table,
)
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

CLIENT_SHARE = 0.5
"""Of the lines that are left, for clients; calls have the rest."""


def server_screen(state: dict[str, Any], size: Size) -> RenderableType:
    title = f" promisefsd top  {state['directory']}"
    lines = [heading(title, f"up {duration(state['up_s'])}  q quits ", size.width)]
    lines += [_clients_line(state), _calls_line(state), _breaks_line(state), _store_line(state), _disk_line(state)]
    lines += [_volumes_line(state), Text()]
    for line in lines:
        line.truncate(size.width, overflow="ellipsis")
    if len(lines) + 3 >= size.height:
        return Group(*lines[: size.height])
    left = size.height - len(lines) - 3
    most_clients = max(int(left * CLIENT_SHARE), left - len(state["calls"]))
    clients = state["clients"][: max(most_clients, 0)]
    calls = pace_table("call", state["calls"], left - len(clients))
    return Group(*lines, _client_table(clients, len(state["clients"]), size.width), Text(), calls)


def _line(name: str, *parts: str | Text) -> Text:
    line = Text(f"{name:<9} ", no_wrap=True)
    line.stylize("bold", 0, len(name))
    for index, part in enumerate(parts):
        if index:
            line.append("  ")
        line.append(part)
    return line


def _alarming(count: int, what: str) -> Text:
    return Text(f"{count:,} {what}", style="bold red" if count else "")


def _clients_line(state: dict[str, Any]) -> Text:
    return _line(
        "clients",
        f"{state['clients_connected']:,} of {state['clients_known']:,} connected",
        _alarming(state["clients_in_doubt"], "in doubt"),
        f"{state['promises']:,} promises",
        f"{state['locks_held']:,} locks, {state['locks_waiting']:,} waited for",
    )


def _calls_line(state: dict[str, Any]) -> Text:
    rate = sum(pace["per_s"] for pace in state["calls"].values())
    failed = sum(pace["failed_per_s"] for pace in state["calls"].values())
    waiting = f"{state['calls_waiting']:,} not answered yet"
    return _line("calls", f"{number(rate)}/s", f"{number(failed)}/s refused", waiting)


def _times(pace: dict[str, Any]) -> str:
    if not pace["per_s"]:
        return "none"
    return f"{number(pace['per_s'])}/s, {milliseconds(pace['mean_s'])} ms (p99 {milliseconds(pace['p99_s'])})"


def _breaks_line(state: dict[str, Any]) -> Text:
    return _line(
        "breaks",
        f"{number(state['breaks_per_s'])}/s",
        _alarming(state["breaks_waiting"], f"owed for {state['longest_break_s']:.1f} s"),
        f"waits {_times(state['wait'])}",
    )


def _store_line(state: dict[str, Any]) -> Text:
    return _line(
        "store",
        f"{number(state['transactions_per_s'])} tx/s",
        f"commits {_times(state['commit'])}",
        f"syncs {_times(state['file_sync'])}",
    )


def _disk_line(state: dict[str, Any]) -> Text:
    store = state["store"]
    return _line(
        "disk",
        f"{bytes_text(store['disk_free_bytes'])} of {bytes_text(store['disk_bytes'])} free",
        f"database {bytes_text(store['database_bytes'])}, log {bytes_text(store['wal_bytes'])}",
        f"{store['deletions_waiting']:,} deletions to do",
    )


def _volumes_line(state: dict[str, Any]) -> Text:
    volumes = state["store"]["volumes"]
    return _line("volumes", *(f"{v['name']} {v['files']:,} files, {bytes_text(v['bytes'])}" for v in volumes))


def _client_table(clients: Sequence[dict[str, Any]], count: int, width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", width=width)
    table.add_column("client" if len(clients) == count else f"client ({count:,} in all)", no_wrap=True, ratio=1)
    for title in ("lease", "promises", "breaks owed", "for"):
        table.add_column(title, justify="right", no_wrap=True)
    for client in clients:
        owes = client["breaks_waiting"]
        style = "bold red" if client["in_doubt"] or owes else "dim" if not client["connected"] else ""
        table.add_row(
            Text(client["name"] + (" (in doubt)" if client["in_doubt"] else ""), style=style),
            f"{client['lease_left_s']:.0f} s" if client["lease_left_s"] else "ended",
            f"{client['promises']:,}",
            f"{owes:,}" if owes else "",
            f"{client['longest_break_s']:.1f} s" if owes else "",
        )
    return table
