"""What a history consists of, as data: processes with their steps, and faults. Made from a seed; can be shortened.

Every write of a history writes a byte value of its own, 1 to 255, over its whole length: so each byte read tells which
write it came from, and 0 that none did. Files of one history are small, its operations many: they are to meet.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from typing import Any

from .layout import ALONE, DIRECTORIES, LAYOUTS, Layout, Path

FILES: tuple[Path, ...] = ((b"d0", b"a"), (b"d1", b"b"))
"""There from the beginning, of FILE_BYTES zeros."""
FILE_BYTES = 9000
LOG: Path = (b"d0", b"log")
"""There from the beginning, empty; only appended to."""
NAMES: tuple[Path, ...] = tuple((d, n) for d in (b"d0", b"d1") for n in (b"x", b"y", b"z"))
"""Come and go."""
APPENDING = os.O_WRONLY | os.O_APPEND
"""Not O_RDWR: the first append of a handle that can also be mapped may be taken for a page written back (README)."""
OFFSETS = (0, 1, 100, 4000, 4090, 4096, 4100, 8190, 8192, 8999, 9000, 12000)
LENGTHS = (1, 10, 100, 200, 4096, 5000)
SIZES = (0, 1, 50, 4096, 4097, 5000, 9000, 12300)
WHOLE = (0, 18_000)
LOOK_BYTES = 200_000
"""More than any file ever has."""
WATCH = -1.0
MAX_VALUE = 255


@dataclass(frozen=True, slots=True)
class Step:
    """One system call: `kind` names a method of `processes.Process`."""

    kind: str
    args: tuple[Any, ...]
    delay_s: float
    """How long the process thinks before it; WATCH: until some call has ended that others must see the effect of."""

    def __str__(self) -> str:
        return f"{self.kind}{self.args}"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something goes wrong: `kind` names a method of `faults.Faults`."""

    at_s: float
    kind: str
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    """Of the schedule: delays, the order of tasks."""
    profile: str
    clients: int
    layout: Layout
    lease_s: float
    timeout_s: float
    processes: tuple[tuple[int, tuple[Step, ...]], ...]
    """For each process, which client it runs on and what it does."""
    faults: tuple[Fault, ...]
    clock_rates: tuple[float, ...] = ()
    """How fast the clients' clocks run, where that of the servers runs at 1."""
    extension: bool = False
    """Whether clients are told which writes come from the kernel's page cache, as the FUSE extension does."""

    def rate_of(self, client: str) -> float:
        """`client` is its name: c and its number."""
        number = client.removeprefix("c")
        return self.clock_rates[int(number)] if number.isdigit() and self.clock_rates else 1.0

    def with_seed(self, seed: int) -> Plan:
        return replace(self, seed=seed)


_CONTENTS = {"write": 32, "read": 30, "fsync": 20, "stat": 6, "truncate": 5, "reopen": 7}
_MAPPING = {"store": 30, "load": 35, "msync": 20, "unmap": 5, "contents": 10}
_HOLES = {"punch": 30, "contents": 30, "mapping": 40}
_NAMING = {
    "create": 20, "unlink": 20, "rename": 15, "link": 7, "stat": 20, "list": 10, "chmod": 8, "reopen": 4, "contents": 6,
}  # fmt: skip
_ORPHANS = {"create": 15, "reopen": 15, "unlink": 12, "rename": 8, "close": 5, "contents": 45}
_APPENDING = {"append": 50, "fsync": 25, "look": 15, "reopen": 10}
_RUSH = {
    "publish": 20, "read": 20, "stat": 20, "chmod": 10, "list": 12, "rename": 12, "create": 8, "unlink": 8,
    "truncate": 4, "reopen": 6,
}  # fmt: skip
"""How often each step is drawn, by subject; each history likes some more and some less."""
LIKINGS = (0.3, 1.0, 1.0, 3.0)
TOGETHER = (0.0, 0.15, 0.4)
LOOKING = frozenset(("read", "load", "look", "stat", "list"))


