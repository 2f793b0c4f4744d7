"""A screen that is drawn anew every so often, until `q`: for the commands `top`. In any terminal that rich can use.

What is drawn is made for the terminal's size at that moment, so it follows when the window is resized.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

KEY_POLL_S = 0.1
"""How soon a key, or a new size, is noticed."""
QUIT_KEYS = b"qQ\x1b\x03\x04"
NAME_WIDTH = 17


class Size(NamedTuple):
    width: int
    height: int


Draw = Callable[[Size], RenderableType]


class NoTerminal(Exception):
    """Standard input or output is no terminal."""


def show(next_picture: Callable[[], Draw], interval_s: float, count: int | None = None) -> None:
    """Draw a picture each interval, `count` times or until somebody quits. Raise NoTerminal."""
    console = Console()
    if not (console.is_terminal and sys.stdin.isatty()):
        raise NoTerminal
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        shown = 0
        while count is None or shown < count:
            draw = next_picture()
            shown += 1
            until_s = time.monotonic() + interval_s
            size = None
            while (left_s := until_s - time.monotonic()) > 0:
                if size != (size := Size(*console.size)):
                    live.update(draw(size), refresh=True)
                if any(key in QUIT_KEYS for key in pressed(min(KEY_POLL_S, left_s))):
                    return


@contextmanager
def _keys() -> Iterator[Callable[[float], bytes]]:
    """Give a function that waits for keys, and returns those that were pressed; they are not shown."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> bytes:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return os.read(descriptor, 64) if ready else b""

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


# What screens are made of


def pace_table(what: str, paces: Mapping[str, Mapping[str, Any]], rows: int) -> Table:
    """The busiest first; what has no room is left out."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column(what, no_wrap=True, min_width=NAME_WIDTH, max_width=NAME_WIDTH)
    for title, width in (("/s", 6), ("mean", 6), ("p99 ms", 6)):
        table.add_column(title, justify="right", no_wrap=True, min_width=width)
    for name, pace in _busiest(paces)[: max(rows, 0)]:
        table.add_row(Text(name), number(pace["per_s"]), milliseconds(pace["mean_s"]), milliseconds(pace["p99_s"]))
    return table


def _busiest(paces: Mapping[str, Mapping[str, Any]]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    return sorted(paces.items(), key=lambda item: (-item[1]["per_s"], item[0]))


def beside(left: RenderableType, right: RenderableType) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(left, right)
    return grid


def heading(left: str, right: str, width: int) -> Text:
    """One line; what is on the right is there whatever is cut off on the left."""
    right = right[:width]
    room = max(width - len(right) - 1, 0)
    left = left if len(left) <= room else left[: max(room - 1, 0)] + "…"
    return Text(left.ljust(room) + " " + right, style="reverse", no_wrap=True)


def number(value: float) -> str:
    """At most six characters, up to 99 million."""
    if value >= 100_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def milliseconds(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def bytes_text(count: float) -> str:
    """At most seven characters: 3 digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def duration(seconds: float) -> str:
    """1:02:03"""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"
