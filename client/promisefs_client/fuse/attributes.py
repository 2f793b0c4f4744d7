"""What the kernel is told of a vnode: attributes, and how long it may keep them."""

from __future__ import annotations

import stat

import pyfuse3

from promisefs_client.vnodes.vnode import Vnode

BLOCK_SIZE_HINT = 131072
"""st_blksize: tools copy in pieces of this size."""

MTIME_LAG_NS = 1_000_000_000
"""While a file is written to, its mtime goes up in steps of this: at each the kernel drops the file's pages."""


def attributes_of(vnode: Vnode, attr_timeout_s: float, entry_timeout_s: float) -> pyfuse3.EntryAttributes:
    """The stat of a vnode as seen through this mount, its own unstored writes included.

    While a file is dirty its attributes are for now only: the store will change them. A mount point, which only
    listings show, is a directory.
    """
    status = vnode.status
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = vnode.ino
    entry.generation = vnode.fid.uniquifier
    entry.st_mode = status.mode
    entry.st_nlink = status.nlink
    if status.is_mount_point:
        entry.st_mode = stat.S_IFDIR | stat.S_IMODE(status.mode)
        entry.st_nlink = 2
    entry.st_uid = status.uid
    entry.st_gid = status.gid
    entry.st_blksize = BLOCK_SIZE_HINT
    entry.st_atime_ns = status.atime_ns
    entry.entry_timeout = entry_timeout_s
    if vnode.pending_mtime_ns is not None and vnode.written_ns is not None:
        if vnode.written_ns >= vnode.pending_mtime_ns + MTIME_LAG_NS:
            vnode.pending_mtime_ns = vnode.written_ns
    pending = vnode.pending_mtime_ns
    if pending is None:
        entry.st_size = status.size
        entry.st_blocks = (status.allocated + 511) // 512
        entry.st_mtime_ns = status.mtime_ns
        entry.st_ctime_ns = status.ctime_ns
        entry.attr_timeout = attr_timeout_s
    else:
        size = vnode.size
        entry.st_size = size
        entry.st_blocks = (status.allocated + max(0, size - status.size) + 511) // 512
        entry.st_mtime_ns = pending
        entry.st_ctime_ns = max(status.ctime_ns, pending)
        entry.attr_timeout = 0
    vnode.kernel_size.told(entry.st_size)
    return entry


def dot_attributes(ino: int) -> pyfuse3.EntryAttributes:
    """For '.' and '..' in a listing, of which the kernel takes the number and the type only."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = ino
    entry.st_mode = stat.S_IFDIR
    entry.entry_timeout = entry.attr_timeout = 0
    return entry


def no_such_name(timeout_s: float) -> pyfuse3.EntryAttributes:
    """A negative entry: the kernel may answer ENOENT by itself for this long."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = timeout_s
    return entry
