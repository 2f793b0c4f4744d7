"""The FUSE extension by itself, below a file system that has nothing else (`extended_fs`)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cell_lib import processes
from conftest import Site
from extended_fs import BLOCK, DEFECT, FAIL, FILE, NONSENSE
from promisefs_client.fuse.fuse_extension import SWITCH

pytestmark = pytest.mark.skipif(os.environ.get(SWITCH) == "off", reason="without the extension")

WAIT_S = 10.0
TO_THE_END = 2**63 - 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class Extended:
    """The mounted file system and what it says."""

    def __init__(self, site: Site) -> None:
        directory, mark = site.next_place()
        self.mountpoint = directory / "m"
        self.mountpoint.mkdir(parents=True)
        self.told_to_end = False
        self.file = self.mountpoint / "file"
        self._errors = directory / "errors"
        self._said: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        command = [sys.executable, str(Path(__file__).with_name("extended_fs.py")), str(self.mountpoint)]
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=processes.environment(mark), text=True
            )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.features = self.expect("mounted")[1]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(json.loads(line))

    def expect(self, name: str) -> list[Any]:
        """The next line of that name; what comes before it does not matter."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                said = self._said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if said[0] == name:
                return said
        raise AssertionError(f"{name} was not said; stderr: {self._errors.read_text()}")

    def end(self) -> str:
        """Unmount, unless it was told to already. Return what it had to say on stderr."""
        if not self.told_to_end:
            self.told_to_end = True
            self.process.terminate()
        assert self.process.wait(WAIT_S) == 0, self._errors.read_text()
        self.expect("ended")
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self._errors.read_text()


@pytest.fixture
def extended(site: Site, _time_limit: None) -> Iterator[Extended]:
    mounted = Extended(site)
    yield mounted
    if mounted.process.poll() is None:
        assert mounted.end() == ""


