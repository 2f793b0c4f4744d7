"""Signals end operations that wait for a server which is away, and lose nothing by it."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import status_of
from cell_lib.cell import Cell
from conftest import MakeCell
from promisefs_client.fuse.fuse_extension import SWITCH
from promisefs_client.fuse.requests import SIGNAL_PATIENCE_S

pytestmark = [
    pytest.mark.limit_s(60),
    pytest.mark.skipif(os.environ.get(SWITCH) == "off", reason="without the extension"),
    pytest.mark.allow_log("connection to .* lost"),
]

TIMEOUT_S = 60


@pytest.fixture
def away(make_cell: MakeCell) -> Iterator[Cell]:
    """A cell of one mount, with the file `old`, whose server is away until the test is over."""
    cell = make_cell(1, mount_options=f"timeout={TIMEOUT_S}")
    (cell.mountpoint("m1") / "old").write_bytes(b"old")
    cell.stop_server(kill=True)
    yield cell
    if not cell.server_runs():
        cell.start_server()


def child(function: Callable[[], Any]) -> int:
    """Run it in a process that catches SIGUSR1, which ends system calls; exit status 0, or the errno."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGUSR1, _give_up)
        function()
        os._exit(0)
    except OSError as error:
        os._exit(error.errno or 255)
    finally:
        os._exit(255)


def _give_up(number: int, frame: object) -> None:
    raise OSError(errno.EINTR, "a signal")  # else Python makes the call again


def wait_for_waiting(mountpoint: Path, count: int) -> None:
    deadline = time.monotonic() + 20
    while status_of(mountpoint)["waiting"] < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def seconds_until_ended(pid: int, number: signal.Signals) -> tuple[float, int]:
    """Send the signal. Return how long it went on, and what waitpid says."""
    began = time.monotonic()
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    return time.monotonic() - began, status


OPERATIONS: dict[str, Callable[[Path], Any]] = {
    "stat": lambda root: os.stat(root / "unknown"),
    "list": lambda root: os.listdir(root),
    "open": lambda root: os.open(root / "unknown", os.O_RDWR | os.O_CREAT),
    "truncate": lambda root: os.truncate(root / "old", 1),
    "mkdir": lambda root: os.mkdir(root / "d"),
    "statfs": lambda root: os.statvfs(root),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_killed_process_ends_at_once(away: Cell, name: str) -> None:
    root = away.mountpoint("m1")
    pid = child(lambda: OPERATIONS[name](root))
    wait_for_waiting(root, 1)
    seconds, status = seconds_until_ended(pid, signal.SIGKILL)
    assert seconds < 1.0 and os.WTERMSIG(status) == signal.SIGKILL
    assert status_of(root)["waiting"] == 0


@pytest.mark.parametrize("name", ["stat", "truncate", "mkdir"])
def test_a_caught_signal_ends_it_soon(away: Cell, name: str) -> None:
    root = away.mountpoint("m1")
    pid = child(lambda: OPERATIONS[name](root))
    wait_for_waiting(root, 1)
    seconds, status = seconds_until_ended(pid, signal.SIGUSR1)
    assert SIGNAL_PATIENCE_S - 0.1 < seconds < SIGNAL_PATIENCE_S + 1.5
    assert os.waitstatus_to_exitcode(status) == errno.EINTR


def test_a_process_that_is_killed_after_it_caught_a_signal(away: Cell) -> None:
    root = away.mountpoint("m1")
    pid = child(lambda: OPERATIONS["stat"](root))
    wait_for_waiting(root, 1)
    os.kill(pid, signal.SIGUSR1)
    seconds, status = seconds_until_ended(pid, signal.SIGKILL)
    assert seconds < SIGNAL_PATIENCE_S - 0.2, "found out by looking"
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_what_was_written_is_stored_later(make_cell: MakeCell) -> None:
    """Only the child has the file open: a server started by who has it open would close it, and wait for itself."""
    cell = make_cell(2, mount_options=f"timeout={TIMEOUT_S}")
    root = cell.mountpoint("m1")
    says, hears = os.pipe(), os.pipe()

    def write_and_sync() -> None:
        descriptor = os.open(root / "f", os.O_RDWR | os.O_CREAT)
        os.pwrite(descriptor, b"written", 0)
        os.write(says[1], b"w")
        os.read(hears[0], 1)
        try:
            os.fsync(descriptor)
        except OSError as error:
            os.write(says[1], bytes([error.errno or 255]))
        os.read(hears[0], 1)

    pid = child(write_and_sync)
    assert os.read(says[0], 1) == b"w"
    cell.stop_server(kill=True)
    os.write(hears[1], b"s")
    deadline = time.monotonic() + 20
    while "fsync" not in status_of(root)["upcalls"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    os.kill(pid, signal.SIGUSR1)
    assert os.read(says[0], 1) == bytes([errno.EINTR])
    assert time.monotonic() - began < SIGNAL_PATIENCE_S + 1.5
    assert status_of(root)["dirty_bytes"] == 7
    cell.start_server()
    os.write(hears[1], b"e")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0  # its end is a close, which stores
    for descriptor in (*says, *hears):
        os.close(descriptor)
    assert (cell.mountpoint("m2") / "f").read_bytes() == b"written"
    assert status_of(root)["store_failures"] == 0


def test_a_change_that_may_have_been_made_is_not_given_up_by_who_might_repeat_it(make_cell: MakeCell) -> None:
    """A caught signal while the answer to an append is on its way: it is appended once, and write says so."""
    cell = make_cell(1, mount_options=f"timeout={TIMEOUT_S}")
    root = cell.mountpoint("m1")
    descriptor = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b"1")
    pid_of_server = cell.server_pid
    assert pid_of_server is not None
    os.kill(pid_of_server, signal.SIGSTOP)
    try:
        pid = child(lambda: os.write(descriptor, b"2"))
        wait_for_waiting(root, 1)
        os.kill(pid, signal.SIGUSR1)
        time.sleep(SIGNAL_PATIENCE_S + 0.5)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    finally:
        os.kill(pid_of_server, signal.SIGCONT)
    os.waitpid(pid, 0)
    os.close(descriptor)
    assert (root / "log").read_bytes() == b"12"
