"""Servers and mounts in one directory: DIR/store, DIR/server.log, and for each mount DIR/NAME and DIR/NAME.log.

With several servers DIR/cell.toml is their cell file, and those after the first have DIR/store1, DIR/server1.log...
`DIR/cell.json` says what runs, so that another process can take it down. Everything has a time limit, and
everything that is started carries the cell's mark (see `processes`).
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from . import mounts, processes

COMMANDS = Path(sys.executable).parent
"""promisefsd and promisefs are taken from where this Python is: the same virtual environment."""
READY_S = 30.0
"""Most time for the server or a mount to become usable."""
STOP_S = 30.0
"""Most time for either to end in good order."""
CELL_NAME = "test.example"
"""Of a cell with several servers."""
_POLL_S = 0.01
_LISTENING = re.compile(r"listening on \S*:(\d+)")
_BAD_LOG_LINE = re.compile(
    r"Traceback \(most recent|\bERROR\b|\bCRITICAL\b|Exception ignored|Error in sys\.|\w+Warning:"
)


class CellError(Exception):
    """The cell could not do what was asked; the message says why."""


@dataclass(slots=True)
class Mount:
    name: str
    mountpoint: Path
    connection: int
    """Number of its FUSE connection, for fusectl."""
    pid: int
    """Its daemon."""


@dataclass(slots=True)
class Server:
    number: int
    port: int = 0
    """Where it listens; 0: not known yet, a free one is taken."""
    pid: int | None = None
    process: subprocess.Popen[bytes] | None = None
    """Present iff it is a child of ours."""

    @property
    def name(self) -> str:
        return "server" + (str(self.number) if self.number else "")


class Cell:
    """Not thread-safe. Starts nothing by itself: call `start_server`, `mount`; `down` ends all.

    What does not say which server means number 0.
    """

    def __init__(self, directory: Path, mark: str | None = None, *, servers: int = 1) -> None:
        self.directory = directory.resolve()
        self.mark = mark or processes.new_mark()
        self.servers = [Server(number) for number in range(servers)]
        self.mounts: dict[str, Mount] = {}

    @classmethod
    def load(cls, directory: Path) -> Cell | None:
        """The cell whose state is in the directory, or None if there is no state."""
        try:
            state = json.loads((directory / "cell.json").read_text())
            cell = cls(directory, state["mark"])
            cell.servers = [Server(**entry) for entry in state["servers"]]
            for entry in state["mounts"]:
                cell.mounts[entry["name"]] = Mount(**{**entry, "mountpoint": Path(entry["mountpoint"])})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as problem:
            raise CellError(f"{directory / 'cell.json'} cannot be understood: {problem!r}") from None
        return cell

    @property
    def store(self) -> Path:
        return self.store_of(0)

    def store_of(self, number: int) -> Path:
        return self.directory / f"store{number or ''}"

    @property
    def rejects(self) -> Path:
        """The quarantine of all its mounts."""
        return self.directory / "rejects"

    @property
    def port(self) -> int:
        return self.servers[0].port

    @property
    def server_pid(self) -> int | None:
        return self.servers[0].pid

    @property
    def address(self) -> str:
        """Where the server listens."""
        return f"127.0.0.1:{self.port}"

    def address_for(self, name: str) -> str:
        """Where a mount finds the server."""
        return self.address

    def prefix_for(self, name: str) -> Sequence[str]:
        """A command with which the server ("server") or a mount is run, such as one that enters a namespace."""
        return ()

    @property
    def cell_file(self) -> Path:
        """Of a cell with several servers."""
        return self.directory / "cell.toml"

    @property
    def logs(self) -> list[Path]:
        """Log files and captured output of everything that ever ran here."""
        return sorted(path for path in self.directory.iterdir() if path.suffix in (".log", ".out"))

    def mountpoint(self, name: str) -> Path:
        return self.directory / name

    def server_runs(self, number: int = 0) -> bool:
        pid = self.servers[number].pid
        return pid is not None and processes.belongs(pid, self.mark)

    def runs(self) -> bool:
        """Whether servers and mounts are all there. Does not touch the mounts."""
        return all(self.server_runs(server.number) for server in self.servers) and all(
            processes.belongs(mount.pid, self.mark) and mounts.fuse_mount_at(mount.mountpoint)
            for mount in self.mounts.values()
        )

    # The server

    def start_server(self, *options: str, number: int = 0) -> None:
        """Start it and wait until it listens; the second time on the same port. Raise CellError."""
        server = self.servers[number]
        if self.server_runs(number):
            raise CellError("the server runs already")
        self.directory.mkdir(parents=True, exist_ok=True)
        output = self.directory / f"{server.name}.out"
        self._save()
        command: list[str | Path] = [COMMANDS / "promisefsd", "serve", self.store_of(number)]
        if len(self.servers) > 1:
            self._write_cell_file()
            command += ["--cell", self.cell_file, "--number", str(number)]
        address = f"127.0.0.1:{server.port}" if number else self.address
        command += ["--listen", address, "--log-file", self.directory / f"{server.name}.log"]
        with output.open("ab") as out:
            seen = out.tell()
            server.process = process = self._spawn(server.name, [*command, *options], out)
        server.pid = process.pid
        deadline = time.monotonic() + READY_S
        while not (ready := _LISTENING.search(_tail(output, seen))):
            if process.poll() is not None:
                server.pid = None
                raise CellError(f"promisefsd ended with status {process.returncode}: {_tail(output, seen)}")
            if time.monotonic() > deadline:
                processes.end(f"{self.mark}/{server.name}", grace_s=1)
                raise CellError(f"promisefsd is not ready after {READY_S:g} s: {_tail(output, seen)}")
            time.sleep(_POLL_S)
        server.port = int(ready[1])
        self._save()

    def _write_cell_file(self) -> None:
        """Say where each server is; those that have no port yet get free ones."""
        for server in self.servers:
            while not server.port:
                with socket.create_server(("127.0.0.1", 0)) as probe:
                    port = probe.getsockname()[1]
                if port not in [other.port for other in self.servers]:
                    server.port = port
        lines = [f'name = "{CELL_NAME}"']
        for server in self.servers:
            lines.append(f'[[server]]\nnumber = {server.number}\naddress = "127.0.0.1:{server.port}"')
        self.cell_file.write_text("\n".join(lines) + "\n")

    def stop_server(self, *, kill: bool = False, number: int = 0) -> None:
        """SIGTERM (or SIGKILL) and wait for its end. Raise CellError if it needed more, or ended with an error."""
        server = self.servers[number]
        mark = f"{self.mark}/{server.name}"
        if kill:
            processes.send(processes.marked(mark), mark, signal.SIGKILL)
        complaints = processes.end(mark, STOP_S)
        status = server.process.wait(STOP_S) if server.process else 0
        server.process = server.pid = None
        self._save()
        if status != (-signal.SIGKILL if kill else 0) and not complaints:
            complaints.append(
                f"promisefsd ended with status {status}: {_tail(self.directory / f'{server.name}.out', 0)}"
            )
        if complaints:
            raise CellError("; ".join(complaints))

    def administer(self, *arguments: str | Path) -> str:
        """Run `promisefsd volume ...` and return what it says. Raise CellError."""
        command: list[str | Path] = [COMMANDS / "promisefsd", "volume", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=STOP_S)
        if done.returncode:
            raise CellError(f"promisefsd volume {arguments[0]} failed ({done.returncode}): {done.stderr.strip()}")
        return done.stdout

    def create_volume(self, name: str, number: int = 0) -> None:
        self.administer("create", self.store_of(number), name)

    def mount_volume(self, path: Path, volume: str) -> None:
        """Make a mount point by `promisefs fs mkmount`. Raise CellError."""
        command: list[str | Path] = [COMMANDS / "promisefs", "fs", "mkmount", path, volume]
        done = subprocess.run(command, capture_output=True, text=True, timeout=STOP_S)
        if done.returncode:
            raise CellError(f"promisefs fs mkmount failed ({done.returncode}): {done.stderr.strip()}")

    # Mounts

    def mount(self, name: str, *, options: str = "", volume: str = "", port: int | None = None) -> Mount:
        """Mount at DIR/NAME; `options` is what -o takes, `port` one that leads to the server's. Raise CellError."""
        mountpoint = self.mountpoint(name)
        mountpoint.mkdir(exist_ok=True)
        output = self.directory / f"{name}.out"
        mark = f"{self.mark}/{name}"
        source = self.address_for(name) if port is None else f"127.0.0.1:{port}"
        if len(self.servers) > 1 and port is None:
            source = CELL_NAME
            options = f"cell={self.cell_file}" + (f",{options}" if options else "")
        options = f"rejects={self.rejects}" + (f",{options}" if options else "")
        command: list[str | Path] = [COMMANDS / "promisefs", "mount", source + (f"/{volume}" if volume else "")]
        command += [mountpoint, "--log-file", self.directory / f"{name}.log", "-o", options]
        with output.open("ab") as out:
            seen = out.tell()
            process = self._spawn(name, command, out)
        try:
            status = process.wait(READY_S)
        except subprocess.TimeoutExpired:
            processes.end(mark, grace_s=1)
            process.wait(STOP_S)
            self._force_unmount(mountpoint)
            raise CellError(f"promisefs mount is not done after {READY_S:g} s: {_tail(output, seen)}") from None
        found = mounts.fuse_mount_at(mountpoint)
        daemons = processes.marked(mark)
        if status != 0 or found is None or not daemons:
            processes.end(mark, grace_s=1)
            self._force_unmount(mountpoint)
            state = f"status {status}, mounted: {found is not None}, daemons: {len(daemons)}"
            raise CellError(f"promisefs mount failed ({state}): {_tail(output, seen)}")
        mount = self.mounts[name] = Mount(name, mountpoint, found.connection, min(daemons))
        self._save()
        return mount

    def unmount(self, name: str) -> None:
        """Unmount in good order and wait for the daemon's end. Raise CellError if that took force."""
        mount = self.mounts.pop(name)
        self._save()
        complaints: list[str] = []
        if mounts.fuse_mount_at(mount.mountpoint):
            complaints += self._umount_command(mount.mountpoint)
        mark = f"{self.mark}/{name}"
        if not complaints and processes.wait_until_gone(mark, STOP_S):
            complaints.append(f"the daemon of {mount.mountpoint} goes on after promisefs umount")
        if mounts.fuse_mount_at(mount.mountpoint):
            complaints.append(f"{mount.mountpoint} had to be aborted and unmounted by force")
            self._force_unmount(mount.mountpoint)
        complaints += processes.end(mark, grace_s=5)
        if complaints:
            raise CellError("; ".join(complaints))

    def _umount_command(self, mountpoint: Path) -> list[str]:
        command: list[str | Path] = [COMMANDS / "promisefs", "umount", mountpoint]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            said = process.communicate(timeout=STOP_S)[0]
        except subprocess.TimeoutExpired:
            self._force_unmount(mountpoint)
            process.kill()
            process.communicate()
            return [f"promisefs umount {mountpoint} is not done after {STOP_S:g} s"]
        if process.returncode:
            return [f"promisefs umount {mountpoint} failed ({process.returncode}): {said.decode(errors='replace')}"]
        return []

    def _force_unmount(self, mountpoint: Path) -> None:
        while mount := mounts.fuse_mount_at(mountpoint):
            mounts.force_unmount(mount)
            if mounts.fuse_mount_at(mountpoint) == mount:
                break

    # The whole

    def up(self, mount_count: int, *, server_options: Sequence[str] = (), mount_options: str = "") -> Cell:
        """Start the servers and mount m1, m2, ... If anything fails take all down again and raise CellError."""
        try:
            for server in self.servers:
                self.start_server(*server_options, number=server.number)
            for number in range(1, mount_count + 1):
                self.mount(f"m{number}", options=mount_options)
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> list[str]:
        """End everything, by force if need be; store and logs stay. Return what did not end in good order."""
        complaints: list[str] = []
        if not self.directory.is_dir():
            return complaints
        if any(processes.belongs(mount.pid, self.mark) for mount in self.mounts.values()):
            # A mount that holds data which is not stored can only end well if there is a server to store it.
            for server in self.servers:
                try:
                    if not self.server_runs(server.number):
                        self.start_server(number=server.number)
                except CellError as problem:
                    complaints.append(f"{server.name} was gone and could not be started again: {problem}")
        for name in list(self.mounts):
            try:
                self.unmount(name)
            except CellError as problem:
                complaints.append(str(problem))
            with suppress(OSError):
                self.mountpoint(name).rmdir()
        for server in self.servers:
            try:
                self.stop_server(number=server.number)
            except CellError as problem:
                complaints.append(str(problem))
        complaints += processes.end(self.mark, grace_s=5)
        for mount in mounts.fuse_mounts_below(self.directory):
            complaints.append(f"{mount.mountpoint} was still mounted")
            mounts.force_unmount(mount)
        (self.directory / "cell.json").unlink(missing_ok=True)
        return complaints

    def _spawn(self, name: str, command: Sequence[str | Path], out: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self.prefix_for(name), *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=processes.environment(f"{self.mark}/{name}"),
            start_new_session=True,
        )

    def _save(self) -> None:
        state = {
            "mark": self.mark,
            "servers": [{"number": each.number, "port": each.port, "pid": each.pid} for each in self.servers],
            "mounts": [{**asdict(mount), "mountpoint": str(mount.mountpoint)} for mount in self.mounts.values()],
        }
        new = self.directory / "cell.json.new"
        new.write_text(json.dumps(state, indent=1) + "\n")
        new.replace(self.directory / "cell.json")


def _tail(path: Path, start: int) -> str:
    """What a captured output has beyond `start`, at most its last 2,000 characters."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").strip()[-2000:]
    return ""


class LogWatch:
    """Finds lines in a cell's logs that mean a bug: tracebacks, errors, warnings of Python."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._seen: dict[Path, int] = {path: path.stat().st_size for path in cell.logs}

    def new_bad_lines(self, allowed: Sequence[str] = ()) -> list[str]:
        """Bad lines since the last call, except those in which one of the `allowed` regular expressions is found."""
        bad = []
        for path in self._cell.logs:
            with path.open("rb") as file:
                file.seek(self._seen.get(path, 0))
                text = file.read()
            self._seen[path] = self._seen.get(path, 0) + len(text)
            for line in text.decode(errors="replace").splitlines():
                if _BAD_LOG_LINE.search(line) and not any(re.search(pattern, line) for pattern in allowed):
                    bad.append(f"{path.name}: {line}")
        return bad