class Maker:
    """Draws the steps of one history."""

    def __init__(self, rng: random.Random, rushes: bool) -> None:
        """`rushes`: nobody takes time to think."""
        self._random = rng
        self._rushes = rushes
        self.slow = not rushes and rng.random() < 0.35
        """Processes take so long that leases end under them."""
        self._value = 0
        self.hot_path = rng.choice(FILES)
        self.onlooking = False
        """The process whose steps are drawn next changes little, and looks when there is something to see."""
        self._together = rng.choice(TOGETHER)
        """So many steps begin when another process has finished one: they meet."""
        self._names = rng.sample(NAMES, rng.choice((1, 2, 3, len(NAMES), len(NAMES))))
        self._likings: dict[str, float] = {}
        self.hot_share = 0.8

    @property
    def values_left(self) -> int:
        return MAX_VALUE - self._value

    def _new_value(self) -> int:
        self._value += 1
        return self._value

    def _draw(self, kinds: dict[str, int]) -> str:
        for kind in kinds:
            if kind not in self._likings:
                self._likings[kind] = self._random.choice(LIKINGS)
        weights = [often * self._likings[kind] for kind, often in kinds.items()]
        if self.onlooking:
            weights = [w if kind in LOOKING else w / 10 for kind, w in zip(kinds, weights, strict=True)]
        return self._random.choices(list(kinds), weights)[0]

    def delay_s(self) -> float:
        chance = self._random.random()
        if self.slow and chance < 0.5:
            return self._random.random() * 1.5
        if chance < 0.6:
            return 0.0
        if chance < 0.97 or self._rushes:
            return self._random.random() * 0.02
        return self._random.random() * 4

    def step(self, kind: str, *args: Any) -> Step:
        looks = (0.8 if self.onlooking else 0.4) if kind in LOOKING else 0.0
        watches = self._random.random() < max(looks, self._together)
        return Step(kind, args, WATCH if watches else self.delay_s())

    def file(self) -> Path:
        return self.hot_path if self._random.random() < self.hot_share else self._random.choice(FILES)

    def name(self) -> Path:
        return self._random.choice(self._names)

    def range(self) -> tuple[int, int]:
        return self._random.choice(OFFSETS), self._random.choice(LENGTHS)

    def range_in_page(self) -> tuple[int, int]:
        offset, length = self.range()
        return offset, min(length, 4096 - offset % 4096)

    # Steps by subject

    def contents(self) -> Step:
        match kind := self._draw(_CONTENTS):
            case "write":
                return self.step(kind, *self.range(), self._new_value())
            case "read":
                return self.step(kind, *(WHOLE if self._random.random() < 0.3 else self.range()))
            case "stat":
                return self.step(kind, self.file())
            case "truncate":
                return self.step(kind, self._random.choice(SIZES))
            case "reopen":
                return self.step(kind, self.file(), self._flags())
        return self.step(kind)

    def _flags(self) -> int:
        return os.O_RDWR | (os.O_TRUNC if self._random.random() < 0.1 else 0)

    def mapping(self) -> Step:
        match kind := self._draw(_MAPPING):
            case "store":
                return self.step(kind, *self.range_in_page(), self._new_value())
            case "load":
                return self.step(kind, *self.range_in_page())
            case "contents":
                return self.contents()
        return self.step(kind)

    def holes(self) -> Step:
        match kind := self._draw(_HOLES):
            case "contents":
                return self.contents()
            case "mapping":
                return self.mapping()
        return self.step(kind, *self.range())

    def naming(self) -> Step:
        name = self.name()
        match kind := self._draw(_NAMING):
            case "rename":
                return self.step(kind, name, self.name())
            case "link":
                return self.step(kind, self._random.choice((name, self.file())), self.name())
            case "list":
                return self.step(kind, self._random.choice(DIRECTORIES))
            case "chmod":
                return self.step(kind, self._random.choice((name, self.file())), self._random.randrange(0o1000))
            case "reopen":
                return self.step(kind, name, os.O_RDWR)
            case "contents":
                return self.contents()
        return self.step(kind, name)

    def orphan(self) -> Step:
        """Files that are open while they are removed."""
        name = self._random.choice(NAMES[:2])
        match kind := self._draw(_ORPHANS):
            case "reopen":
                return self.step(kind, name, os.O_RDWR)
            case "rename":
                return self.step(kind, self._random.choice(NAMES), name)
            case "close":
                return self.step(kind)
            case "contents":
                return self.contents()
        return self.step(kind, name)

    def rush(self) -> Step:
        """One file and its few names, of which everyone wants to know the latest."""
        path = self._random.choice((self.hot_path, *self._names[:2]))
        match kind := self._draw(_RUSH):
            case "publish":
                return self.step(kind, *self.range(), self._new_value())
            case "read":
                return self.step(kind, *WHOLE)
            case "list":
                return self.step(kind, path[:-1])
            case "chmod":
                return self.step(kind, path, self._random.randrange(0o1000))
            case "rename":
                return self.step(kind, path, self._random.choice((self.hot_path, *self._names[:2])))
            case "truncate":
                return self.step(kind, self._random.choice(SIZES))
            case "reopen":
                return self.step(kind, path, self._flags())
        return self.step(kind, path)

    def appending(self) -> Step:
        match kind := self._draw(_APPENDING):
            case "append":
                return self.step(kind, self._random.choice((1, 10, 100, 3000)), self._new_value())
            case "look":
                return self.step(kind, LOG)
            case "reopen":
                return self.step(kind, LOG, APPENDING)
        return self.step(kind)


