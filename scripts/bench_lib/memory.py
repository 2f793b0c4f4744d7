"""How much memory the daemons hold after much work: 4 GiB streamed through a mount, a server with 200,000 files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from .targets import PromisefsMounts, cold_view

LIMIT_S = 1800.0
MIB = 1 << 20
_STREAM_BYTES = 4 << 30
_QUICK_STREAM_BYTES = 512 * MIB
_FILES = 200_000
_QUICK_FILES = 5_000
_FILES_PER_FOLDER = 5_000


@dataclass(frozen=True, slots=True)
class Memory:
    """In MiB, of VmRSS now and VmHWM, the highest so far."""

    streamed_mib: int
    writer_mount_rss: float
    writer_mount_peak: float
    reader_mount_rss: float
    reader_mount_peak: float
    files: int
    server_rss: float
    server_peak: float


def _resident_mib(pid: int) -> tuple[float, float]:
    text = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(size) for name, size in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, re.MULTILINE)}
    return found["VmRSS"] / 1024, found["VmHWM"] / 1024


def measure(target: PromisefsMounts, quick: bool) -> Memory:
    stream_bytes = _QUICK_STREAM_BYTES if quick else _STREAM_BYTES
    file_count = _QUICK_FILES if quick else _FILES
    cell = target.cell
    path = target.warm() / "stream.bin"
    block = os.urandom(MIB)
    with path.open("wb", buffering=0) as file:
        for _ in range(stream_bytes // MIB):
            file.write(block)
    with cold_view(target) as view:
        reader_pid = next(mount.pid for mount in cell.mounts.values() if mount.mountpoint == view)
        buffer = bytearray(MIB)
        with (view / path.name).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        reader = _resident_mib(reader_pid)
    writer = _resident_mib(cell.mounts["m1"].pid)
    path.unlink()
    for number in range(file_count):
        folder = target.warm() / f"many{number // _FILES_PER_FOLDER}"
        if number % _FILES_PER_FOLDER == 0:
            folder.mkdir()
        os.close(os.open(folder / f"f{number}", os.O_CREAT | os.O_WRONLY, 0o644))
    assert cell.server_pid is not None
    server = _resident_mib(cell.server_pid)
    return Memory(stream_bytes // MIB, *writer, *reader, file_count, *server)


def table(memory: Memory) -> Table:
    made = Table(title="Resident memory, MiB", title_justify="left")
    made.add_column("process")
    made.add_column("now", justify="right")
    made.add_column("highest", justify="right")
    streamed = f"mount, after {memory.streamed_mib} MiB"
    made.add_row(f"{streamed} written", f"{memory.writer_mount_rss:.0f}", f"{memory.writer_mount_peak:.0f}")
    made.add_row(f"{streamed} read", f"{memory.reader_mount_rss:.0f}", f"{memory.reader_mount_peak:.0f}")
    made.add_row(f"server, with {memory.files:,} files", f"{memory.server_rss:.0f}", f"{memory.server_peak:.0f}")
    return made
