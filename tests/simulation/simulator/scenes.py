"""Short histories in which a few calls are bound to meet: each scene is about a race that is drawn too rarely else.

What is random is when exactly: each step comes up to `jitter_s` late, besides what the schedule adds.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .layout import Path
from .plan import FILE_BYTES, FILES, NAMES, WATCH, WHOLE, Fault, Step

READER, WRITER, OTHER = 0, 1, 2
"""Clients."""
CLIENTS = 3
BEGIN_S = 0.6
"""When everyone is ready."""


@dataclass(slots=True)
class Scene:
    random: random.Random
    jitter_s: float
    file: Path
    processes: list[tuple[int, tuple[Step, ...]]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    value: int = 0
    extension: bool = False
    """As in Plan."""

    def after(self, seconds: float, kind: str, *args: Any) -> Step:
        return Step(kind, args, seconds + self.random.random() * self.jitter_s)

    def publish(self, after_s: float) -> Step:
        self.value += 1
        return self.after(after_s, "publish", self.random.choice((0, 4090, 8190)), 100, self.value)

    def open(self, flags: int = os.O_RDWR) -> Step:
        return Step("reopen", (self.file, flags), 0.0)

    def process(self, client: int, *steps: Step | Sequence[Step]) -> None:
        flat = [step for item in steps for step in ([item] if isinstance(item, Step) else item)]
        self.processes.append((client, tuple(flat)))

    def fault(self, at_s: float, kind: str, *args: Any) -> None:
        self.faults.append(Fault(at_s + self.random.random() * self.jitter_s, kind, args))

    def onlooker(self, count: int) -> list[Step]:
        return [Step("read", WHOLE, WATCH) for _ in range(count)]


def deaf_reader(scene: Scene) -> None:
    """Two others store at the same time while breaks do not reach the reader, who may lose them altogether."""
    late_s = scene.random.choice((0.0, BEGIN_S))
    scene.process(READER, scene.after(late_s, "reopen", scene.file, os.O_RDWR), scene.onlooker(8))
    for writer in (WRITER, OTHER):
        scene.process(writer, scene.open(), [scene.publish(BEGIN_S if not i else 0.02) for i in range(4)])
    seconds, lost = 0.1 + scene.random.random() * 0.5, scene.random.random() < 0.5
    scene.fault(BEGIN_S - 0.05, "stall", READER, 0, True, seconds, lost)


def lost_break(scene: Scene) -> None:
    """A file is read all the time that two others store; one break is lost, and after it little changes."""
    scene.process(READER, scene.open(), [scene.after(0.0, "read", *WHOLE) for _ in range(40)])
    for writer in (WRITER, OTHER):
        scene.process(writer, scene.open(), [scene.publish(0.0) for _ in range(scene.random.randint(1, 3))])
    scene.fault(scene.random.random() * 0.2, "stall", READER, 0, True, 0.3, True)


def fetch_amid_store(scene: Scene) -> None:
    """Files are read for the first time while each is stored; then the break is lost, and nobody stores again."""
    for name in scene.random.sample(NAMES, 3):
        making = [Step("create", (name,), 0.0), Step("write", (0, FILE_BYTES, scene.value + 1), 0.0)]
        scene.value += 1
        scene.process(WRITER, making, Step("fsync", (), 0.0), scene.publish(BEGIN_S))
        for reader in (READER, OTHER):
            opening = scene.after(BEGIN_S - 0.1, "reopen", name, os.O_RDONLY)
            scene.process(reader, opening, scene.after(0.1, "read", *WHOLE))
    scene.fault(BEGIN_S - 0.1, "busy_disks", 0.2)
    for reader in (READER, OTHER):
        scene.fault(BEGIN_S, "stall", reader, 0, True, 0.2 + scene.random.random() * 0.3, True)


def cut_mapping(scene: Scene) -> None:
    """A file is cut again and again, and made longer by far writes, while all mounts store into mappings of it."""
    scene.extension = True
    rng = scene.random
    for client in (READER, WRITER, OTHER):
        steps = [scene.open(), Step("load", (8192, 1), 0.0)]
        for _ in range(8):
            scene.value += 1
            offset = rng.choice((0, 100, 4096, 5000, 8192, 8999))
            match rng.choice(("store", "store", "store", "write") if client != WRITER else ("truncate", "write")):
                case "store":
                    steps += [Step("store", (offset, 10 + scene.value, scene.value), WATCH), scene.after(0.0, "msync")]
                case "write":
                    steps.append(scene.after(0.02, "write", 12_000, 1, scene.value))
                case "truncate":
                    steps.append(scene.after(0.05, "truncate", rng.choice((0, 1, 50, 4097))))
        scene.process(client, steps)


def first_look(scene: Scene) -> None:
    """A kernel meets a file, again and again, while another client changes its mode and its size."""
    looks = [Step("stat", (scene.file,), 0.05) for _ in range(14)]
    scene.process(READER, scene.after(BEGIN_S, "stat", scene.file), looks)
    changes = [scene.after(0.1, "chmod", scene.file, 0o600 + i) for i in range(8)]
    scene.process(WRITER, scene.open(), scene.publish(BEGIN_S - 0.1), changes)
    if scene.random.random() < 0.7:
        scene.fault(BEGIN_S - 0.1, "busy_processor", READER, 0.03)
    for i in range(8):
        scene.fault(BEGIN_S - 0.02 + 0.1 * i, "shrink", READER)


def listing(scene: Scene) -> None:
    """A directory is listed all the time, and names looked up, while another client moves a file to and fro."""
    here, there = scene.file, (scene.file[0], b"x")
    for _ in range(2):
        lists = [scene.after(0.0, "list", here[:-1]) for _ in range(12)]
        scene.process(READER, scene.after(BEGIN_S, "stat", here), lists)
    scene.process(READER, [Step("stat", (scene.random.choice((here, there)),), WATCH) for _ in range(6)])
    moves = [(here, there), (there, here), (here, there)][: scene.random.randint(1, 3)]
    scene.process(WRITER, [scene.after(0.1 if i else BEGIN_S, "rename", *move) for i, move in enumerate(moves)])


def removal(scene: Scene) -> None:
    """A process removes a file while another one of its mount opens it, and another client is slow to let go of it."""
    name = NAMES[0]
    making = [Step("create", (name,), WATCH), Step("close", (), 0.0), scene.after(0.05, "unlink", name)]
    scene.process(READER, making * 5)
    using = [Step("stat", (name,), WATCH), scene.after(0.05, "reopen", name, os.O_RDWR), scene.publish(0.1)]
    scene.process(READER, using * 5)
    scene.process(WRITER, [Step("stat", (name,), WATCH) for _ in range(5)])
    for i in range(5):
        scene.fault(0.5 * i, "stall", WRITER, 0, True, 0.3, False)


def outage(scene: Scene) -> None:
    """The server is killed, and one who relies on its promises does not hear of it."""
    scene.process(READER, scene.open(), scene.onlooker(10))
    scene.process(WRITER, scene.open(), [scene.publish(BEGIN_S if not i else 0.1) for i in range(6)])
    scene.fault(BEGIN_S, "block", READER, 0, 0.5 + scene.random.random() * 2.0, True, True)
    scene.fault(BEGIN_S, "kill", 0, scene.random.random() * 0.1, False)


def late_stores(scene: Scene) -> None:
    """A connection breaks while its client stores, repeats it, and stores something else; the first comes late."""
    for name in (scene.file, scene.file, *NAMES[:2]):
        opening = scene.after(0.0, "reopen", name, os.O_RDWR | os.O_CREAT)
        steps = [scene.publish(BEGIN_S if not i else 0.0) for i in range(4)]
        scene.process(WRITER, opening, steps)
    scene.process(READER, scene.open(), scene.onlooker(8))
    scene.fault(BEGIN_S, "linger", WRITER, 0, 0.1 + scene.random.random())


def isolation(scene: Scene) -> None:
    """A reader is cut off for longer than its lease; the last renewal's reply may have been slow."""
    scene.process(READER, scene.open(), [scene.after(0.1, "read", *WHOLE) for _ in range(50)])
    scene.process(WRITER, scene.open(), [scene.publish(2.0 if not i else 0.1) for i in range(4)])
    if scene.random.random() < 0.5:
        scene.fault(0.5 + scene.random.random(), "block", READER, 0, 1.5, False, True)
    scene.fault(1.0 + scene.random.random(), "block", READER, 0, 8.0, True, scene.random.random() < 0.7)


SCENES: tuple[Callable[[Scene], None], ...] = (
    deaf_reader, lost_break, fetch_amid_store, cut_mapping, first_look, listing, removal, outage, late_stores,
    isolation,
)  # fmt: skip


def draw_scene(rng: random.Random, extension: bool) -> Scene:
    scene = Scene(rng, rng.choice((0.001, 0.01, 0.1)), rng.choice(FILES), extension=extension)
    rng.choice(SCENES)(scene)
    return scene