PROFILES: dict[str, tuple[str, ...]] = {
    "contents": ("contents",),
    "mappings": ("mapping",),
    "names": ("naming",),
    "orphans": ("orphan",),
    "appends": ("appending",),
    "rush": ("rush",),
    "scenes": (),
    "mixed": ("contents", "mapping", "naming", "orphan"),
    "holes": ("holes",),
    "refusals": ("contents", "mapping"),
}
RARE = ("holes",)
"""Only made when they are asked for."""


def make_plan(seed: int, *, faults: bool = True, profile: str | None = None) -> Plan:
    rng = random.Random(seed)
    profile = profile or rng.choice([name for name in PROFILES if name not in RARE])
    if profile == "scenes":
        return _scene(seed, rng)
    layout = _choose_layout(seed) if profile != "refusals" else ALONE
    clients = rng.choice((2, 2, 2, 2, 3, 3, 3, 4, 4, 5))
    extension = seed % 2 == 1 or profile == "holes"
    maker = Maker(rng, rushes=profile == "rush")
    if layout is not ALONE and rng.random() < 0.5:
        maker.hot_share = 1.0  # the other file is changed by nobody
    processes = []
    for number in range(clients + rng.choice((0, 0, 1, 2, clients))):
        subjects = PROFILES[profile]
        maker.onlooking = rng.random() < 0.25
        steps = [_first_step(maker, rng, profile)]
        for _ in range(rng.randint(4, 14) if profile != "rush" else rng.randint(10, 30)):
            if maker.values_left:
                steps.append(getattr(maker, rng.choice(subjects))())
        if profile == "appends":
            steps = [s for s in steps if s.kind not in ("truncate", "write")]
        processes.append((number % clients, tuple(steps)))
    if layout is not ALONE:
        processes += [(rng.randrange(clients), _watching(maker, rng)) for _ in range(rng.randint(1, clients))]
    disturbances = _make_disturbances(rng, clients)
    problems: tuple[Fault, ...] = ()
    if profile == "refusals":
        problems = _make_refusals(rng, layout, clients if faults else 0)
    elif not faults:
        pass
    elif layout.servers == 1:
        problems = _make_faults(rng, clients)
    else:
        problems = _make_faults_of_one_server(rng, clients, rng.randrange(layout.servers))
    return Plan(
        seed=seed,
        profile=profile,
        clients=clients,
        layout=layout,
        lease_s=3.0,
        timeout_s=8.0,
        processes=tuple(processes),
        faults=disturbances + problems,
        clock_rates=tuple(rng.choice((1.0, 0.99, 1.01)) for _ in range(clients)),
        extension=extension,
    )


def _choose_layout(seed: int) -> Layout:
    rng = random.Random(seed ^ 0xCE11)
    return ALONE if rng.random() < 0.7 else rng.choice(LAYOUTS)


def _watching(maker: Maker, rng: random.Random) -> tuple[Step, ...]:
    """Reads one file, changes nothing: what it has cached is to outlive what befalls other servers than that file's."""
    file = rng.choice((*FILES, *(file for file in FILES if file != maker.hot_path)))
    steps = [maker.step("reopen", file, os.O_RDONLY)]
    for _ in range(rng.randint(4, 12)):
        kind = rng.choice(("load", "load", "read", "stat"))
        steps.append(maker.step(kind, file) if kind == "stat" else maker.step(kind, *maker.range_in_page()))
    return tuple(steps)


def _scene(seed: int, rng: random.Random) -> Plan:
    from .scenes import CLIENTS, draw_scene

    scene = draw_scene(rng, seed % 2 == 1)
    return Plan(
        seed=seed,
        profile="scenes",
        clients=CLIENTS,
        layout=ALONE,
        lease_s=3.0,
        timeout_s=8.0,
        processes=tuple(scene.processes),
        faults=tuple(scene.faults),
        clock_rates=tuple(rng.choice((1.0, 0.99, 1.01)) for _ in range(CLIENTS)),
        extension=scene.extension,
    )


def _first_step(maker: Maker, rng: random.Random, profile: str) -> Step:
    if profile == "appends":
        return maker.step("reopen", LOG, APPENDING)
    if profile == "orphans":
        return maker.step("reopen", NAMES[0], os.O_RDWR | os.O_CREAT)
    return maker.step("reopen", maker.file(), os.O_RDWR)


