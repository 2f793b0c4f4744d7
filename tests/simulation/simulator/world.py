"""One seed, one schedule: everything that is random or takes time in a simulated history.

`simulated(seed)` makes the process deterministic for the length of a block: trio's scheduler, the clocks, random
numbers and threads all follow from the seed. Time is simulated: when every task waits, the clock jumps to the
next deadline.

Threads run inline, between two waits of random length: what they do is atomic, when they do it is not.
"""

from __future__ import annotations

import gc
import math
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import pyfuse3
import trio
import trio._core._run as trio_run
from promisefs_client.network import clock
from promisefs_server.store.datafiles import DataFile

T = TypeVar("T")

EPOCH_NS = 1_700_000_000_000_000_000
"""Wall clock when a history begins."""


PACES = (
    (0.75, 0.97, 0.002, 0.05),
    (0.75, 0.97, 0.002, 0.05),
    (0.95, 0.99, 0.001, 0.01),
    (0.3, 0.8, 0.005, 0.05),
    (0.6, 0.8, 0.002, 0.15),
)
"""(share of pauses that take no time, of those up to the longer ones, seconds that shorter ones take, and longer ones).
A break has to be acknowledged within a second, before which there are several pauses."""


class SimulatedClock(trio.abc.Clock):
    """Stands still while a task can run; then jumps to the next deadline."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.before_time_passes: Callable[[], None] = lambda: None
        """Called when every task waits; must not raise."""

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self.now_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        # trio asks only when no task can run. Without a deadline it waits for a wake-up of its own, as it ends.
        if deadline == math.inf:
            return 1.0
        self.before_time_passes()
        self.now_s = max(self.now_s, deadline)
        return 0.0


class Pace:
    """How long things take on a machine, or with its disk: usually no time at all."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng
        self._soon, self._late, self._short_s, self._long_s = rng.choice(PACES)

    def slow_down(self, long_s: float) -> None:
        """From now on nothing takes no time."""
        self._soon = self._late = 0.0
        self._long_s = long_s

    async def pause(self) -> None:
        """Let others run, for as long as a machine takes that is as busy as this one."""
        choice = self._random.random()
        if choice < self._soon:
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(self._random.random() * (self._short_s if choice < self._late else self._long_s))


class World:
    """Chance and time of one history."""

    def __init__(self, seed: int) -> None:
        self.clock = SimulatedClock()
        self.random = random.Random(seed)
        self._bytes = random.Random(seed ^ 0x5EED)
        self.threads = Pace(self.random)
        """Of what is done in threads: disks."""
        self.wall_offset_ns = 0
        """Faults move it: wall clocks jump."""
        self.deliveries = 0
        """Pieces of data that have come out of connections so far."""

    @property
    def now_s(self) -> float:
        return self.clock.now_s

    def time_ns(self) -> int:
        return EPOCH_NS + self.wall_offset_ns + int((self.clock.now_s - 1000.0) * 1e9)

    def random_bytes(self, count: int) -> bytes:
        return self._bytes.randbytes(count)

    def random_bits(self, count: int) -> int:
        return self._bytes.getrandbits(count)

    async def run_in_thread(
        self,
        function: Callable[..., T],
        *args: Any,
        thread_name: str | None = None,
        abandon_on_cancel: bool = False,
        limiter: trio.CapacityLimiter | None = None,
    ) -> T:
        """In place of trio.to_thread.run_sync."""
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=not abandon_on_cancel):
            await self.threads.pause()
            result = function(*args)
            await self.threads.pause()
        return result


def _sometimes_cached(world: World) -> Callable[[DataFile, memoryview, int], int]:
    """In place of DataFile.read_cached: what a server wants to read is in memory, or not; no file system decides."""

    def read_cached(file: DataFile, buffer: memoryview, offset: int) -> int:
        if world.random.random() < 0.5:
            return 0
        file.read_into(buffer, offset)
        return len(buffer)

    return read_cached


def _readdir_reply(token: Any, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
    """In place of pyfuse3.readdir_reply; the model kernel's token collects entries."""
    return bool(token.add(name, entry, next_id))


@contextmanager
def simulated(seed: int) -> Iterator[World]:
    """Make this process follow from the seed within the block."""
    world = World(seed)
    trio_run._r.seed(seed)
    collects = gc.isenabled()
    gc.disable()  # when it would finalize something depends on what ran before, and it takes time
    with (
        patch.object(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        patch.object(trio.to_thread, "run_sync", world.run_in_thread),
        patch.object(time, "time_ns", world.time_ns),
        patch.object(clock._suspensions, "until_now_s", lambda: 0.0),
        patch.object(os, "urandom", world.random_bytes),
        patch.object(secrets, "randbits", world.random_bits),
        patch.object(pyfuse3, "readdir_reply", _readdir_reply),
        patch.object(DataFile, "read_cached", _sometimes_cached(world)),
    ):
        try:
            yield world
        finally:
            if collects:
                gc.enable()
