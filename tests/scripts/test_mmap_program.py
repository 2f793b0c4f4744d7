"""The mmap reader and writer on a local file, and the judgement over what they print."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from cell_lib import mmap_program
from cell_lib.mmap_program import Seen, Written, match, parse_seen, parse_written

LIMIT_S = 20


@pytest.fixture(scope="module")
def program() -> Path:
    return mmap_program.build()


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_writer_prints_each_new_byte(program: Path, tmp_path: Path) -> None:
    done = run(program, "-i", "1", "-n", "3", tmp_path / "page", "mod")
    assert (done.returncode, done.stdout) == (0, "01\n02\n03\n")
    assert (tmp_path / "page").read_bytes()[:1] == b"\3"


def test_reader_prints_the_byte(program: Path, tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"\xab")
    done = run(program, "-i", "1", "-n", "2", tmp_path / "page")
    assert (done.returncode, done.stdout) == (0, "ab\nab\n")


def test_byte_wraps_and_the_rest_stays(program: Path, tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"\xffrest")
    assert run(program, "-n", "1", "-i", "1", tmp_path / "page", "mod").stdout == "00\n"
    assert (tmp_path / "page").read_bytes() == b"\0rest"


def test_without_options_once_a_second(program: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    assert run(program, "-n", "2", tmp_path / "page", "mod").stdout == "01\n02\n"
    assert time.monotonic() - began > 1.9


def test_times(program: Path, tmp_path: Path) -> None:
    before = time.monotonic_ns()
    line = run(program, "-t", "-n", "1", "-i", "1", tmp_path / "page", "mod").stdout
    written = parse_written(line)
    assert before < written.stored_ns < written.done_ns < time.monotonic_ns()
    seen = parse_seen(run(program, "-t", "-n", "1", "-i", "1", tmp_path / "page").stdout)
    assert (seen.byte, seen.old_ns) == (1, 0) and written.done_ns < seen.seen_ns


@pytest.mark.parametrize("arguments", [[], ["-i", "x", "f"], ["-n", "0", "f"], ["f", "other"], ["-q", "f"]])
def test_usage(program: Path, arguments: list[str]) -> None:
    assert run(program, *arguments).returncode == 2


def test_reader_refuses_an_empty_or_missing_file(program: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        done = run(program, tmp_path / name)
        assert done.returncode == 1 and name in done.stderr


def test_a_page_that_is_gone_is_said_so(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_bytes(b"x")
    reader = subprocess.Popen([program, "-i", "10", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stdout.readline() == "78\n"
    path.write_bytes(b"")
    assert "SIGBUS" in reader.communicate(timeout=LIMIT_S)[1]
    assert reader.returncode == 3


def test_match_measures_from_fsync_to_first_sight() -> None:
    written = [Written(1, 90, 100), Written(2, 190, 200)]
    seen = [Seen(0, 50, 0), Seen(1, 99, 95), Seen(2, 230, 180)]
    sights = match(written, seen)
    assert [sight.delay_ns for sight in sights] == [-1, 30]
    assert not any(sight.stale for sight in sights)


def test_match_finds_a_load_of_an_older_byte_after_fsync() -> None:
    assert [sight.stale for sight in match([Written(1, 90, 100)], [Seen(0, 50, 0), Seen(1, 130, 101)])] == [True]


def test_a_newer_byte_stands_for_those_skipped() -> None:
    written = [Written(byte, byte * 10, byte * 10 + 5) for byte in (1, 2, 3)]
    sights = match(written, [Seen(0, 1, 0), Seen(3, 34, 9)])
    assert [sight.seen and sight.seen.byte for sight in sights] == [3, 3, 3]
    assert not any(sight.stale for sight in sights)


def test_match_across_the_wrap_and_what_is_not_seen_yet() -> None:
    written = [Written(255, 0, 5), Written(0, 10, 15), Written(1, 20, 25)]
    sights = match(written, [Seen(254, 0, 0), Seen(255, 4, 3), Seen(0, 14, 12)])
    assert [sight.seen and sight.seen.byte for sight in sights] == [255, 0, None]
