"""The names of control sockets: who takes one over, who removes it, and which directories are trusted."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from promisefs_client.control import control_socket
from promisefs_client.control.control_socket import BoundSocket, opened, peer_of
from promisefs_client.errors import UserError

DEVICE = "0:77"


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for sockets with a path too long for sun_path."""
    place = tmp_path / ("long" * 40)
    place.mkdir()
    monkeypatch.setattr(control_socket, "directories", lambda owner: [f"{tmp_path}/missing/x", f"{place}/promisefs"])
    yield place / "promisefs"


def listens(runtime: Path) -> bool:
    with opened(str(runtime), os.geteuid()) as place, socket.socket(socket.AF_UNIX) as asker:
        try:
            asker.connect(f"{place}/{DEVICE}")
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


def test_a_name_is_taken_over_and_only_its_owner_removes_it(runtime: Path) -> None:
    first = BoundSocket(DEVICE)
    assert runtime.stat().st_mode & 0o777 == 0o700
    assert listens(runtime)
    first.socket.close()  # as if its process had been killed
    assert not listens(runtime)
    assert (runtime / DEVICE).is_socket()
    second = BoundSocket(DEVICE)
    assert listens(runtime)
    first.remove()
    assert listens(runtime)
    second.remove()
    assert os.listdir(runtime) == []
    second.socket.close()


def test_who_is_at_the_other_end() -> None:
    here, there = socket.socketpair()
    with here, there:
        assert peer_of(here) == peer_of(there) == (os.getpid(), os.geteuid())


def test_a_directory_that_others_can_use(runtime: Path) -> None:
    runtime.mkdir(mode=0o700)
    runtime.chmod(0o750)
    with pytest.raises(UserError, match="only uid"):
        BoundSocket(DEVICE)
    assert os.listdir(runtime) == []


def test_a_link_to_a_directory(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    runtime.symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match=str(runtime)):
        BoundSocket(DEVICE)
    assert os.listdir(tmp_path / "real") == []


def test_a_directory_of_somebody_else(runtime: Path) -> None:
    runtime.mkdir(mode=0o700)
    with pytest.raises(UserError, match="only uid"), opened(str(runtime), os.geteuid() + 1):
        pass