@pytest.fixture
def descriptor(extended: Extended) -> Iterator[int]:
    descriptor = os.open(extended.file, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def lock(descriptor: int, command: int, kind: int, start: int, length: int) -> tuple[int, int, int, int]:
    """fcntl with a struct flock. Return type, start, length, pid."""
    asked = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
    answered = fcntl.fcntl(descriptor, command, asked)
    l_type, _, l_start, l_length, l_pid = struct.unpack("hhqqi4x", answered)
    return l_type, l_start, l_length, l_pid


def fails_with(expected: int, function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(OSError) as failure:
        function(*arguments)
    assert failure.value.errno == expected


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    if _LIBC.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def child(function: Callable[[], Any]) -> int:
    """Run it in a process of its own: exit status 0, or the errno."""
    pid = os.fork()
    if pid:
        return pid
    try:
        function()
        os._exit(0)
    except OSError as error:
        os._exit(error.errno or 255)
    finally:
        os._exit(255)


def test_the_features_that_are_on(extended: Extended) -> None:
    operations = ("getlk", "setlk", "flock", "fallocate", "lseek", "copy_file_range", "interrupts", "write_flags")
    assert extended.features == {**dict.fromkeys(operations, True), "cached_symlinks": False}


def test_byte_range_locks_reach_the_handlers(extended: Extended, descriptor: int) -> None:
    lock(descriptor, fcntl.F_SETLK, fcntl.F_WRLCK, 10, 20)
    _, inode, fh, owner, asked, wait = extended.expect("setlk")
    assert (inode, fh, asked, wait) == (FILE, 7, [fcntl.F_WRLCK, 10, 29, os.getpid()], False)
    lock(descriptor, fcntl.F_SETLKW, fcntl.F_RDLCK, 0, 0)
    _, inode, fh, same_owner, asked, wait = extended.expect("setlk")
    assert (asked[:3], wait, same_owner) == ([fcntl.F_RDLCK, 0, TO_THE_END], True, owner)
    assert lock(descriptor, fcntl.F_GETLK, fcntl.F_RDLCK, 3, 4) == (fcntl.F_WRLCK, 5, 0, extended.process.pid)
    assert lock(descriptor, fcntl.F_GETLK, fcntl.F_WRLCK, 1, 1)[0] == fcntl.F_UNLCK
    lock(descriptor, fcntl.F_SETLK, fcntl.F_UNLCK, 0, 0)
    assert extended.expect("setlk")[4][0] == fcntl.F_UNLCK


def test_flock_reaches_the_handler(extended: Extended, descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _, inode, fh, _, kind, wait = extended.expect("flock")
    assert (inode, fh, kind, wait) == (FILE, 7, fcntl.F_RDLCK, True)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert extended.expect("flock")[4:] == [fcntl.F_WRLCK, False]
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    assert extended.expect("flock")[4] == fcntl.F_UNLCK


def test_holes_and_copies_reach_the_handlers(extended: Extended, descriptor: int) -> None:
    fallocate(descriptor, 3, 5, 6)
    assert extended.expect("fallocate")[1:] == [FILE, 7, 3, 5, 6]
    assert os.lseek(descriptor, 100, os.SEEK_HOLE) == 103
    assert extended.expect("lseek")[1:] == [FILE, 7, 100, os.SEEK_HOLE]
    assert os.lseek(descriptor, 0, os.SEEK_END) == 1 << 20, "the kernel's own affair"
    assert os.copy_file_range(descriptor, descriptor, 10, 1, 500) == 5
    assert extended.expect("copy_file_range")[1:] == [FILE, 7, 1, FILE, 7, 500, 10, 0]


def test_whose_locks_end_with_a_close(extended: Extended, descriptor: int) -> None:
    lock(descriptor, fcntl.F_SETLK, fcntl.F_WRLCK, 0, 1)
    owner = extended.expect("setlk")[3]
    another = os.open(extended.file, os.O_RDWR)
    fcntl.flock(another, fcntl.LOCK_SH)
    flock_owner = extended.expect("flock")[3]
    os.close(another)
    assert extended.expect("flush")[1] == owner, "any close of the file by the process that has the lock"
    assert extended.expect("release")[1:] == [True, flock_owner]
    os.close(os.open(extended.file, os.O_RDWR))
    assert extended.expect("release")[1:] == [False, None], "it has had no flock"


def test_a_write_from_a_mapping_is_known_as_such(extended: Extended, descriptor: int) -> None:
    os.pwrite(descriptor, b"x", 3)
    assert extended.expect("write")[1:] == [3, 1, False]
    with mmap.mmap(descriptor, 4096) as mapping:
        mapping[5] = 7
        mapping.flush()
    assert extended.expect("write")[1:] == [0, 4096, True]


def test_every_request_is_answered_whatever_the_handler_does(extended: Extended, descriptor: int) -> None:
    for start, expected in ((FAIL, errno.EDEADLK), (DEFECT, errno.EIO)):
        fails_with(expected, lock, descriptor, fcntl.F_SETLK, fcntl.F_WRLCK, start, 1)
        fails_with(expected, lock, descriptor, fcntl.F_GETLK, fcntl.F_WRLCK, start, 1)
        fails_with(expected, fallocate, descriptor, 0, start, 1)
        fails_with(expected, os.lseek, descriptor, start, os.SEEK_HOLE)
        fails_with(expected, os.copy_file_range, descriptor, descriptor, 1, start, 1 << 19)
    fails_with(errno.EIO, lock, descriptor, fcntl.F_GETLK, fcntl.F_WRLCK, NONSENSE, 1)
    fails_with(errno.EIO, os.lseek, descriptor, NONSENSE, os.SEEK_DATA)
    os.close(os.dup(descriptor))
    assert extended.process.poll() is None
    _give_up(descriptor)
    errors = extended.end()
    assert errors.count("ZeroDivisionError") == 2 * 5, "the message, and the line that raises it"
    assert errors.count("has returned 'nonsense'") == 2
    assert errors.count("Traceback") == 7


def _give_up(descriptor: int) -> None:
    """Give it another file, so that its mount can go."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.close(null)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_ends_a_wait(extended: Extended, descriptor: int, number: signal.Signals) -> None:
    def wait() -> None:
        signal.signal(signal.SIGUSR1, _interrupting)
        lock(descriptor, fcntl.F_SETLKW, fcntl.F_WRLCK, BLOCK, 1)

    pid = child(wait)
    extended.expect("blocked")
    began = time.monotonic()
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    assert time.monotonic() - began < 1.0
    extended.expect("interrupted")
    if number == signal.SIGKILL:
        assert os.WTERMSIG(status) == number
    else:
        assert os.waitstatus_to_exitcode(status) == errno.EINTR


class _Signalled(OSError):
    pass


def _interrupting(number: int, frame: object) -> None:
    """Have Python not repeat the call that failed with EINTR."""
    raise _Signalled(errno.EINTR, "interrupted")


def test_a_signal_ends_an_operation_of_pyfuse3s(extended: Extended) -> None:
    pid = child(lambda: os.stat(extended.mountpoint / "blocks"))
    extended.expect("blocked")
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    extended.expect("interrupted")


def test_many_waits_and_signals_at_the_same_time(extended: Extended, descriptor: int) -> None:
    for _ in range(3):
        pids = [child(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX)) for _ in range(30)]
        for _ in pids:
            extended.expect("blocked")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        for _ in pids:
            extended.expect("interrupted")


def test_what_is_in_flight_at_the_end_is_answered(extended: Extended, descriptor: int) -> None:
    pids = [child(lambda: lock(descriptor, fcntl.F_SETLKW, fcntl.F_WRLCK, BLOCK, 1)) for _ in range(5)]
    for _ in pids:
        extended.expect("blocked")
    _give_up(descriptor)
    extended.told_to_end = True
    extended.process.terminate()
    for pid in pids:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.ECONNABORTED
    assert extended.end() == ""
