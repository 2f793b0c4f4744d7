"""Mounts of this machine as the kernel lists them. Nothing here touches a mount: it may hang."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from promisefs_client.errors import ExitCode, UserError

FUSE_TYPE = "fuse.promisefs"
MAX_LINKS = 40
"""Symbolic links that are followed one after the other, as by the kernel."""


class MountEntry(NamedTuple):
    """One line of mountinfo. Several may have one device: bind mounts, and copies in other namespaces."""

    mount_id: int
    parent_id: int
    device: str
    """major:minor, by which a mount is known wherever it is moved; used again once the mount has ended."""
    root: str
    """Which directory of the file system is mounted: "/", or another one for a bind mount."""
    mountpoint: str
    kind: str
    source: str
    owner: int
    """uid of who mounted it; means something for FUSE only."""
    shared: bool = False
    """Whether it was mounted with allow_other."""

    def usable_by(self, uid: int) -> bool:
        return self.shared or uid in (0, self.owner)


def _read_mountinfo(pid: int | str) -> list[MountEntry]:
    """proc_pid_mountinfo(5)"""
    entries = []
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            mount, _, filesystem = line.rstrip("\n").partition(" - ")
            mount_id, parent_id, device, root, mountpoint = mount.split(" ")[:5]
            kind, source, options = filesystem.split(" ", 2)
            owner = re.search(r"(?:^|,)user_id=(\d+)", options)
            uid = int(owner[1]) if owner else 0
            entries.append(
                MountEntry(
                    int(mount_id),
                    int(parent_id),
                    device,
                    _unescape(root),
                    _unescape(mountpoint),
                    kind,
                    _unescape(source),
                    uid,
                    bool(re.search(r"(?:^|,)allow_other(?:,|$)", options)),
                )
            )
    return entries


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def list_mounts(pid: int | str = "self") -> list[MountEntry]:
    """Every promisefs mount in the mount namespace of a process. Raise OSError if it may not be looked at."""
    return [entry for entry in _read_mountinfo(pid) if entry.kind == FUSE_TYPE]


def fusectl() -> str | None:
    """Where the kernel's control of FUSE connections is mounted, usually /sys/fs/fuse/connections; None if nowhere."""
    return next((entry.mountpoint for entry in _read_mountinfo("self") if entry.kind == "fusectl"), None)


def uppermost_at(mountpoint: str) -> MountEntry | None:
    """What is mounted at exactly this path, with nothing over it there."""
    entries = [entry for entry in _read_mountinfo("self") if entry.mountpoint == mountpoint]
    covered = {entry.parent_id for entry in entries}
    return next((entry for entry in entries if entry.mount_id not in covered), None)


def find_mount(path: str) -> MountEntry:
    """The promisefs mount at exactly this path, uppermost there; a path may end in symbolic links. Raise UserError."""
    try:
        place = os.path.abspath(path)
    except FileNotFoundError:
        raise UserError(f"{path}: the working directory has been removed", ExitCode.MOUNTPOINT) from None
    if found := _promisefs_at(place):
        return found
    for _ in range(MAX_LINKS):
        parent, name = os.path.split(place)
        place = os.path.join(os.path.realpath(parent), name)
        if found := _promisefs_at(place):
            return found
        # Looking at what is mounted on might hang.
        if uppermost_at(place) is not None or not os.path.islink(place):
            break
        place = os.path.normpath(os.path.join(os.path.dirname(place), os.readlink(place)))
    raise UserError(f"{path} is not a promisefs mount; 'promisefs status' lists them", ExitCode.MOUNTPOINT)


def _promisefs_at(mountpoint: str) -> MountEntry | None:
    entry = uppermost_at(mountpoint)
    return entry if entry is not None and entry.kind == FUSE_TYPE else None


def device_of(fuse_fd: int, mountpoint: str) -> str:
    """The device of the mount that this descriptor of /dev/fuse serves, just mounted at `mountpoint`.

    Kernels before 6.16 do not tell it; then it is what is uppermost there. Raise UserError if nothing is.
    """
    with open(f"/proc/self/fdinfo/{fuse_fd}", encoding="ascii") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key == "fuse_connection":
                number = int(value)  # as the kernel has it inside: MAJOR() and MINOR() of linux/kdev_t.h
                return f"{number >> 20}:{number & 0xFFFFF}"
    return find_mount(mountpoint).device
