"""Where the processes of one user on this machine find each other: directories that nobody else can use.

They are opened first and checked then, and what is in them is reached through the descriptor: nobody can put another
one in between. A path through the descriptor is short, too, whatever the directory's is (sun_path has 108 bytes).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class NotPrivate(Exception):
    """Others could have put the directory there, or could change what is in it."""


def directories(owner: int) -> list[str]:
    """Those of this user, best first."""
    if owner == 0:
        places = ["/run"]
    else:
        own = os.environ.get("XDG_RUNTIME_DIR", "") if owner == os.geteuid() else ""
        places = [own] if own else []
        if f"/run/user/{owner}" not in places:
            places.append(f"/run/user/{owner}")
    return [*(f"{place}/promisefs" for place in places), f"/tmp/promisefs-{owner}"]


@contextmanager
def opened(directory: str, owner: int, others_may: int = 0) -> Iterator[str]:
    """Give a path through a descriptor of the directory. Raise OSError, NotPrivate.

    `others_may`: mode bits of group and others that it may have.

    /tmp is everybody's: a link, a directory of somebody else's or one that others can write is not used.
    """
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != owner or stat.S_IMODE(found.st_mode) & 0o077 & ~others_may:
            raise NotPrivate(f"{directory} is not a directory that only uid {owner} can use: remove it")
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def write_private(directory: str, name: str, content: bytes) -> None:
    """Have the file hold this, or what it held before, at every moment; nobody else can read it.

    The directory is made if need be. Raise OSError, NotPrivate.
    """
    owner = os.geteuid()
    with suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    with opened(directory, owner) as place:
        new = f"{place}/{name}.{os.getpid()}.new"
        with suppress(FileNotFoundError):
            os.unlink(new)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, content)
        finally:
            os.close(descriptor)
        os.rename(new, f"{place}/{name}")


def read_private(directory: str, name: str, owner: int, limit_bytes: int) -> bytes | None:
    """What a file holds that only its owner can have written and read; None if there is none. Raise NotPrivate."""
    try:
        with opened(directory, owner) as place:
            descriptor = os.open(f"{place}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode) or found.st_uid != owner or stat.S_IMODE(found.st_mode) & 0o077:
                    raise NotPrivate(f"{directory}/{name} is not a file that only uid {owner} can use: remove it")
                return os.read(descriptor, limit_bytes)
            finally:
                os.close(descriptor)
    except OSError:
        return None
