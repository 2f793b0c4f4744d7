"""Locks when something fails: mounts that die or are cut off, servers that are killed and come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cell_lib import mounts
from promisefs_client.fuse.fuse_extension import SWITCH
from test_locks_on_mounts import Locker

if TYPE_CHECKING:
    from conftest import MakeCell, MakeNetworkCell

pytestmark = [
    pytest.mark.skipif(os.environ.get(SWITCH) == "off", reason="locks need the FUSE extension"),
    pytest.mark.limit_s(200),
]

LEASE_S = 2.0
LEASE = ("--lease", "2")
SLACK_S = 2.0
"""What anything may take longer than it should on a machine that is busy."""
COMES_BACK_S = 30.0
TURNS = 25
WORKER = """
import fcntl, os, struct, sys, time
path, inside, turns = sys.argv[1], sys.argv[2], int(sys.argv[3])
fd = os.open(path, os.O_RDWR)
for _ in range(turns):
    fcntl.lockf(fd, fcntl.LOCK_EX)
    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # of a local disk: fails if another holds the lock too
    (count,) = struct.unpack("q", os.pread(fd, 8, 0))
    time.sleep(0.01)
    os.pwrite(fd, struct.pack("q", count + 1), 0)
    os.unlink(inside)
    fcntl.lockf(fd, fcntl.LOCK_UN)
"""


def test_locks_of_a_mount_that_is_killed_pass_on_after_its_lease(make_cell: MakeCell) -> None:
    cell = make_cell(server_options=LEASE)
    with Locker(cell.mountpoint("m1") / "f") as a, Locker(cell.mountpoint("m2") / "f") as b:
        assert a.do("[lock(EX), flock(EX)]") == ["locked", "locked"]
        b.tell("[lock(EX), flock(EX)]")
        assert not b.has_answered(0.3)
        killed = cell.mounts.pop("m1")
        os.kill(killed.pid, signal.SIGKILL)
        assert b.answer(LEASE_S + SLACK_S) == ["locked", "locked"]
        mount = mounts.fuse_mount_at(killed.mountpoint)
        assert mount is not None
        mounts.force_unmount(mount)


@pytest.mark.allow_log(r"locks are lost")
def test_a_mount_that_does_not_run_loses_its_locks_and_finds_out(make_cell: MakeCell) -> None:
    cell = make_cell(server_options=LEASE)
    with Locker(cell.mountpoint("m1") / "f") as a, Locker(cell.mountpoint("m2") / "f") as b:
        assert a.do("lock(EX)") == "locked"
        b.tell("lock(EX)")
        assert not b.has_answered(0.2)
        stopped = cell.mounts["m1"].pid
        os.kill(stopped, signal.SIGSTOP)
        try:
            assert b.answer(LEASE_S + SLACK_S) == "locked"
            b.do("os.pwrite(fds['f'], b'b', 0)")
            a.tell("os.pwrite(fds['f'], b'a', 0)")
            time.sleep(0.2)
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert a.error(COMES_BACK_S) == "EIO"
        assert b.do("lock(UN)") == "locked"
        assert a.do("lock(UN)") == "locked" and a.do("lock(SH)") == "locked"
        assert a.do("os.pread(fds['f'], 1, 0)") == b"b"


@pytest.mark.allow_log(r"locks are lost", r"StoreData")
@pytest.mark.alone
def test_who_is_cut_off_loses_its_locks_and_knows(make_network_cell: MakeNetworkCell) -> None:
    cell = make_network_cell(server_options=LEASE, mount_options="timeout=20")
    path_a, path_b = (cell.mountpoint(name) / "f" for name in ("m1", "m2"))
    with Locker(path_a) as a, Locker(path_b) as b:
        assert a.do("lock(EX)") == "locked"
        a.do("os.pwrite(fds['f'], b'stored', 0)")
        a.do("os.fsync(fds['f'])")
        b.tell("lock(EX)")
        assert not b.has_answered(0.3)
        a.do("os.pwrite(fds['f'], b'late..', 0)")
        with cell.links["m1"].cut():
            began = time.monotonic()
            assert b.answer(LEASE_S + SLACK_S) == "locked"
            assert time.monotonic() - began > LEASE_S / 3, "a renewal is no older than that"
            a.tell("os.pwrite(fds['f'], b'more..', 0)")
            assert not a.has_answered(0.3), "it cannot be known whether the lock is still held"
            assert b.do("os.pread(fds['f'], 6, 0)") == b"stored"
            b.do("os.pwrite(fds['f'], b'other.', 0)")
            assert b.do("lock(UN)") == "locked"
        assert a.error(COMES_BACK_S) == "EIO"
        assert b.do("lock(SH)") == "locked" and b.do("os.pread(fds['f'], 6, 0)") == b"other."
        assert a.do("lock(SH)") == "EIO", "until it is unlocked"
        for io in ("os.fsync(fds['f'])", "os.ftruncate(fds['f'], 0)"):
            a.tell(io)
            assert a.error() == "EIO"
        assert a.do("lock(UN)") == "locked"
        a.tell("os.fsync(fds['f'])")
        assert a.error() == "EIO", "what was thrown away is told once"
        assert a.do("lock(SH)") == "locked"
        assert a.do("os.pread(fds['f'], 6, 0)") == b"other."


@pytest.mark.alone
def test_a_short_interruption_costs_no_lock(make_network_cell: MakeNetworkCell) -> None:
    cell = make_network_cell(server_options=("--lease", "10"))
    path_a, path_b = (cell.mountpoint(name) / "f" for name in ("m1", "m2"))
    with Locker(path_a) as a, Locker(path_b) as b:
        assert a.do("lock(EX)") == "locked"
        b.tell("lock(EX)")
        for name in ("m1", "m2"):
            with cell.links[name].resetting():
                time.sleep(0.5)
        time.sleep(1.5)
        assert not b.has_answered(0.1)
        a.do("os.pwrite(fds['f'], b'x', 0)")
        assert a.do("lock(UN)") == "locked"
        assert b.answer(COMES_BACK_S) == "locked"
        assert b.do("os.pread(fds['f'], 1, 0)") == b"x"


@pytest.mark.parametrize("kill", [True, False])
def test_over_restarts_no_lock_is_held_by_two_and_nobody_who_waits_is_forgotten(
    make_cell: MakeCell, tmp_path: Path, kill: bool
) -> None:
    cell = make_cell(mounts=4)
    (cell.mountpoint("m1") / "f").write_bytes(bytes(8))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, cell.mountpoint(f"m{n % 4 + 1}") / "f", tmp_path / "inside", str(TURNS)]
        )
        for n in range(8)
    ]
    try:
        for _ in range(3):
            time.sleep(1.5)
            cell.stop_server(kill=kill)
            time.sleep(0.3)
            cell.start_server()
        assert [worker.wait(120) for worker in workers] == [0] * 8
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    count = int.from_bytes((cell.mountpoint("m2") / "f").read_bytes(), sys.byteorder)
    assert count == 8 * TURNS
