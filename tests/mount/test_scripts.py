"""The scripts as people start them: they do what they say, and leave nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cell_lib import mounts, processes
from cell_lib.cell import Cell

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Site

SCRIPTS = Path(__file__).parents[2] / "scripts"
LIMIT_S = 100


class Scripts:
    """Runs scripts with a directory for temporary files and a mark of their own."""

    def __init__(self, directory: Path, mark: str) -> None:
        self.directory = directory
        self.mark = mark
        self.environment = {**processes.environment(self.mark), "TMPDIR": str(directory)}

    def start(self, name: str, *arguments: str | Path) -> subprocess.Popen[str]:
        # Not through the wrapper, which would set up .venv: the tests may run in another environment.
        return subprocess.Popen(
            [sys.executable, SCRIPTS / f"{name}.py", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )

    def run(self, name: str, *arguments: str | Path) -> tuple[int, str]:
        process = self.start(name, *arguments)
        try:
            output = process.communicate(timeout=LIMIT_S)[0]
        finally:
            process.kill()
            process.communicate()
        return process.returncode, output

    def leftovers(self) -> list[str]:
        left = [processes.command_line(pid) for pid in processes.wait_until_gone(self.mark, 2)]
        left += [str(mount.mountpoint) for mount in mounts.fuse_mounts_below(self.directory)]
        return left + [path.name for path in self.directory.iterdir()]


@pytest.fixture
def scripts(site: Site) -> Iterator[Scripts]:
    name = f"s{os.urandom(4).hex()}"
    directory = site.directory / name
    directory.mkdir()
    # Below the session's directory and mark: the guard ends these too.
    made = Scripts(directory, f"{site.mark}/{name}")
    yield made
    processes.end(made.mark, grace_s=2)
    for mount in mounts.fuse_mounts_below(directory):
        mounts.force_unmount(mount)


def test_demo_follows_and_leaves_nothing(scripts: Scripts) -> None:
    status, output = scripts.run("demo", "--seconds", "3", "--interval", "100")
    assert status == 0, output
    assert "the reader followed the writer" in output and " 0 stale" in output
    assert output.count("wrote ") >= 10
    assert scripts.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_interrupted_leaves_nothing(scripts: Scripts, number: signal.Signals) -> None:
    demo = scripts.start("demo", "--seconds", "60", "--interval", "50")
    assert demo.stdout is not None
    try:
        for _ in range(4):
            assert demo.stdout.readline()
        demo.send_signal(number)
        output = demo.communicate(timeout=LIMIT_S)[0]
    finally:
        demo.kill()
        demo.communicate()
    assert demo.returncode == 0, output
    assert scripts.leftovers() == []


def test_demo_killed_leaves_no_mount_and_no_process(scripts: Scripts) -> None:
    """Even then: the guard sees that it is alone. Only the temporary directory stays."""
    demo = scripts.start("demo", "--seconds", "60", "--interval", "50")
    assert demo.stdout is not None
    for _ in range(4):
        assert demo.stdout.readline()
    demo.kill()
    demo.communicate()
    assert processes.wait_until_gone(scripts.mark, 10) == []
    assert mounts.fuse_mounts_below(scripts.directory) == []


def test_demo_fails_if_the_server_goes_away(scripts: Scripts) -> None:
    demo = scripts.start("demo", "--seconds", "4", "--interval", "50")
    assert demo.stdout is not None
    try:
        for _ in range(4):
            assert demo.stdout.readline()
        (state,) = scripts.directory.glob("*/cell.json")
        cell = Cell.load(state.parent)
        assert cell is not None and cell.server_pid is not None
        processes.send([cell.server_pid], cell.mark, signal.SIGKILL)
        output = demo.communicate(timeout=LIMIT_S)[0]
    finally:
        demo.kill()
        demo.communicate()
    assert demo.returncode == 1, output
    assert scripts.leftovers() == []


def test_demo_keep_is_taken_down_by_cell(scripts: Scripts) -> None:
    status, output = scripts.run("demo", "--seconds", "1", "--interval", "100", "--keep")
    assert status == 0, output
    told = re.search(r"cell down (\S+);", output)
    assert told
    directory = Path(told[1])
    (directory / "m1" / "hello").write_text("kept")
    assert (directory / "m2" / "hello").read_text() == "kept"
    assert scripts.run("cell", "down", directory)[0] == 0
    assert processes.wait_until_gone(scripts.mark, 2) == []
    assert mounts.fuse_mounts_below(scripts.directory) == []


def test_cell_up_status_down(scripts: Scripts) -> None:
    directory = scripts.directory / "c"
    status, output = scripts.run("cell", "up", directory, "--mounts", "3")
    assert status == 0, output
    for name in ("m1", "m2", "m3"):
        assert f"{directory / name}" in output
    (directory / "m1" / "hello").write_text("x")
    assert (directory / "m3" / "hello").read_text() == "x"
    assert scripts.run("cell", "status", directory)[0] == 0
    status, output = scripts.run("cell", "up", directory)
    assert status == 1 and "runs there already" in output
    status, output = scripts.run("cell", "down", directory)
    assert status == 0, output
    assert scripts.run("cell", "down", directory)[0] == 0
    assert scripts.run("cell", "status", directory)[0] == 1
    assert processes.marked(scripts.mark) == [] and mounts.fuse_mounts_below(directory) == []
    # What was stored is there again.
    assert scripts.run("cell", "up", directory, "--mounts", "1")[0] == 0
    assert (directory / "m1" / "hello").read_text() == "x"
    assert scripts.run("cell", "down", directory)[0] == 0


def test_cell_up_that_fails_takes_down_what_it_started(scripts: Scripts) -> None:
    directory = scripts.directory / "c"
    status, output = scripts.run("cell", "up", directory, "-o", "no_such_option")
    assert status == 1 and "Traceback" not in output, output
    assert processes.marked(scripts.mark) == [] and mounts.fuse_mounts_below(directory) == []
    (scripts.directory / "file").touch()
    status, output = scripts.run("cell", "up", scripts.directory / "file" / "c")
    assert status == 1 and "Traceback" not in output, output


def test_cell_down_after_everything_was_killed(scripts: Scripts) -> None:
    directory = scripts.directory / "c"
    assert scripts.run("cell", "up", directory)[0] == 0
    processes.send(processes.marked(scripts.mark), scripts.mark, signal.SIGKILL)
    time.sleep(0.1)
    assert scripts.run("cell", "status", directory)[0] == 1
    scripts.run("cell", "down", directory)
    assert processes.marked(scripts.mark) == [] and mounts.fuse_mounts_below(directory) == []
    assert scripts.run("cell", "down", directory)[0] == 0


def test_bench_quick_as_json(scripts: Scripts) -> None:
    only = [part for name in ("stat-warm", "seq-read-cold", "visible-read") for part in ("--only", name)]
    process = scripts.start("bench", "--quick", "--json", "--no-sshfs", *only)
    try:
        output = process.communicate(timeout=LIMIT_S)[0]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, output
    results = json.loads(output[output.index("{") :])
    assert results["failures"] == [] and results["visible"]["read"]["promisefs"]["stale"] == 0
    for name in ("stat-warm", "seq-read-cold"):
        assert results["rates"][name]["promisefs"] > 0 and results["rates"][name]["local"] > 0
    assert scripts.leftovers() == []


def test_torture_as_json(scripts: Scripts) -> None:
    status, output = scripts.run("torture", "--mounts", "3", "--minutes", "1", "--checks", "500", "--json")
    assert status == 0, output
    results = json.loads(output[output.index("{") :])
    assert (results["mounts"], results["stale"], results["failures"]) == (3, 0, [])
    assert results["judged"] >= 500 and results["seconds"] < 60
    assert results["seen"]["read"]["count"] > 0 and results["deeds"]["rename"]["median_ms"] > 0
    assert scripts.leftovers() == []


def test_torture_refuses_a_picture_it_cannot_draw(scripts: Scripts) -> None:
    status, output = scripts.run("torture", "--minutes", "1", "--plot", scripts.directory / "missing" / "p.png")
    assert status == 1 and "Traceback" not in output and len(output.splitlines()) == 1, output
