"""Networks that fail: mounts that are cut off both ways or one way, for longer or shorter than their lease.

A writer waits for a mount that is cut off, one lease at most. When its fsync has returned, nothing on the other side
shows the old bytes any more: what was mapped there is gone, and who looks waits for the server, up to `timeout`.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from asking import status_of
from cell_lib import mounts, processes
from cell_lib.cell import COMMANDS
from network import NetworkCell, NetworkError
from outsider import Outsider
from test_mmap import assert_followed, reading, write
from torture_lib.run import run_torture

if TYPE_CHECKING:
    from conftest import MakeNetworkCell

PAGE = mmap.PAGESIZE
LEASE_S = 2.0
LEASE = ("--lease", "2")
SLACK_S = 1.0
"""What anything may take longer than it should on a machine that is busy."""
COMES_BACK_S = 20.0
"""From the end of a fault until all is well: TCP and the session wait longer from try to try."""

pytestmark = pytest.mark.limit_s(150)


@contextmanager
def took(least_s: float, most_s: float) -> Iterator[None]:
    began_s = time.monotonic()
    yield
    took_s = time.monotonic() - began_s
    assert least_s <= took_s <= most_s, f"took {took_s:.2f} s, not {least_s:g} to {most_s:g} s"


def wait_until_same(reader: Outsider, expression: str, value: object) -> None:
    deadline = time.monotonic() + COMES_BACK_S
    while (seen := reader.do(expression)) != value:
        assert time.monotonic() < deadline, f"{expression} is {seen!r} and not {value!r} after {COMES_BACK_S:g} s"
        time.sleep(0.02)


# Cut off for longer than the lease


def test_a_mapping_that_is_cut_off_never_shows_what_was_overwritten(
    make_network_cell: MakeNetworkCell, mmap_program: Path, tmp_path: Path
) -> None:
    """The reader looks all the time. It is cut off, then another mount stores: it waits at most one lease."""
    cell = make_network_cell(server_options=LEASE)
    path_a, path_b = cell.mountpoint("m1") / "page", cell.mountpoint("m2") / "page"
    path_a.write_bytes(bytes(PAGE))
    rng = random.Random(1)
    with reading(mmap_program, path_b, tmp_path / "out", "-t", "-c", "-i", "0.2") as reader:
        reader.wait_for(0)
        written = write(mmap_program, path_a, 3)
        for direction in ("both", "from", "to"):
            reader.wait_for(written[-1].byte)
            time.sleep(rng.random() * LEASE_S / 3)  # anywhere between two renewals
            with cell.links["m2"].cut(direction):
                with took(0.05, LEASE_S + SLACK_S):
                    written += write(mmap_program, path_a, 1)
                with took(0.0, SLACK_S):
                    written += write(mmap_program, path_a, 3)  # the lease is over: nobody waits for it any more
                time.sleep(0.5)
            reader.wait_for(written[-1].byte, COMES_BACK_S)
            written += write(mmap_program, path_a, 3)
        reader.wait_for(written[-1].byte)
        assert_followed(written, reader.seen())


def test_who_is_cut_off_waits_and_then_gets_errors(make_network_cell: MakeNetworkCell) -> None:
    cell = make_network_cell(server_options=LEASE, mount_options="timeout=3")
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    (a / "f").write_bytes(b"old".ljust(PAGE, b"."))
    with Outsider() as reader, Outsider() as mapper, Outsider() as writer:
        for process in (reader, mapper):
            process.do(f"(fd := os.open({str(b / 'f')!r}, os.O_RDWR))")
            process.do(f"(mapping := mmap.mmap(fd, {PAGE})) and None")
            assert process.do("mapping[:3]") == b"old"
        writer.do(f"(fd := os.open({str(b / 'dirty')!r}, os.O_RDWR | os.O_CREAT))")
        writer.do("os.fsync(fd)")
        with cell.links["m2"].cut():
            writer.do("os.pwrite(fd, b'kept', 0)")
            with took(0.05, LEASE_S + SLACK_S):
                (a / "f").write_bytes(b"new")
            with took(1.0, 3.0 + SLACK_S):
                reader.tell("os.pread(fd, 3, 0)")
                mapper.tell("mapping[:3]")
                writer.tell("os.fsync(fd)")
                assert reader.error() == "ETIMEDOUT"
                assert writer.error() == "ETIMEDOUT"
            # The kernel tries up to three times to get a page that is needed for a mapping.
            assert mapper.has_died(2 * 3.0 + SLACK_S) == signal.SIGBUS
        wait_until_same(reader, "os.fstat(fd).st_size", 3)
        assert reader.do("os.pread(fd, 100, 0)") == b"new"
        writer.do("os.fsync(fd)")
        assert (a / "dirty").read_bytes() == b"kept"


def test_a_mount_that_is_cut_off_and_dies_is_waited_for_only_once(make_network_cell: MakeNetworkCell) -> None:
    """Its connections stay half open at the server: nothing ever says that they have ended."""
    cell = make_network_cell(mounts=3, server_options=LEASE)
    a, b, c = (cell.mountpoint(name) for name in ("m1", "m2", "m3"))
    (a / "f").write_bytes(b"0")
    for view in (a, b, c):
        assert (view / "f").read_bytes() == b"0"
        assert os.listdir(view) == ["f"]
    killed = cell.mounts.pop("m2")
    with cell.links["m2"].cut():
        os.kill(killed.pid, signal.SIGKILL)
        assert processes.wait_until_gone(f"{cell.mark}/m2", 10) == []
        try:
            with took(0.05, LEASE_S + SLACK_S):
                (a / "f").write_bytes(b"1")
            assert (c / "f").read_bytes() == b"1"
            with took(0.0, SLACK_S):
                for number in range(20):
                    (a / "f").write_bytes(b"%d" % number)
                    assert (c / "f").read_bytes() == b"%d" % number
        finally:
            mounts.force_unmount(mounts.FuseMount(killed.mountpoint, killed.connection, "fuse.promisefs"))


def test_a_server_that_was_restarted_behind_half_open_connections(make_network_cell: MakeNetworkCell) -> None:
    """The mount cannot see that its server went: its connections stand until it sends something."""
    cell = make_network_cell(server_options=LEASE)
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    (a / "f").write_bytes(b"old".ljust(PAGE, b"."))
    with Outsider() as reader:
        reader.do(f"(fd := os.open({str(b / 'f')!r}, os.O_RDONLY))")
        reader.do(f"(mapping := mmap.mmap(fd, {PAGE}, prot=mmap.PROT_READ)) and None")
        assert reader.do("mapping[:3]") == b"old"
        with cell.links["m2"].cut():
            cell.stop_server(kill=True)
            cell.start_server(*LEASE)
            with took(0.0, LEASE_S + SLACK_S + COMES_BACK_S):
                with open(a / "f", "r+b") as file:
                    file.write(b"new")
            reader.tell("mapping[:3]")
            assert not reader.has_answered(0.5), "it cannot know"
        assert reader.answer(COMES_BACK_S) == b"new"


# Cut off for less than the lease


def test_a_fault_that_is_shorter_than_the_lease_costs_nothing(make_network_cell: MakeNetworkCell) -> None:
    """Nothing is dropped, by nobody: the same promises, the same pages, no question to the server."""
    cell = make_network_cell(server_options=("--lease", "8"))
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    link = cell.links["m2"]
    (a / "f").write_bytes(b"x" * PAGE)
    with Outsider() as reader:
        reader.do(f"(fd := os.open({str(b / 'f')!r}, os.O_RDONLY))")
        reader.do(f"(mapping := mmap.mmap(fd, {PAGE}, prot=mmap.PROT_READ)) and None")
        look = f"(mapping[0], os.pread(fd, 1, 0), os.stat({str(b / 'f')!r}).st_size, os.listdir({str(b)!r}))"

        def look_for(seconds: float) -> None:
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s:
                assert reader.do(look) == (ord("x"), b"x", PAGE, ["f"])
                time.sleep(0.1)

        look_for(0.3)
        before = status_of(b)
        for fault in ("both", "from", "to", "reset"):
            with link.resetting() if fault == "reset" else link.cut(fault):
                look_for(3.0)  # a renewal meets it: there is one every third of a lease
            look_for(2.5)  # it goes through now, on a new connection after resets
        after = status_of(b)
        assert (after["breaks"], after["resets"]) == (before["breaks"], before["resets"])
        assert after["upcalls"].get("read") == before["upcalls"].get("read"), "pages were dropped"
        assert after["rpcs"] == before["rpcs"], "the server was asked again"
        assert after["leases_lost"] == 0
        assert after["servers"][0]["connects"] > before["servers"][0]["connects"]
        # And it still is told.
        (a / "f").write_bytes(b"y" * PAGE)
        assert reader.do("mapping[0]") == ord("y")


def test_a_writer_waits_for_the_end_of_a_short_cut(make_network_cell: MakeNetworkCell) -> None:
    """The break arrives late and is acknowledged: the mount goes on as before, other files cost it nothing."""
    cell = make_network_cell(server_options=("--lease", "10"))
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    for name in ("f", "other"):
        (a / name).write_bytes(b"old".ljust(PAGE, b"."))
    with Outsider() as reader, Outsider() as writer:
        for name in ("f", "other"):
            reader.do(f"({name} := mmap.mmap(os.open({str(b / name)!r}, os.O_RDONLY), {PAGE}, prot=1)) and None")
            assert reader.do(f"{name}[:3]") == b"old"
        writer.do(f"(fd := os.open({str(a / 'f')!r}, os.O_RDWR))")
        resets = status_of(b)["resets"]
        reads = status_of(b)["upcalls"]["read"]
        with cell.links["m2"].cut():
            writer.do("os.pwrite(fd, b'new', 0)")
            writer.tell("os.fsync(fd)")
            assert not writer.has_answered(1.5)
            assert reader.do("f[:3]") == b"old", "it was promised that"
        writer.answer(8)
        assert reader.do("f[:3]") == b"new"
        assert reader.do("other[:3]") == b"old"
        state = status_of(b)
        assert (state["resets"], state["upcalls"]["read"]) == (resets, reads + 1)


# Mounting


def mount_by_command(cell: NetworkCell, name: str) -> tuple[int, str]:
    """Try to mount once more from a namespace. Return status and output."""
    mountpoint = cell.directory / "another"
    mountpoint.mkdir()
    done = subprocess.run(
        [*cell.prefix_for(name), COMMANDS / "promisefs", "mount", cell.address_for(name), mountpoint],
        env=processes.environment(f"{cell.mark}/another"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert processes.wait_until_gone(f"{cell.mark}/another", 5) == []
    assert mounts.fuse_mount_at(mountpoint) is None
    mountpoint.rmdir()
    return done.returncode, done.stdout + done.stderr


def test_mounting_an_unreachable_server_fails_in_time(make_network_cell: MakeNetworkCell) -> None:
    cell = make_network_cell(mounts=1)
    with cell.links["m1"].cut(), took(0.0, 25.0):
        status, output = mount_by_command(cell, "m1")
    assert status == 4, output
    assert len(output.splitlines()) == 1 and cell.address_for("m1") in output, output


def test_mounting_a_server_that_accepts_and_says_nothing_fails_in_time(make_network_cell: MakeNetworkCell) -> None:
    cell = make_network_cell(mounts=1)
    assert cell.server_pid is not None
    # nsenter has become the server: a process that enters no pid namespace does not fork.
    os.kill(cell.server_pid, signal.SIGSTOP)
    try:
        with took(1.0, 25.0):
            status, output = mount_by_command(cell, "m1")
    finally:
        os.kill(cell.server_pid, signal.SIGCONT)
    assert status == 4, output
    assert len(output.splitlines()) == 1 and cell.address_for("m1") in output, output


# Bad networks


def test_nothing_is_stale_where_packets_get_lost(make_network_cell: MakeNetworkCell, tmp_path: Path) -> None:
    cell = make_network_cell(server_options=LEASE)
    with cell.links["m1"].losing(5), cell.links["m2"].losing(15):
        tally = run_torture([cell.mountpoint(name) for name in ("m1", "m2")], tmp_path, seconds=8.0)
    assert tally.failures == []
    assert tally.judged >= 200


def test_nothing_is_stale_where_packets_are_late_and_overtake_each_other(
    make_network_cell: MakeNetworkCell, tmp_path: Path
) -> None:
    cell = make_network_cell(server_options=LEASE)
    try:
        with cell.links["m1"].delaying(5, 3), cell.links["m2"].delaying(30, 25):
            tally = run_torture([cell.mountpoint(name) for name in ("m1", "m2")], tmp_path, seconds=8.0)
    except NetworkError as problem:
        pytest.skip(f"no delays: {problem}")  # netem is a module that not every kernel has
    assert tally.failures == []
    assert tally.judged >= 100


def test_nothing_is_stale_while_a_mount_is_cut_off_again_and_again(
    make_network_cell: MakeNetworkCell, tmp_path: Path
) -> None:
    """For longer and for shorter than the lease, in all directions, while all is being changed."""
    cell = make_network_cell(server_options=("--lease", "1"))
    rng = random.Random(4)
    faults: list[str] = []
    end_s = time.monotonic() + 14

    def cut_now_and_then(judged: int, failed: int) -> None:
        if time.monotonic() < end_s and rng.random() < 0.3:
            faults.append(rng.choice(["both", "from", "to", "reset"]))
            link = cell.links[rng.choice(["m1", "m2"])]
            with link.resetting() if faults[-1] == "reset" else link.cut(faults[-1]):
                time.sleep(rng.choice([0.1, 0.3, 0.6, 1.2, 2.0]))

    views = [cell.mountpoint(name) for name in ("m1", "m2")]
    tally = run_torture(views, tmp_path, seconds=18.0, on_progress=cut_now_and_then)
    assert tally.failures == []
    assert len(faults) >= 3
    assert tally.judged >= 200
