"""What ordinary tools cost in upcalls (kernel to mount) and RPCs (mount to server), on 100 files in 5 folders.

The lines run in this order; "again" shows what the promises of the time before spare. "elsewhere" is a second mount,
which has not seen the tree.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cell_lib.cell import COMMANDS
from rich.table import Table

from .targets import PromisefsMounts

_TOOL_S = 60.0
_MAKE = (
    "mkdir tree && cd tree && for d in 1 2 3 4 5; do mkdir d$d; for f in $(seq 20); do echo $f > d$d/f$f; done; done"
)
_GIT = "git -c user.name=bench -c user.email=bench@localhost -c gc.auto=0"

TOOLS = (
    ("make 100 files of one line", "m1", _MAKE),
    ("ls -lR", "m1", "ls -lR tree"),
    ("ls -lR, elsewhere", "m2", "ls -lR tree"),
    ("ls -lR, elsewhere, again", "m2", "ls -lR tree"),
    ("cat of all, elsewhere", "m2", "cat tree/*/*"),
    ("cat of all, elsewhere, again", "m2", "cat tree/*/*"),
    ("find -newer", "m1", "find tree -newer tree/d1/f1"),
    ("du", "m1", "du -s tree"),
    ("cp -r", "m1", "cp -r tree copy"),
    ("tar -c", "m1", "tar -cf tree.tar tree"),
    ("tar -x", "m1", "mkdir out && tar -xf tree.tar -C out"),
    ("rsync -a", "m1", "rsync -a tree/ synced"),
    ("rsync -a, again", "m1", "rsync -a tree/ synced"),
    ("git init, add, commit", "m1", f"cd out && {_GIT} init -q . && {_GIT} add -A && {_GIT} commit -q -m tree"),
    ("git status", "m1", "cd out && git status"),
    ("git status, again", "m1", "cd out && git status"),
    ("save by rename", "m1", "echo new > tree/d1/.f1.swp && mv tree/d1/.f1.swp tree/d1/f1"),
    ("append of a line", "m1", "echo more >> tree/d1/f2"),
    ("rm -r", "m1", "rm -r copy"),
)


@dataclass(frozen=True, slots=True)
class Calls:
    tool: str
    upcalls: dict[str, int]
    rpcs: dict[str, int]
    failed: bool


def _counters(mountpoint: Path) -> tuple[Counter[str], Counter[str]]:
    command: list[str | Path] = [COMMANDS / "promisefs", "status", mountpoint, "--json"]
    state = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=_TOOL_S).stdout)
    return Counter(state["upcalls"]), Counter(state["rpcs"])


def measure(target: PromisefsMounts) -> list[Calls]:
    results = []
    for tool, name, script in TOOLS:
        mountpoint = target.cell.mountpoint(name)
        idle = _counters(mountpoint)
        before = _counters(mountpoint)
        done = subprocess.run(["sh", "-c", script], cwd=mountpoint, capture_output=True, timeout=_TOOL_S, check=False)
        after = _counters(mountpoint)
        # Asking costs something too: as much as the two askings before differ.
        upcalls, rpcs = ((after[kind] - before[kind]) - (before[kind] - idle[kind]) for kind in (0, 1))
        results.append(Calls(tool, dict(upcalls.most_common()), dict(rpcs.most_common()), done.returncode != 0))
    return results


def _described(counts: dict[str, int]) -> str:
    return (
        f"{sum(counts.values())}: " + ", ".join(f"{count} {name}" for name, count in counts.items()) if counts else "0"
    )


def table(calls: list[Calls]) -> Table:
    made = Table(title="Upcalls and RPCs of tools, 100 files in 5 folders", title_justify="left", show_lines=True)
    made.add_column("tool", no_wrap=True)
    made.add_column("upcalls")
    made.add_column("RPCs")
    for entry in calls:
        made.add_row(
            entry.tool + (" [red](failed)[/red]" if entry.failed else ""),
            _described(entry.upcalls),
            _described(entry.rpcs),
        )
    return made
