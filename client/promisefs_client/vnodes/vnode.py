"""What the client knows of one vnode. Core: no I/O, no clock."""

from __future__ import annotations

from promisefs_protocol.ids import Fid, Status

from promisefs_client.data.contents import FileContents
from promisefs_client.fuse.kernel_size import KernelSize
from promisefs_client.identity.key import Credentials, Key
from promisefs_client.network.servers import Server

from .volumes import Volume

Version = tuple[int, int]

Access = tuple[tuple[Credentials, int], ...]
"""Pairs of credentials and `Rights`, with SUPERUSER and OWNER. Thousands of vnodes share one."""

ROOT_INO = 1
VOLUME_SHIFT = 40


def ino_of(fid: Fid) -> int:
    """The inode number of a fid: computed, so it stays the same for ever. Vnode numbers are never used twice."""
    return fid.volume << VOLUME_SHIFT | fid.vnode


class DirectoryNames:
    """Names of one directory, as far as they were told, all at one data version.

    `entries` holds None for a name known not to exist. `complete`: every name that exists is here.
    """

    __slots__ = ("complete", "entries", "version")

    def __init__(self, version: Version) -> None:
        self.version = version
        self.entries: dict[bytes, Fid | None] = {}
        self.complete = False

    def knows(self, name: bytes) -> bool:
        return self.complete or name in self.entries


class Vnode:
    """One file, directory or symlink.

    Fields are changed only by `VnodeTable` and, for contents, `FileStore`.
    """

    __slots__ = (
        "access",
        "append_opens",
        "contents",
        "deleted",
        "fid",
        "ino",
        "kept",
        "kernel_pages",
        "kernel_size",
        "lookups",
        "lost",
        "names",
        "openers",
        "opens",
        "own_versions",
        "parent",
        "pending_mtime_ns",
        "promise_until",
        "read_write_opens",
        "rights_of_anyone",
        "shown_at",
        "status",
        "target",
        "volume",
        "written_ns",
    )

    def __init__(self, fid: Fid, volume: Volume, ino: int, status: Status) -> None:
        self.fid = fid
        self.volume = volume
        self.ino = ino
        self.status = status
        self.promise_until = 0.0  # client's monotonic clock; 0: no promise
        self.access: Access = ()  # who may do what, as far as it is known; good as long as the promise
        self.rights_of_anyone = 0  # the same of everybody
        self.openers: list[Key] = []  # of each handle, who opened it
        self.lookups = 0  # references the kernel holds
        self.opens = 0  # handles the kernel holds; a mapping keeps its handle open until the last munmap
        self.read_write_opens = 0  # of these, those that a writable shared mapping may belong to
        self.append_opens = 0  # of these, those that write(2) appends through
        self.kernel_pages = False  # the kernel may have pages of this file
        self.deleted = False  # the last name is gone; lives on through open handles
        self.kept = False  # deleted, but the server keeps it for us until GiveUpOpen
        self.lost = False  # dirty bytes had to be thrown away: the file was gone at the server
        self.parent: Fid | None = None  # of a directory: what '..' is
        self.contents: FileContents | None = None  # present iff a regular file was opened or read
        self.names: DirectoryNames | None = None  # present iff a directory and some names are known
        self.target: bytes | None = None  # of a symlink; never changes
        self.pending_mtime_ns: int | None = None  # present iff contents are dirty: what the kernel is told meanwhile
        self.written_ns: int | None = None  # present iff contents are dirty: goes out with the store
        self.shown_at: int | None = None  # offset of a byte that was put into the kernel's page cache, unasked
        self.kernel_size = KernelSize()
        self.own_versions: set[int] = set()  # data versions our stores made, ahead of the label (replies out of order)

    def rights_of(self, credentials: Credentials) -> int | None:
        """What the holder of a key may do, if the promise is good and this is known."""
        for who, rights in self.access:
            if who is credentials:
                return rights
        return None

    @property
    def server(self) -> Server:
        """Whose promise it is."""
        return self.volume.server

    @property
    def size(self) -> int:
        """Size as seen through this mount: the server's, extended by what is not stored yet."""
        if self.contents is None:
            return self.status.size
        return max(self.status.size, self.contents.dirty_end)

    @property
    def is_dirty(self) -> bool:
        return self.contents is not None and self.contents.is_dirty

    @property
    def in_use(self) -> bool:
        """The kernel refers to it, or it holds data the server does not have."""
        return self.lookups > 0 or self.opens > 0 or self.is_dirty
