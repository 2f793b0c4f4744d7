"""Leaves the token of whoever runs this server where their mounts on this machine find it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from promisefs_protocol.local_server import LocalServer, file_name
from promisefs_protocol.runtime_directory import NotPrivate, directories, opened, write_private

log = logging.getLogger(__name__)


@contextmanager
def left_for_mounts(store: bytes, server: LocalServer) -> Iterator[None]:
    """Have it there within the context. If no directory can be used there is a log line, and people have to log in."""
    directory = _write(file_name(store), server.to_bytes())
    try:
        yield
    finally:
        if directory is not None:
            _remove(directory, file_name(store), server.to_bytes())


def _write(name: str, content: bytes) -> str | None:
    problems = []
    for directory in directories(os.geteuid()):
        try:
            write_private(directory, name, content)
            return directory
        except (OSError, NotPrivate) as error:
            problems.append(f"{directory}: {error}")
    log.warning("mounts on this machine have to log in: no place for this server's token: %s", "; ".join(problems))
    return None


def _remove(directory: str, name: str, content: bytes) -> None:
    with suppress(OSError, NotPrivate), opened(directory, os.geteuid()) as place:
        with open(f"{place}/{name}", "rb") as file:
            if file.read() != content:
                return  # another run of the server has begun
        os.unlink(f"{place}/{name}")
