"""Decides whether a history kept the guarantees, and whether everything came to an end in time."""

from __future__ import annotations

from collections.abc import Iterator

from .checker_appends import check_appends
from .checker_contents import ContentsChecker
from .checker_names import NamesChecker
from .checker_progress import check_progress, has_met_outage
from .checker_refusals import REFUSALS, RefusalsChecker
from .checker_separation import check_separation
from .history import Call, History
from .layout import Path
from .plan import Plan


def check(history: History, plan: Plan, initial: dict[Path, int]) -> list[str]:
    """Return what is wrong with the history; nothing if it is as it should be. `initial`: path to inode number."""
    refusals = RefusalsChecker(history)
    problems = list(refusals.check())
    problems += ContentsChecker(history, refusals).check(initial)
    problems += NamesChecker(history).check(initial)
    problems += check_appends(history, initial)
    problems += check_separation(history)
    problems += check_progress(history, plan)
    problems += check_errors(history, plan)
    return problems


ORDINARY = {"", "ENOENT", "EEXIST", "SIGBUS"}


def check_errors(history: History, plan: Plan) -> Iterator[str]:
    """Calls that failed and had no reason to, or did what they must not do."""
    for call in history.calls:
        if call.succeeded and call.ino and _leads_elsewhere(call, plan):
            yield f"failed: {call} went from one volume to another"
        if call.error in ORDINARY:
            continue
        if call.error in REFUSALS and history.refuses_from_s <= call.end_s:
            continue
        if call.error in ("ETIMEDOUT", "EIO") and has_met_outage(history, plan, call):
            continue
        if call.error == "ESTALE" and call.kind in _BY_PATH and _changed_meanwhile(history, call):
            continue
        if call.error == "EXDEV" and _leads_elsewhere(call, plan):
            continue
        yield f"failed: {call}"


_BY_PATH = {"reopen", "stat", "chmod", "link", "unlink", "rename", "create"}
_CHANGING = {"create", "unlink", "rename", "link", "reopen"}


def _leads_elsewhere(call: Call, plan: Plan) -> bool:
    """Whether it moves or links something to a directory that is in another volume."""
    if call.kind not in ("rename", "link"):
        return False
    old, new = call.args
    return plan.layout.home(old) != plan.layout.home(new)


def _changed_meanwhile(history: History, call: Call) -> bool:
    """Whether somebody changed a name that the call uses while it ran."""
    paths = {arg for arg in call.args if isinstance(arg, tuple)}
    return any(
        other.kind in _CHANGING and other.begin < call.end and call.begin < other.end and paths.intersection(other.args)
        for other in history.calls
        if other is not call
    )
