"""Locks on real mounts: fcntl, open file descriptions and flock hold among processes of different mounts.

PROMISEFS_LOCK_ROUNDS in the environment says how often the counter test counts, instead of ROUNDS.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from asking import status_of
from outsider import Outsider
from promisefs_client.fuse.fuse_extension import SWITCH

if TYPE_CHECKING:
    from conftest import MakeCell, View

pytestmark = [
    pytest.mark.skipif(os.environ.get(SWITCH) == "off", reason="locks need the FUSE extension"),
    pytest.mark.limit_s(200),
]

ROUNDS = 400
LEASE_S = 2.0
LEASE = ("--lease", "2")
LOCKER = """
import errno, fcntl, signal, struct, threading, time
fds = {}
def open_file(path, name="f"):
    fds[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
def tried(function, *args):
    try:
        function(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "locked"
def lock(how, length=0, start=0, name="f"):
    return tried(fcntl.lockf, fds[name], how, length, start)
def flock(how, name="f"):
    return tried(fcntl.flock, fds[name], how)
def ofd(kind, start, length, wait=False, name="f"):
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    return tried(fcntl.fcntl, fds[name], command, struct.pack("hhqqi", kind, 0, start, length, 0))
def in_the_way(kind, start=0, length=0, name="f"):
    asked = struct.pack("hhqqi", kind, 0, start, length, 0)
    kind, _, start, length, pid = struct.unpack("hhqqi", fcntl.fcntl(fds[name], fcntl.F_GETLK, asked))
    return (kind, start, length, pid)
class Alarm(Exception):
    pass
def ring(*args):
    raise Alarm
def lock_for(seconds):
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    began = time.monotonic()
    try:
        fcntl.lockf(fds["f"], fcntl.LOCK_EX)
    except Alarm:
        return time.monotonic() - began
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "locked"
EX, SH, UN, NB = fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN, fcntl.LOCK_NB
RD, WR, NO = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
"""


class Locker(Outsider):
    """A process with the file open."""

    def __init__(self, path: Path) -> None:
        super().__init__(LOCKER)
        self.do(f"open_file({str(path)!r})")


# Sharing and exclusion


@pytest.mark.parametrize("function", ["lock", "flock"])
def test_sharing_exclusion_and_handover(cell: View, function: str) -> None:
    with Locker(cell.a / "f") as a, Locker(cell.b / "f") as b, Locker(cell.a / "f") as c:
        assert a.do(f"{function}(SH)") == b.do(f"{function}(SH)") == "locked"
        assert c.do(f"{function}(EX | NB)") == "EAGAIN"
        c.tell(f"{function}(EX)")
        assert not c.has_answered(0.3)
        assert a.do(f"{function}(UN)") == "locked"
        assert not c.has_answered(0.2)
        assert b.do(f"{function}(UN)") == "locked"
        assert c.answer(5) == "locked"
        assert [p.do(f"{function}(SH | NB)") for p in (a, b)] == ["EAGAIN"] * 2
        assert c.do(f"{function}(SH)") == "locked", "a downgrade"
        assert b.do(f"{function}(SH | NB)") == "locked"
        assert c.do(f"{function}(EX | NB)") == "EAGAIN"
        assert b.do(f"{function}(UN)") == "locked"
        assert c.do(f"{function}(EX | NB)") == "locked", "an upgrade"


def test_ranges_split_and_merge(cell: View) -> None:
    with Locker(cell.a / "f") as a, Locker(cell.b / "f") as b:
        assert a.do("lock(EX, 100, 0)") == "locked"
        assert a.do("lock(UN, 20, 40)") == "locked"
        assert b.do("lock(EX | NB, 20, 40)") == "locked"
        assert [b.do(f"lock(EX | NB, 1, {at})") for at in (39, 60, 99, 100)] == ["EAGAIN"] * 3 + ["locked"]
        assert a.do("in_the_way(WR, 30, 100)") == (1, 40, 20, 0), "another machine's process has no number here"
        assert a.do("lock(EX | NB, 20, 40)") == "EAGAIN"
        assert b.do("lock(UN, 20, 40)") == "locked"
        assert a.do("lock(SH, 60, 20)") == "locked"
        assert b.do("in_the_way(WR, 0, 1000)") == (1, 0, 20, 0)
        assert b.do("lock(SH | NB, 60, 20)") == "locked"
        assert b.do("lock(EX | NB, 0, 1000000)") == "locked", "to the end, however far"


def test_locks_of_open_file_descriptions(cell: View) -> None:
    with Locker(cell.a / "f") as a, Locker(cell.b / "f") as b:
        a.do(f"open_file({str(cell.a / 'f')!r}, 'g')")
        assert a.do("ofd(WR, 0, 10)") == "locked"
        assert a.do("ofd(WR, 5, 10, name='g')") == "EAGAIN", "another description, though one process"
        assert a.do("lock(SH | NB, 10, 0)") == "EAGAIN"
        b.tell("ofd(WR, 9, 1, True)")
        assert not b.has_answered(0.3)
        assert a.do("os.close(os.dup(fds['f']))") is None, "closing a descriptor ends no lock of the description"
        assert not b.has_answered(0.3)
        assert a.do("os.close(fds.pop('f'))") is None, "closing the last one does"
        assert b.answer(5) == "locked"


def test_closing_any_descriptor_ends_a_processs_locks(cell: View) -> None:
    with Locker(cell.a / "f") as a, Locker(cell.b / "f") as b:
        a.do(f"open_file({str(cell.a / 'f')!r}, 'g')")
        assert a.do("lock(EX)") == "locked" and a.do("flock(EX)") == "locked"
        assert b.do("lock(EX | NB)") == "EAGAIN"
        a.do("os.close(fds['g'])")
        assert b.do("lock(EX | NB)") == "locked"
        assert b.do("flock(SH | NB)") == "EAGAIN", "the description that was closed had no flock"


def test_a_process_that_dies_leaves_no_lock(cell: View) -> None:
    with Locker(cell.b / "f") as b:
        with Locker(cell.a / "f") as a:
            assert a.do("lock(EX)") == "locked" and a.do("flock(EX)") == "locked"
            b.tell("[lock(EX), flock(EX)]")
            assert not b.has_answered(0.3)
            os.kill(a.pid, signal.SIGKILL)
            assert b.answer(5) == ["locked", "locked"]


def test_a_circle_of_waiting_is_refused(cell: View) -> None:
    with Locker(cell.a / "f") as a, Locker(cell.b / "f") as b:
        a.do(f"open_file({str(cell.a / 'g')!r}, 'g')")
        b.do(f"open_file({str(cell.b / 'g')!r}, 'g')")
        assert a.do("lock(EX)") == "locked" and b.do("lock(EX, name='g')") == "locked"
        a.tell("lock(EX, name='g')")
        assert not a.has_answered(0.3)
        assert b.do("lock(EX)") == "EDEADLOCK"  # the same number
        assert b.do("lock(UN, name='g')") == "locked"
        assert a.answer(5) == "locked"


# Options


@pytest.mark.parametrize(("scope", "second"), [("cell", "EAGAIN"), ("local", "locked"), ("off", "ENOLCK")])
def test_among_whom_locks_hold(make_cell: MakeCell, scope: str, second: str) -> None:
    cell = make_cell(mount_options=f"locks={scope}")
    with Locker(cell.mountpoint("m1") / "f") as a, Locker(cell.mountpoint("m2") / "f") as b:
        first = "ENOLCK" if scope == "off" else "locked"
        assert a.do("[lock(EX | NB), flock(EX | NB)]") == [first] * 2
        assert b.do("[lock(EX | NB), flock(SH | NB)]") == [second] * 2
        told = status_of(cell.mountpoint("m1"))["locks"]
        assert told == {"scope": scope, "held": 2 if scope == "cell" else 0, "waiting": 0, "lost": 0}


# Signals


def test_a_signal_ends_a_wait(cell: View) -> None:
    with Locker(cell.a / "f") as a, Locker(cell.b / "f") as b:
        assert a.do("lock(EX)") == "locked"
        assert 0.3 <= b.do("lock_for(0.3)") < 3
        assert a.do("lock(UN)") == "locked"
        assert a.do("lock(EX | NB)") == "locked", "nothing was left of the request"


def test_a_killed_process_waits_no_longer(cell: View) -> None:
    with Locker(cell.a / "f") as a:
        assert a.do("lock(EX)") == "locked"
        with Locker(cell.b / "f") as b:
            b.tell("lock(EX)")
            assert not b.has_answered(0.3)
            os.kill(b.pid, signal.SIGKILL)
            assert b.has_died(5) == signal.SIGKILL
        assert a.do("lock(UN)") == "locked"
        assert a.do("lock(EX | NB)") == "locked"


# Data under a lock


COUNTER = """
import fcntl, mmap, os, struct, sys
path, times, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
fd = os.open(path, os.O_RDWR)
view = None if how == "written" else mmap.mmap(fd, mmap.PAGESIZE)
for _ in range(times):
    fcntl.lockf(fd, fcntl.LOCK_EX)
    if view is None:
        (count,) = struct.unpack("q", os.pread(fd, 8, 0))
        os.pwrite(fd, struct.pack("q", count + 1), 0)
    else:
        (count,) = struct.unpack("q", view[:8])
        view[:8] = struct.pack("q", count + 1)
        if how == "mapped":
            view.flush()
    fcntl.lockf(fd, fcntl.LOCK_UN)
"""


@pytest.mark.limit_s(float(os.environ.get("PROMISEFS_LOCK_LIMIT_S", "200")))
@pytest.mark.parametrize("how", ["written", "mapped", "both", "unsynced"])
def test_a_counter_is_exact(make_cell: MakeCell, how: str) -> None:
    """Eight processes on four mounts. "mapped" with msync, "unsynced" without: a release has the pages written back."""
    rounds = int(os.environ.get("PROMISEFS_LOCK_ROUNDS", ROUNDS)) // 8 * 8
    running = make_cell(mounts=4)
    (running.mountpoint("m1") / "counter").write_bytes(bytes(4096))
    began = time.monotonic()
    counters = []
    for number in range(8):
        mode = how if how != "both" else ("written", "mapped")[number // 4]
        path = running.mountpoint(f"m{number % 4 + 1}") / "counter"
        counters.append(subprocess.Popen([sys.executable, "-c", COUNTER, path, str(rounds // 8), mode]))
    assert [counter.wait() for counter in counters] == [0] * 8
    print(f"{how}: {rounds} in {time.monotonic() - began:.1f} s")
    for number in range(1, 5):
        found = (running.mountpoint(f"m{number}") / "counter").read_bytes()[:8]
        assert int.from_bytes(found, sys.byteorder) == rounds
