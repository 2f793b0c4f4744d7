"""What is true of each name, as those who change it say through pipes.

Every worker has a pipe that all others write to. Who changes a name holds its lock, announces to all what it will be,
makes the change, and publishes it when its last call (fsync, close, rename...) has returned. A message that was
sent before a look began is in the looker's pipe by then, so whoever empties his pipe before and after a look knows

- what was published when the look began: it must show that or something newer;
- everything that was announced up to its end: it can show nothing but these. If nothing was announced or under way
  meanwhile (the name was *quiet*), it must show exactly what was published.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

PIPE_BYTES = 1 << 20
"""A worker that hears nothing for so long that this fills holds the others up until it does."""
_FULL_S = 0.001


class Kind(IntEnum):
    ANNOUNCED = 0
    PUBLISHED = 1
    STOP = 2


class State(NamedTuple):
    """What a name stands for."""

    head: int
    """The version in the first bytes; 0: there is no such name."""
    tail: int
    """The version in the last bytes; 0: they are zeros."""
    size: int
    inode: int
    """0 if it is not known before the file is made."""

    @property
    def exists(self) -> bool:
        return self.head != 0


ABSENT = State(0, 0, 0, 0)


class _Message(NamedTuple):
    kind: int
    name: int
    at_ns: int
    state: State


_FORMAT = struct.Struct("<QQQQQQQ")
_READ_BYTES = 1024 * _FORMAT.size


def _packed(message: _Message) -> bytes:
    return _FORMAT.pack(message.kind, message.name, message.at_ns, *message.state)


def make_pipe() -> tuple[int, int]:
    """A pipe for one worker: (read end, write end), both non-blocking."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return read_end, write_end


def say_stop(write_end: int) -> None:
    """Tell the worker at the other end to finish, if there is one."""
    _written(write_end, _packed(_Message(Kind.STOP, 0, 0, ABSENT)))


class Known:
    """What one worker has heard of one name."""

    __slots__ = ("possible", "published", "published_ns", "under_way")

    def __init__(self) -> None:
        self.published = ABSENT
        self.published_ns = 0
        self.under_way: State | None = None
        self.possible = [ABSENT]
        """What a look that began at the last `mark` may show; the first is what was published then."""

    def mark(self) -> None:
        """A look begins."""
        self.possible = [self.published]
        if self.under_way is not None:
            self.possible.append(self.under_way)

    @property
    def quiet(self) -> bool:
        return len(self.possible) == 1


class Board:
    """One worker's end. `lock_file` is any local file; `writers` are the write ends of all workers' pipes."""

    def __init__(self, names: int, lock_file: Path, own_pipe: int, writers: list[int]) -> None:
        self.known = [Known() for _ in range(names)]
        self.stopped = False
        self._locks = os.open(lock_file, os.O_RDWR)
        self._pipe = own_pipe
        self._writers = writers

    # Hearing

    def hear(self) -> list[int]:
        """Take what has been said. Return the names of which a change was published, oldest first."""
        published: list[int] = []
        while True:
            try:
                data = os.read(self._pipe, _READ_BYTES)
            except BlockingIOError:
                return published
            for kind, name, at_ns, *state in _FORMAT.iter_unpack(data):
                if kind == Kind.STOP:
                    self.stopped = True
                    continue
                self._take(_Message(kind, name, at_ns, State(*state)))
                if kind == Kind.PUBLISHED:
                    published.append(name)

    def _take(self, message: _Message) -> None:
        known = self.known[message.name]
        if message.kind == Kind.ANNOUNCED:
            known.under_way = message.state
            known.possible.append(message.state)
        else:
            known.published, known.published_ns = message.state, message.at_ns
            known.under_way = None

    # Changing

    @contextmanager
    def changing(self, *names: int) -> Iterator[None]:
        """Nobody else changes these names meanwhile, and what was published of them is known."""
        for name in sorted(names):
            fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, name)
        try:
            self.hear()
            yield
        finally:
            for name in names:
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, name)

    def announce(self, name: int, state: State) -> None:
        """The change begins: from now on the name may show this."""
        self._say(_Message(Kind.ANNOUNCED, name, 0, state))

    def publish(self, name: int, state: State) -> None:
        """The change is done: from now on it must show this."""
        self._say(_Message(Kind.PUBLISHED, name, time.monotonic_ns(), state))

    def _say(self, message: _Message) -> None:
        data = _packed(message)
        for writer in self._writers:
            while not _written(writer, data):
                self.hear()  # else two could wait for each other
                time.sleep(_FULL_S)
        self.hear()


def _written(pipe: int, data: bytes) -> bool:
    """Write all of it, or nothing because the pipe is full (a write of less than PIPE_BUF is never split).

    To a worker that has ended nothing need be said.
    """
    try:
        os.write(pipe, data)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
    return True
