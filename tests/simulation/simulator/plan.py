"""What a history consists of, as data: processes with their steps, and faults. Made from a seed; can be shortened.

Every write of a history writes a byte value of its own, 1 to 255, over its whole length: so each byte read tells which
write it came from, and 0 that none did. Files of one history are small, its operations many: they are to meet.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from typing import Any

Path = tuple[bytes, ...]

DIRECTORIES: tuple[Path, ...] = ((b"d0",), (b"d1",))
"""Always there. Everything else happens in them."""
FILES: tuple[Path, ...] = ((b"d0", b"a"), (b"d0", b"b"))
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
    servers: int
    lease_s: float
    timeout_s: float
    processes: tuple[tuple[int, tuple[Step, ...]], ...]
    """For each process, which client it runs on and what it does."""
    faults: tuple[Fault, ...]
    clock_rates: tuple[float, ...] = ()
    """How fast the clients' clocks run, where that of the servers runs at 1."""

    def rate_of(self, client: str) -> float:
        """`client` is its name: c and its number."""
        number = client.removeprefix("c")
        return self.clock_rates[int(number)] if number.isdigit() and self.clock_rates else 1.0

    def with_seed(self, seed: int) -> Plan:
        return replace(self, seed=seed)


class Maker:
    """Draws the steps of one history."""

    def __init__(self, rng: random.Random, shrinks: bool) -> None:
        """`shrinks`: files may become smaller. Not where they are mapped: the kernel goes on believing in the old size,
        and grows the file again when it writes pages back (README)."""
        self._random = rng
        self._shrinks = shrinks
        self.slow = rng.random() < 0.35
        """Processes take so long that leases end under them."""
        self._value = 0
        self.hot_path = rng.choice(FILES)

    @property
    def values_left(self) -> int:
        return MAX_VALUE - self._value

    def _new_value(self) -> int:
        self._value += 1
        return self._value

    def delay_s(self) -> float:
        chance = self._random.random()
        if self.slow and chance < 0.5:
            return self._random.random() * 1.5
        if chance < 0.6:
            return 0.0
        if chance < 0.97:
            return self._random.random() * 0.02
        return self._random.random() * 4

    def step(self, kind: str, *args: Any) -> Step:
        watches = kind in ("read", "load", "look", "stat", "list") and self._random.random() < 0.4
        return Step(kind, args, WATCH if watches else self.delay_s())

    def file(self) -> Path:
        return self.hot_path if self._random.random() < 0.8 else self._random.choice(FILES)

    def name(self) -> Path:
        return self._random.choice(NAMES)

    def range(self) -> tuple[int, int]:
        return self._random.choice(OFFSETS), self._random.choice(LENGTHS)

    def range_in_page(self) -> tuple[int, int]:
        offset, length = self.range()
        return offset, min(length, 4096 - offset % 4096)

    # Steps by subject

    def contents(self) -> Step:
        choice = self._random.random()
        if choice < 0.32:
            return self.step("write", *self.range(), self._new_value())
        if choice < 0.62:
            return self.step("read", *self.range())
        if choice < 0.82:
            return self.step("fsync")
        if choice < 0.88:
            return self.step("stat", self.file())
        if choice < 0.93:
            return self.step("truncate", self._random.choice(SIZES if self._shrinks else SIZES[-1:]))
        return self.step("reopen", self.file(), self._flags())

    def _flags(self) -> int:
        return os.O_RDWR | (os.O_TRUNC if self._shrinks and self._random.random() < 0.1 else 0)

    def mapping(self) -> Step:
        choice = self._random.random()
        if choice < 0.3:
            return self.step("store", *self.range_in_page(), self._new_value())
        if choice < 0.65:
            return self.step("load", *self.range_in_page())
        if choice < 0.85:
            return self.step("msync")
        if choice < 0.9:
            return self.step("unmap")
        return self.contents()

    def naming(self) -> Step:
        choice = self._random.random()
        name = self.name()
        if choice < 0.2:
            return self.step("create", name)
        if choice < 0.4:
            return self.step("unlink", name)
        if choice < 0.55:
            return self.step("rename", name, self.name())
        if choice < 0.62:
            return self.step("link", self._random.choice((name, self.file())), self.name())
        if choice < 0.82:
            return self.step("stat", name)
        if choice < 0.92:
            return self.step("list", self._random.choice(DIRECTORIES))
        if choice < 0.96:
            return self.step("chmod", self._random.choice((name, self.file())), self._random.randrange(0o1000))
        return self.step("reopen", name, os.O_RDWR)

    def orphan(self) -> Step:
        """Files that are open while they are removed."""
        choice = self._random.random()
        name = self._random.choice(NAMES[:2])
        if choice < 0.15:
            return self.step("create", name)
        if choice < 0.3:
            return self.step("reopen", name, os.O_RDWR)
        if choice < 0.42:
            return self.step("unlink", name)
        if choice < 0.5:
            return self.step("rename", self.name(), name)
        if choice < 0.55:
            return self.step("close")
        return self.contents()

    def appending(self) -> Step:
        choice = self._random.random()
        if choice < 0.5:
            return self.step("append", self._random.choice((1, 10, 100, 3000)), self._new_value())
        if choice < 0.75:
            return self.step("fsync")
        if choice < 0.9:
            return self.step("look", LOG)
        return self.step("reopen", LOG, APPENDING)


