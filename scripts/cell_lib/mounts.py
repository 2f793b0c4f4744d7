"""FUSE mounts as the kernel lists them, and how to get rid of one that hangs.

Nothing here touches a mountpoint (a stat on a hung mount never returns): paths are compared as text, and
the connection number, which is the minor number of st_dev, comes from mountinfo.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FUSECTL = Path("/sys/fs/fuse/connections")
_COMMAND_S = 10.0


@dataclass(frozen=True, slots=True)
class FuseMount:
    mountpoint: Path
    connection: int
    """Its number under fusectl."""
    kind: str
    """The file system type, such as fuse.promisefs."""


def _unescape(field: str) -> str:
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(field))
    return os.fsdecode(raw)


def fuse_mounts() -> list[FuseMount]:
    found = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")[0]
        if kind.split(".")[0] in ("fuse", "fuseblk"):
            found.append(FuseMount(Path(_unescape(fields[4])), int(fields[2].split(":")[1]), kind))
    return found


def fuse_mount_at(mountpoint: Path) -> FuseMount | None:
    """What is mounted at exactly this (resolved) path, on top."""
    return next((mount for mount in reversed(fuse_mounts()) if mount.mountpoint == mountpoint), None)


def fuse_mounts_below(directory: Path) -> list[FuseMount]:
    """Mounts at or below a (resolved) directory, the last mounted first."""
    return [mount for mount in reversed(fuse_mounts()) if mount.mountpoint.is_relative_to(directory)]


def _run(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=_COMMAND_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def abort_connection(number: int) -> bool:
    """End a FUSE connection: all that waits for its daemon gets ECONNABORTED. Return whether that was possible.

    Uses fusectl where it is mounted, else (as root) mounts it for the moment.
    """
    if _write_abort(FUSECTL / str(number) / "abort"):
        return True
    if os.geteuid() != 0 or FUSECTL.joinpath(str(number)).exists():
        return False
    with tempfile.TemporaryDirectory(prefix="promisefs-fusectl-") as directory:
        if not _run("mount", "-t", "fusectl", "none", directory):
            return False
        try:
            return _write_abort(Path(directory, str(number), "abort"))
        finally:
            _run("umount", "-l", directory)


def _write_abort(path: Path) -> bool:
    with suppress(OSError):
        path.write_text("1")
        return True
    return False


def unmount_lazily(mountpoint: Path) -> bool:
    if os.geteuid() == 0 and _run("umount", "-l", str(mountpoint)):
        return True
    return _run("fusermount3", "-u", "-z", str(mountpoint))


def force_unmount(mount: FuseMount) -> None:
    """The last resort: abort, then unmount lazily. What could not be done shows in `fuse_mounts`."""
    abort_connection(mount.connection)
    unmount_lazily(mount.mountpoint)


def why_fuse_is_unusable() -> str | None:
    """One line saying what is missing for FUSE mounts, or None."""
    if not os.path.exists("/dev/fuse"):
        return (
            "/dev/fuse is not there: modprobe fuse, or start the container with --device /dev/fuse --cap-add SYS_ADMIN"
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened by this user: chmod a+rw /dev/fuse, as root (udev does it where it runs)"
    return None
