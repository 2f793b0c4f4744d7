"""`scripts/bench`: promisefs beside a local directory, and sshfs if it can be used, in one run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import click
from bench_lib import calls, files, locks, memory, pictures, visible
from bench_lib.targets import LocalDirectory, PromisefsMounts, SshfsMounts, SshfsUnusable, Target
from cell_lib import mounts
from cell_lib.cell import Cell, CellError
from cell_lib.guard import Guard
from rich.console import Console
from rich.table import Table

MEASUREMENT_LIMIT_S = 300.0
"""For one measurement of one target; then its mounts are aborted."""
FILE_COLUMNS = 120
"""Width of the tables if they do not go to a terminal."""
VISIBLE = tuple(f"visible-{kind}" for kind in visible.KINDS)
MEMORY = "memory"
CALLS = "calls"
LOCKS = "locks"
ON_REQUEST = (MEMORY, CALLS)
NAMES = (*(measurement.name for measurement in files.MEASUREMENTS), *VISIBLE, LOCKS, *ON_REQUEST)

progress = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(slots=True)
class Results:
    """What was measured, by name of the measurement, then of the target."""

    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    visible: dict[str, dict[str, visible.Visibility]] = field(default_factory=dict)
    unseen: list[tuple[str, str]] = field(default_factory=list)
    """(way to look, target) of what was not seen at all."""
    locks: list[locks.Handover] = field(default_factory=list)
    memory: memory.Memory | None = None
    calls: list[calls.Calls] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measure_all(targets: Sequence[Target], names: Sequence[str], quick: bool, guard: Guard) -> Results:
    """Measure each name on each target. What fails is noted, and the rest goes on."""
    results = Results()
    sizes = files.QUICK if quick else files.FULL
    steps = visible.QUICK_STEPS if quick else visible.FULL_STEPS

    def attempt(name: str, target: Target, work: Callable[[], None]) -> None:
        progress.print(f"[dim]{name} on {target.name} ...[/dim]")
        guard.arm(MEASUREMENT_LIMIT_S)
        try:
            work()
        except visible.NeverSeen as problem:
            if target.name == "sshfs":  # it promises nothing of the kind
                results.unseen.append((problem.kind, target.name))
                results.notes.append(f"{name} on {target.name}: {problem}")
            else:
                results.failures.append(f"{name} on {target.name}: {problem}")
        except (OSError, CellError, subprocess.SubprocessError) as problem:
            results.failures.append(f"{name} on {target.name}: {problem}")
        if guard.disarm():
            results.failures.append(
                f"{name} on {target.name}: not done after {MEASUREMENT_LIMIT_S:g} s, mounts aborted"
            )

    def measure_rate(measurement: files.Measurement, target: Target) -> None:
        rate = measurement.run(target, sizes)
        results.rates.setdefault(measurement.name, {})[target.name] = rate

    def measure_visible(kind: str, target: Target) -> None:
        seen = visible.measure(target, kind, steps)
        results.visible.setdefault(kind, {})[target.name] = seen

    for measurement in files.MEASUREMENTS:
        for target in targets if measurement.name in names else ():
            attempt(measurement.name, target, partial(measure_rate, measurement, target))
    for kind in visible.KINDS:
        for target in targets if f"visible-{kind}" in names else ():
            attempt(f"visible-{kind}", target, partial(measure_visible, kind, target))
    lock_steps = locks.QUICK_STEPS if quick else locks.FULL_STEPS

    def measure_locks(kind: str, target: Target) -> None:
        results.locks.append(locks.measure(target, kind, lock_steps))

    for kind in locks.KINDS if LOCKS in names else ():
        for target in targets:
            if target.name != "sshfs":  # its locks hold within one mount
                attempt(f"locks ({kind})", target, partial(measure_locks, kind, target))
    return results


def speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def rate_table(results: Results, targets: Sequence[Target]) -> Table:
    table = Table(title="Speed (more is better; x: times the local directory's)", title_justify="left")
    table.add_column("measurement")
    table.add_column("unit")
    for target in targets:
        table.add_column(target.name, justify="right")
        if target.name != "local":
            table.add_column("x local", justify="right")
    for measurement in files.MEASUREMENTS:
        if measurement.name not in results.rates:
            continue
        rates = results.rates[measurement.name]
        row = [f"{measurement.name}: {measurement.description}", measurement.unit]
        for target in targets:
            row.append(speed(rates[target.name]) if target.name in rates else "failed")
            if target.name != "local":
                both = target.name in rates and "local" in rates
                row.append(f"{rates[target.name] / rates['local']:.2f}" if both else "")
        table.add_row(*row)
    return table


def visible_table(results: Results) -> Table:
    table = Table(title="From the return of fsync to sight on the other mount", title_justify="left")
    for header in ("seen by", "target", "median ms", "p99 ms", "stale", "fsync took, median ms"):
        table.add_column(header, justify="left" if header in ("seen by", "target") else "right")
    for kind, by_target in results.visible.items():
        for name, seen in by_target.items():
            stale = f"{seen.stale} of {seen.steps}"
            table.add_row(
                kind,
                name,
                f"{seen.median_ms:.3f}",
                f"{seen.p99_ms:.3f}",
                f"[red]{stale}[/red]" if seen.stale else stale,
                f"{seen.write_median_ms:.3f}",
            )
    return table


def as_json(results: Results, targets: Sequence[Target], quick: bool) -> str:
    units = {measurement.name: measurement.unit for measurement in files.MEASUREMENTS}
    return json.dumps(
        {
            "quick": quick,
            "targets": [target.name for target in targets],
            "rates": {name: {"unit": units[name], **rates} for name, rates in results.rates.items()},
            "visible": {
                kind: {name: _without_delays(asdict(seen)) for name, seen in by_target.items()}
                for kind, by_target in results.visible.items()
            },
            "locks": [asdict(handover) for handover in results.locks],
            "memory": asdict(results.memory) if results.memory else None,
            "calls": [asdict(entry) for entry in results.calls],
            "failures": results.failures,
            "notes": results.notes,
        },
        indent=1,
    )


def _without_delays(seen: dict[str, object]) -> dict[str, object]:
    del seen["delays_ms"]
    return seen


def run(
    directory: Path, names: Sequence[str], quick: bool, with_sshfs: bool, print_json: bool, plot_to: Path | None
) -> int:
    cell = Cell(directory / "cell")
    sshfs: SshfsMounts | None = None
    notes: list[str] = []
    complaints: list[str] = []
    with Guard(directory, cell.mark) as guard:
        guard.arm(MEASUREMENT_LIMIT_S)
        try:
            cell.up(2)
            promisefs = PromisefsMounts(cell)
            targets: list[Target] = [LocalDirectory(directory / "local"), promisefs]
            if with_sshfs:
                try:
                    sshfs = SshfsMounts(directory / "sshfs", f"{cell.mark}/sshfs")
                    targets.append(sshfs)
                except SshfsUnusable as reason:
                    notes.append(f"sshfs is not measured: {reason}")
            results = measure_all(targets, names, quick, guard)
            results.notes += notes
            if MEMORY in names:
                progress.print("[dim]memory ...[/dim]")
                guard.arm(memory.LIMIT_S)
                results.memory = memory.measure(promisefs, quick)
            if CALLS in names:
                progress.print("[dim]calls ...[/dim]")
                guard.arm(MEASUREMENT_LIMIT_S)
                results.calls = calls.measure(promisefs)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            guard.arm(MEASUREMENT_LIMIT_S)
            if sshfs:
                sshfs.close()
            complaints = cell.down()
    results.failures += complaints
    if plot_to is not None:
        pictures.draw(results.rates, results.visible, results.unseen, plot_to)
    if print_json:
        print(as_json(results, targets, quick))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_COLUMNS)
        if results.rates:
            console.print(rate_table(results, targets))
        if results.visible:
            console.print(visible_table(results))
        if results.locks:
            console.print(locks.table(results.locks))
        if results.memory:
            console.print(memory.table(results.memory))
        if results.calls:
            console.print(calls.table(results.calls))
        for note in results.notes:
            console.print(note)
    for failure in results.failures:
        progress.print(f"[red]bench: {failure}[/red]")
    stale = any(seen.stale for by_target in results.visible.values() for seen in [by_target.get("promisefs")] if seen)
    return 1 if results.failures or stale else 0


def _interrupt(_signal_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", "only", multiple=True, metavar="NAME", type=click.Choice(NAMES), help="Only this; repeatable.")
@click.option("--quick", is_flag=True, help="Less of everything: shows that it works, its numbers mean little.")
@click.option("--json", "print_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--plot",
    "plot_to",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIRECTORY",
    help="Draw the results there, as speed.png and visible.png. Needs matplotlib (scripts/setup.sh --plot).",
)
@click.option("--no-sshfs", is_flag=True, help="Leave sshfs out.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where to work, so which disk is measured [default: the directory for temporary files].",
)
def main(
    only: tuple[str, ...], quick: bool, print_json: bool, plot_to: Path | None, no_sshfs: bool, directory: Path | None
) -> None:
    """Measure promisefs mounts, a local directory of the same disk, and sshfs.

    Cold, for promisefs and sshfs: through a mount that has not seen the data; the server's page cache is warm. For the
    local directory: the file's pages were dropped with posix_fadvise, names and inodes were not.

    Two are measured only if asked for: --only memory streams 4 GiB and makes 200,000 files; --only calls
    counts the upcalls and RPCs of ordinary tools.

    sshfs is measured against an sshd of its own, if sshfs and sshd are installed.

    Exit status: 0; 1 if something failed or promisefs showed a stale read; 2 usage.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if reason := mounts.why_fuse_is_unusable():
        raise CellError(reason)
    if plot_to is not None:
        pictures.check_matplotlib()
    names = only or tuple(name for name in NAMES if name not in ON_REQUEST)
    work = Path(tempfile.mkdtemp(prefix="promisefs-bench-", dir=directory)).resolve()
    try:
        status = run(work, names, quick, not no_sshfs, print_json, plot_to)
    finally:
        if not mounts.fuse_mounts_below(work):
            with suppress(subprocess.SubprocessError):
                subprocess.run(["rm", "-rf", "--one-file-system", work], check=False, timeout=MEASUREMENT_LIMIT_S)
    sys.exit(status)


if __name__ == "__main__":
    try:
        main.main(standalone_mode=True, prog_name="scripts/bench")
    except (CellError, OSError, pictures.PlotError) as problem:
        print(f"bench: {problem}", file=sys.stderr)
        sys.exit(1)
