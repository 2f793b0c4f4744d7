"""What happened in a history: every system call with its begin and end in one order, and a timeline to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import trio

from .kernel_inodes import describe_bytes
from .world import World

NEVER = math.inf
_TELLING = {"fsync", "msync", "close", "truncate", "punch", "create", "unlink", "rename", "link", "chmod"}


@dataclass(slots=True, eq=False)
class Call:
    """One system call. `begin` and `end` are places in the order of all begins and ends."""

    number: int
    client: str
    process: str
    kind: str
    args: tuple[Any, ...]
    begin: float
    begin_s: float
    end: float = NEVER
    """NEVER: it did not end, as its machine crashed."""
    end_s: float = NEVER
    ino: int = 0
    """The file it is about, where that is known."""
    result: Any = None
    error: str = ""
    """The errno's name."""

    @property
    def succeeded(self) -> bool:
        return self.end < NEVER and not self.error

    def __str__(self) -> str:
        result = self.error or _text(self.result)
        return f"#{self.number} {self.process}: {self.kind}{_text(self.args)} = {result}"


@dataclass(slots=True, eq=False)
class Outage:
    """A server was away, or could not be reached."""

    server: int
    client: str | None
    """Whose connection it was; None: everybody's."""
    begin_s: float
    end_s: float

    def concerns(self, client: str, servers: Container[int]) -> bool:
        return self.server in servers and self.client in (None, client)


class TakenBack(NamedTuple):
    """A client was told, or found out, that promises of a server hold no more."""

    at: float
    """Its place in the order of all events."""
    at_s: float
    client: str
    server: int
    inos: tuple[int, ...] | None
    """None: none of that server's."""


class Drop(NamedTuple):
    """A kernel was told to drop what it has of a file's bytes."""

    at: float
    at_s: float
    client: str
    ino: int


class Kept(NamedTuple):
    """Bytes that a server refused are in a client's quarantine."""

    at: float
    client: str
    ino: int
    offset: int
    data: bytes


def _text(value: Any) -> str:
    if isinstance(value, bytes) and len(value) > 12:
        return describe_bytes(value)
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_text, value)) + ")"
    return repr(value)


class History:
    def __init__(self, world: World) -> None:
        self._world = world
        self.begin_s = world.now_s
        self._order = 0
        self._told = trio.Event()
        self.after_call: Callable[[], None] = lambda: None
        self.calls: list[Call] = []
        self.timeline: list[tuple[float, str, str]] = []
        self.outages: list[Outage] = []
        self.taken_back: list[TakenBack] = []
        self.drops: list[Drop] = []
        self.kept: list[Kept] = []
        self.refuses_from_s = NEVER
        """Since then servers may have refused stores."""

    def note(self, actor: str, text: str) -> None:
        self.timeline.append((self._world.now_s, actor, text))

    def unreachable(self, server: int, client: str, seconds: float) -> None:
        """For so long from now on."""
        now_s = self._world.now_s
        self.outages.append(Outage(server, client, now_s, now_s + seconds))

    @contextmanager
    def away(self, server: int) -> Iterator[None]:
        """The server is, within the block."""
        outage = Outage(server, None, self._world.now_s, NEVER)
        self.outages.append(outage)
        try:
            yield
        finally:
            outage.end_s = self._world.now_s

    def promises_end(self, client: str, server: int, inos: tuple[int, ...] | None) -> None:
        self.taken_back.append(TakenBack(self.tick(), self._world.now_s, client, server, inos))

    def dropped(self, client: str, ino: int) -> None:
        self.drops.append(Drop(self.tick(), self._world.now_s, client, ino))

    def refuses(self) -> None:
        """A server refuses stores from now on, for a while."""
        self.refuses_from_s = min(self.refuses_from_s, self._world.now_s)

    def keeps(self, client: str, ino: int, offset: int, data: bytes) -> None:
        self.note(client, f"keeps refused bytes at {offset}: {describe_bytes(data)}")
        self.kept.append(Kept(self.tick(), client, ino, offset, data))

    def tick(self) -> int:
        self._order += 1
        return self._order

    def begin(self, client: str, process: str, kind: str, args: tuple[Any, ...]) -> Call:
        call = Call(len(self.calls), client, process, kind, args, self.tick(), self._world.now_s)
        self.calls.append(call)
        self.note(process, f"#{call.number} {kind}{_text(args)} ...")
        return call

    def end(self, call: Call) -> None:
        call.end = self.tick()
        call.end_s = self._world.now_s
        if call.kind in _TELLING and not call.error:
            self._told.set()
            self._told = trio.Event()
        self.note(call.process, str(call).replace(f" {call.process}:", "", 1))
        self.after_call()

    async def something_told(self) -> None:
        """Return when a call has ended after which others must see something."""
        await self._told.wait()

    def text(self) -> str:
        start_s = self.timeline[0][0] if self.timeline else 0.0
        return "\n".join(f"{at_s - start_s:10.4f}  {actor:12s} {text}" for at_s, actor, text in self.timeline)