def _make_faults(rng: random.Random, clients: int) -> tuple[Fault, ...]:
    """Half of all histories have some."""
    kinds = rng.choice(("", "", "network", "server", "client", "incident", "all"))
    faults: list[Fault] = []
    for _ in range(rng.randint(1, 4) if kinds else 0):
        kind = kinds if kinds != "all" else rng.choice(("network", "network", "server", "client", "incident"))
        faults += _make_fault(rng, kind, rng.randrange(clients), 0)
    for _ in range(rng.choice((0, 0, 0, 2, 4))):
        stall = (rng.randrange(clients), 0, rng.random() < 0.5, rng.random() * 0.5, False)
        faults.append(Fault(rng.random(), "stall", stall))
    return tuple(faults)


def _make_faults_of_one_server(rng: random.Random, clients: int, server: int) -> tuple[Fault, ...]:
    """One of several servers has a bad day, and now and then a client too."""
    kinds = ("network", "network", "isolation", "server", "incident", "client")
    faults: list[Fault] = []
    for _ in range(rng.randint(1, 3)):
        faults += _make_fault(rng, rng.choice(kinds), rng.randrange(clients), server)
    return tuple(faults)


def _make_refusals(rng: random.Random, layout: Layout, stalled: int) -> tuple[Fault, ...]:
    """A server refuses stores, some of them or all. Nothing is lost on the way; `stalled` clients may hear late."""
    volume = layout.homes[0].volume
    faults: list[Fault] = []
    at_s = 0.0
    for _ in range(rng.randint(1, 3)):
        at_s += rng.choice((0.05, 0.3, 2.0)) * rng.random()
        seconds = rng.choice((0.05, 0.3, 2.0, 7.0)) * rng.random()
        match rng.choice(("full_disk", "quota", "quota", "read_only")):
            case "full_disk":
                faults.append(Fault(at_s, "full_disk", (0, seconds)))
            case "quota":
                faults.append(Fault(at_s, "quota", (0, volume, rng.choice((1, 1, 2000, 5000)), seconds)))
            case "read_only":
                faults.append(Fault(at_s, "read_only", (0, volume, seconds)))
        at_s += seconds
    for client in range(stalled):
        if rng.random() < 0.3:
            faults.append(Fault(rng.random(), "stall", (client, 0, rng.random() < 0.5, rng.random() * 0.5, False)))
    return tuple(faults)


def _make_fault(rng: random.Random, kind: str, client: int, server: int) -> list[Fault]:
    at_s = rng.choice((0.05, 0.3, 2.0, 6.0)) * rng.random()
    seconds = rng.choice((0.5, 2.0, 4.0, 12.0, 40.0)) * rng.random()
    match kind:
        case "client":
            return [Fault(at_s, "crash", (client,))]
        case "server":
            down_s = rng.choice((0.0, 0.5, 5.0)) * rng.random()
            return [Fault(at_s, rng.choice(("kill", "restart", "restart")), (server, down_s, rng.random() < 0.5))]
        case "incident":
            # The server has forgotten its promises, and who had some may not hear of it.
            return [
                Fault(at_s, "block", (client, server, rng.random() * 4.0, True, True)),
                Fault(at_s, "kill", (server, 0.1 * rng.random(), False)),
            ]
        case "isolation":
            return [Fault(at_s, "isolate", (server, seconds))]
    if rng.random() < 0.3:
        return [Fault(at_s, "cut", (client, server))]
    if rng.random() < 0.4:
        return [Fault(at_s, "stall", (client, server, rng.random() < 0.5, rng.random(), rng.random() < 0.5))]
    up, down = rng.choice(((True, True), (True, True), (True, False), (False, True)))
    return [Fault(at_s, "block", (client, server, seconds, up, down))]


def _make_disturbances(rng: random.Random, clients: int) -> tuple[Fault, ...]:
    """What happens on good days too."""
    faults = [
        Fault(
            rng.random() * rng.choice((0.1, 1.0)), rng.choice(("shrink", "flush", "flush")), (rng.randrange(clients),)
        )
        for _ in range(rng.choice((0, 0, 2, 5)))
    ]
    if rng.random() < 0.15:
        # Memory is short: hardly is something known before it is forgotten.
        faults += [Fault(rng.random() * 2.0, "shrink", (rng.randrange(clients),)) for _ in range(40)]
    if rng.random() < 0.1:
        faults.append(Fault(rng.random(), "wall_clock", (rng.choice((-3600, -1, 3600)) * 10**9,)))
    return tuple(faults)
