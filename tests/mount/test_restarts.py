"""Server and clients that stop, are killed and come back: nothing that was promised is lost, nothing happens twice."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from asking import status_of
from cell_lib import mounts, processes
from cell_lib.cell import Cell
from outsider import Outsider

if TYPE_CHECKING:
    from conftest import MakeCell

PAGE = mmap.PAGESIZE
LEASE_S = 2.0
LEASE = ("--lease", "2")
PROMPT_S = 1.0
"""Without anything to wait for, an operation takes milliseconds."""


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {limit_s:g} s"
        time.sleep(0.02)


def data_files(cell: Cell) -> int:
    return sum(path.is_file() for path in (cell.store / "data").rglob("*"))


def restart(cell: Cell, *, kill: bool) -> None:
    cell.stop_server(kill=kill)
    cell.start_server(*LEASE)


def open_for_writing(path: Path) -> str:
    return f"(fd := os.open({str(path)!r}, os.O_RDWR | os.O_CREAT, 0o644))"


# The server is killed


def test_a_killed_server_loses_nothing_and_delays_the_rest(make_cell: MakeCell) -> None:
    cell = make_cell(server_options=LEASE)
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    rng = random.Random(1)
    contents = {f"{kind}{i}": rng.randbytes(rng.choice([1, 5000, 700_000])) for kind in "scd" for i in range(4)}
    for name in ("moved", "removed"):
        (a / name).write_bytes(name.encode())
    for name in ("parent1", "parent2", "parent3", "parent4"):
        (a / name).mkdir()
    with ExitStack() as stack:
        holders: list[Outsider] = []
        for name, content in contents.items():
            holder = stack.enter_context(Outsider())
            holder.do(open_for_writing(a / name))
            holder.do(f"os.pwrite(fd, {content!r}, 0)")
            if name.startswith("s"):
                holder.do("os.fsync(fd)")
            if name.startswith("c"):
                holder.do("os.close(fd)")
            else:
                holders.append(holder)  # s: synced and open; d: open and dirty
        cell.stop_server(kill=True)
        waiting = [stack.enter_context(Outsider()) for _ in range(6)]
        waiting[0].tell(f"os.mkdir({str(a / 'parent1/made')!r})")
        waiting[1].tell(f"os.rename({str(a / 'moved')!r}, {str(a / 'parent2/moved')!r})")
        waiting[2].tell(f"os.unlink({str(b / 'removed')!r})")
        waiting[3].tell(f"os.close(os.open({str(b / 'parent3/new')!r}, os.O_CREAT | os.O_EXCL | os.O_WRONLY))")
        waiting[4].tell(f"os.symlink('target', {str(b / 'parent4/link')!r})")
        waiting[5].tell("1")
        holders[-1].tell("os.fsync(fd)")
        time.sleep(0.7)
        assert [process.has_answered() for process in waiting] == [False] * 5 + [True]
        assert not holders[-1].has_answered()
        cell.start_server(*LEASE)
        assert [process.error(15) for process in waiting] == ["none"] * 6
        assert holders[-1].error(15) == "none"
        for view in (a, b):
            for name, content in contents.items():
                if not name.startswith("d"):
                    assert (view / name).read_bytes() == content, name
            assert os.listdir(view / "parent1") == ["made"]
            assert os.listdir(view / "parent2") == ["moved"]
            assert os.listdir(view / "parent3") == ["new"]
            assert os.readlink(view / "parent4/link") == "target"
            assert not (view / "moved").exists()
            assert not (view / "removed").exists()
        assert (b / f"d{3}").read_bytes() == contents["d3"]  # its fsync began while the server was away
        # The others are stored in time, nobody closes or syncs them.
        for name in ("d0", "d1", "d2"):
            wait_until(lambda name=name: (b / name).read_bytes() == contents[name], f"{name} is stored")  # type: ignore[misc]


def test_a_change_whose_reply_was_lost_is_not_made_again(make_cell: MakeCell) -> None:
    """The server has made the changes and waits for the other mount, which is stopped, when it is killed."""
    cell = make_cell(server_options=("--lease", "4"))
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    for number in range(7):
        (a / f"d{number}").mkdir()
        (a / f"d{number}/old").write_bytes(b"old")
        assert os.listdir(b / f"d{number}") == ["old"]
    (a / "d6/sub").mkdir()
    assert sorted(os.listdir(b / "d6")) == ["old", "sub"]
    changes = [
        f"os.close(os.open({str(a / 'd0/new')!r}, os.O_CREAT | os.O_EXCL | os.O_WRONLY))",
        f"os.mkdir({str(a / 'd1/new')!r})",
        f"os.rename({str(a / 'd2/old')!r}, {str(a / 'd2/new')!r})",
        f"os.unlink({str(a / 'd3/old')!r})",
        f"os.symlink('target', {str(a / 'd4/new')!r})",
        f"os.link({str(a / 'd5/old')!r}, {str(a / 'd5/new')!r})",
        f"os.rmdir({str(a / 'd6/sub')!r})",
    ]
    listings = [["new", "old"], ["new", "old"], ["new"], [], ["new", "old"], ["new", "old"], ["old"]]
    with ExitStack() as stack:
        changers = [stack.enter_context(Outsider()) for _ in changes]
        for changer in changers:
            changer.do("0")
        os.kill(cell.mounts["m2"].pid, signal.SIGSTOP)
        try:
            for changer, change in zip(changers, changes, strict=True):
                changer.tell(change)
            time.sleep(0.7)
            assert not any(changer.has_answered() for changer in changers), "the other mount was not asked"
            cell.stop_server(kill=True)
            cell.start_server("--lease", "4")
        finally:
            os.kill(cell.mounts["m2"].pid, signal.SIGCONT)
        assert [changer.error(15) for changer in changers] == ["none"] * len(changes)
    for view in (a, b):
        assert [sorted(os.listdir(view / f"d{number}")) for number in range(7)] == listings


STREAM = """
def names(path, seconds):
    i = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        d = f"{path}/{i}"
        os.mkdir(d)
        fd = os.open(d + "/a", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(fd, b"%d" % i)
        os.close(fd)
        os.rename(d + "/a", d + "/b")
        os.link(d + "/b", d + "/c")
        os.symlink("elsewhere", d + "/s")
        os.unlink(d + "/b")
        os.mkdir(d + "/e")
        os.rename(d + "/c", d + "/d")
        os.rmdir(d + "/e")
        i += 1
    return i

def records(path, seconds):
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    i = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        os.write(fd, b"%08d" % i)
        (os.fsync if i % 2 else os.fdatasync)(fd)
        i += 1
    os.close(fd)
    return i
"""


def test_changes_of_names_happen_once_though_the_server_is_killed_again_and_again(make_cell: MakeCell) -> None:
    """A change that was made before the kill, and whose reply was lost, is asked for again: no EEXIST, no ENOENT."""
    cell = make_cell(server_options=("--lease", "1"))
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    rng = random.Random(2)
    seconds = 4.0
    with ExitStack() as stack:
        streams = {}
        for number in range(4):
            folder = (a, b)[number % 2] / f"stream{number}"
            folder.mkdir()
            streams[folder] = stack.enter_context(Outsider(STREAM))
            streams[folder].tell(f"names({str(folder)!r}, {seconds})")
        writer = stack.enter_context(Outsider(STREAM))
        writer.tell(f"records({str(a / 'records')!r}, {seconds})")
        end = time.monotonic() + seconds - 1
        kills = 0
        while time.monotonic() < end:
            time.sleep(0.3 + rng.random() * 0.4)
            cell.stop_server(kill=True)
            kills += 1
            cell.start_server("--lease", "1")
        counts = {folder: stream.answer(30) for folder, stream in streams.items()}
        written = writer.answer(30)
    assert kills >= 2
    assert isinstance(written, int)
    for view in (a, b):
        for folder, count in counts.items():
            assert isinstance(count, int)
            assert count > 5
            assert sorted(os.listdir(view / folder.name)) == sorted(str(i) for i in range(count))
            for i in range(count):
                inside = view / folder.name / str(i)
                assert sorted(os.listdir(inside)) == ["d", "s"]
                assert (inside / "d").read_bytes() == b"%d" % i
                assert os.stat(inside / "d").st_nlink == 1
                assert os.stat(inside).st_nlink == 2
        assert (view / "records").read_bytes() == b"".join(b"%08d" % i for i in range(written))


def test_timeout_bounds_the_wait_and_keeps_what_is_dirty(make_cell: MakeCell) -> None:
    # With `posix` the kernel looks at the root's attributes first; lookups in it would wait one after the other.
    cell = make_cell(server_options=("--lease", "1"), mount_options="timeout=2,posix")
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    for name in ("d1", "d2", "d3", "d4", "d5", "d6"):
        (a / name).mkdir()
    (a / "d3/cached").write_bytes(b"cached")
    assert (a / "d3/cached").read_bytes() == b"cached"
    with ExitStack() as stack:
        holder = stack.enter_context(Outsider())
        holder.do(open_for_writing(a / "f"))
        holder.do("os.pwrite(fd, b'synced', 0)")
        holder.do("os.fsync(fd)")
        cell.stop_server(kill=True)
        holder.do("os.pwrite(fd, b'dirty!', 6)")
        time.sleep(1.2)  # the lease is over: what is cached may be stale
        expressions = [
            f"os.mkdir({str(a / 'd1/new')!r})",
            f"os.stat({str(a / 'd2/missing')!r})",
            f"open({str(a / 'd3/cached')!r}).read()",
            f"os.listdir({str(a / 'd4')!r})",
            f"os.open({str(a / 'd5/new')!r}, os.O_CREAT | os.O_EXCL | os.O_WRONLY)",
            f"os.chmod({str(a / 'd6')!r}, 0o700)",
        ]
        askers = [stack.enter_context(Outsider()) for _ in expressions]
        for asker in askers:
            asker.do("0")  # it is there
        start = time.monotonic()
        for asker, expression in zip(askers, expressions, strict=True):
            asker.tell(expression)
        holder.tell("os.fsync(fd)")
        for asker, expression in zip([*askers, holder], [*expressions, "fsync"], strict=True):
            assert asker.error(10) == "ETIMEDOUT", expression
            assert 1.5 < time.monotonic() - start < 6, f"{expression}: after {time.monotonic() - start:.1f} s"
        assert holder.do("os.pwrite(fd, b'more', 12)") == 4
        cell.start_server("--lease", "1")
        wait_until(lambda: (b / "f").read_bytes() == b"synceddirty!more", "what was dirty is stored")
        holder.do("os.close(fd)")
        assert (a / "f").read_bytes() == b"synceddirty!more"
        (a / "d1/new").mkdir()  # it was never made
        assert (a / "d3/cached").read_bytes() == b"cached"


def test_a_read_in_flight_does_not_keep_a_mount_from_reconnecting(make_cell: MakeCell) -> None:
    """The server waits for InitCallBackState3, that for the kernel, and the kernel for a READ, which needs the server.

    An acknowledgement as late as `ack_wait` allows here would come after the lease, and that is none.
    """
    lease = ("--lease", "1")
    cell = make_cell(server_options=lease, mount_options="ack_wait=3")
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    content = os.urandom(400 * PAGE)
    (a / "f").write_bytes(content)
    with Outsider() as reader:
        reader.do(f"(fd := os.open({str(b / 'f')!r}, os.O_RDONLY))")
        # Through a mapping: a read would ask for the file's size first.
        reader.do(f"(mapping := mmap.mmap(fd, {len(content)}, prot=mmap.PROT_READ)) and None")
        cell.stop_server(kill=True)
        time.sleep(1.2)  # the lease has ended
        reader.tell(f"mapping[{300 * PAGE}:{301 * PAGE}]")
        time.sleep(0.3)
        assert not reader.has_answered()
        cell.start_server(*lease)
        assert reader.answer(8) == content[300 * PAGE : 301 * PAGE]
        assert status_of(b)["early_acks"] >= 1, "what was not waited for is counted"


# A file without a name, and restarts


@pytest.mark.parametrize("kill", [False, True], ids=["clean", "killed"])
def test_an_open_file_without_a_name_survives_a_restart(make_cell: MakeCell, kill: bool) -> None:
    cell = make_cell(server_options=LEASE)
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    content = os.urandom(300 * PAGE)
    (b / "other").write_bytes(b"other")
    with ExitStack() as stack:
        openers = [stack.enter_context(Outsider()) for _ in range(2)]
        for name, opener in zip(("unlinked", "replaced"), openers, strict=True):
            (b / name).write_bytes(content)
            opener.do(open_for_writing(a / name))
            opener.do(f"(mapping := mmap.mmap(fd, {len(content)})) and None")
        os.unlink(b / "unlinked")
        os.rename(b / "other", b / "replaced")
        restart(cell, kill=kill)
        for opener in openers:
            assert opener.do("os.fstat(fd).st_nlink") == 0
            assert opener.do(f"os.pread(fd, {len(content)}, 0)") == content
            assert opener.do(f"mapping[{200 * PAGE}:{201 * PAGE}]") == content[200 * PAGE : 201 * PAGE]
            opener.do("os.pwrite(fd, b'written', 5)")
            opener.do("os.fsync(fd)")
            opener.do("mapping.__setitem__(1, 77)")
            opener.do("mapping.flush()")
            opener.do(f"os.ftruncate(fd, {len(content) + 10})")
            assert opener.do(f"os.pread(fd, 20, {len(content) - 4})") == content[-4:] + bytes(10)
            assert opener.do("mmap.mmap(fd, 12)[:]") == content[:1] + b"M" + content[2:5] + b"written"
        assert data_files(cell) == 3
    wait_until(lambda: data_files(cell) == 1, "two data files are gone")
    for view in (a, b):
        assert os.listdir(view) == ["replaced"]
        assert (view / "replaced").read_bytes() == b"other"


def test_a_file_without_a_name_that_is_closed_while_the_server_is_away(make_cell: MakeCell) -> None:
    cell = make_cell(server_options=LEASE)
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    (a / "f").write_bytes(b"f")
    with Outsider() as opener:
        opener.do(open_for_writing(a / "f"))
        os.unlink(b / "f")
        assert opener.do("os.pread(fd, 5, 0)") == b"f"
        cell.stop_server(kill=True)
    cell.start_server(*LEASE)
    wait_until(lambda: data_files(cell) == 0, "the data file is gone")


# Clients end


def unstored(cell: Cell, path: Path) -> bytes:
    """Leave a closed file whose bytes the server has not got. Its mount has a short timeout; the server runs again."""
    content = os.urandom(200_000)
    with Outsider() as writer:
        writer.do(open_for_writing(path))
        writer.do(f"os.pwrite(fd, {content!r}, 0)")
        cell.stop_server(kill=True)
        writer.tell("os.close(fd)")
        assert writer.error() == "ETIMEDOUT"
    time.sleep(1.5)  # the release, which nobody waits for, tries once more
    cell.start_server(*LEASE)
    return content


def wait_for_end_of_mount(cell: Cell, name: str) -> None:
    mark = f"{cell.mark}/{name}"
    wait_until(lambda: not processes.marked(mark), "the mount's process has ended")
    assert mounts.fuse_mount_at(cell.mountpoint(name)) is None


def test_sigterm_stores_what_open_files_hold(make_cell: MakeCell) -> None:
    cell = make_cell()
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    content = os.urandom(3_000_000)
    with Outsider() as writer:
        writer.do(open_for_writing(a / "f"))
        writer.do(f"os.pwrite(fd, {content!r}, 100)")
        os.kill(cell.mounts["m1"].pid, signal.SIGTERM)
        wait_for_end_of_mount(cell, "m1")
    assert (b / "f").read_bytes() == bytes(100) + content


def test_sigterm_stores_what_mappings_hold(make_cell: MakeCell) -> None:
    cell = make_cell()
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    (a / "f").write_bytes(bytes(PAGE))
    with Outsider() as writer:
        writer.do(open_for_writing(a / "f"))
        writer.do(f"(mapping := mmap.mmap(fd, {PAGE})) and None")
        writer.do("mapping.__setitem__(0, 9)")
        os.kill(cell.mounts["m1"].pid, signal.SIGTERM)
        wait_for_end_of_mount(cell, "m1")
    assert (b / "f").read_bytes()[0] == 9


@pytest.mark.allow_log(r"fuse_release\(\): fuse_reply_\* failed")  # umount does not wait for a release that stores
@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_the_end_of_a_mount_stores_what_could_not_be_stored_before(make_cell: MakeCell, how: str) -> None:
    cell = make_cell(server_options=LEASE, mount_options="timeout=1")
    content = unstored(cell, cell.mountpoint("m1") / "f")
    # At its end it tries for `timeout`, a second here: on a busy machine it takes as long to find the server.
    wait_until(lambda: status_of(cell.mountpoint("m1"))["connected"], "the server is found")
    if how == "SIGTERM":
        os.kill(cell.mounts["m1"].pid, signal.SIGTERM)
    else:
        command = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
        subprocess.run([*command, cell.mountpoint("m1")], check=True, timeout=20)
    wait_for_end_of_mount(cell, "m1")
    assert (cell.mountpoint("m2") / "f").read_bytes() == content


def test_a_killed_client_holds_others_up_for_one_lease_at_most(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=3, server_options=LEASE)
    a, b, c = (cell.mountpoint(name) for name in ("m1", "m2", "m3"))
    for view in (a, b, c):
        (a / "f").write_bytes(b"before")
        assert (view / "f").read_bytes() == b"before"
        assert os.listdir(view) == ["f"]
    killed = cell.mounts.pop("m1")
    os.kill(killed.pid, signal.SIGKILL)
    try:
        start = time.monotonic()
        (b / "f").write_bytes(b"after!")
        (b / "g").write_bytes(b"new")
        os.rename(b / "g", b / "h")
        waited_s = time.monotonic() - start
        assert waited_s < LEASE_S + PROMPT_S, f"waited {waited_s:.1f} s"
        assert (c / "f").read_bytes() == b"after!"
        assert sorted(os.listdir(c)) == ["f", "h"]
        time.sleep(max(0.0, LEASE_S + 0.2 - waited_s))
        start = time.monotonic()
        for number in range(20):
            (b / "f").write_bytes(b"%d" % number)
            assert (c / "f").read_bytes() == b"%d" % number
        assert time.monotonic() - start < PROMPT_S, "the dead client still counts"
    finally:
        mounts.force_unmount(mounts.FuseMount(killed.mountpoint, killed.connection, "fuse.promisefs"))


def test_a_stopped_client_holds_others_up_for_one_lease_and_follows_when_it_goes_on(make_cell: MakeCell) -> None:
    """SIGSTOP: its connection stands, but it does not answer."""
    cell = make_cell(server_options=LEASE)
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    (a / "f").write_bytes(b"before")
    assert (b / "f").read_bytes() == b"before"
    pid = cell.mounts["m2"].pid
    with Outsider() as reader:
        reader.do(f"(fd := os.open({str(b / 'f')!r}, os.O_RDONLY))")
        os.kill(pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            (a / "f").write_bytes(b"after!")
            waited_s = time.monotonic() - start
            assert waited_s < LEASE_S + PROMPT_S, f"waited {waited_s:.1f} s"
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: reader.do("os.pread(fd, 10, 0)") == b"after!", "the stopped mount follows", PROMPT_S)
        assert (b / "f").read_bytes() == b"after!"
        (b / "f").write_bytes(b"again!")
        assert (a / "f").read_bytes() == b"again!"
