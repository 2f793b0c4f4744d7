"""The test that AFS has for its saved callback state, with many files: mapped here, changed there, a restart between.

The mapping process runs on and touches nothing but its mappings. The server stops, what it remembers of promises is
kept or removed, it starts again, another mount changes every file. Each mapping must show the new data when the
change's fsync has returned; that it takes no longer than that is measured as the time until the last one does.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import TYPE_CHECKING

import pytest
from outsider import Outsider

if TYPE_CHECKING:
    from conftest import MakeCell

PAGE = mmap.PAGESIZE
FILES = int(os.environ.get("PROMISEFS_MAPPED_FILES", "100"))
"""docs/torture.md has the times of 1,000."""
LEASE = ("--lease", "5")
MAPPER = """
def map_all(directory, count):
    global mappings
    mappings = []
    for number in range(count):
        fd = os.open(f"{directory}/{number}", os.O_RDONLY)
        mappings.append(mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ))
        os.close(fd)
    return sum(mapping[0] for mapping in mappings)

def different(byte):
    return [number for number, mapping in enumerate(mappings) if mapping[0] != byte]

def wait_for(byte, limit_s):
    began = time.monotonic()
    while left := different(byte):
        assert time.monotonic() - began < limit_s, f"{len(left)} do not show {byte}"
    return time.monotonic()
"""
CHANGER = """
def change_all(directory, count, byte):
    for number in range(count):
        fd = os.open(f"{directory}/{number}", os.O_RDWR)
        os.pwrite(fd, bytes([byte]), 0)
        os.fsync(fd)
        os.close(fd)
    return time.monotonic()
"""


@pytest.mark.limit_s(120 + FILES)
@pytest.mark.parametrize("state", ["kept", "removed", "killed"])
def test_many_mapped_files_show_what_is_new_after_a_restart(make_cell: MakeCell, state: str) -> None:
    cell = make_cell(server_options=LEASE)
    a, b = (cell.mountpoint(name) for name in ("m1", "m2"))
    with Outsider(MAPPER) as reader, Outsider(CHANGER) as writer:
        for number in range(FILES):
            (a / str(number)).write_bytes(b"\1" * PAGE)
        assert reader.do(f"map_all({str(b)!r}, {FILES})") == FILES
        began_s = time.monotonic()
        cell.stop_server(kill=state == "killed")
        stopped_s = time.monotonic()
        if state == "removed":
            (cell.store / "callback-state").unlink()
        cell.start_server(*LEASE)
        started_s = time.monotonic()
        writer.tell(f"change_all({str(a)!r}, {FILES}, 2)")
        reader.tell(f"wait_for(2, {30 + FILES / 5})")
        changed_s = writer.answer(60 + FILES)
        seen_s = reader.answer(60 + FILES)
        assert isinstance(changed_s, float) and isinstance(seen_s, float)
        assert reader.do("different(2)") == []
        # Once more, now that all is warm: at once, since each fsync waited for this.
        writer.do(f"change_all({str(a)!r}, {FILES}, 3)")
        assert reader.do("different(3)") == []
    times = {"stop": stopped_s - began_s, "start": started_s - stopped_s}
    times |= {"all changed": changed_s - started_s, "last seen": seen_s - started_s}
    print(f"{FILES} files, state {state}: " + ", ".join(f"{what} {s:.2f} s" for what, s in times.items()))
