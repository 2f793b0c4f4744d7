"""Speed of ordinary file operations. Each measurement prepares what it needs, then times only what it is named for."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .targets import Target, cold_view

MIB = 1 << 20
_BLOCK = 4096
_TOOL_S = 300.0
_REPEATS = 3
"""Warm measurements are short: the best of so many counts."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work the measurements do."""

    file_bytes: int
    random_reads: int
    files: int
    tar_files: int


FULL = Sizes(file_bytes=256 * MIB, random_reads=4096, files=1000, tar_files=2000)
QUICK = Sizes(file_bytes=32 * MIB, random_reads=512, files=200, tar_files=300)


@dataclass(frozen=True, slots=True)
class Measurement:
    name: str
    unit: str
    """Of what `run` returns; a rate, so more is better."""
    description: str
    run: Callable[[Target, Sizes], float]


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def best(work: Callable[[], None]) -> float:
    return min(timed(work) for _ in range(_REPEATS))


def _pattern() -> bytes:
    return random.Random(1).randbytes(MIB)


def _write_file(path: Path, size_bytes: int) -> None:
    block = _pattern()
    with path.open("wb", buffering=0) as file:
        for _ in range(size_bytes // MIB):
            file.write(block)
        os.fsync(file.fileno())


def _big_file(target: Target, sizes: Sizes) -> str:
    """Make sure that the file for reading is there; return its name."""
    path = target.warm() / "read.bin"
    if not path.exists() or path.stat().st_size != sizes.file_bytes:
        _write_file(path, sizes.file_bytes)
    return path.name


def _read_file(path: Path, size_bytes: int) -> None:
    buffer = bytearray(MIB)
    total = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    if total != size_bytes:
        raise OSError(f"{path}: {total} bytes read, {size_bytes} were written")


def sequential_write(target: Target, sizes: Sizes) -> float:
    path = target.warm() / "write.bin"
    seconds = timed(lambda: _write_file(path, sizes.file_bytes))
    path.unlink()
    return sizes.file_bytes / 1e6 / seconds


def sequential_read_cold(target: Target, sizes: Sizes) -> float:
    name = _big_file(target, sizes)
    with cold_view(target) as view:
        return sizes.file_bytes / 1e6 / timed(lambda: _read_file(view / name, sizes.file_bytes))


def sequential_read_warm(target: Target, sizes: Sizes) -> float:
    path = target.warm() / _big_file(target, sizes)
    _read_file(path, sizes.file_bytes)
    return sizes.file_bytes / 1e6 / best(lambda: _read_file(path, sizes.file_bytes))


def _random_reads(path: Path, sizes: Sizes) -> None:
    blocks = random.Random(2).sample(range(sizes.file_bytes // _BLOCK), sizes.random_reads)
    fd = os.open(path, os.O_RDONLY)
    try:
        for block in blocks:
            os.pread(fd, _BLOCK, block * _BLOCK)
    finally:
        os.close(fd)


def random_read_cold(target: Target, sizes: Sizes) -> float:
    name = _big_file(target, sizes)
    with cold_view(target) as view:
        return sizes.random_reads / timed(lambda: _random_reads(view / name, sizes))


def random_read_warm(target: Target, sizes: Sizes) -> float:
    path = target.warm() / _big_file(target, sizes)
    _read_file(path, sizes.file_bytes)
    return sizes.random_reads / best(lambda: _random_reads(path, sizes))


def _create_files(directory: Path, count: int) -> None:
    content = bytes(1024)
    for number in range(count):
        with open(directory / f"file{number:06d}", "wb", buffering=0) as file:
            file.write(content)


def _small_files(target: Target, sizes: Sizes) -> str:
    """Make sure that the folder of small files is there; return its name."""
    directory = target.warm() / "small"
    if not directory.exists():
        directory.mkdir()
        _create_files(directory, sizes.files)
    return directory.name


def create(target: Target, sizes: Sizes) -> float:
    directory = target.warm() / "create"
    directory.mkdir()
    seconds = timed(lambda: _create_files(directory, sizes.files))
    _unlink_all(directory)
    directory.rmdir()
    return sizes.files / seconds


def stat_warm(target: Target, sizes: Sizes) -> float:
    directory = target.warm() / _small_files(target, sizes)
    paths = [str(directory / f"file{number:06d}") for number in range(sizes.files)]

    def stat_all() -> None:
        for path in paths:
            os.stat(path)

    stat_all()
    return sizes.files / best(stat_all)


def scandir_cold(target: Target, sizes: Sizes) -> float:
    name = _small_files(target, sizes)

    def scan(directory: Path) -> None:
        with os.scandir(directory) as entries:
            count = sum(entry.stat().st_size == 1024 for entry in entries)
        if count != sizes.files:
            raise OSError(f"{directory}: {count} files of 1,024 bytes, {sizes.files} were made")

    with cold_view(target) as view:
        # The mount's own first contact is not what is measured.
        os.stat(view)
        return sizes.files / timed(lambda: scan(view / name))


def _unlink_all(directory: Path) -> None:
    for name in os.listdir(directory):
        os.unlink(directory / name)


def unlink(target: Target, sizes: Sizes) -> float:
    directory = target.warm() / "unlink"
    directory.mkdir()
    _create_files(directory, sizes.files)
    seconds = timed(lambda: _unlink_all(directory))
    directory.rmdir()
    return sizes.files / seconds


def _tarball(file_count: int) -> bytes:
    """A tree of small files like a source tree: 20 to a folder, 100 bytes to 12 KiB each."""
    generator = random.Random(3)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for number in range(file_count):
            content = generator.randbytes(int(100 * 120 ** generator.random()))
            entry = tarfile.TarInfo(f"tree/d{number // 200}/e{number // 20}/f{number}.c")
            entry.size, entry.mode, entry.mtime = len(content), 0o644, 1_700_000_000
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _tool(*command: str | Path, stdin: bytes = b"", cwd: Path | None = None) -> None:
    subprocess.run(command, input=stdin, cwd=cwd, check=True, stdout=subprocess.DEVNULL, timeout=_TOOL_S)


def untar(target: Target, sizes: Sizes) -> float:
    directory = target.warm() / "untar"
    directory.mkdir()
    packed = _tarball(sizes.tar_files)
    seconds = timed(lambda: _tool("tar", "-x", "-C", directory, stdin=packed))
    _tool("rm", "-r", directory)
    return sizes.tar_files / seconds


def git_status(target: Target, sizes: Sizes) -> float:
    """Status of an unchanged repository, warm, files per second."""
    directory = target.warm() / "repository"
    if not directory.exists():
        directory.mkdir()
        _tool("tar", "-x", "-C", directory, stdin=_tarball(sizes.tar_files))
        git = ("git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0")
        _tool(*git, "init", "-q", ".", cwd=directory)
        _tool(*git, "add", "-A", cwd=directory)
        _tool(*git, "commit", "-q", "-m", "tree", cwd=directory)
        # Files as young as the index are read again by every status; a second later they no longer are.
        time.sleep(1.1)
        _tool("git", "status", "--porcelain", cwd=directory)
    return sizes.tar_files / best(lambda: _tool("git", "status", "--porcelain", cwd=directory))


MEASUREMENTS = (
    Measurement("seq-write", "MB/s", "write in 1 MiB pieces, then fsync", sequential_write),
    Measurement("seq-read-cold", "MB/s", "read in 1 MiB pieces, cold", sequential_read_cold),
    Measurement("seq-read-warm", "MB/s", "the same, warm", sequential_read_warm),
    Measurement("rand-read-cold", "reads/s", "4 KiB at random places, cold", random_read_cold),
    Measurement("rand-read-warm", "reads/s", "the same, warm", random_read_warm),
    Measurement("create", "files/s", "create, write 1 KiB, close", create),
    Measurement("stat-warm", "files/s", "stat by path, warm", stat_warm),
    Measurement("scandir-cold", "files/s", "scandir and stat of each entry, cold", scandir_cold),
    Measurement("unlink", "files/s", "unlink of the files just made", unlink),
    Measurement("untar", "files/s", "tar -x of a source tree", untar),
    Measurement("git-status", "files/s", "git status of it committed, warm", git_status),
)
