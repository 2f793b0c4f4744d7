"""Which files are open or may be mapped, and what they are called, as far as is known. Core: no I/O."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from promisefs_protocol.ids import Fid

from promisefs_client.vnodes.vnode import Vnode
from promisefs_client.vnodes.vnode_table import VnodeTable

MAX_LISTED = 10_000
"""More are counted, not listed."""
MAX_DEPTH = 4096
"""Longer paths are shown from there on."""


def open_files_report(table: VnodeTable, now: float) -> dict[str, Any]:
    """What `promisefs status --mmaps --json` says of a mount, but for the processes.

    `path` begins with "/", the root of the mount, or with "?/" where its beginning is not known; "?" is not known at
    all. `outlives_close`: no descriptor that was opened is left, so a mapping, or a duplicate, keeps the file open.
    """
    files = list(table.open_mmaps.files(now))
    listed = files[:MAX_LISTED]
    paths = known_paths(table, [file.vnode for file in listed])
    return {
        "files": [
            {
                "path": os.fsdecode(paths[file.vnode.fid]),
                "fid": str(file.vnode.fid),
                "inode": file.vnode.ino,
                "opens": file.opens,
                "outlives_close": file.outlives_close,
                "deleted": file.vnode.deleted,
                "promised": table.valid(file.vnode, now),
                "dirty": file.vnode.is_dirty,
            }
            for file in listed
        ],
        "omitted": len(files) - len(listed),
    }


def known_paths(table: VnodeTable, vnodes: Iterable[Vnode]) -> dict[Fid, bytes]:
    """What the vnodes are called, by the names that directories cache. One of them, if there are several."""
    wanted = {vnode.fid for vnode in vnodes}
    homes: dict[Fid, tuple[Vnode, bytes]] = {}
    for directory in table:
        if directory.names is not None:
            for name, fid in directory.names.entries.items():
                if fid in wanted:
                    homes[fid] = directory, name
    paths = {}
    for fid in wanted:
        if fid in homes:
            directory, name = homes[fid]
            paths[fid] = _path_of(table, directory) + b"/" + name
        else:
            paths[fid] = b"?"
    return paths


def _path_of(table: VnodeTable, directory: Vnode) -> bytes:
    """The path of a directory, empty for the mount's root."""
    names: list[bytes] = []
    while directory.fid != table.root_fid:
        parent = None if directory.parent is None else table.get(directory.parent)
        name = None if parent is None else _name_in(table, parent, directory)
        if parent is None or name is None or len(names) == MAX_DEPTH:
            names.append(b"?")
            break
        names.append(name)
        directory = parent
    else:
        names.append(b"")
    return b"/".join(reversed(names))


def _name_in(table: VnodeTable, parent: Vnode, directory: Vnode) -> bytes | None:
    entries = {} if parent.names is None else parent.names.entries
    for name, fid in entries.items():
        if fid == directory.fid or (fid is not None and _stands_for(table.get(fid), directory)):
            return name
    return None


def _stands_for(vnode: Vnode | None, directory: Vnode) -> bool:
    """Whether it is a mount point of the volume whose root that directory is."""
    volume = directory.volume
    return (
        vnode is not None
        and vnode.status.is_mount_point
        and directory.fid == volume.root
        and vnode.target == volume.name.encode()
    )
