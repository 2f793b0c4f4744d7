"""What a run of the benchmark comes to, as pictures: speed.png and visible.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files
from .visible import KINDS, SEEN_S, Visibility

SPEED, VISIBLE = "speed.png", "visible.png"
COLOURS = {"local": "#9a9a9a", "promisefs": "#2166ac", "sshfs": "#d6804c"}
STYLES = {"local": ":", "promisefs": "-", "sshfs": "--"}
_DOTS_PER_INCH = 100
_BAR = 0.8


class PlotError(Exception):
    """Pictures cannot be made; the message says why, and what helps."""


def check_matplotlib() -> None:
    """Raise PlotError if it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError("--plot needs matplotlib: scripts/setup.sh --plot") from None


def draw(
    rates: Mapping[str, Mapping[str, float]],
    visible: Mapping[str, Mapping[str, Visibility]],
    unseen: Sequence[tuple[str, str]],
    directory: Path,
) -> None:
    """Draw what was measured of the two. `unseen`: (kind, target) of what was not seen at all."""
    if rates:
        _draw_speed(rates, directory / SPEED)
    if visible:
        _draw_visible(visible, unseen, directory / VISIBLE)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _targets(of: Sequence[Mapping[str, object]]) -> list[str]:
    return [name for name in COLOURS if any(name in one for one in of)]


def _draw_speed(rates: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """A bar for each target and measurement: how many times as fast as the local directory it is."""
    measured = [m for m in files.MEASUREMENTS if "local" in rates.get(m.name, {})]
    targets = _targets([rates[m.name] for m in measured])
    figure = _figure(9, 1.2 + 0.62 * len(measured))
    axes = figure.subplots()
    thickness = _BAR / len(targets)
    for number, target in enumerate(targets):
        for row, measurement in enumerate(measured):
            rate = rates[measurement.name].get(target)
            if rate is None:
                continue
            share = rate / rates[measurement.name]["local"]
            y = row + (number + 0.5) * thickness - _BAR / 2
            label = target if row == 0 else None
            axes.barh(y, share, thickness * 0.9, left=0, color=COLOURS[target], label=label)
            text = f" {rate:,.0f} {measurement.unit}" if rate >= 10 else f" {rate:.1f} {measurement.unit}"
            axes.text(share, y, text, va="center", fontsize=7)
    axes.set_yticks(range(len(measured)), [f"{m.name}: {m.description}" for m in measured], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    lowest, highest = axes.get_xlim()
    axes.set_xlim(lowest / 2, highest * 4)  # room for the numbers
    axes.axvline(1, color="black", linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:g}")
    axes.set_xlabel("times the local directory's speed")
    axes.grid(True, axis="x", alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _draw_visible(
    visible: Mapping[str, Mapping[str, Visibility]], unseen: Sequence[tuple[str, str]], path: Path
) -> None:
    """For each way to look, the share of steps that were seen so soon after fsync had returned."""
    kinds = [kind for kind in KINDS if kind in visible]
    figure = _figure(9, 3 if len(kinds) < 3 else 5.5)
    grid = figure.subplots(-(-len(kinds) // 2), min(len(kinds), 2), sharex=True, sharey=True, squeeze=False)
    for axes, kind in zip(grid.flat, kinds, strict=False):
        for target in _targets([visible[kind]]):
            seen = visible[kind][target]
            shares = [100 * (i + 1) / len(seen.delays_ms) for i in range(len(seen.delays_ms))]
            stale = f", {seen.stale} of {seen.steps} stale" if target != "local" else ""
            label = f"{target}: median {seen.median_ms:.2g} ms{stale}"
            axes.step(seen.delays_ms, shares, STYLES[target], where="post", color=COLOURS[target], label=label)
        for target in (target for of, target in unseen if of == kind):
            label = f"{target}: not seen within {SEEN_S:g} s"
            axes.plot([], [], STYLES[target], color=COLOURS[target], label=label)
        axes.set_title(f"seen by {kind}", fontsize=10)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
        axes.set_ylim(0, 100)
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    figure.supxlabel("milliseconds from the return of fsync to the first sight on the other mount", fontsize=9)
    figure.supylabel("percent of steps seen within", fontsize=9)
    figure.savefig(path, dpi=_DOTS_PER_INCH)
