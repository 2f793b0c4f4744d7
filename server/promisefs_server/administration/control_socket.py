"""The control socket: how commands on the same machine reach the server that uses a store.

DIR/control, a Unix socket of mode 0600. It is there while a server runs, and what a crash left of it goes at the next
start: only who holds the store's lock makes or removes it. The folder is named by a descriptor, since the path of a
Unix socket is limited to 107 bytes and that of a store is not.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import trio

CONTROL_NAME = "control"
MAX_WAITING = 16


@contextlib.contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{CONTROL_NAME}"
    finally:
        os.close(descriptor)


def listen(folder: Path) -> trio.SocketListener:
    """Make the socket anew. Raise OSError."""
    remove(folder)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_path(folder) as path:
            control.bind(path)
            # Until it listens, nobody can connect.
            os.chmod(path, 0o600)
        control.listen(MAX_WAITING)
        control.setblocking(False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(control))
    except BaseException:
        control.close()
        raise


def remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / CONTROL_NAME)


async def connect(folder: Path) -> trio.SocketStream | None:
    """Connect to the server that uses the store in `folder`; None if no server listens there. Raise OSError."""
    control = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_path(folder) as path:
            await control.connect(path)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        control.close()
        return None
    except BaseException:
        control.close()
        raise
    return trio.SocketStream(control)
