"""Ranges of data files: reserved, made zeros, copied, looked through for holes. All of it is for threads.

None of this changes the length of a data file but `copy`: what lies behind its end is zeros.
"""

from __future__ import annotations

import ctypes
import errno
import os

from promisefs_protocol.messages import FallocateMode

from .datafiles import DataFile

PIECE_BYTES = 1 << 20
"""What is written or copied at a time where the disk's file system has no better way."""
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_NO_COPY = (*_UNSUPPORTED, errno.EXDEV, errno.EINVAL)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def allocate(file: DataFile, offset: int, length: int) -> None:
    """Reserve room on the disk for the range; bytes stay what they are. Raise OSError."""
    _fallocate(file, FallocateMode.KEEP_SIZE, offset, length)


def punch(file: DataFile, offset: int, length: int) -> None:
    """Make the range zeros, which take no room if the disk's file system can do that. Raise OSError."""
    if not _try_fallocate(file, FallocateMode.PUNCH_HOLE, offset, length):
        _write_zeros(file, offset, length)


def zero(file: DataFile, offset: int, length: int) -> None:
    """Make the range, which has room on the disk, zeros that keep it. Raise OSError."""
    if not _try_fallocate(file, FallocateMode.ZERO_RANGE, offset, length):
        _write_zeros(file, offset, length)


def copy(source: DataFile | None, source_offset: int, target: DataFile, offset: int, length: int) -> None:
    """Copy bytes of one data file, none being all zeros, to another, or to another range of it. Raise OSError.

    They share the room on the disk afterwards if its file system can do that.
    """
    while length and source is not None:
        copied = _copy_some(source.descriptor, source_offset, target.descriptor, offset, length)
        if not copied:
            break
        source_offset, offset, length = source_offset + copied, offset + copied, length - copied
    if length:
        punch(target, offset, length)


def seek(file: DataFile, offset: int, size: int, *, hole: bool) -> int | None:
    """Return the offset of the next data, or of the next hole, in a file of that size which reaches beyond `offset`.

    None if there is no more data.
    """
    try:
        found = os.lseek(file.descriptor, offset, os.SEEK_HOLE if hole else os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        found = offset if hole else size  # behind the data file's end
    if hole:
        return min(found, size)
    return found if found < size else None


def _fallocate(file: DataFile, mode: FallocateMode, offset: int, length: int) -> None:
    while _libc.fallocate64(file.descriptor, mode | FallocateMode.KEEP_SIZE, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _try_fallocate(file: DataFile, mode: FallocateMode, offset: int, length: int) -> bool:
    """Return whether the disk's file system can do that."""
    try:
        _fallocate(file, mode, offset, length)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _write_zeros(file: DataFile, offset: int, length: int) -> None:
    end = min(offset + length, os.fstat(file.descriptor).st_size)
    while offset < end:
        piece = min(PIECE_BYTES, end - offset)
        file.write(bytes(piece), offset)
        offset += piece


def _copy_some(source: int, source_offset: int, target: int, offset: int, length: int) -> int:
    """Return how many bytes were copied; 0 at the source's end."""
    try:
        return os.copy_file_range(source, target, length, source_offset, offset)
    except OSError as error:
        if error.errno not in _NO_COPY:
            raise
    data = os.pread(source, min(length, PIECE_BYTES), source_offset)
    return os.pwrite(target, data, offset) if data else 0
