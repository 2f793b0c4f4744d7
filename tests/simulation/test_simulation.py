"""Random histories of simulated cells keep the guarantees; the same seed gives the same history."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant
from simulator.plan import make_plan
from simulator.run import run_history

HISTORIES = {
    "contents": 100, "mappings": 100, "names": 90, "orphans": 90, "appends": 80, "mixed": 100, "rush": 80,
    "scenes": 280, "holes": 40, "refusals": 40,
}  # fmt: skip
"""Of each kind, with faults and without: 2,000 in all. Those that take longer are fewer."""
QUICK = [mutant for mutant in MUTANTS if mutant.histories <= 100]

TIMELINES = """
import hashlib
from simulator.plan import make_plan
from simulator.run import run_history
for seed in range(8):
    print(seed, hashlib.sha256(run_history(make_plan(seed), trace=True).timeline.encode()).hexdigest())
"""


def timelines(hash_seed: str) -> str:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", TIMELINES], env=environment, check=True, capture_output=True, text=True, timeout=120
    ).stdout


def test_one_seed_is_one_schedule_in_every_process() -> None:
    first = timelines("1")
    assert len(first.splitlines()) == 8
    assert timelines("2") == first


@pytest.mark.parametrize("profile", HISTORIES)
@pytest.mark.parametrize("faults", [False, True])
def test_histories_keep_the_guarantees(profile: str, faults: bool) -> None:
    for seed in range(HISTORIES[profile]):
        outcome = run_history(make_plan(seed, profile=profile, faults=faults))
        assert not outcome.failed, f"seed {seed}: {outcome.problems}\n{outcome.timeline}"


@pytest.mark.parametrize("mutant", QUICK, ids=lambda mutant: mutant.name)
def test_a_rule_that_is_switched_off_is_missed(mutant: Mutant) -> None:
    """A sample; `scripts/simulate --mutants` takes them all."""
    for seed in range(mutant.histories):
        plan = make_plan(seed, profile=mutant.profile)
        with mutant.active():
            failed = run_history(plan).failed
        if failed and not run_history(plan).failed:
            return
    pytest.fail(f"not found in {mutant.histories} histories")
