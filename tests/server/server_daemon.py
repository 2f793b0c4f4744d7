"""Real promisefsd processes, and clients of theirs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio
from promisefs_protocol.local_server import find_local_server
from server_cell import Client

COMMAND = [sys.executable, "-c", "from promisefs_server.cli import main; main(prog_name='promisefsd')"]
TIMEOUT_S = 30


class Daemon:
    def __init__(self, folder: Path, *options: str) -> None:
        """Options may say where to listen; else it is at a free port."""
        self.process = subprocess.Popen(
            [*COMMAND, "serve", str(folder), *([] if "--cell" in options else ["--port", "0"]), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r"listening on (\S+):(\d+)$", line)
        assert match, (line, self.process.communicate(timeout=TIMEOUT_S))
        self.host, self.port = match[1].strip("[]"), int(match[2])

    def end(self, number: int) -> tuple[int, str]:
        """Send the signal; return (exit status, stderr)."""
        self.process.send_signal(number)
        stdout, stderr = self.process.communicate(timeout=TIMEOUT_S)
        assert stdout == "", "more than the one line"
        return self.process.returncode, stderr


@contextmanager
def daemon(folder: Path, *options: str) -> Iterator[Daemon]:
    running = Daemon(folder, *options)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate(timeout=TIMEOUT_S)


def _token_of_local(store: bytes) -> bytes:
    server = find_local_server(store, os.geteuid())
    assert server is not None
    return server.token


@asynccontextmanager
async def client_of(server: Daemon, uuid: bytes | None = None, volume: str = "root") -> AsyncIterator[Client]:
    async def connect() -> trio.abc.Stream:
        return await trio.open_tcp_stream(server.host, server.port)

    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            client = Client(connect, nursery, uuid, _token_of_local)
            client.volume = volume
            yield await client.connect()
            nursery.cancel_scope.cancel()
