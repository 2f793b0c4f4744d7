"""A cell of two servers, joined by a mount point: what looks like one tree, and how little one server's end touches it.

The volume root is on server 0, the volume atlas on server 1, and hangs at /atlas.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from asking import status_of
from cell_lib.cell import Cell, CellError
from outsider import Outsider
from promisefs_client.commands.mounts import fusectl
from promisefs_client.fuse.fuse_extension import SWITCH

if TYPE_CHECKING:
    from conftest import MakeCell

PAGE = mmap.PAGESIZE
LEASE_S = 2.0
LEASE = ("--lease", "2")
PROMPT_S = 1.0
"""Without anything to wait for, an operation takes milliseconds."""

MAPPER = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
mappings = {}
def map_file(path):
    fd = os.open(path, os.O_RDWR)
    mappings[path] = mmap.mmap(fd, mmap.PAGESIZE)
    os.close(fd)
    return mappings[path][0]
def resident(path):
    found = ctypes.c_ubyte()
    byte = ctypes.c_char.from_buffer(mappings[path])
    address = ctypes.addressof(byte)
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(found)) == 0
    del byte
    return bool(found.value & 1)
"""


@pytest.fixture
def two(make_cell: MakeCell) -> Cell:
    return with_atlas(make_cell(servers=2, server_options=LEASE))


def with_atlas(cell: Cell) -> Cell:
    cell.create_volume("atlas", 1)
    cell.mount_volume(cell.mountpoint("m1") / "atlas", "atlas")
    return cell


def views(cell: Cell) -> tuple[Path, Path]:
    return cell.mountpoint("m1"), cell.mountpoint("m2")


