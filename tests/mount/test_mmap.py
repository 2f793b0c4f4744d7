"""A mapping on one mount follows a mapping on the other, also while the reader holds the page and through restarts."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cell_lib.mmap_program import Seen, Written, match, parse_seen, parse_written

if TYPE_CHECKING:
    from conftest import MakeCell, View

TOOL_S = 60
STEPS = 100


class Reader:
    """The C reader in the background; it prints to a local file."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self._process = process
        self._output = output

    def lines(self) -> list[str]:
        text = self._output.read_text()
        return text[: text.rfind("\n") + 1].splitlines()

    def seen(self) -> list[Seen]:
        return [parse_seen(line) for line in self.lines()]

    def wait_for(self, byte: int, timeout_s: float = 20) -> None:
        """Wait until the last byte printed is this one or a newer one."""
        deadline = time.monotonic() + timeout_s
        while not (lines := self.lines()) or int(lines[-1].split()[0], 16) < byte:
            assert self._process.poll() is None, f"the reader ended with status {self._process.returncode}"
            assert time.monotonic() < deadline, f"{byte:02x} is not seen after {timeout_s} s; last lines: {lines[-3:]}"
            time.sleep(0.005)


@contextmanager
def reading(program: Path, path: Path, output: Path, *options: str) -> Iterator[Reader]:
    with output.open("wb") as out:
        process = subprocess.Popen([program, *options, path], stdout=out)
    try:
        yield Reader(process, output)
    finally:
        process.kill()
        process.wait(TOOL_S)


def write(program: Path, path: Path, steps: int, interval_ms: float = 2) -> list[Written]:
    command: list[str | Path] = [program, "-t", "-i", str(interval_ms), "-n", str(steps), path, "mod"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S, check=True)
    return [parse_written(line) for line in done.stdout.splitlines()]


def assert_followed(written: list[Written], seen: list[Seen]) -> None:
    sights = match(written, seen)
    assert [sight.written.byte for sight in sights if sight.seen is None] == [], "never seen"
    assert [sight for sight in sights if sight.stale] == [], "an older byte was loaded after fsync had returned"


def test_reader_and_writer_once_a_second(cell: View, mmap_program: Path, tmp_path: Path) -> None:
    """The two programs as anybody would start them, without options."""
    path_a, path_b = cell.a / "page", cell.b / "page"
    path_a.write_bytes(bytes(mmap.PAGESIZE))
    with reading(mmap_program, path_b, tmp_path / "out") as reader:
        reader.wait_for(0)
        writer = subprocess.Popen([mmap_program, path_a, "mod"], stdout=subprocess.PIPE, text=True)
        try:
            assert writer.stdout is not None
            for byte in (1, 2, 3):
                assert writer.stdout.readline() == f"{byte:02x}\n"
                reader.wait_for(byte, timeout_s=3)
        finally:
            writer.kill()
            writer.communicate(timeout=TOOL_S)
        followed = [int(line, 16) for line in reader.lines()]
    # Neither knows when the other looks: one byte may come twice, another not at all.
    assert followed == sorted(followed) and {0} < set(followed) <= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("back", [False, True], ids=["a to b", "b to a"])
def test_every_fsync_is_seen_by_a_reader_that_holds_the_page(
    cell: View, mmap_program: Path, tmp_path: Path, back: bool
) -> None:
    source, target = (cell.b, cell.a) if back else (cell.a, cell.b)
    (source / "page").write_bytes(bytes(mmap.PAGESIZE))
    with reading(mmap_program, target / "page", tmp_path / "out", "-t", "-c", "-i", "0.2") as reader:
        reader.wait_for(0)
        written = write(mmap_program, source / "page", STEPS)
        reader.wait_for(STEPS)
        assert_followed(written, reader.seen())


def test_a_load_right_after_msync_sees_the_new_byte(cell: View) -> None:
    """Both mappings in one process: not a microsecond between the return of msync(MS_SYNC) and the load."""
    (cell.a / "page").write_bytes(bytes(mmap.PAGESIZE))
    with open(cell.a / "page", "r+b") as file_a, open(cell.b / "page", "r+b") as file_b:
        with mmap.mmap(file_a.fileno(), 0) as page_a, mmap.mmap(file_b.fileno(), 0) as page_b:
            for step in range(1, STEPS + 1):
                source, target = (page_a, page_b) if step % 2 else (page_b, page_a)
                source[0] = step
                source.flush()
                assert target[0] == step


def test_a_mapping_outlives_the_close_of_its_file(cell: View) -> None:
    (cell.a / "page").write_bytes(b"old".ljust(mmap.PAGESIZE, b"\0"))
    fd = os.open(cell.b / "page", os.O_RDONLY)
    page = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
    with page:
        assert page[:3] == b"old"
        with open(cell.a / "page", "r+b") as file:
            file.write(b"new")
        assert page[:3] == b"new"


@pytest.mark.limit_s(150)
@pytest.mark.parametrize("state", ["kept", "removed", "damaged", "server killed"])
def test_reader_follows_through_a_server_restart(
    make_cell: MakeCell, mmap_program: Path, tmp_path: Path, state: str
) -> None:
    """The server stops while the reader runs and holds the page; what it remembers of promises is kept or not."""
    cell = make_cell(server_options=["--lease", "3"])
    path_a, path_b = cell.mountpoint("m1") / "page", cell.mountpoint("m2") / "page"
    path_a.write_bytes(bytes(mmap.PAGESIZE))
    with reading(mmap_program, path_b, tmp_path / "out", "-t", "-c", "-i", "0.2") as reader:
        reader.wait_for(0)
        written = write(mmap_program, path_a, 20)
        reader.wait_for(20)
        cell.stop_server(kill=state == "server killed")
        saved = cell.store / "callback-state"
        if state in ("kept", "removed", "damaged"):
            assert saved.exists(), "a clean stop saves the promises"
        if state == "removed":
            saved.unlink()
        if state == "damaged":
            damaged = bytearray(saved.read_bytes())
            damaged[len(damaged) // 2] ^= 0xFF
            saved.write_bytes(damaged)
        cell.start_server("--lease", "3")
        written += write(mmap_program, path_a, 20)
        reader.wait_for(40)
        assert_followed(written, reader.seen())


@pytest.mark.limit_s(150)
def test_a_store_that_began_before_the_restart_is_seen(make_cell: MakeCell, mmap_program: Path, tmp_path: Path) -> None:
    """The writer never stops: its fsync waits for the server, then goes through, and the reader follows."""
    cell = make_cell(server_options=["--lease", "3"])
    path_a, path_b = cell.mountpoint("m1") / "page", cell.mountpoint("m2") / "page"
    path_a.write_bytes(bytes(mmap.PAGESIZE))
    with reading(mmap_program, path_b, tmp_path / "out", "-t", "-c", "-i", "0.2") as reader:
        reader.wait_for(0)
        command: list[str | Path] = [mmap_program, "-t", "-i", "20", "-n", "100", path_a, "mod"]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            time.sleep(0.5)
            cell.stop_server()
            (cell.store / "callback-state").unlink()
            time.sleep(0.5)
            cell.start_server("--lease", "3")
            output = writer.communicate(timeout=TOOL_S)[0]
        finally:
            writer.kill()
            writer.communicate()
        assert writer.returncode == 0
        written = [parse_written(line) for line in output.splitlines()]
        assert len(written) == 100
        reader.wait_for(100)
        assert_followed(written, reader.seen())
