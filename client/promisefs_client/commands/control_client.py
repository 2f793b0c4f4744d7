"""Asks the process behind a mount, without touching the mount: for the commands at the terminal."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

from promisefs_protocol.runtime_directory import directories

from promisefs_client.control.control_socket import PeerProcess, opened, opened_shared, peer_of, shared_directory
from promisefs_client.errors import UserError

from .mounts import MountEntry

GREETING_WAIT_S = 5.0
"""A process that runs greets at once."""
ANSWER_WAIT_S = 5.0
"""For a command that waits for nothing but the mount's process."""


class MountIsDead(UserError):
    """Nobody serves the mount any more."""


class MountIsSilent(UserError):
    """The mount's process is there but says nothing; `pid` is its number."""

    def __init__(self, message: str, pid: int) -> None:
        super().__init__(message)
        self.pid = pid


class Asked:
    """A connection to a mount's process that has greeted. Asks one thing.

    with Asked(entry) as mount: state = mount.ask("status", {})
    """

    def __init__(self, entry: MountEntry) -> None:
        """Raise UserError if it cannot be reached, may not be, or does not greet."""
        self._where = entry.mountpoint
        self._connection = _connect(entry)
        try:
            self.process: PeerProcess = peer_of(self._connection)
            if self.process.uid != entry.owner:
                raise UserError(
                    f"{self._where}: its control socket is held by uid {self.process.uid}, not {entry.owner}"
                )
            self._lines = self._connection.makefile("rb")
            self._commands = self._receive(GREETING_WAIT_S)["commands"]
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._connection.close()

    def ask(self, command: str, args: dict[str, Any], wait_s: float = ANSWER_WAIT_S) -> Any:
        """Return the result. Raise UserError: the command's own, or if there is no answer within `wait_s`."""
        self._send(command, args)
        answer = self._receive(wait_s)
        if "error" in answer:
            raise UserError(answer["error"], answer["code"])
        return answer["result"]

    def follow(self, command: str, args: dict[str, Any]) -> Iterator[Any]:
        """Ask for what goes on; give each answer until the mount ends. Raise UserError: the command's own."""
        self._send(command, args)
        wait_s: float | None = ANSWER_WAIT_S
        while True:
            try:
                answer = self._receive(wait_s)
            except MountIsDead:
                if wait_s is not None:
                    raise
                return
            if "error" in answer:
                raise UserError(answer["error"], answer["code"])
            if "item" not in answer:
                return
            yield answer["item"]
            wait_s = None  # from now on something comes only when something happens

    def _send(self, command: str, args: dict[str, Any]) -> None:
        if command not in self._commands:
            if os.geteuid() not in (0, self.process.uid):
                raise UserError(f"{self._where}: only uid {self.process.uid} and root may ask that")
            raise UserError(f"{self._where}: its process is of another version and does not know {command!r}")
        self._connection.sendall(json.dumps({"command": command, "args": args}).encode() + b"\n")

    def _receive(self, wait_s: float | None) -> dict[str, Any]:
        self._connection.settimeout(wait_s)
        try:
            line = self._lines.readline()
        except TimeoutError:
            pid = self.process.pid
            stopped = _state_of(pid) in ("T", "t")
            state = "is stopped: kill -CONT it" if stopped else f"does not answer for {wait_s or 0:g} s"
            raise MountIsSilent(f"{self._where}: its process {pid} {state}", pid) from None
        except OSError as error:
            raise MountIsDead(f"{self._where}: {error.strerror}: its process has ended") from None
        if not line.endswith(b"\n"):
            raise MountIsDead(f"{self._where}: its process ended before it answered")
        message: dict[str, Any] = json.loads(line)
        return message


def ask(entry: MountEntry, command: str, args: dict[str, Any] | None = None, wait_s: float = ANSWER_WAIT_S) -> Any:
    """Ask one thing. Raise UserError."""
    with Asked(entry) as mount:
        return mount.ask(command, args or {}, wait_s)


def _connect(entry: MountEntry) -> socket.socket:
    where = entry.mountpoint
    others = os.geteuid() not in (0, entry.owner)
    if others and not entry.shared:
        raise UserError(f"{where} is a mount of uid {entry.owner}: only that user and root may ask it")
    dead = False
    tried = [shared_directory(entry.owner)] if others else directories(entry.owner)
    for directory in tried:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(GREETING_WAIT_S)
        try:
            with (opened_shared if others else opened)(directory, entry.owner) as place:
                connection.connect(f"{place}/{entry.device}")
            return connection
        except FileNotFoundError:
            connection.close()
        except ConnectionRefusedError:
            connection.close()
            dead = True
        except (BlockingIOError, TimeoutError):
            connection.close()
            raise UserError(
                f"{where}: its process does not answer, nor those who asked before: is it stopped?"
            ) from None
        except OSError as error:
            connection.close()
            raise UserError(f"{directory}/{entry.device}: {error.strerror}") from None
        except BaseException:
            connection.close()
            raise
    if dead:
        raise MountIsDead(f"{where}: its process is dead: 'fusermount3 -u {where}' removes the mount")
    raise UserError(
        f"{where}: no control socket {entry.device} in {' or '.join(tried)}: its process is in another container or "
        f"namespace, or dead (then 'fusermount3 -u {where}' removes the mount)"
    )


def _state_of(pid: int) -> str:
    """One letter as in proc_pid_stat(5); nothing if there is no such process to be seen."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie, which whoever should reap it may leave for long."""
    return _state_of(pid) not in ("", "Z", "X")
