"""Random operations on two files, through two mounts alternately, and on local files: each byte is the same.

What fsx does, of our own making: writes and stores into mappings, truncation both ways, holes, zeros, reserved room,
copies within a file and between the two, looking for data and holes, with handles of every kind that stay open on both
mounts. Before the other mount takes over, what was written is fsynced, as an application would.

A history is made of one seed, which a failure names, with what was done last. PROMISEFS_FSX_SEED=N plays that one,
PROMISEFS_FSX_STEPS=N makes it longer, PROMISEFS_FSX_SECONDS=N plays one after the other for so long.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from promisefs_client.fuse.fuse_extension import SWITCH
from test_ranges_on_mounts import ALLOCATE, KEEP, PUNCH, ZERO, fallocate

if TYPE_CHECKING:
    from conftest import View

SEED = int(os.environ.get("PROMISEFS_FSX_SEED", "1"))
STEPS = int(os.environ.get("PROMISEFS_FSX_STEPS", "400"))
SECONDS = float(os.environ.get("PROMISEFS_FSX_SECONDS", "0"))
LIMIT_S = SECONDS + 240 + STEPS / 4
MAX_BYTES = 400_000
"""More than two of the client's blocks."""
PAGE = mmap.PAGESIZE
NAMES = ("f", "g")
SHOWN_STEPS = 25
MODES = (ALLOCATE, KEEP, PUNCH, PUNCH, ZERO, ZERO | KEEP)


class Handles:
    """One file as one mount has it open: for reading and writing and mapped, or by two descriptors and not."""

    def __init__(self, path: Path, mapped: bool) -> None:
        self.mapping: mmap.mmap | None = None
        if mapped:
            self.reader = self.writer = os.open(path, os.O_RDWR)
        else:
            self.reader, self.writer = os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY)
        self._mapped = mapped

    def map(self, size: int) -> mmap.mmap | None:
        """A mapping that reaches to the end at least, and is kept as long as it does."""
        if not self._mapped or not size:
            return None
        if self.mapping is None or len(self.mapping) < size:
            if self.mapping is not None:
                self.mapping.close()
            self.mapping = mmap.mmap(self.writer, size)
        return self.mapping

    def close(self) -> None:
        if self.mapping is not None:
            self.mapping.close()
        for fd in {self.reader, self.writer}:
            os.close(fd)


