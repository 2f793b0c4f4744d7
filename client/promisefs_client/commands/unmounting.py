"""Ending a mount: from the terminal, and by its own process."""

from __future__ import annotations

import errno
import logging
import os
import select
import subprocess
import time

from promisefs_client.errors import ExitCode, UserError

from .control_client import MountIsSilent, ask, runs
from .mounts import MountEntry, list_mounts, uppermost_at

log = logging.getLogger(__name__)

EXIT_WAIT_S = 60.0
ENDING_WAIT_S = 3.0
"""When nobody has the mount any more its process knows at once."""
_FUSERMOUNT_WAIT_S = 30.0


def unmount(entry: MountEntry, force: bool, store_wait_s: float) -> None:
    """Wait until nothing is dirty, unmount, wait until the process has ended. Raise UserError.

    `force`: unmount even with data that cannot be stored, or while in use (lazily).
    """
    pid: int | None = None
    try:
        pid = _wait_until_stored(entry, force, store_wait_s)
    except UserError as error:
        if not force:
            raise
        pid = error.pid if isinstance(error, MountIsSilent) else None
    _fusermount(entry.mountpoint, lazily=force)
    if any(other.device == entry.device for other in list_mounts()):
        return  # it is mounted elsewhere, too: bound there, or under another mount
    began = time.monotonic()
    while pid is not None and runs(pid):
        waited_s = time.monotonic() - began
        if waited_s > EXIT_WAIT_S:
            raise UserError(f"unmounted, but process {pid} has not ended yet", ExitCode.BUSY)
        if waited_s > ENDING_WAIT_S and _still_serves(entry):
            raise UserError(
                f"{entry.mountpoint} is unmounted here, but process {pid} goes on: it is in use, or still mounted in "
                "another mount namespace (of a container, or of a service)",
                ExitCode.BUSY,
            )
        time.sleep(0.02)


def _still_serves(entry: MountEntry) -> bool:
    """Whether the kernel has not ended the mount: when it has, its process lets nobody ask it any more."""
    try:
        ask(entry, "status")
    except UserError:
        return False
    return True


def _fusermount(mountpoint: str, lazily: bool) -> None:
    """Unmount what is uppermost there. Raise UserError."""
    command = ["fusermount3", "-u", *(["-z"] if lazily else []), "--", mountpoint]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FUSERMOUNT_WAIT_S, env=environment)
    except FileNotFoundError:
        raise UserError("fusermount3 is missing: install the package fuse3", ExitCode.FUSE) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{mountpoint}: fusermount3 hangs", ExitCode.BUSY) from None
    if done.returncode:
        reason = done.stderr.strip().removeprefix("fusermount3: ")
        if os.strerror(errno.EBUSY) in reason:
            raise UserError(f"{reason}: close what uses it, or --force", ExitCode.BUSY)
        raise UserError(reason or f"{mountpoint}: fusermount3 failed", ExitCode.FAILURE)


def _wait_until_stored(entry: MountEntry, force: bool, wait_s: float) -> int:
    deadline = time.monotonic() + wait_s
    while True:
        status = ask(entry, "status")
        if not status["dirty_bytes"] or force:
            return int(status["pid"])
        if time.monotonic() > deadline:
            away = "" if status["connected"] else ", the server is away"
            raise UserError(
                f"{entry.mountpoint} holds {status['dirty_bytes']} bytes that are not stored after {wait_s:g} s{away}: "
                "--force gives them up, but for what it can still quarantine (promisefs rejects)",
                ExitCode.BUSY,
            )
        time.sleep(0.2)


def is_unmounted(fuse_fd: int) -> bool:
    """Whether the kernel has ended the mount that this descriptor of /dev/fuse serves."""
    poll = select.poll()
    poll.register(fuse_fd, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def unmount_own(device: str) -> None:
    """Unmount what the calling process served until now, wherever it has been moved to, and nothing else."""
    for entry in list_mounts():
        if entry.device != device:
            continue
        if uppermost_at(entry.mountpoint) != entry:
            log.warning("%s cannot be unmounted: something is mounted over it", entry.mountpoint)
            continue
        try:
            _fusermount(entry.mountpoint, lazily=True)
        except UserError as error:
            log.warning("%s", error)
