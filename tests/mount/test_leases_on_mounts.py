"""A mount that is cut off from its server: what it shows, and what others wait for."""

from __future__ import annotations

import mmap
import os
import time
from typing import TYPE_CHECKING

import pytest
from logging_in import logged_in_at
from outsider import Outsider
from relay import Relay

if TYPE_CHECKING:
    from conftest import MakeCell

PAGE = mmap.PAGESIZE
MAPPER = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
mappings = []
def map_all(directory, count):
    for number in range(count):
        fd = os.open(f"{directory}/{number}", os.O_RDWR)
        mappings.append(mmap.mmap(fd, mmap.PAGESIZE))
        os.close(fd)
    return sum(mapping[0] for mapping in mappings)
def resident():
    found = ctypes.c_ubyte()
    count = 0
    for mapping in mappings:
        byte = ctypes.c_char.from_buffer(mapping)
        address = ctypes.addressof(byte)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(found)) == 0
        del byte
        count += found.value & 1
    return count
"""


@pytest.mark.limit_s(200)
def test_what_a_mount_that_is_cut_off_has_mapped_is_gone_when_a_writer_goes_on(make_cell: MakeCell) -> None:
    """The writer waits one lease. By then not one of the pages is left that it might contradict."""
    count, lease_s = 1000, 6.0
    cell = make_cell(mounts=1, server_options=("--lease", f"{lease_s:g}"))
    writer = cell.mountpoint("m1")
    with Relay(cell.port) as relay, logged_in_at(cell.store, relay.port):
        cell.mount("cut", port=relay.port)
        view = cell.mountpoint("cut")
        with Outsider(MAPPER) as reader:
            for number in range(count):
                (writer / str(number)).write_bytes(b"\1" * PAGE)
            assert reader.do(f"map_all({str(view)!r}, {count})") == count
            assert reader.do("resident()") == count
            relay.cut()
            began = time.monotonic()
            fd = os.open(writer / "0", os.O_WRONLY)
            try:
                os.pwrite(fd, b"\2", 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            waited_s = time.monotonic() - began
            assert reader.do("resident()") == 0
            assert lease_s / 2 < waited_s < lease_s + 2
            reader.tell("mappings[0][0]")
            assert not reader.has_answered(0.5), "it cannot know"
            relay.mend()
            assert reader.answer(15) == 2
            assert reader.do("sum(mapping[0] for mapping in mappings)") == count + 1
        cell.unmount("cut")
