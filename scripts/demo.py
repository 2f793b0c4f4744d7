"""`scripts/demo`: one server, two mounts; a writer maps a page on one, a reader on the other, both shown live."""

from __future__ import annotations

import os
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

import click
from cell_lib import mmap_program, mounts, processes
from cell_lib.cell import Cell, CellError
from cell_lib.guard import Guard
from cell_lib.mmap_program import Seen, Sight, Written
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

READER_INTERVAL_MS = 0.2
"""Between two looks of the reader: what the delays shown can be too long by."""
FIRST_LOOK_S = 20.0
LAST_LOOK_S = 1.0
"""What the reader has, after the writer's end, to see its last byte."""
GUARD_EXTRA_S = 90.0
"""Beyond --seconds, for start and end; then the guard aborts the mounts."""
ROWS = 12

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """The demo could not run; the message says why."""


class Race:
    """The writer and the reader, and what they have printed so far."""

    def __init__(self, program: Path, written_path: Path, read_path: Path, mark: str, interval_ms: float) -> None:
        self.written: list[Written] = []
        self.seen: list[Seen] = []
        self.problems: list[str] = []
        self._selector = selectors.DefaultSelector()
        self._partial: dict[int, bytes] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environment = processes.environment(f"{mark}/mmap")
        written_path.write_bytes(bytes(os.sysconf("SC_PAGESIZE")))
        # The reader looks before the first store, so it holds the page when that comes.
        self._start(program, "-t", "-c", "-i", str(READER_INTERVAL_MS), read_path)
        deadline = time.monotonic() + FIRST_LOOK_S
        while not self.seen:
            self.read(0.1)
            if self.problems or time.monotonic() > deadline:
                self.end()
                raise DemoError("the reader saw nothing" + "".join(f"; {problem}" for problem in self.problems))
        self._writer = self._start(program, "-t", "-i", str(interval_ms), written_path, "mod")

    def sights(self) -> list[Sight]:
        return mmap_program.match(self.written, self.seen)

    def read(self, wait_s: float) -> None:
        """Take in what the two print within `wait_s`."""
        for key, _ in self._selector.select(wait_s):
            data = os.read(key.fd, 65536)
            *lines, self._partial[key.fd] = (self._partial.get(key.fd, b"") + data).split(b"\n")
            if not data:
                self._selector.unregister(key.fd)
                self.problems.append(f"the {key.data} ended by itself")
            for line in lines:
                if key.data == "reader":
                    self.seen.append(mmap_program.parse_seen(line.decode()))
                else:
                    self.written.append(mmap_program.parse_written(line.decode()))

    def finish(self) -> None:
        """End the writer, let the reader catch up, end it."""
        if self.problems:
            return
        self._writer.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._writer.wait(10)
        deadline = time.monotonic() + LAST_LOOK_S
        while time.monotonic() < deadline and self._selector.get_map():
            self.read(0.05)
            if self.written and self.sights()[-1].seen:
                break
        # The writer's end showed up as its pipe's: that was no problem.
        self.problems.clear()

    def end(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.stdout:
                process.stdout.close()
        self._selector.close()

    def _start(self, program: Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C is for the demo, which ends them in the right order.
        process = subprocess.Popen(
            [program, *arguments], stdout=subprocess.PIPE, env=self._environment, start_new_session=True
        )
        self._processes.append(process)
        assert process.stdout is not None
        name = "writer" if arguments[-1] == "mod" else "reader"
        self._selector.register(process.stdout, selectors.EVENT_READ, name)
        return process


def delay_text(sight: Sight) -> str:
    if sight.delay_ns is None:
        return "not seen yet"
    if sight.stale:
        return f"[red]STALE, {sight.delay_ns / 1e6:.2f} ms after fsync[/red]"
    side = "after" if sight.delay_ns > 0 else "before"
    return f"{abs(sight.delay_ns) / 1e6:7.2f} ms {side} fsync returned"


def summary(sights: list[Sight]) -> str:
    met = [sight for sight in sights if sight.seen]
    if not met:
        return "nothing yet"
    delays_ms = sorted((sight.delay_ns or 0) / 1e6 for sight in met)
    store_ms = statistics.median((sight.seen.seen_ns - sight.written.stored_ns) / 1e6 for sight in met if sight.seen)
    stale = sum(sight.stale for sight in sights)
    return (
        f"{len(sights)} written, {len(met)} seen, {stale} stale\nfsync's return to first sight: median"
        f" {statistics.median(delays_ms):+.2f} ms, latest {delays_ms[-1]:+.2f} ms (+ after, - before)"
        f"\nstore to first sight: median {store_ms:.2f} ms"
    )


def picture(cell: Cell, sights: list[Sight], began_ns: int) -> Group:
    shown = sights[-ROWS:]
    writer, reader = Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2))
    for sight in shown:
        written = sight.written
        fsync_ms = (written.done_ns - written.stored_ns) / 1e6
        writer.add_row(
            f"[bold]{written.byte:02x}[/bold]",
            f"{(written.done_ns - began_ns) / 1e9:7.2f} s",
            f"{fsync_ms:6.2f} ms to fsync",
        )
        reader.add_row(f"[bold]{sight.seen.byte:02x}[/bold]" if sight.seen else "..", delay_text(sight))
    for _ in range(ROWS - len(shown)):
        writer.add_row("", "", "")
        reader.add_row("", "")
    both = Table.grid(expand=True)
    both.add_column(ratio=1)
    both.add_column(ratio=1)
    both.add_row(
        Panel(writer, title=f"writer: {cell.mountpoint('m1').name}/page", border_style="green"),
        Panel(reader, title=f"reader: {cell.mountpoint('m2').name}/page", border_style="cyan"),
    )
    return Group(both, summary(sights))


