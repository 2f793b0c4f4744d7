"""Mounts of this machine, as other processes see them: finding them, asking them, ending them."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from typing import Any, NamedTuple

from .errors import ExitCode, UserError
from .xattrs import STATUS

FUSE_TYPE = "fuse.promisefs"
STATUS_WAIT_S = 5.0
STORE_WAIT_S = 30.0
EXIT_WAIT_S = 60.0


class MountEntry(NamedTuple):
    mountpoint: str
    source: str


def list_mounts() -> list[MountEntry]:
    """Every promisefs mount in this mount namespace (proc_pid_mountinfo(5))."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields, _, rest = line.partition(" - ")
            kind, source, _ = rest.split(" ", 2)
            if kind == FUSE_TYPE:
                found.append(MountEntry(_unescape(fields.split(" ")[4]), _unescape(source)))
    return found


def _unescape(text: str) -> str:
    for code in ("040", "011", "012", "134"):
        text = text.replace("\\" + code, chr(int(code, 8)))
    return text


def find_mount(path: str) -> MountEntry:
    """The mount at exactly this path, without touching it: it may hang. Raise UserError."""
    parent, name = os.path.split(os.path.abspath(path))
    wanted = os.path.join(os.path.realpath(parent), name)
    for entry in list_mounts():
        if entry.mountpoint in (wanted, os.path.abspath(path)):
            return entry
    raise UserError(f"{path} is not a promisefs mount; 'promisefs status' lists them", ExitCode.MOUNTPOINT)


def fetch_status(entry: MountEntry) -> dict[str, Any]:
    """Ask the process behind a mount. Raise UserError if it does not answer."""
    answer: list[bytes | OSError] = []

    def ask() -> None:
        try:
            answer.append(os.getxattr(entry.mountpoint, STATUS))
        except OSError as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(STATUS_WAIT_S)
    if not answer:
        raise UserError(f"{entry.mountpoint} does not answer: it waits for its server, hangs or is stopped")
    if isinstance(answer[0], OSError):
        raise UserError(f"{entry.mountpoint}: {answer[0].strerror}: is its process dead? 'fusermount3 -u' removes it")
    status: dict[str, Any] = json.loads(answer[0])
    return status


def unmount(entry: MountEntry, force: bool) -> None:
    """Wait until nothing is dirty, unmount, wait until the process has ended. Raise UserError.

    `force`: unmount even with data that cannot be stored, or while in use (lazily).
    """
    pid: int | None = None
    try:
        pid = _wait_until_stored(entry, force)
    except UserError:
        if not force:
            raise
    command = ["fusermount3", "-u", *(["-z"] if force else []), entry.mountpoint]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("fusermount3: ")
        raise UserError(f"{reason}: close what uses it, or --force", ExitCode.BUSY)
    deadline = time.monotonic() + EXIT_WAIT_S
    while pid is not None and _runs(pid):
        if time.monotonic() > deadline:
            raise UserError(f"unmounted, but process {pid} has not ended yet", ExitCode.BUSY)
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie, which whoever should reap it may leave for long (proc_pid_stat(5))."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until_stored(entry: MountEntry, force: bool) -> int:
    deadline = time.monotonic() + STORE_WAIT_S
    while True:
        status = fetch_status(entry)
        if not status["dirty_bytes"] or force:
            return int(status["pid"])
        if time.monotonic() > deadline:
            raise UserError(
                f"{entry.mountpoint} holds {status['dirty_bytes']} bytes that are not stored: "
                "is the server reachable? --force gives them up",
                ExitCode.BUSY,
            )
        time.sleep(0.2)
