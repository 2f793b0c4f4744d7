"""`scripts/torture`: processes on several mounts change and watch the same few names; nothing shown may be stale."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

import click
from cell_lib import mounts
from cell_lib.cell import Cell, CellError
from cell_lib.guard import Guard
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torture_lib.report import PlotError, as_json, check_plot, checks_table, deeds_table, plot
from torture_lib.run import END_S, MAX_MOUNTS, run_torture
from torture_lib.tally import Tally

START_AND_END_S = 120.0
"""For server and mounts to come and go, before the guard ends them by force."""
LINE_EVERY_S = 30.0
"""Where no progress bar can be shown."""
FILE_COLUMNS = 120
"""Width of the tables if they do not go to a terminal."""

progress_console = Console(stderr=True, highlight=False, soft_wrap=True)


class Ticker:
    """Shows progress, and kills and restarts the server if that was asked for."""

    def __init__(
        self, cell: Cell, server_options: list[str], seconds: float, checks: int | None, kill_every_s: float | None,
        seed: int, stack: ExitStack,
    ) -> None:  # fmt: skip
        self.kills = 0
        self._cell = cell
        self._server_options = server_options
        self._seconds = seconds
        self._checks = checks
        self._kill_every_s = kill_every_s
        self._rng = random.Random(seed)
        self._began_s = time.monotonic()
        self._line_at_s = self._began_s + LINE_EVERY_S
        self._kill_at_s = self._next_kill_s()
        self._progress: Progress | None = None
        if progress_console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._progress = stack.enter_context(Progress(*columns, console=progress_console, transient=True))
            self._task = self._progress.add_task("starting", total=1.0)

    def _next_kill_s(self) -> float:
        if self._kill_every_s is None:
            return float("inf")
        return time.monotonic() + self._kill_every_s * self._rng.uniform(0.5, 1.5)

    def tick(self, judged: int, failed: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._kill_at_s:
            self._cell.stop_server(kill=True)
            self._cell.start_server(*self._server_options)
            self.kills += 1
            self._kill_at_s = self._next_kill_s()
        text = f"{judged:,} checks, {failed:,} failures"
        if self._progress:
            done = (now_s - self._began_s) / self._seconds
            if self._checks:
                done = max(done, judged / self._checks)
            self._progress.update(self._task, description=text, completed=min(done, 1.0))
        elif now_s >= self._line_at_s:
            self._line_at_s = now_s + LINE_EVERY_S
            progress_console.print(f"{now_s - self._began_s:5.0f} s: {text}")


def tell_failure(text: str) -> None:
    progress_console.print(f"[red]torture:[/red] {escape(text)}")


def run(
    directory: Path,
    mount_count: int,
    minutes: float,
    checks: int | None,
    lease: str | None,
    kill_every_s: float | None,
    seed: int,
    picture: Path | None,
    print_json: bool,
) -> int:
    cell = Cell(directory / "cell")
    seconds = minutes * 60
    with Guard(directory, cell.mark) as guard:
        guard.arm(START_AND_END_S)
        try:
            server_options = ["--lease", lease] if lease else []
            cell.up(mount_count, server_options=server_options)
            views = [cell.mountpoint(f"m{number + 1}") / "common" for number in range(mount_count)]
            views[0].mkdir()
            guard.arm(seconds + END_S + START_AND_END_S)
            with ExitStack() as stack:
                ticker = Ticker(cell, server_options, seconds, checks, kill_every_s, seed, stack)
                began_s = time.monotonic()
                tally = run_torture(views, directory, seconds, checks, seed, ticker.tick, tell_failure)
                took_s = time.monotonic() - began_s
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            guard.arm(START_AND_END_S)
            complaints = cell.down()
        if guard.disarm():
            complaints.append("it hung: mounts were aborted")
    for complaint in complaints:
        tally.fail(complaint)
        tell_failure(complaint)
    facts = {"mounts": mount_count, "seconds": round(took_s, 1), "seed": seed, "server_kills": ticker.kills}
    report(tally, facts, picture, print_json)
    return 1 if tally.failed or tally.stale or not tally.judged else 0


def report(tally: Tally, facts: dict[str, float], picture: Path | None, print_json: bool) -> None:
    title = (
        f"{tally.judged:,} checks, {tally.stale:,} stale; {facts['mounts']} mounts, {facts['seconds']:,.0f} s, "
        f"server killed {facts['server_kills']} times"
    )
    if picture:
        plot(tally, title, picture)
    if print_json:
        print(as_json(tally, facts))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_COLUMNS)
        console.print(checks_table(tally))
        console.print(deeds_table(tally))
        console.print(f"{title}; files without a name were used {tally.orphans:,} times; seed {facts['seed']}")
    if tally.failed:
        progress_console.print(f"[red]torture: {tally.failed:,} failures[/red]")


def _interrupt(_signal_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--mounts", "mount_count", type=click.IntRange(2, MAX_MOUNTS), default=3, show_default=True)
@click.option("--minutes", type=click.FloatRange(0.05, 10_000), default=1.0, show_default=True, help="At most so long.")
@click.option("--checks", type=click.IntRange(1), help="End when so many looks were judged.")
@click.option("--lease", metavar="SECONDS", help="For the server, as promisefsd serve --lease.")
@click.option(
    "--kill-server",
    type=click.FloatRange(0.5),
    metavar="SECONDS",
    help="kill -9 the server and start it again, about so often.",
)
@click.option("--seed", type=int, help="For choices; the schedule is the machine's all the same.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw the latencies (needs the extra 'plot').",
)
@click.option("--json", "print_json", is_flag=True, help="Print JSON instead of tables.")
def main(
    mount_count: int,
    minutes: float,
    checks: int | None,
    lease: str | None,
    kill_server: float | None,
    seed: int | None,
    picture: Path | None,
    print_json: bool,
) -> None:
    """Torture a cell of its own: a server with a temporary store, and some mounts of it.

    On each mount two processes write, fsync, close, msync, append, truncate, rename, unlink and create the same
    8 names, and one watches them: by reading, stat, listing, and through handles and mappings that stay open. A change
    is published through pipes when its last call has returned. Whoever changes something looks at it at once on
    another mount. A look must show what was published when it began, or something newer that was announced.

    Exit status: 0 if nothing stale was seen and nothing failed; 1 if not; 2 usage.

    \b
    Examples:
      scripts/torture
      scripts/torture --mounts 4 --minutes 60 --checks 1000000 --plot latencies.png
      scripts/torture --lease 1 --kill-server 3
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if reason := mounts.why_fuse_is_unusable():
        raise CellError(reason)
    if picture:
        check_plot(picture)
    seed = random.randrange(1 << 32) if seed is None else seed
    work = Path(tempfile.mkdtemp(prefix="promisefs-torture-")).resolve()
    try:
        status = run(work, mount_count, minutes, checks, lease, kill_server, seed, picture, print_json)
    finally:
        if not mounts.fuse_mounts_below(work):
            with suppress(subprocess.SubprocessError):
                subprocess.run(["rm", "-rf", "--one-file-system", work], check=False, timeout=START_AND_END_S)
    sys.exit(status)


if __name__ == "__main__":
    try:
        main.main(standalone_mode=True, prog_name="scripts/torture")
    except (CellError, PlotError, OSError) as problem:
        print(f"torture: {problem}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("torture: interrupted", file=sys.stderr)
        sys.exit(1)
