"""Runs pyfuse3's main loop so that a request which vanishes does no harm, also without the FUSE extension.

pyfuse3 reads /dev/fuse in worker tasks (`_session_loop`) when it polls readable. Between poll and read the request may
vanish, its process being killed. A blocking read then freezes the whole process, GIL held, until some other request
comes. So the descriptor is made non-blocking; the read fails with EAGAIN, which the FUSE extension makes harmless.
Without it pyfuse3 raises OSError out of the worker, cancelling all others in the midst of their requests, and a request
that is never answered hangs its process.

So the workers are then wrapped: the one that meets EAGAIN begins anew, the others notice nothing. pyfuse3 looks the
worker's function up in its module whenever it starts one, which is what makes the wrapper take effect (3.4.0, 3.5.0).
Each such race leaks one request buffer, about a megabyte, which pyfuse3 frees only when a worker ends in good order.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pyfuse3

from promisefs_client.commands.mounts import fusectl

from .fuse_extension import FuseExtension

log = logging.getLogger(__name__)

MAX_REQUESTS = 4096
"""FUSE requests served at a time; further ones wait, also those that need no server. Each worker is a task that takes
about 11 KB, and a megabyte of address space. More than the calls that may wait for an absent server, see MAX_WAITING
in `session`."""
QUEUE_WIDTH = 1000
"""Most requests that the kernel sends without waiting for answers to earlier ones, readahead among them, in a cell of
several servers. Its own limit is 12: as few READs that wait for one server would hold up those of all the others."""


def fuse_descriptor() -> int:
    """The descriptor that libfuse opened; pyfuse3 does not tell it."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
        except OSError:
            continue
    raise AssertionError("mounted, but no descriptor of /dev/fuse is open")


def widen_queue(device: str) -> None:
    """Have the kernel send up to QUEUE_WIDTH requests of the mount `device` (major:minor) at a time, if it lets us.

    Without the FUSE extension, which says so when the mount is made.
    """
    connection = f"{fusectl()}/{device.rpartition(':')[2]}"
    try:
        for limit in ("max_background", "congestion_threshold"):
            with open(f"{connection}/{limit}", "w") as file:
                file.write(str(QUEUE_WIDTH))
    except OSError as error:
        log.warning("%s: %s: readers of one server's files may have to wait for another", connection, error.strerror)


def _surviving(worker: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(worker)
    async def survive(*args: Any) -> None:
        while True:
            try:
                await worker(*args)
                return
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise
                log.debug("a request vanished before it could be read")

    return survive


async def serve_kernel(descriptor: int, extension: FuseExtension | None) -> None:
    """Answer the kernel's requests until the file system is unmounted or `pyfuse3.terminate` is called.

    `extension`, if it is in effect.
    """
    if extension is None:
        await _serve_with_pyfuse3_alone(descriptor)
        return
    os.set_blocking(descriptor, False)
    async with extension.serving():
        await pyfuse3.main(max_tasks=MAX_REQUESTS)


async def _serve_with_pyfuse3_alone(descriptor: int) -> None:
    module: Any = pyfuse3
    worker = module._session_loop
    module._session_loop = _surviving(worker)
    os.set_blocking(descriptor, False)
    try:
        await pyfuse3.main(max_tasks=MAX_REQUESTS)
    finally:
        module._session_loop = worker
