"""What `promisefs top` shows: one mount, or a line for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from promisefs_protocol.observe.live_screen import (
    Size,
    beside,
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

from .status_view import describe_server, printable

TWO_TABLES_WIDTH = 80
_QUIT = "q quits"


def mount_screen(state: dict[str, Any], size: Size) -> RenderableType:
    title = f" promisefs top  {printable(state['mountpoint'])}  {printable(state['source'])}"
    if "error" in state:
        return Group(heading(title, f"{_QUIT} ", size.width), Text(), Text(printable(state["error"]), style="bold red"))
    lines: list[Text] = [heading(title, f"up {duration(state['mounted_s'])}  {_QUIT} ", size.width)]
    lines += [_server_line(server) for server in state["servers"]]
    lines += [_bytes_line(state), _cache_line(state), _holdings_line(state), _breaks_line(state), _trouble_line(state)]
    lines += [_hits_line("hits", state, ("attributes", "names", "listings", "pages"))]
    lines += [_hits_line("kernel", state, ("kernel_attributes", "kernel_names"), "may keep"), Text()]
    for line in lines:
        line.truncate(size.width, overflow="ellipsis")
    if len(lines) >= size.height:
        return Group(*lines[: size.height])
    rows = size.height - len(lines) - 1
    operations = pace_table("operation", state["operations"], rows)
    if size.width < TWO_TABLES_WIDTH:
        return Group(*lines, operations)
    return Group(*lines, beside(operations, pace_table("call", state["calls"], rows)))


def _line(name: str, *parts: str | Text) -> Text:
    line = Text(f"{name:<9} ", no_wrap=True)
    line.stylize("bold", 0, len(name))
    for index, part in enumerate(parts):
        if index:
            line.append("  ")
        line.append(part)
    return line


def _counted(count: int, what: str) -> Text:
    """What should be none is red if it is not."""
    return Text(f"{count:,} {what}", style="bold red" if count else "")


def _server_line(server: dict[str, Any]) -> Text:
    away = not server["connected"]
    text = Text(f"{server['address']} {describe_server(server)}", style="bold red" if away else "")
    return _line("server", text, f"lease {server['lease_left_s']:.1f} s left")


def _bytes_line(state: dict[str, Any]) -> Text:
    rates = (
        f"{name} {bytes_text(state[f'{name}_bytes_per_s'])}/s" for name in ("read", "written", "fetched", "stored")
    )
    return _line("bytes", *rates)


def _cache_line(state: dict[str, Any]) -> Text:
    used = state["cache_bytes"] + state["dirty_bytes"]
    share = used / state["cache_limit_bytes"]
    return _line(
        "cache",
        f"{bytes_text(used)} of {bytes_text(state['cache_limit_bytes'])} ({share:.0%})",
        f"dirty {bytes_text(state['dirty_bytes'])} in {state['dirty_files']:,} files",
    )


def _holdings_line(state: dict[str, Any]) -> Text:
    mapped, locks = state["open_mmaps"], state["locks"]
    return _line(
        "holds",
        f"{state['promises']:,} promises",
        f"{mapped['files']:,} open files, {mapped['outlive_close']:,} mapped",
        f"{locks['held']:,} locks, {locks['waiting']:,} waited for",
    )


def _breaks_line(state: dict[str, Any]) -> Text:
    taken = state["acknowledgements"]
    times = f"acknowledged in {milliseconds(taken['mean_s'])} ms (p99 {milliseconds(taken['p99_s'])})"
    return _line(
        "breaks",
        f"{number(state['breaks_per_s'])}/s",
        times if taken["per_s"] else "none to acknowledge",
        f"{state['resets']:,} resets",
    )


def _trouble_line(state: dict[str, Any]) -> Text:
    refused = state["bytes_refused"]
    return _line(
        "trouble",
        _counted(state["early_acks"], "early acks"),
        _counted(state["leases_lost"], "leases lost"),
        _counted(state["timeouts"], "timeouts"),
        _counted(state["store_failures"], "stores failed"),
        Text(f"{bytes_text(refused)} refused", style="bold red" if refused else ""),
    )


def _hits_line(name: str, state: dict[str, Any], caches: Sequence[str], *before: str) -> Text:
    def rate(cache: str) -> str:
        share = state["caches"][cache]["hit_rate"]
        return f"{cache.removeprefix('kernel_')} {'-' if share is None else f'{share:.1%}'}"

    return _line(name, *before, *(rate(cache) for cache in caches))


def overview_screen(states: list[dict[str, Any]], size: Size) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    table.add_column("mountpoint", no_wrap=True, ratio=1)
    for title in ("op/s", "p99 ms", "read/s", "written/s", "dirty", "promises", "breaks/s", "lease"):
        table.add_column(title, justify="right", no_wrap=True)
    for state in states[: size.height - 3]:
        where = Text(printable(state["mountpoint"]))
        if "error" in state:
            table.add_row(where, Text("no answer", style="bold red"))
            continue
        slowest = max((pace["p99_s"] for pace in state["operations"].values()), default=0.0)
        lease_s = min((server["lease_left_s"] for server in state["servers"] if server["connects"]), default=0.0)
        table.add_row(
            where,
            number(sum(pace["per_s"] for pace in state["operations"].values())),
            milliseconds(slowest),
            bytes_text(state["read_bytes_per_s"]),
            bytes_text(state["written_bytes_per_s"]),
            bytes_text(state["dirty_bytes"]),
            f"{state['promises']:,}",
            number(state["breaks_per_s"]),
            Text(f"{lease_s:.0f} s" if state["connected"] else "away", style="" if state["connected"] else "bold red"),
        )
    return Group(heading(f" promisefs top  {len(states)} mounts", f"{_QUIT} ", size.width), Text(), table)
