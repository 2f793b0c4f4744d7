"""Which processes have files of a mount open or mapped, found in /proc without touching the mount.

/proc/PID/maps shows device and inode of each mapping. A stat of /proc/PID/fd/N would ask the mount's process, and so
may wait for a server; fdinfo shows the id of the mount and, since Linux 5.14, the inode.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from .mounts import list_mounts


class User(NamedTuple):
    pid: int
    command: str
    mappings: int
    descriptors: int


class Users(NamedTuple):
    by_inode: dict[int, list[User]]
    hidden: int
    """Processes that may not be looked into: other users' ones."""


def find_users(device: str) -> Users:
    """Everything that processes have open or mapped on one mount. A look at a moving target."""
    found: dict[int, list[User]] = {}
    hidden = 0
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    mount_ids = _mount_ids(pids, device)
    for pid in pids:
        try:
            mapped = _mapped_inodes(pid, device)
            opened = _open_inodes(pid, mount_ids)
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                command = comm.read().strip()
        except PermissionError:
            hidden += 1
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        else:
            for inode in sorted(mapped.keys() | opened.keys()):
                user = User(pid, command, mapped.get(inode, 0), opened.get(inode, 0))
                found.setdefault(inode, []).append(user)
    return Users(found, hidden)


def _mount_ids(pids: list[int], device: str) -> set[int]:
    """Under which ids mount namespaces have the mount; a descriptor keeps the one of where it was opened."""
    ids: set[int] = set()
    namespaces: set[str] = set()
    for pid in [os.getpid(), *pids]:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in namespaces:
                namespaces.add(namespace)
                ids.update(entry.mount_id for entry in list_mounts(pid) if entry.device == device)
        except OSError:
            continue  # ended, or hidden from us; those are counted later
    return ids


def _mapped_inodes(pid: int, device: str) -> dict[int, int]:
    """Inode -> number of mappings (proc_pid_maps(5))."""
    major, minor = map(int, device.split(":"))
    wanted = f"{major:02x}:{minor:02x}".encode()
    inodes: dict[int, int] = {}
    with open(f"/proc/{pid}/maps", "rb") as maps:
        for line in maps:
            _, _, _, on, inode, *_ = line.split(None, 5)
            if on == wanted:
                inodes[int(inode)] = inodes.get(int(inode), 0) + 1
    return inodes


def _open_inodes(pid: int, mount_ids: set[int]) -> dict[int, int]:
    """Inode -> number of descriptors (proc_pid_fdinfo(5))."""
    inodes: dict[int, int] = {}
    for number in os.listdir(f"/proc/{pid}/fdinfo"):
        inode = mount_id = 0
        try:
            with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as info:
                for line in info:
                    key, _, value = line.partition(":")
                    if key == "mnt_id":
                        mount_id = int(value)
                    elif key == "ino":
                        inode = int(value)
        except FileNotFoundError:
            continue  # closed meanwhile
        if mount_id in mount_ids and inode:
            inodes[inode] = inodes.get(inode, 0) + 1
    return inodes
