"""What systemd is told: readiness when clients can connect and not before, and the end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from promisefs_protocol import service_manager
from server_daemon import client_of, daemon


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket on which a service manager listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


async def test_a_server_says_when_it_is_ready_and_when_it_stops(folder: Path, manager: socket.socket) -> None:
    with daemon(folder) as server:
        ready, status = manager.recv(1000).decode().splitlines()
        assert (ready, status) == ("READY=1", f"STATUS=listening on 127.0.0.1:{server.port}")
        async with client_of(server) as client:
            await client.create(b"f")
        assert server.end(signal.SIGTERM)[0] == 0
        assert manager.recv(1000) == b"STOPPING=1"


def test_a_server_that_cannot_serve_is_never_ready(folder: Path, manager: socket.socket) -> None:
    folder.mkdir()
    (folder / "somebody's").touch()
    with pytest.raises(AssertionError, match="is not empty and no promisefs store"), daemon(folder):
        pass
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(1000)


def test_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0promisefs-test-notify")
        monkeypatch.setenv("NOTIFY_SOCKET", "@promisefs-test-notify")
        service_manager.notify("READY=1")
        assert listener.recv(100) == b"READY=1"


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service_manager.notify("READY=1")
    assert not caplog.records
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    service_manager.notify("READY=1")
    assert "cannot tell the service manager that READY=1: No such file" in caplog.text
