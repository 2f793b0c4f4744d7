"""What a run of the torture comes to: tables, JSON, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from .looks import KINDS
from .tally import Histogram, Tally

_QUANTILES = (0.5, 0.99)


class PlotError(Exception):
    """The picture cannot be made; the message says why, and what helps."""


def checks_table(tally: Tally) -> Table:
    table = Table(title="Looks, and from publication to sight", title_justify="left")
    table.add_column("seen by")
    for header in ("checks", "first", "meanwhile", "absent", "stale", "median ms", "p99 ms", "longest ms"):
        table.add_column(header, justify="right")
    for kind in KINDS:
        checks = tally.checks_of(kind)
        counts = [f"{count:,}" for count in (checks.judged, checks.first, checks.busy, checks.absent)]
        stale = f"[red]{checks.stale:,}[/red]" if checks.stale else "0"
        table.add_row(kind, *counts, stale, *_latencies(tally.seen.get(kind, Histogram())))
    table.add_section()
    table.add_row("all", f"{tally.judged:,}", "", "", "", f"{tally.stale:,}")
    table.caption = (
        "first: a process's first look since a change; meanwhile: while the name was being changed; "
        "absent: had to find no such name"
    )
    return table


def deeds_table(tally: Tally) -> Table:
    table = Table(title="Changes, until their last call returned", title_justify="left")
    table.add_column("change")
    for header in ("count", "median ms", "p99 ms", "longest ms"):
        table.add_column(header, justify="right")
    for deed, histogram in sorted(tally.deeds.items()):
        table.add_row(deed, f"{histogram.count:,}", *_latencies(histogram))
    return table


def _latencies(histogram: Histogram) -> list[str]:
    if not histogram.count:
        return ["", "", ""]
    return [*(f"{histogram.quantile_ms(q):,.2f}" for q in _QUANTILES), f"{histogram.longest_ns / 1e6:,.1f}"]


def as_json(tally: Tally, facts: Mapping[str, object]) -> str:
    """`facts`: what was run. Latencies are in milliseconds."""

    def latencies(histograms: Mapping[str, Histogram]) -> dict[str, dict[str, float]]:
        return {
            kind: {
                "count": histogram.count,
                "median_ms": histogram.quantile_ms(0.5),
                "p99_ms": histogram.quantile_ms(0.99),
                "longest_ms": histogram.longest_ns / 1e6,
            }
            for kind, histogram in sorted(histograms.items())
        }

    counted = tally.as_json()
    return json.dumps(
        {
            **facts,
            "judged": tally.judged,
            "stale": tally.stale,
            "failed": tally.failed,
            "checks": counted["checks"],
            "seen": latencies(tally.seen),
            "deeds": latencies(tally.deeds),
            "orphans": tally.orphans,
            "failures": tally.failures,
        },
        indent=1,
    )


def check_plot(path: Path) -> None:
    """Raise PlotError if `plot` would fail for a reason that can be known before."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError("--plot needs matplotlib, which is in the extra 'plot': pip install -e '.[plot]'") from None
    if path.suffix.lower() != ".png":
        raise PlotError(f"--plot {path}: the name must end with .png")
    if not path.absolute().parent.is_dir():
        raise PlotError(f"--plot {path}: there is no such directory")


def plot(tally: Tally, title: str, path: Path) -> None:
    """Draw both distributions, cumulative, over a logarithmic time axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    pictures = (
        ("From publication to the first sight of it", {kind: tally.seen[kind] for kind in KINDS if kind in tally.seen}),
        ("How long a change took", dict(sorted(tally.deeds.items()))),
    )
    for axes, (name, histograms) in zip(figure.subplots(1, 2, sharey=True), pictures, strict=True):
        for kind, histogram in histograms.items():
            points = [(ms, 0.0) for ms, _ in histogram.shares()[:1]] + histogram.shares()
            label = f"{kind} ({histogram.count:,}, median {histogram.quantile_ms(0.5):.2g} ms)"
            axes.step([ms for ms, _ in points], [100 * share for _, share in points], where="post", label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axes.set_title(name)
        axes.set_xlabel("milliseconds")
        axes.set_ylim(0, 100)
        axes.grid(True, which="both", alpha=0.25)
        if histograms:
            axes.legend(fontsize=8, loc="upper left")
    figure.axes[0].set_ylabel("percent within")
    figure.savefig(path, dpi=120)