def watch(cell: Cell, race: Race, seconds: float) -> bool:
    """Show the race for `seconds`; return False if it was interrupted."""
    began_ns = time.monotonic_ns()
    deadline = time.monotonic() + seconds
    printed = 0
    with ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        try:
            while time.monotonic() < deadline and not race.problems:
                race.read(min(0.1, max(0.0, deadline - time.monotonic())))
                if not cell.runs():
                    race.problems.append("the server or a mount ended before the demo did")
                sights = race.sights()
                if live:
                    live.update(picture(cell, sights, began_ns), refresh=True)
                    continue
                for sight in sights[printed:]:
                    if sight.seen is None:
                        break
                    console.print(f"wrote {sight.written.byte:02x}   read {sight.seen.byte:02x} {delay_text(sight)}")
                    printed += 1
        except KeyboardInterrupt:
            return False
    return True


def verdict(race: Race) -> list[str]:
    """What kept the reader from following the writer; empty if it did."""
    sights = race.sights()
    found = list(race.problems)
    if not sights:
        found.append("nothing was written")
    found += [f"{sight.written.byte:02x} was never seen" for sight in sights if sight.seen is None]
    found += [f"{sight.written.byte:02x}: an older byte was read after its fsync" for sight in sights if sight.stale]
    return found


def run(directory: Path, seconds: float, interval_ms: float, keep: bool) -> int:
    program = mmap_program.build()
    cell = Cell(directory)
    with Guard(directory, cell.mark) as guard:
        guard.arm(seconds + GUARD_EXTRA_S)
        console.print("starting a server and two mounts ...")
        race: Race | None = None
        complaints: list[str] = []
        kept = False
        try:
            cell.up(2)
            pages = [cell.mountpoint(name) / "page" for name in ("m1", "m2")]
            race = Race(program, pages[0], pages[1], cell.mark, interval_ms)
            finished = watch(cell, race, seconds)
            _ignore_signals()
            kept = keep and finished and not race.problems
            race.finish()
        finally:
            _ignore_signals()
            if race and not cell.server_runs():
                # A writer that waits for it in fsync cannot even be killed before it has its answer.
                with suppress(CellError):
                    cell.start_server()
            if race:
                race.end()
            processes.end(f"{cell.mark}/mmap", grace_s=1)
            if not kept:
                complaints += cell.down()
    console.print(summary(race.sights()))
    wrong = verdict(race)
    for complaint in complaints + wrong:
        console.print(f"[red]demo: {complaint}[/red]")
    if kept:
        explain(cell, program)
    console.print("the reader did not follow the writer" if wrong else "the reader followed the writer")
    return 1 if complaints or wrong else 0


def explain(cell: Cell, program: Path) -> None:
    here = Path(__file__).resolve().parent
    one, two = cell.mountpoint("m1"), cell.mountpoint("m2")
    console.print(
        f"It stays up. Two views of one volume:\n  {one}\n  {two}\n"
        f"Try, in two terminals:\n  {program} {one}/page mod\n  {program} {two}/page\n"
        f"One more mount:\n  {here.parent}/.venv/bin/promisefs mount {cell.address} MOUNTPOINT\n"
        f"Take it down:\n  {here}/cell down {cell.directory}; rm -r {cell.directory}"
    )


def _interrupt(_signal_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    """From here on things are being taken down, which must not be interrupted. All of it has time limits."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seconds", type=click.FloatRange(0.5, 86400), default=20.0, show_default=True, help="How long.")
@click.option(
    "--interval",
    type=click.FloatRange(1, 60000),
    default=500.0,
    show_default=True,
    metavar="MS",
    help="Between two stores.",
)
@click.option("--keep", is_flag=True, help="Leave server and mounts running, and say how to use them.")
def main(seconds: float, interval: float, keep: bool) -> None:
    """Show that a memory mapping on one mount follows a memory mapping on another.

    A server with a temporary store, two mounts of it. On one a C program increments a byte of a shared mapping and
    calls fsync; on the other it looks at the byte in a mapping of its own, all the time. Shown is when
    each new byte is first seen, measured from the return of the writer's fsync on one clock.

    Exit status: 0 if every byte written was seen (or a newer one) and none older after its fsync; 1 if not, or
    something failed; 2 usage. Ctrl-C ends it early, in good order.

    \b
    Examples:
      scripts/demo
      scripts/demo --seconds 5 --interval 50
      scripts/demo --keep
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if reason := mounts.why_fuse_is_unusable():
        raise DemoError(reason)
    directory = Path(tempfile.mkdtemp(prefix="promisefs-demo-")).resolve()
    try:
        status = run(directory, seconds, interval, keep)
    finally:
        # Its cell.json is what a cell has that runs on. Never into a mount.
        if not (directory / "cell.json").exists() and not mounts.fuse_mounts_below(directory):
            subprocess.run(["rm", "-rf", "--one-file-system", directory], check=False)
    sys.exit(status)


if __name__ == "__main__":
    try:
        main.main(standalone_mode=True, prog_name="scripts/demo")
    except (DemoError, CellError, mmap_program.CompileError, OSError) as problem:
        print(f"demo: {problem}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        sys.exit(1)
