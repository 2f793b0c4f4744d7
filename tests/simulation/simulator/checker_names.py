"""Decides from a history whether the names that were seen could have been there (G2), and modes.

A name is a register: it stands for an inode or for nothing. Changes are requests that the server carries out at one
moment between their begin and end, or, if they failed without a clear answer, at any time after their begin or
never. What a lookup, listing or stat saw is stale iff every change that could have made it so was over before another
change of that name began which was over before the lookup began.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from .history import NEVER, Call, History
from .layout import Path

UNCLEAR = {"ETIMEDOUT", "EIO", ""}
"""Errors after which a change may or may not have happened; '' for what did not return."""
SOMETHING = -1
"""An inode whose number was never told: made by a call that did not return in good order."""


@dataclass(slots=True, eq=False)
class Change:
    call: Call | None
    value: int
    """0: the name is gone."""
    begin: float
    end: float

    def __str__(self) -> str:
        return "the beginning" if self.call is None else str(self.call)


class NamesChecker:
    def __init__(self, history: History) -> None:
        self._calls = history.calls
        self._changes: dict[Path, list[Change]] = defaultdict(list)
        self._modes: dict[int, list[Change]] = defaultdict(list)

    def check(self, initial: dict[Path, int]) -> Iterator[str]:
        for path, ino in initial.items():
            self._changes[path].append(Change(None, ino, -1.0, -1.0))
        for call in self._calls:
            self._collect(call)
        for call in self._calls:
            if call.kind == "rename":
                self._blur(call)
        for call in self._calls:
            if call.end < NEVER:
                yield from self._check(call)

    def _blur(self, call: Call) -> None:
        """A rename moves what the old name stands for at the server, perhaps not what the kernel had found before."""
        old, new = call.args[:2]
        if any(c.call is not call and c.begin < call.end and c.end > call.begin for c in self._changes[old]):
            for change in self._changes[new]:
                if change.call is call:
                    change.value = SOMETHING

    def _collect(self, call: Call) -> None:
        if call.error and call.error not in UNCLEAR:
            return
        end = call.end if call.succeeded else NEVER
        match call.kind, call.args:
            case "create", (path,):
                self._change(path, call, call.ino or SOMETHING, end)
            case "reopen", (path, flags) if flags & 0o100 and not call.succeeded:
                self._change(path, call, SOMETHING, end)
            case "reopen", (path, flags) if flags & 0o100:
                # It may have made the file, or found it.
                self._change(path, call, call.ino, end)
            case "unlink", (path,):
                self._change(path, call, 0, end)
            case "link", (_, path):
                self._change(path, call, call.ino or SOMETHING, end)
            case "rename", (old, new) if call.ino or not call.succeeded:
                self._change(old, call, 0, end)
                self._change(new, call, call.ino or SOMETHING, end)
            case "chmod", (_, mode):
                self._modes[call.ino].append(Change(call, mode, call.begin, end))

    def _change(self, path: Path, call: Call, value: int, end: float) -> None:
        self._changes[path].append(Change(call, value, call.begin, end))

    # Observations

    def _check(self, call: Call) -> Iterator[str]:
        match call.kind, call.args:
            case "stat", (path,):
                yield from self._seen(path, call, call.ino)
                if call.succeeded:
                    yield from self._mode(call)
            case "reopen", (path, flags) if not flags & 0o100:
                yield from self._seen(path, call, call.ino)
            case (("create" | "link"), _) if call.error == "EEXIST":
                yield from self._existed(call.args[-1], call)
            case (("unlink" | "rename"), (path, *_)) if call.error == "ENOENT":
                yield from self._seen(path, call, 0)
            case "list", (directory,) if call.succeeded:
                for path in self._changes:
                    if path[:-1] == directory:
                        yield from self._seen(path, call, call.result.get(path[-1], 0))
                for name in call.result:
                    if (*directory, name) not in self._changes:
                        yield f"garbage: {call} has {name!r}, which nobody made"

    def _seen(self, path: Path, call: Call, ino: int) -> Iterator[str]:
        """The call says that the name stood for this inode, 0 for nothing, at some moment while it ran."""
        if call.error not in ("", "ENOENT"):
            return
        if not ino and not call.error and call.kind != "list":
            return
        yield from self._possible(path, call, lambda value: value == ino or (value == SOMETHING and ino != 0))

    def _existed(self, path: Path, call: Call) -> Iterator[str]:
        yield from self._possible(path, call, lambda value: value != 0)

    def _possible(self, path: Path, call: Call, fits: object) -> Iterator[str]:
        assert callable(fits)
        changes = self._changes[path]
        if not any(change.call is None for change in changes):
            changes.append(Change(None, 0, -1.0, -1.0))
        yield from _regular(f"name {b'/'.join(path).decode()}", call, changes, fits)

    def _mode(self, call: Call) -> Iterator[str]:
        # 0: those that failed, perhaps after they had found their file.
        changes = [Change(None, 0o644, -1.0, -1.0), *self._modes[call.ino], *self._modes[0]]
        _, mode = call.result
        yield from _regular("mode", call, changes, lambda value: value == mode)


def _regular(what: str, call: Call, changes: list[Change], fits: object) -> Iterator[str]:
    """Whether one of the changes whose value fits can be the last one at some moment of the call."""
    assert callable(fits)
    possible = [c for c in changes if c.begin < call.end and c.call is not call and fits(c.value)]
    if not possible:
        yield f"garbage: {call}: {what} was never so"
        return
    over = [c for c in changes if c.end < call.begin]
    stale = [next((o for o in over if c.end < o.begin), None) for c in possible]
    if None not in stale:
        yield f"stale: {call}: {what}: last so by {possible[0]}, no more since {stale[0]}"