def run(*command: str | Path) -> str:
    done = subprocess.run([*command], capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def failing(*command: str | Path) -> str:
    done = subprocess.run([*command], capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode != 0, command
    return done.stderr


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, caught.value


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {limit_s:g} s"
        time.sleep(0.02)


# One tree


def test_a_mount_point_looks_like_a_directory(two: Cell) -> None:
    a, b = views(two)
    assert os.listdir(b) == ["atlas"], "a listing before anybody looked it up"
    (a / "atlas/f").write_bytes(b"f")
    for view in (a, b):
        assert [(entry.name, entry.is_dir()) for entry in os.scandir(view)] == [("atlas", True)]
        assert (view / "atlas").is_dir() and not (view / "atlas").is_symlink()
        assert (view / "atlas/f").read_bytes() == b"f"
        listed = {entry.name: entry.inode() for entry in os.scandir(view)}
        assert listed["atlas"] == os.stat(view / "atlas").st_ino, "once it is known, a listing says the same"
        inodes = [os.stat(view / path).st_ino for path in (".", "atlas", "atlas/f")]
        assert len(set(inodes)) == 3
        assert os.stat(view / "atlas/..").st_ino == os.stat(view).st_ino
        inside = run("sh", "-c", f"cd {view}/atlas && ls -ai").split()
        assert inside == [str(inodes[1]), ".", str(inodes[0]), "..", str(inodes[2]), "f"]
        assert run("sh", "-c", f"cd {view}/atlas && pwd -P").strip() == str(view / "atlas")


def test_ordinary_tools(two: Cell, tmp_path: Path) -> None:
    a, b = views(two)
    (a / "atlas/dir").mkdir()
    (a / "atlas/dir/file").write_bytes(b"x" * 100_000)
    (a / "atlas/link").symlink_to("dir/file")
    (a / "plain").write_bytes(b"plain")
    paths = ["", "/atlas", "/atlas/dir", "/atlas/dir/file", "/atlas/link", "/plain"]
    assert sorted(run("find", b).split()) == [f"{b}{path}" for path in paths]
    assert "atlas" in run("ls", "-l", b)
    assert int(run("du", "-s", "--apparent-size", "-B1", b).split()[0]) > 100_000
    run("cp", "-a", b, tmp_path / "copy")
    assert (tmp_path / "copy/atlas/dir/file").read_bytes() == b"x" * 100_000
    assert os.readlink(tmp_path / "copy/atlas/link") == "dir/file"
    run("cp", "-a", b / "atlas", b / "second")
    assert run("diff", "-r", a / "atlas", a / "second") == ""
    run("mv", b / "second/dir", b / "atlas/moved")  # EXDEV, so it copies and removes
    assert os.listdir(a / "second") == ["link"]
    assert (a / "atlas/moved/file").read_bytes() == b"x" * 100_000


def test_what_does_not_go_over_a_mount_point(two: Cell) -> None:
    a, _ = views(two)
    (a / "f").write_bytes(b"f")
    (a / "d").mkdir()
    (a / "atlas/g").write_bytes(b"g")
    (a / "atlas/e").mkdir()
    with refused(errno.EXDEV):
        os.rename(a / "f", a / "atlas/f")
    with refused(errno.EXDEV):
        os.rename(a / "atlas/e", a / "e")
    with refused(errno.EXDEV):
        os.link(a / "f", a / "atlas/f")
    for _ in range(2):
        with refused(errno.EBUSY):
            os.rmdir(a / "atlas")
        with refused(errno.EBUSY):
            os.rename(a / "d", a / "atlas")
        with refused(errno.EISDIR):
            os.unlink(a / "atlas")
        assert sorted(os.listdir(a / "atlas")) == ["e", "g"]
        os.listdir(a)


def test_rm_empties_the_volume_and_stops_at_the_mount_point(two: Cell) -> None:
    """As in AFS: it cannot know. The mount point and the volume stay."""
    a, b = views(two)
    (a / "sub").mkdir()
    two.mount_volume(a / "sub/again", "atlas2")
    two.create_volume("atlas2", 1)
    (a / "sub/again/f").write_bytes(b"f")
    assert "Device or resource busy" in failing("rm", "-rf", b / "sub")
    assert os.listdir(a / "sub") == ["again"]
    assert os.listdir(a / "sub/again") == []
    (a / "sub/again/new").write_bytes(b"new")
    assert (b / "sub/again/new").read_bytes() == b"new"


def test_a_mount_point_is_renamed_within_its_volume(two: Cell) -> None:
    a, b = views(two)
    (a / "d").mkdir()
    (a / "atlas/f").write_bytes(b"f")
    with Outsider() as holder:
        holder.do(f"(fd := os.open({str(b / 'atlas/f')!r}, os.O_RDWR))")
        os.rename(a / "atlas", a / "d/moved")
        for view in (a, b):
            assert os.listdir(view) == ["d"]
            assert os.listdir(view / "d") == ["moved"]
            assert (view / "d/moved/f").read_bytes() == b"f"
            assert os.stat(view / "d/moved/..").st_ino == os.stat(view / "d").st_ino
        holder.do("os.pwrite(fd, b'g', 0)")
        holder.do("os.fsync(fd)")
    assert (a / "d/moved/f").read_bytes() == b"g"


def test_fs_commands(two: Cell) -> None:
    a, b = views(two)
    command = str(Path(sys.executable).parent / "promisefs")
    assert run(command, "fs", "lsmount", b / "atlas") == f"'{b}/atlas' is a mount point for volume '#atlas'\n"
    (a / "dir").mkdir()
    assert "Invalid argument" in failing(command, "fs", "lsmount", b / "dir")
    assert "No such file" in failing(command, "fs", "rmmount", b / "nothing")
    assert "File exists" in failing(command, "fs", "mkmount", b / "dir", "atlas")
    assert "Invalid argument" in failing(command, "fs", "mkmount", b / "new", "no/name")
    run(command, "fs", "mkmount", b / "atlas/back", "other")
    assert run(command, "fs", "lsmount", a / "atlas/back").endswith("volume '#other'\n")
    run(command, "fs", "rmmount", a / "atlas/back", a / "atlas")
    for view in (a, b):
        assert os.listdir(view) == ["dir"]
    two.mount_volume(b / "dir/atlas", "atlas")
    assert os.listdir(a / "dir/atlas") == []
    assert "not in a promisefs mount" in failing(command, "fs", "lsmount", "/")


def test_a_volume_that_does_not_exist_yet(two: Cell) -> None:
    a, b = views(two)
    two.mount_volume(a / "later", "later")
    for view in (a, b):
        assert sorted(os.listdir(view)) == ["atlas", "later"]
        with refused(errno.ENODEV):
            os.listdir(view / "later")
        with refused(errno.ENODEV):
            os.stat(view / "later")
    two.create_volume("later", 1)
    (a / "later/f").write_bytes(b"f")
    assert (b / "later/f").read_bytes() == b"f"


def test_a_volume_inside_itself_is_a_loop(two: Cell) -> None:
    a, b = views(two)
    two.mount_volume(a / "atlas/self", "atlas")
    two.mount_volume(a / "atlas/up", "root")
    for view in (a, b):
        for name in ("self", "up"):
            with refused(errno.ELOOP):
                os.stat(view / "atlas" / name)
        assert sorted(os.listdir(view / "atlas")) == ["self", "up"]
        assert os.listdir(view) == ["atlas"]


def test_a_volume_in_two_places(two: Cell) -> None:
    a, b = views(two)
    two.mount_volume(a / "second", "atlas")
    for turn in range(20):
        (a / "atlas" / f"f{turn}").write_bytes(b"%d" % turn)
        assert (a / "second" / f"f{turn}").read_bytes() == b"%d" % turn
        assert (b / "second" / f"f{turn}").read_bytes() == b"%d" % turn
        assert len(os.listdir(b / "atlas")) == turn + 1
    assert len(run("find", b, "-type", "f").split()) == 40


def test_names_and_data_are_coherent_in_both_volumes(two: Cell) -> None:
    a, b = views(two)
    for turn in range(60):
        writer, reader = (a, b) if turn % 2 else (b, a)
        for folder in ("", "atlas"):
            (writer / folder / "data").write_bytes(b"%d" % turn)
            assert (reader / folder / "data").read_bytes() == b"%d" % turn
            (writer / folder / f"name{turn}").touch()
            assert (reader / folder / f"name{turn}").exists()
            os.unlink(reader / folder / f"name{turn}")
            assert not (writer / folder / f"name{turn}").exists()


def test_the_removal_and_renaming_of_a_volume_is_seen_at_once(two: Cell) -> None:
    a, b = views(two)
    (a / "atlas/f").write_bytes(b"f")
    assert (b / "atlas/f").read_bytes() == b"f"
    two.administer("rename", two.store_of(1), "atlas", "globe")
    for view in (a, b):
        with refused(errno.ENODEV):
            os.stat(view / "atlas")
    two.mount_volume(a / "globe", "globe")
    assert (b / "globe/f").read_bytes() == b"f"
    with Outsider() as holder:
        holder.do(f"(fd := os.open({str(b / 'globe/f')!r}, os.O_RDONLY))")
        two.administer("remove", two.store_of(1), "globe", "--yes")
        holder.tell("os.pread(fd, 1, 0)")
        assert holder.error() == "ESTALE"
    for view in (a, b):
        with refused(errno.ENODEV):
            os.stat(view / "globe/f")
        assert sorted(os.listdir(view)) == ["atlas", "globe"]


# One server's end is not the other's


def calls_to(cell: Cell, view: str, number: int) -> dict[str, Any]:
    """What a server was asked about files, and what it told; VL calls only ask which volumes it has."""
    server = status_of(cell.mountpoint(view))["servers"][number]
    told = {name: server[name] for name in ("resets", "breaks", "leases_lost", "connects")}
    return told | {name: count for name, count in server["rpcs"].items() if not name.startswith("VL.")}


@pytest.mark.parametrize("how", ["saved state", "no saved state", "killed"])
def test_the_restart_of_one_server_does_not_touch_files_of_the_other(two: Cell, how: str) -> None:
    a, b = views(two)
    mine, theirs = "data", "atlas/data"
    for path in (mine, theirs):
        (a / path).write_bytes(b"\1" * PAGE)
    with Outsider(MAPPER) as reader:
        for path in (mine, theirs):
            assert reader.do(f"map_file({str(b / path)!r})") == 1
        time.sleep(0.1)  # the flushes of its closes are over
        before, reads = calls_to(two, "m2", 0), status_of(b)["upcalls"]["read"]
        two.stop_server(number=1, kill=how == "killed")
        if how == "no saved state":
            (two.store_of(1) / "callback-state").unlink()
        time.sleep(LEASE_S / 2)
        two.start_server(*LEASE, number=1)
        wait_until(lambda: status_of(b)["servers"][1]["connected"], "the mount found it again")
        assert reader.do(f"resident({str(b / mine)!r})") is True
        if how != "saved state":
            assert reader.do(f"resident({str(b / theirs)!r})") is False
        assert calls_to(two, "m2", 0) == before
        assert status_of(b)["upcalls"]["read"] == reads
        assert reader.do(f"mappings[{str(b / mine)!r}][0]") == 1
        assert calls_to(two, "m2", 0) == before, "it was still in the kernel"
        (a / theirs).write_bytes(b"\2" * PAGE)
        assert reader.do(f"mappings[{str(b / theirs)!r}][0]") == 2
        (a / mine).write_bytes(b"\3" * PAGE)
        assert reader.do(f"mappings[{str(b / mine)!r}][0]") == 3
    assert calls_to(two, "m2", 0)["resets"] == before["resets"]


@pytest.fixture
def _fusectl(tmp_path: Path) -> Iterator[None]:
    """Without the FUSE extension mounts need it to have the kernel send more than twelve requests at a time."""
    if os.environ.get(SWITCH) != "off" or fusectl() is not None:
        yield
    elif os.geteuid() == 0:
        run("mount", "-t", "fusectl", "none", tmp_path)
        yield
        run("umount", "--lazy", tmp_path)
    else:
        pytest.skip("fusectl is not mounted, and only root can")


@pytest.mark.usefixtures("_fusectl")
@pytest.mark.parametrize("away", ["killed", "stopped"])
def test_an_unreachable_server_does_not_hold_up_the_other(make_cell: MakeCell, away: str) -> None:
    """Also while many processes wait for it, whose requests the kernel queues with everybody's."""
    two = with_atlas(make_cell(servers=2, server_options=LEASE, mount_options="timeout=8"))
    a, b = views(two)
    waiting = 40
    content = os.urandom(3 << 20)
    for folder in ("", "atlas"):
        (a / folder / "data").write_bytes(content)
    for number in range(waiting):
        (a / "atlas" / str(number)).write_bytes(content[: 300 * PAGE])
    with ExitStack() as stack:
        readers = [stack.enter_context(Outsider(MAPPER)) for _ in range(waiting)]
        for number, reader in enumerate(readers):
            reader.do(f"(fd := os.open({str(b / f'atlas/{number}')!r}, os.O_RDWR))")
        mapper = stack.enter_context(Outsider(MAPPER))
        (a / "mapped").write_bytes(b"\1" * PAGE)
        assert mapper.do(f"map_file({str(b / 'mapped')!r})") == 1
        assert os.listdir(b / "atlas")
        before = calls_to(two, "m2", 0)
        server_pid = two.servers[1].pid
        assert server_pid is not None
        if away == "killed":
            two.stop_server(number=1, kill=True)
        else:
            os.kill(server_pid, signal.SIGSTOP)
        try:
            for reader in readers:
                reader.tell("os.pread(fd, 300 * 4096, 0)")
            time.sleep(LEASE_S * 2)  # lost: what is mapped from there has been dropped
            assert not any(reader.has_answered() for reader in readers[1:])
            assert mapper.do(f"resident({str(b / 'mapped')!r})") is True
            assert calls_to(two, "m2", 0) == before, "the lost lease cost the other server's files something"
            start = time.monotonic()
            assert (b / "data").read_bytes() == content, "nothing of it was in the kernel"
            (b / "new").write_bytes(content)
            assert (a / "new").read_bytes() == content
            (a / "mapped").write_bytes(b"\2" * PAGE)
            assert mapper.do(f"mappings[{str(b / 'mapped')!r}][0]") == 2
            assert sorted(os.listdir(b)) == ["atlas", "data", "mapped", "new"]
            assert time.monotonic() - start < 3 * PROMPT_S
        finally:
            if away == "killed":
                two.start_server(*LEASE, number=1)
            else:
                os.kill(server_pid, signal.SIGCONT)
        for number, reader in enumerate(readers):
            assert reader.error(30) in ("none", "ETIMEDOUT"), number
    wait_until(lambda: status_of(b)["servers"][1]["connected"], "the mount found it again")
    assert (b / "atlas/data").read_bytes() == content


def test_what_is_dirty_of_an_unreachable_server_does_not_hold_up_stores_at_the_other(make_cell: MakeCell) -> None:
    two = with_atlas(make_cell(servers=2, server_options=LEASE))
    a, b = views(two)
    with Outsider() as writer:
        for name, path in (("theirs", "atlas/f"), ("mine", "f")):
            writer.do(f"({name} := os.open({str(b / path)!r}, os.O_RDWR | os.O_CREAT))")
        os.listdir(a / "atlas")
        two.stop_server(number=1, kill=True)
        try:
            writer.do("os.pwrite(theirs, b'theirs', 0)")
            time.sleep(5.5)  # the timer stores it now, and waits
            writer.do("os.pwrite(mine, b'mine', 0)")
            wait_until(lambda: (a / "f").read_bytes() == b"mine", "the timer stored it", limit_s=8)
        finally:
            two.start_server(*LEASE, number=1)
        wait_until(lambda: (a / "atlas/f").read_bytes() == b"theirs", "it was stored when the server was back")


def test_a_mount_waits_for_no_server_that_it_does_not_need(make_cell: MakeCell) -> None:
    two = with_atlas(make_cell(servers=2, server_options=LEASE))
    two.stop_server(number=1)
    start = time.monotonic()
    two.mount("m3", options="timeout=2")
    view = two.mountpoint("m3")
    assert os.listdir(view) == ["atlas"]
    (view / "f").write_bytes(b"f")
    assert time.monotonic() - start < 5
    start = time.monotonic()
    with refused(errno.ETIMEDOUT):
        os.listdir(view / "atlas")
    assert 1.5 < time.monotonic() - start < 8
    with pytest.raises(CellError, match=r"not all servers answer|may be on a server"):
        two.mount("m4", options="timeout=2", volume="atlas")
    two.start_server(*LEASE, number=1)
    wait_until(lambda: status_of(view)["servers"][1]["connected"], "the mount found it")
    assert os.listdir(view / "atlas") == []
    with pytest.raises(CellError, match="has no volume 'nothing'"):
        two.mount("m4", volume="nothing")
    two.stop_server(number=0)
    start = time.monotonic()
    two.mount("m4", volume="atlas")
    (two.mountpoint("m4") / "g").write_bytes(b"g")
    assert time.monotonic() - start < 5
    two.unmount("m4")
    two.start_server(*LEASE, number=0)


# A volume moves


def test_a_volume_moves_to_another_server_while_its_files_are_open(two: Cell) -> None:
    a, b = views(two)
    (a / "atlas/f").write_bytes(b"\1" * PAGE)
    (a / "atlas/dir").mkdir()
    (a / "stays").write_bytes(b"\1" * PAGE)
    with Outsider(MAPPER) as reader, Outsider() as writer:
        assert reader.do(f"map_file({str(b / 'atlas/f')!r})") == 1
        assert reader.do(f"map_file({str(b / 'stays')!r})") == 1
        writer.do(f"(fd := os.open({str(a / 'atlas/dir/new')!r}, os.O_RDWR | os.O_CREAT))")
        writer.do("os.pwrite(fd, b'written before', 0)")
        inode = os.stat(a / "atlas/f").st_ino
        for number in (0, 1):
            two.stop_server(number=number)
        writer.tell("os.fsync(fd)")
        two.administer("move", two.store_of(1), "atlas", two.store_of(0))
        for number in (1, 0):
            two.start_server(*LEASE, number=number)
        assert writer.answer() is None
        assert (b / "atlas/dir/new").read_bytes() == b"written before"
        assert os.stat(b / "atlas/f").st_ino == inode
        assert reader.do(f"mappings[{str(b / 'atlas/f')!r}][0]") == 1
        (a / "atlas/f").write_bytes(b"\2" * PAGE)
        assert reader.do(f"mappings[{str(b / 'atlas/f')!r}][0]") == 2
        two.stop_server(number=1)  # nobody needs it any more
        (b / "atlas/f").write_bytes(b"\3" * PAGE)
        assert (a / "atlas/f").read_bytes() == b"\3" * PAGE
        assert reader.do(f"mappings[{str(b / 'atlas/f')!r}][0]") == 3
        two.start_server(*LEASE, number=1)


def test_a_volume_that_moved_is_found_though_its_old_server_never_comes_back(two: Cell) -> None:
    a, b = views(two)
    (a / "atlas/f").write_bytes(b"f")
    assert (b / "atlas/f").read_bytes() == b"f"
    two.stop_server(number=1)
    two.stop_server(number=0)
    two.administer("move", two.store_of(1), "atlas", two.store_of(0))
    two.start_server(*LEASE, number=0)
    time.sleep(LEASE_S)
    assert (b / "atlas/f").read_bytes() == b"f"
    (b / "atlas/f").write_bytes(b"g")
    assert (a / "atlas/f").read_bytes() == b"g"
    two.start_server(*LEASE, number=1)
    wait_until(lambda: status_of(b)["servers"][1]["connected"], "the mount found it again")
    assert (a / "atlas/f").read_bytes() == b"g"
