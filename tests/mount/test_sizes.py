"""The size that a kernel believes in follows what other mounts do, also where it would not ask."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cell_lib import processes
from outsider import Outsider

if TYPE_CHECKING:
    from conftest import MakeCell, View

PAGE = mmap.PAGESIZE
CAP_DAC_READ_SEARCH = 2

AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000
STATX_SIZE = 0x200

MAPPER = f"""
import signal
signal.signal(signal.SIGBUS, signal.SIG_DFL)
def map_it(path, pages):
    global fd, mapped
    fd = os.open(path, os.O_RDWR)
    mapped = mmap.mmap(fd, pages * {PAGE})
    return [mapped[i * {PAGE}] for i in range(pages)]
"""


def believed_size(fd: int) -> int:
    """What this machine's kernel believes in, without asking the mount."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)
    assert libc.statx(fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_SIZE, buffer) == 0
    return int(struct.unpack_from("=Q", buffer, 40)[0])


def may_look_at_inodes() -> bool:
    """Whether mounts here have CAP_DAC_READ_SEARCH (capabilities(7))."""
    effective = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return bool(int(effective.split()[1], 16) >> CAP_DAC_READ_SEARCH & 1)


needs_capability = pytest.mark.skipif(not may_look_at_inodes(), reason="mounts have no CAP_DAC_READ_SEARCH here")


@needs_capability
def test_an_open_file_that_is_cut_elsewhere(cell: View) -> None:
    """When the truncation returns the kernel knows: it may throw away what it is answered later."""
    (cell.a / "f").write_bytes(bytes(3 * PAGE))
    with open(cell.b / "f", "rb") as file:
        assert len(file.read()) == 3 * PAGE
        for size in (2 * PAGE + 100, PAGE, 10, 0):
            os.truncate(cell.a / "f", size)
            assert believed_size(file.fileno()) == size


@needs_capability
def test_a_file_that_was_cut_elsewhere_is_opened(cell: View) -> None:
    (cell.a / "f").write_bytes(bytes(3 * PAGE))
    assert os.stat(cell.b / "f").st_size == 3 * PAGE
    os.truncate(cell.a / "f", PAGE)
    fd = os.open(cell.b / "f", os.O_RDONLY)
    try:
        assert believed_size(fd) == PAGE
    finally:
        os.close(fd)


@needs_capability
def test_a_mapped_file_that_is_cut_elsewhere_stays_cut(cell: View) -> None:
    """Loads and stores beyond the new end get SIGBUS; what was stored there before does not come back."""
    (cell.a / "f").write_bytes(b"\x01" * 3 * PAGE)
    with Outsider(MAPPER) as mapper:
        mapper.tell(f"map_it({os.fspath(cell.b / 'f')!r}, 3)")
        assert mapper.answer() == [1, 1, 1]
        os.truncate(cell.a / "f", PAGE)
        mapper.tell("mapped.__setitem__(0, 2)")
        assert mapper.answer() is None
        mapper.tell("mapped.flush()")
        assert mapper.answer() is None
        mapper.tell(f"mapped.__setitem__({2 * PAGE}, 3)")
        assert os.waitstatus_to_exitcode(os.waitpid(mapper.pid, 0)[1]) == -signal.SIGBUS
    expected = b"\x02" + b"\x01" * (PAGE - 1)
    for view in cell.both:
        assert os.stat(view / "f").st_size == PAGE
        assert (view / "f").read_bytes() == expected


SLOW_TO_ANSWER = """
import os, sys, trio
from promisefs_client import cli
from promisefs_client.fuse import handlers as fuse_ops
answer = fuse_ops.Operations.getattr
async def slowly(self, inode, ctx):
    if os.path.exists(sys.argv[-1] + ".slow"):
        await trio.sleep(60)
    return await answer(self, inode, ctx)
fuse_ops.Operations.getattr = slowly
cli.main()
"""


@needs_capability
def test_a_mount_that_is_killed_while_it_looks_at_its_own_inodes(make_cell: MakeCell) -> None:
    """A thread of its own waits for its answer: that must not keep /dev/fuse open, for nobody else could end it."""
    cell = make_cell(mounts=1, server_options=("--lease", "2"))
    a, b = cell.mountpoint("m1"), cell.directory / "slow"
    b.mkdir()
    (a / "f").write_bytes(bytes(PAGE))
    command = [sys.executable, "-c", SLOW_TO_ANSWER, "mount", "-f", cell.address, b]
    with subprocess.Popen(command, env=processes.environment(cell.mark)) as mount:
        try:
            wait_until(lambda: os.path.ismount(b))
            with Outsider() as reader:
                reader.tell(f"len(os.read(os.open({os.fspath(b / 'f')!r}, os.O_RDONLY), 100))")
                assert reader.answer() == 100
                Path(f"{b}.slow").touch()
                os.truncate(a / "f", 10)
                mount.kill()
                assert mount.wait(10) == -signal.SIGKILL
        finally:
            mount.kill()
            if mount.poll() is not None:  # else the guard has to free it
                subprocess.run(["fusermount3", "-u", "-z", b], check=True)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
