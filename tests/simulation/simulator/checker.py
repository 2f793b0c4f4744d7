"""Decides whether a history kept the guarantees, and whether everything came to an end in time."""

from __future__ import annotations

from collections.abc import Iterator

from .checker_appends import check_appends
from .checker_contents import ContentsChecker
from .checker_names import NamesChecker
from .faults import DISTURBANCES
from .history import History
from .plan import Path, Plan


def check(history: History, plan: Plan, initial: dict[Path, int]) -> list[str]:
    """Return what is wrong with the history; nothing if it is as it should be. `initial`: path to inode number."""
    problems = list(ContentsChecker(history).check(initial))
    problems += NamesChecker(history).check(initial)
    problems += check_appends(history, initial)
    problems += _check_errors(history, plan)
    return problems


ORDINARY = {"", "ENOENT", "EEXIST", "SIGBUS"}


def _check_errors(history: History, plan: Plan) -> Iterator[str]:
    for call in history.calls:
        if call.error in ORDINARY:
            continue
        if call.error in ("ETIMEDOUT", "EIO") and any(fault.kind not in DISTURBANCES for fault in plan.faults):
            continue
        if call.error == "ESTALE" and call.kind in _BY_PATH and _changed_meanwhile(history, call):
            continue
        yield f"failed: {call}"


_BY_PATH = {"reopen", "stat", "chmod", "link", "unlink", "rename", "create"}
_CHANGING = {"create", "unlink", "rename", "link", "reopen"}


def _changed_meanwhile(history: History, call: object) -> bool:
    """Whether somebody changed a name that the call uses while it ran."""
    paths = {arg for arg in call.args if isinstance(arg, tuple)}  # type: ignore[attr-defined]
    return any(
        other.kind in _CHANGING and other.begin < call.end and call.begin < other.end and paths.intersection(other.args)  # type: ignore[attr-defined]
        for other in history.calls
        if other is not call
    )
