"""`scripts/test`: every check of the project, in one run. Arguments go to pytest.

Steps: ruff, formatting, types, layers, pytest. One that fails does not keep the others from running; the time limit of
the whole run does. With arguments only pytest runs.

Afterwards nothing may be left: processes and FUSE mounts that the run started and did not end are named, ended by
force, and make it fail. Exit status: 0 if every step passed and nothing was left, else 1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from cell_lib import mounts, processes

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LIMIT_S = 2400.0
"""For all steps together. They should need less than 600 s on two cores that do nothing else."""
WORKERS = 4
"""Tests run at a time. Most of their time they wait: for leases, time limits, processes that start and end."""
_GRACE_S = 10.0
_LAST_WORDS_S = 30.0
"""For a step that is interrupted: pytest ends its cells, then says what failed until then."""


def steps(pytest_arguments: list[str]) -> list[tuple[str, list[str]]]:
    pytest = [sys.executable, "-m", "pytest"]
    if pytest_arguments:
        return [("pytest", [*pytest, *pytest_arguments])]
    return [
        ("ruff check", [f"{BIN}/ruff", "check", "."]),
        ("ruff format", [f"{BIN}/ruff", "format", "--check", "."]),
        ("mypy", [f"{BIN}/mypy"]),
        ("mypy scripts", [f"{BIN}/mypy", "scripts"]),
        ("layers", [f"{BIN}/lint-imports"]),
        ("pytest", [*pytest, "-m", "not alone", "-n", str(WORKERS), "--dist", "worksteal"]),
        ("pytest, one at a time", [*pytest, "-m", "alone"]),
    ]


def run_step(name: str, command: list[str], environment: dict[str, str], deadline: float) -> bool:
    """Run one step; return whether it passed. At the deadline it is interrupted, at last killed."""
    print(f"== {name}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        status = process.wait(max(1.0, deadline - began))
    except subprocess.TimeoutExpired:
        print(f"\n== {name}: TIMEOUT, the whole run may take {LIMIT_S:g} s", flush=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            process.kill()
        return False
    except BaseException:
        process.terminate()
        process.wait(_GRACE_S)
        raise
    print(f"== {name}: {'ok' if status == 0 else f'FAILED ({status})'} ({time.monotonic() - began:.1f} s)", flush=True)
    return status == 0


def leftovers(directory: Path, mark: str) -> list[str]:
    """Name what the run left and end it by force."""
    found = [f"process {pid}: {processes.command_line(pid)}" for pid in processes.wait_until_gone(mark, _GRACE_S)]
    for mount in mounts.fuse_mounts_below(directory):
        found.append(f"mount {mount.mountpoint} (connection {mount.connection})")
        mounts.force_unmount(mount)
    found += [f"mount {mount.mountpoint} cannot be unmounted" for mount in mounts.fuse_mounts_below(directory)]
    processes.end(mark, grace_s=2)
    return found


def main(pytest_arguments: list[str]) -> int:
    mark = processes.new_mark()
    directory = Path(tempfile.mkdtemp(prefix="promisefs-test-")).resolve()
    # Everything that tests make lies below, so what they leave can be found.
    environment = {**processes.environment(mark), "TMPDIR": str(directory), "MYPYPATH": str(ROOT / "scripts")}
    deadline = time.monotonic() + LIMIT_S
    passed: dict[str, bool] = {}
    try:
        for name, command in steps(pytest_arguments):
            passed[name] = time.monotonic() < deadline and run_step(name, command, environment, deadline)
    finally:
        left = leftovers(directory, mark)
        # Never into a mount: files there may be somebody's.
        if not mounts.fuse_mounts_below(directory):
            subprocess.run(["rm", "-rf", "--one-file-system", directory], check=False)
    for line in left:
        print(f"== left behind: {line}")
    failed = [name for name, good in passed.items() if not good] + (["leftovers"] if left else [])
    print(f"== {'FAILED: ' + ', '.join(failed) if failed else 'all passed'}")
    return 1 if failed else 0


def _stop(signal_number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    # Tests are the same whatever the caller's shell has set up for Python.
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main(sys.argv[1:]))
