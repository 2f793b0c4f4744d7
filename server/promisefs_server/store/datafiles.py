"""Data files: the bytes of regular files, one file each, made at the first store.

A data file may be shorter than its vnode's size (the rest is zeros) or, after a crash, longer (the rest is garbage):
the size in the database decides. All methods but `allocated_bytes` and `read_cached` may block and are for threads;
`pin` and `unpin` keep a descriptor open meanwhile and belong to the trio thread.

Files lie at FOLDER/<volume>/<number / 4096>/<number>, in hexadecimal.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from .syncing import sync_path
from .volumes import VNODE_BITS, VNODE_MASK

log = logging.getLogger(__name__)

MAX_OPEN_FILES = 512
MAX_SINGLE_SYNCS = 256
"""From so many on, syncing the whole file system is thought to be faster."""
FOLDER_BITS = 12
"""A folder holds 2**12 files."""


class DataFile:
    """A descriptor, kept open while `pins` is not 0 and, least recently used last to go, after that."""

    __slots__ = ("descriptor", "discarded", "key", "pins")

    def __init__(self, key: int, descriptor: int) -> None:
        self.key = key
        self.descriptor = descriptor
        self.pins = 0
        self.discarded = False

    # For threads, while pinned

    def cut(self, size: int) -> None:
        """Drop bytes from `size` on; there are some."""
        os.ftruncate(self.descriptor, size)

    def write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self.descriptor, view, offset)
            if written == 0:
                raise OSError(errno.EIO, "a write that wrote nothing")
            view, offset = view[written:], offset + written

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` as far as the data file goes; the caller has zeroed it."""
        while buffer:
            count = os.preadv(self.descriptor, [buffer], offset)
            if count == 0:
                return
            buffer, offset = buffer[count:], offset + count

    def sync(self) -> None:
        os.fdatasync(self.descriptor)

    # For the trio thread: never waits for the disk

    def reaches_beyond(self, size: int) -> bool:
        return os.fstat(self.descriptor).st_size > size

    def read_cached(self, buffer: memoryview, offset: int) -> int:
        """Like `read_into`, but only what is in memory. Return how many bytes."""
        try:
            return os.preadv(self.descriptor, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return 0
            raise


class DataFiles:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[int, DataFile] = OrderedDict()
        self.unsynced: set[int] = set()
        """Written since the server started, and not synced since."""
        self.unsynced_folders: set[Path] = set()
        """Have new entries which are not synced."""

    def path(self, key: int) -> Path:
        number = key & VNODE_MASK
        return self._volume_folder(key >> VNODE_BITS) / f"{number >> FOLDER_BITS:x}" / f"{number:x}"

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def pin(self, key: int, *, create: bool) -> Iterator[DataFile | None]:
        """Have the data file open within the context; None if there is none and it is not to be made. Raise OSError."""
        file = self._open.get(key)
        if file is None:
            file = self._open_file(key, create)
            if file is None:
                yield None
                return
            self._open[key] = file
            self._evict()
        else:
            self._open.move_to_end(key)
        file.pins += 1
        try:
            yield file
        finally:
            file.pins -= 1
            if file.discarded and not file.pins:
                os.close(file.descriptor)

    def _open_file(self, key: int, create: bool) -> DataFile | None:
        path = self.path(key)
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return DataFile(key, os.open(path, flags))
        except FileNotFoundError:
            if not create:
                return None
        flags |= os.O_CREAT
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:
            for folder in (path.parent.parent, path.parent):
                if not folder.is_dir():
                    folder.mkdir(mode=0o700)
                    self.unsynced_folders.add(folder.parent)
            descriptor = os.open(path, flags, 0o600)
        self.unsynced_folders.add(path.parent)
        return DataFile(key, descriptor)

    def _evict(self) -> None:
        """Close the least recently used beyond the limit; pinned ones stay, so the limit may be passed for a while."""
        excess = len(self._open) - MAX_OPEN_FILES
        if excess > 0:
            unpinned = (key for key, file in self._open.items() if not file.pins)
            for key in list(itertools.islice(unpinned, excess)):
                os.close(self._open.pop(key).descriptor)

    def allocated_bytes(self, key: int) -> int:
        """What the data file takes on disk."""
        try:
            file = self._open.get(key)
            return (os.stat(self.path(key)) if file is None else os.fstat(file.descriptor)).st_blocks * 512
        except FileNotFoundError:
            return 0

    def discard(self, key: int) -> None:
        """The vnode is gone: let go of the descriptor. `delete` then frees the space."""
        self.unsynced.discard(key)
        file = self._open.pop(key, None)
        if file is None:
            return
        if file.pins:
            file.discarded = True
        else:
            os.close(file.descriptor)

    def discard_volume(self, volume: int) -> None:
        """As `discard`, for all vnodes of a volume."""
        for key in [key for key in self._open if key >> VNODE_BITS == volume]:
            self.discard(key)
        self.unsynced.difference_update([key for key in self.unsynced if key >> VNODE_BITS == volume])

    def delete(self, key: int) -> None:
        """Remove the data file if there is one. For threads."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(key))

    def close(self) -> None:
        for file in self._open.values():
            os.close(file.descriptor)
        self._open.clear()

    def sync_written(self) -> None:
        """Make durable what was written since the start. Pins nothing, so for the shutdown; for threads."""
        if len(self.unsynced) + len(self.unsynced_folders) > MAX_SINGLE_SYNCS:
            self.sync_all()
        else:
            for path in [*map(self.path, self.unsynced), *self.unsynced_folders]:
                with contextlib.suppress(FileNotFoundError):
                    sync_path(path)
        self.unsynced.clear()
        self.unsynced_folders.clear()

    def sync_all(self) -> None:
        """Make durable every byte and name below the folder. For threads; may take long."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.syncfs(descriptor) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(self.folder))
        finally:
            os.close(descriptor)

    # Whole volumes, and the sweep after a crash

    def folders(self) -> list[Path]:
        """Every folder of data files. For threads."""
        return [inner for outer in self.folder.iterdir() if outer.is_dir() for inner in _entries(outer)]

    def volume_folders(self, volume: int) -> list[Path]:
        """The folders of a volume's data files. For threads."""
        return [inner for inner in _entries(self._volume_folder(volume)) if inner.is_dir()]

    def delete_folder(self, folder: Path) -> None:
        """Remove a folder and the data files in it. What else is in it stays, and so does it. For threads."""
        for key in self.keys_in(folder):
            self.delete(key)
        _remove_empty(folder)

    def delete_volume_folder(self, volume: int) -> bool:
        """Remove a volume's folder, which should be empty, durably. Return whether there was one. For threads."""
        folder = self._volume_folder(volume)
        if not folder.exists():
            return False
        _remove_empty(folder)
        sync_path(self.folder)
        return True

    def _volume_folder(self, volume: int) -> Path:
        return self.folder / f"{volume:x}"

    def keys_in(self, folder: Path) -> list[int]:
        """The vnodes whose data files are in a folder. For threads. Names that are none of ours are passed over."""
        keys = []
        for path in folder.iterdir():
            try:
                key = int(folder.parent.name, 16) << VNODE_BITS | int(path.name, 16)
            except ValueError:
                continue
            if self.path(key) == path:
                keys.append(key)
        return keys


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        log.warning("%s stays, for there are things in it that promisefsd has not made", folder)
