"""`scripts/simulate`: random histories of simulated cells; see docs/simulation.md.

Exit status: 0 if every history kept the guarantees (with --mutants: if every mutant was found), else 1.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "simulation"))

from mutants import MUTANTS, Mutant
from simulator.batch import run_seeds
from simulator.minimise import minimise
from simulator.plan import PROFILES, make_plan
from simulator.run import Outcome, run_history

console = Console(highlight=False, soft_wrap=True)
progress_console = Console(stderr=True, highlight=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--histories", default=2000, show_default=True, help="How many histories to run.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first; the others have those that follow.")
@click.option("--minutes", type=float, help="Stop after this time, however many have been run.")
@click.option("--jobs", default=0, help="Processes to run them in; 0: one for each processor.")
@click.option("--profile", type=click.Choice(sorted(PROFILES)), help="Only histories of this kind.")
@click.option("--show", is_flag=True, help="Run the one history of --seed, and print its timeline with all messages.")
@click.option("--keep-going", is_flag=True, help="Do not stop at the first failure; count them.")
@click.option("--mutants", is_flag=True, help="Switch off one rule after the other: each has to be found.")
def main(
    histories: int, seed: int, minutes: float | None, jobs: int, profile: str | None, show: bool, keep_going: bool,
    mutants: bool,
) -> None:  # fmt: skip
    """Run random histories of simulated cells, and decide for each whether it kept the guarantees."""
    if show:
        sys.exit(show_history(seed, profile))
    if mutants:
        sys.exit(run_mutants(jobs))
    deadline_s = time.monotonic() + minutes * 60 if minutes else float("inf")
    sys.exit(run(histories, seed, jobs, profile, deadline_s, keep_going))


def show_history(seed: int, profile: str | None) -> int:
    outcome = run_history(make_plan(seed, profile=profile), trace=True)
    console.print(outcome.timeline, markup=False)
    for problem in outcome.problems:
        console.print(problem, markup=False)
    return int(outcome.failed)


def run(histories: int, seed: int, jobs: int, profile: str | None, deadline_s: float, keep_going: bool) -> int:
    began = time.monotonic()
    done = calls = 0
    simulated_s = 0.0
    failures: list[Outcome] = []
    with new_progress() as progress:
        task = progress.add_task("histories", total=histories)
        for outcome in run_seeds(seed, histories, jobs=jobs, profile=profile, deadline_s=deadline_s):
            done += 1
            calls += outcome.calls
            simulated_s += outcome.simulated_s
            progress.advance(task)
            if outcome.failed:
                failures.append(outcome)
                progress.update(task, description=f"histories, {len(failures)} failed")
                if not keep_going:
                    break
    took_s = time.monotonic() - began
    console.print(
        f"{done} histories from seed {seed} in {took_s:.0f} s: {calls} system calls, "
        f"{simulated_s / 3600:.1f} simulated hours, {len(failures)} failed"
    )
    for failure in failures[1:]:
        console.print(f"seed {failure.plan.seed} ({failure.plan.profile}): {failure.problems[0][:300]}", markup=False)
    if failures:
        report(failures[0], profile)
    return int(bool(failures))


def report(failure: Outcome, profile: str | None) -> None:
    """Print a failure as short as it can be made."""
    again = f"scripts/simulate --show --seed {failure.plan.seed}" + (f" --profile {profile}" if profile else "")
    console.print(f"[bold]seed {failure.plan.seed} ({failure.plan.profile}) failed[/bold]; all of it: {again}")
    console.print("making it shorter ...")
    shortest = minimise(failure)
    console.print(shortest.timeline, markup=False)
    for problem in shortest.problems:
        console.print(problem, markup=False)


def run_mutants(jobs: int) -> int:
    table = Table("mutant", "rule that is switched off", "found after", "histories allowed", "how")
    survivors = 0
    with new_progress() as progress:
        task = progress.add_task("mutants", total=len(MUTANTS))
        for mutant in MUTANTS:
            progress.update(task, description=mutant.name)
            found, outcome = find(mutant, jobs)
            survivors += outcome is None
            how = "[red]SURVIVED[/red]" if outcome is None else outcome.problems[0].split(":")[0]
            table.add_row(mutant.name, mutant.rule, str(found), str(mutant.histories), how)
            progress.advance(task)
    console.print(table)
    return int(survivors > 0)


def find(mutant: Mutant, jobs: int) -> tuple[int, Outcome | None]:
    """Run histories with the rule switched off until one fails that keeps the guarantees when it is on."""
    count = 0
    for outcome in run_seeds(0, mutant.histories, jobs=jobs, profile=mutant.profile, prepare=mutant.active):
        count += 1
        if outcome.failed and not run_history(outcome.plan).failed:
            return count, outcome
    return count, None


def new_progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=progress_console,
    )  # fmt: skip


if __name__ == "__main__":
    main()
