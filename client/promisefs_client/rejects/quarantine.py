"""The quarantine: a directory where bytes are kept that no server took.

    DIRECTORY/SOURCE/EVENT-NUMBER.reject      mode 0700, 0600; SOURCE is what was mounted, escaped

A reject is on disk, with its name, when `keep` returns. Several mounts of one source share its directory: names never
collide, and a reject that another process has just removed is no error.

Bounds: `limit_bytes` for each source, and `max_age_s`. Beyond either the oldest go, with a line in the log; what is
being kept never does, so a single reject may exceed the limit.
"""

from __future__ import annotations

import itertools
import logging
import os
import stat
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .reject import MAGIC, MAX_HEADER_BYTES, NoReject, Reject, decode_header, encode_header

log = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 1 << 30
DEFAULT_MAX_AGE_S = 30 * 86400.0
SUFFIX = ".reject"
LOOK_AGAIN_S = 60.0
"""Others may have added to the directory: it is looked through after this at the latest, when something is kept."""


def default_directory() -> Path:
    """Where this user's rejects are kept unless told otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/promisefs/rejects")
    state = os.environ.get("XDG_STATE_HOME", "")
    return Path(state if os.path.isabs(state) else os.path.expanduser("~/.local/state")) / "promisefs" / "rejects"


@dataclass(frozen=True, slots=True)
class KeptReject:
    """A reject that is in the quarantine."""

    reject: Reject
    file: Path
    bytes_at: int
    """Where its bytes begin in the file."""

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """Give (offset, bytes) of each range. Raise OSError, NoReject if the file is cut."""
        with open(self.file, "rb") as file:
            file.seek(self.bytes_at)
            for offset, length in self.reject.ranges:
                data = file.read(length)
                if len(data) != length:
                    raise NoReject(f"{self.file} is cut")
                yield offset, data


class Quarantine:
    """That of one source; its methods block, and may run in several threads at once."""

    def __init__(
        self,
        directory: Path,
        source: str,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        max_age_s: float = DEFAULT_MAX_AGE_S,
    ) -> None:
        self.directory = directory
        self._folder = directory / urllib.parse.quote(source, safe="")
        self._limit_bytes = limit_bytes
        self._max_age_s = max_age_s
        self._numbers = itertools.count()
        self._known_bytes = 0
        self._looked_at = -LOOK_AGAIN_S

    def prepare(self) -> None:
        """Make the directory if need be. Raise OSError if it cannot be used, or others can look into it."""
        _make_private(self.directory)
        _make_private(self._folder)

    def keep(self, reject: Reject, pieces: Iterable[bytes | bytearray]) -> None:
        """Have the reject on disk. Raise OSError, with nothing left behind."""
        self.prepare()
        header = encode_header(reject)
        self._make_room(len(header) + reject.size_bytes)
        final = self._folder / f"{reject.event}-{os.getpid()}.{next(self._numbers)}{SUFFIX}"
        new = final.with_suffix(".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(header)
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, final)
        except BaseException:
            with suppress(OSError):
                os.unlink(new)
            raise
        _sync_directory(self._folder)

    def _make_room(self, size_bytes: int) -> None:
        now_s = time.monotonic()
        self._known_bytes += size_bytes
        if self._known_bytes <= self._limit_bytes and now_s - self._looked_at < LOOK_AGAIN_S:
            return
        self._looked_at = now_s
        there: list[tuple[float, int, Path]] = []
        for file in self._folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):
                found = file.stat()
                there.append((found.st_mtime, found.st_size, file))
        there.sort()
        total = size_bytes + sum(size for _, size, _ in there)
        oldest_s = time.time() - self._max_age_s
        gone = gone_bytes = 0
        for changed_s, size, file in there:
            if changed_s >= oldest_s and total <= self._limit_bytes:
                break
            with suppress(FileNotFoundError):
                file.unlink()
            total -= size
            gone += 1
            gone_bytes += size
        if gone:
            log.warning("%s: the %d oldest rejects are gone, %d bytes: they were too many or too old",
                        self._folder, gone, gone_bytes)  # fmt: skip
        self._known_bytes = total


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        found = os.stat(directory)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise PermissionError(
                f"{directory} is not a directory that only uid {os.geteuid()} can use (mode 0700)"
            ) from None
    else:
        _sync_directory(directory.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def kept_in(directory: Path) -> tuple[list[KeptReject], list[str]]:
    """All rejects of all sources below a directory, oldest first; and what is wrong with files that are none."""
    rejects: list[KeptReject] = []
    problems: list[str] = []
    for file in directory.glob(f"*/*{SUFFIX}"):
        try:
            rejects.append(_read(file))
        except FileNotFoundError:
            continue
        except (OSError, NoReject) as error:
            problems.append(f"{file}: {error}")
    rejects.sort(key=lambda kept: (kept.reject.at_ns, kept.file))
    return rejects, problems


def _read(file: Path) -> KeptReject:
    with open(file, "rb") as opened:
        if opened.readline(len(MAGIC)) != MAGIC:
            raise NoReject("not in the format that this version knows")
        reject = decode_header(opened.readline(MAX_HEADER_BYTES))
        bytes_at = opened.tell()
        if os.fstat(opened.fileno()).st_size != bytes_at + reject.size_bytes:
            raise NoReject("its bytes are not all there")
    return KeptReject(reject, file, bytes_at)


def discard(rejects: Sequence[KeptReject]) -> None:
    """Delete rejects. Raise OSError."""
    for kept in rejects:
        with suppress(FileNotFoundError):
            kept.file.unlink()
