"""Processes on several mounts change and watch the same few names, all at once: nothing that is shown may be stale."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torture_lib.looks import KINDS
from torture_lib.run import run_torture
from torture_lib.tally import Tally
from torture_lib.worker import DEEDS

if TYPE_CHECKING:
    from conftest import MakeCell, View

ALL_DEEDS = (*DEEDS, "create", "rename", "save by rename")


def assert_clean(tally: Tally) -> None:
    assert tally.failures == []
    assert (tally.failed, tally.stale) == (0, 0)


def test_torture(cell: View, tmp_path: Path) -> None:
    tally = run_torture(list(cell.both), tmp_path, seconds=20.0, checks=6_000)
    assert_clean(tally)
    for kind in KINDS:
        assert tally.checks_of(kind).judged >= 100, f"too little was judged: {tally.checks}"
        assert tally.checks_of(kind).first >= 20, f"too little was judged: {tally.checks}"
    assert tally.checks_of("read").absent >= 20, f"too little was judged: {tally.checks}"
    assert set(tally.deeds) == set(ALL_DEEDS)
    assert tally.orphans > 0


@pytest.mark.allow_log(r"promisefs_client.network.session: .*Connection refused")
def test_torture_while_the_server_is_killed(make_cell: MakeCell, tmp_path: Path) -> None:
    """kill -9 at any moment, clients with dirty data: they come back, lose nothing, show nothing that is old."""
    lease = ("--lease", "2")
    running = make_cell(server_options=lease)
    kill_at_s = time.monotonic() + 2
    kills = 0

    def kill_now_and_then(judged: int, failed: int) -> None:
        nonlocal kill_at_s, kills
        if time.monotonic() >= kill_at_s and kills < 4:
            running.stop_server(kill=True)
            running.start_server(*lease)
            kill_at_s = time.monotonic() + 2
            kills += 1

    mounts = [running.mountpoint(name) for name in ("m1", "m2")]
    tally = run_torture(mounts, tmp_path, seconds=13.0, on_progress=kill_now_and_then)
    assert_clean(tally)
    assert kills >= 2
    assert tally.judged >= 500, f"too little was judged: {tally.checks}"