def outcome(call: Callable[[], object]) -> object:
    """What a call returns, or its errno."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def copy_all(source: int, source_offset: int, target: int, offset: int, length: int) -> int:
    """copy_file_range may copy less than it is told to: so again."""
    done = 0
    while done < length:
        copied = os.copy_file_range(source, target, length - done, source_offset + done, offset + done)
        if not copied:
            break
        done += copied
    return done


class History:
    def __init__(self, seed: int, views: tuple[Path, Path], local: Path) -> None:
        self.random = random.Random(seed)
        self.done: list[str] = []
        self._local = {name: os.open(local / f"{name}{seed}", os.O_RDWR | os.O_CREAT) for name in NAMES}
        self._paths = [{name: view / f"{name}{seed}" for name in NAMES} for view in views]
        for path in self._paths[0].values():
            path.touch()
        self._handles = [{name: self._opened(m, name) for name in NAMES} for m in (0, 1)]
        self.mount = 0
        self.steps: list[Callable[[str], None]] = [
            *[self.write] * 4,
            *[self.store] * 4,
            *[self.read] * 2,
            *[self.fallocate] * 5,
            *[self.copy] * 4,
            *[self.truncate] * 2,
            *[self.seek] * 2,
            self.sync,
            self.open_again,
            *[self.take_turns] * 3,
        ]

    def _opened(self, mount: int, name: str) -> Handles:
        return Handles(self._paths[mount][name], self.random.random() < 0.6)

    def handles(self, name: str) -> Handles:
        return self._handles[self.mount][name]

    def size(self, name: str) -> int:
        return os.fstat(self._local[name]).st_size

    def content(self, name: str) -> bytes:
        return os.pread(self._local[name], MAX_BYTES + 1, 0)

    def say(self, text: str) -> None:
        self.done.append(f"mount {self.mount}: {text}")

    # Numbers

    def offset(self, end: int) -> int:
        """Below `end`; often where a page begins or ends."""
        at = self.random.randrange(end) if end else 0
        return at // PAGE * PAGE if self.random.random() < 0.4 else at

    def length(self, most: int) -> int:
        length = self.random.choice((1, self.random.randint(1, 100), PAGE, self.random.randint(1, 150_000)))
        return max(1, min(length, most))

    def bytes_of(self, length: int) -> bytes:
        return self.random.randbytes(min(length, 64)) * (length // 64 + 1)

    # Steps

    def step(self) -> None:
        self.random.choice(self.steps)(self.random.choice(NAMES))
        for name in NAMES:
            self.look(self.mount, name, self.random.random() < 0.2)

    def look(self, mount: int, name: str, whole: bool) -> None:
        """Compare by every way there is."""
        handles, content = self._handles[mount][name], self.content(name)
        size = len(content)
        assert os.fstat(handles.reader).st_size == size
        assert os.stat(self._paths[mount][name]).st_size == size
        start = 0 if whole else self.offset(size)
        length = size if whole else self.length(MAX_BYTES)
        _same(os.pread(handles.reader, length, start), content[start : start + length], start, "pread")
        mapping = handles.map(size)
        if mapping is not None:
            _same(mapping[start : min(start + length, size)], content[start : start + length], start, "mapping")

    def write(self, name: str) -> None:
        offset = self.offset(MAX_BYTES)
        length = self.length(MAX_BYTES - offset)
        self.say(f"write {name} {offset} {length}")
        data = self.bytes_of(length)[:length]
        os.pwrite(self._local[name], data, offset)
        assert os.pwrite(self.handles(name).writer, data, offset) == length

    def store(self, name: str) -> None:
        size = self.size(name)
        mapping = self.handles(name).map(size)
        if mapping is None:
            return
        offset = self.offset(size)
        length = self.length(size - offset)
        self.say(f"store {name} {offset} {length}")
        data = self.bytes_of(length)[:length]
        os.pwrite(self._local[name], data, offset)
        mapping[offset : offset + length] = data

    def read(self, name: str) -> None:
        self.say(f"read {name}")
        self.look(self.mount, name, False)

    def fallocate(self, name: str) -> None:
        mode = self.random.choice(MODES)
        offset = self.offset(MAX_BYTES)
        length = self.length(MAX_BYTES - offset)
        self.say(f"fallocate {name} {mode:#x} {offset} {length}")
        fallocate(self._local[name], mode, offset, length)
        fallocate(self.handles(name).writer, mode, offset, length)

    def copy(self, name: str) -> None:
        source = self.random.choice(NAMES)
        offset, source_offset = self.offset(MAX_BYTES), self.offset(self.size(source) + 100)
        length = self.length(MAX_BYTES - offset)
        self.say(f"copy {source} {source_offset} to {name} {offset} {length}")
        expected = outcome(lambda: copy_all(self._local[source], source_offset, self._local[name], offset, length))
        reader, writer = self.handles(source).reader, self.handles(name).writer
        assert outcome(lambda: copy_all(reader, source_offset, writer, offset, length)) == expected

    def truncate(self, name: str) -> None:
        size = self.offset(MAX_BYTES)
        self.say(f"truncate {name} {size}")
        os.ftruncate(self._local[name], size)
        os.ftruncate(self.handles(name).writer, size)

    def seek(self, name: str) -> None:
        """Holes are where the file system wants them, as long as they are zeros."""
        offset = self.offset(MAX_BYTES)
        self.say(f"seek {name} {offset}")
        content, reader = self.content(name), self.handles(name).reader
        hole = outcome(lambda: os.lseek(reader, offset, os.SEEK_HOLE))
        data = outcome(lambda: os.lseek(reader, offset, os.SEEK_DATA))
        if offset >= len(content):
            assert hole == data == "ENXIO"
            return
        assert isinstance(hole, int) and offset <= hole <= len(content)
        assert data == "ENXIO" or (isinstance(data, int) and offset <= data < len(content))
        assert (hole == offset) != (data == offset)
        assert not any(content[offset : data if isinstance(data, int) else len(content)])

    def sync(self, name: str) -> None:
        self.say(f"sync {name}")
        os.fsync(self.handles(name).writer)

    def open_again(self, name: str) -> None:
        self.say(f"open {name} again")
        self.handles(name).close()
        self._handles[self.mount][name] = self._opened(self.mount, name)

    def take_turns(self, name: str) -> None:
        for each in NAMES:
            os.fsync(self.handles(each).writer)
        self.mount = 1 - self.mount
        self.say("takes over")
        for each in NAMES:
            self.look(self.mount, each, True)

    def end(self) -> None:
        for handles in self._handles:
            for each in handles.values():
                each.close()
        for fd in self._local.values():
            os.close(fd)

    def remove(self) -> None:
        for path in self._paths[0].values():
            path.unlink()


def _same(found: bytes, expected: bytes, start: int, how: str) -> None:
    if found != expected:
        assert len(found) == len(expected), f"{how} at {start}"
        at = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        pytest.fail(f"{how} at {start + at}: {found[at : at + 16]!r}, not {expected[at : at + 16]!r}")


def play(seed: int, views: tuple[Path, Path], local: Path) -> None:
    history = History(seed, views, local)
    try:
        for _ in range(STEPS):
            history.step()
        for name in NAMES:
            os.fsync(history.handles(name).writer)
        for mount in (0, 1):
            for name in NAMES:
                history.look(mount, name, True)
    except BaseException:
        print(f"seed {seed}, step {len(history.done)}:", *history.done[-SHOWN_STEPS:], sep="\n  ")
        raise
    finally:
        history.end()
    history.remove()


@pytest.mark.skipif(os.environ.get(SWITCH) == "off", reason="without the FUSE extension")
@pytest.mark.limit_s(LIMIT_S)
def test_two_mounts_do_what_a_local_file_system_does(cell: View, tmp_path: Path) -> None:
    until = time.monotonic() + SECONDS
    seed = SEED
    play(seed, cell.both, tmp_path)
    while time.monotonic() < until:
        seed += 1
        play(seed, cell.both, tmp_path)
    print(f"seeds {SEED} to {seed}")