PROFILES: dict[str, tuple[str, ...]] = {
    "contents": ("contents",),
    "mappings": ("mapping",),
    "names": ("naming",),
    "orphans": ("orphan",),
    "appends": ("appending",),
    "mixed": ("contents", "mapping", "naming", "orphan"),
}


def make_plan(seed: int, *, faults: bool = True, profile: str | None = None) -> Plan:
    rng = random.Random(seed)
    profile = profile or rng.choice(list(PROFILES))
    clients = rng.choice((2, 2, 2, 3, 3, 4))
    maker = Maker(rng, shrinks="mapping" not in PROFILES[profile])
    processes = []
    for number in range(clients + rng.choice((0, 0, 1, 2))):
        subjects = PROFILES[profile]
        steps = [_first_step(maker, rng, profile)]
        for _ in range(rng.randint(4, 14)):
            if maker.values_left:
                steps.append(getattr(maker, rng.choice(subjects))())
        if profile == "appends":
            steps = [s for s in steps if s.kind not in ("truncate", "write")]
        processes.append((number % clients, tuple(steps)))
    return Plan(
        seed=seed,
        profile=profile,
        clients=clients,
        servers=1,
        lease_s=3.0,
        timeout_s=8.0,
        processes=tuple(processes),
        faults=_make_disturbances(rng, clients) + (_make_faults(rng, clients, 1) if faults else ()),
        clock_rates=tuple(rng.choice((1.0, 0.99, 1.01)) for _ in range(clients)),
    )


def _first_step(maker: Maker, rng: random.Random, profile: str) -> Step:
    if profile == "appends":
        return maker.step("reopen", LOG, APPENDING)
    if profile == "orphans":
        return maker.step("reopen", NAMES[0], os.O_RDWR | os.O_CREAT)
    return maker.step("reopen", maker.file(), os.O_RDWR)


def _make_faults(rng: random.Random, clients: int, servers: int) -> tuple[Fault, ...]:
    """Half of all histories have some."""
    kinds = rng.choice(("", "", "network", "server", "client", "all"))
    faults: list[Fault] = []
    for _ in range(rng.randint(1, 4) if kinds else 0):
        at_s = rng.choice((0.05, 0.3, 2.0, 6.0)) * rng.random()
        kind = kinds if kinds != "all" else rng.choice(("network", "network", "server", "client"))
        client, server = rng.randrange(clients), rng.randrange(servers)
        if kind == "network":
            if rng.random() < 0.4:
                faults.append(Fault(at_s, "cut", (client, server)))
            else:
                up, down = rng.choice(((True, True), (True, True), (True, False), (False, True)))
                seconds = rng.choice((0.5, 2.0, 4.0, 12.0)) * rng.random()
                faults.append(Fault(at_s, "block", (client, server, seconds, up, down)))
        elif kind == "server":
            down_s = rng.choice((0.0, 0.5, 5.0)) * rng.random()
            faults.append(Fault(at_s, rng.choice(("kill", "kill", "restart")), (server, down_s, rng.random() < 0.5)))
        else:
            faults.append(Fault(at_s, "crash", (client,)))
    return tuple(faults)


def _make_disturbances(rng: random.Random, clients: int) -> tuple[Fault, ...]:
    """What happens on good days too."""
    faults = [
        Fault(
            rng.random() * rng.choice((0.1, 1.0)), rng.choice(("shrink", "flush", "flush")), (rng.randrange(clients),)
        )
        for _ in range(rng.choice((0, 0, 2, 5)))
    ]
    if rng.random() < 0.1:
        faults.append(Fault(rng.random(), "wall_clock", (rng.choice((-3600, -1, 3600)) * 10**9,)))
    return tuple(faults)
