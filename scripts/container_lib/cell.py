"""A cell in containers: a server and clients, each in a container with its own mounts and network.

They share one network of their own, on which the server is called "server". Clients log in with a token of an
administrator, which the server's container gives. All that is made carries LABEL, with the cell's name as its value,
and ends with the cell.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cell_lib.mmap_program import Seen, Written, parse_seen, parse_written

from .engine import MAY_MOUNT, Engine, EngineError

LABEL = "promisefs-ci"
LEASE_S = 3.0
MOUNTPOINT = "/mnt/promisefs"
_STORE = "/var/lib/promisefs/store"
_USER = "ci"
_TOKEN = "/root/token"
_MOUNT = f"promisefs login --server server --token-file {_TOKEN} && exec promisefs mount -f server {MOUNTPOINT}"
"""What a client's container runs: the token is there before it starts."""
_READY_S = 60.0
_POLL_S = 0.1
_TOOL_S = 60.0


class CellError(Exception):
    """The cell could not do what was asked; the message says why."""


@dataclass(frozen=True, slots=True)
class Images:
    server: str
    client: str
    program: Path
    """The compiled scripts/mmap_demo.c."""


class Reader:
    """The mmap reader in a client's container; it holds its mapping until it is ended."""

    def __init__(self, client: Client, process: subprocess.Popen[bytes], output: Path) -> None:
        self._client = client
        self._process = process
        self._output = output

    def seen(self) -> list[Seen]:
        text = self._output.read_text()
        return [parse_seen(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait_for(self, byte: int, timeout_s: float = 30.0) -> None:
        """Wait until the last byte printed is this one or a newer one. Raise CellError."""
        deadline = time.monotonic() + timeout_s
        while not (seen := self.seen()) or seen[-1].byte < byte:
            if self._process.poll() is not None:
                raise CellError(f"the reader on {self._client.name} ended with status {self._process.returncode}")
            if time.monotonic() > deadline:
                raise CellError(f"byte {byte} is not seen after {timeout_s:g} s; the last lines: {seen[-3:]}")
            time.sleep(_POLL_S)


class Client:
    """One client's container. It lives as long as its mount."""

    def __init__(self, engine: Engine, name: str, container: str) -> None:
        self._engine = engine
        self.name = name
        self.container = container

    def run(self, script: str, timeout_s: float = _TOOL_S) -> str:
        """Run a shell script in the mount; return what it prints. Raise EngineError if it fails."""
        return self._engine.run("exec", "-w", MOUNTPOINT, self.container, "sh", "-ec", script, timeout_s=timeout_s)

    def write_mapped(self, name: str, steps: int, interval_ms: float = 5.0) -> list[Written]:
        """Run the mmap writer: so many times a store into the mapping and fsync."""
        output = self.run(f"mmap_demo -t -i {interval_ms} -n {steps} {shlex.quote(name)} mod")
        return [parse_written(line) for line in output.splitlines()]

    @contextmanager
    def reading_mapped(self, name: str) -> Iterator[Reader]:
        pid_file = f"/run/reader-{name}"
        script = f"echo $$ >{pid_file}; exec mmap_demo -t -c -i 0.2 {shlex.quote(name)}"
        with tempfile.TemporaryDirectory(prefix="promisefs-ci-") as directory:
            output = Path(directory) / "seen"
            with output.open("wb") as out:
                process = self._engine.spawn("exec", "-w", MOUNTPOINT, self.container, "sh", "-c", script, stdout=out)
            try:
                yield Reader(self, process, output)
            finally:
                # Ending the command that looks into the container does not end what runs there.
                with suppress(EngineError):
                    self._engine.run("exec", self.container, "sh", "-c", f"kill -9 $(cat {pid_file})")
                process.kill()
                process.wait(_TOOL_S)


class ContainerCell:
    """Use as a context manager: leaving it removes all that was made."""

    def __init__(self, engine: Engine, images: Images) -> None:
        self.engine = engine
        self.name = f"{LABEL}-{os.urandom(4).hex()}"
        self._images = images
        self._clients = 0
        self._label = ("--label", f"{LABEL}={self.name}")

    def __enter__(self) -> ContainerCell:
        try:
            self.engine.run("network", "create", *self._label, self.name)
            serve = ("serve", _STORE, "--listen", "0.0.0.0:7654", "--insecure", "--lease", f"{LEASE_S:g}")
            self._make("run", "server", self._images.server, *serve)
            self._wait_until_ready("server", "promisefsd", "volume", "list", _STORE)
            self._administer("users", "add", _STORE, _USER, "--no-password", "--admin")
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None and not isinstance(value, KeyboardInterrupt):
            self._show_logs()
        self.remove()

    def new_client(self) -> Client:
        """Start a container that mounts the server's volume, and wait until it has."""
        self._clients += 1
        name = f"client{self._clients}"
        container = self._container(name)
        options = ("--init", "--tmpfs", f"{MOUNTPOINT}:ro", *MAY_MOUNT, "--entrypoint", "sh")
        self._make("create", name, self._images.client, "-c", _MOUNT, options=options)
        self._give_token(container)
        self.engine.run("cp", self._images.program, f"{container}:/usr/local/bin/mmap_demo")
        self.engine.run("start", container)
        self._wait_until_ready(name, "promisefs", "status", MOUNTPOINT)
        return Client(self.engine, name, container)

    def _give_token(self, container: str) -> None:
        with tempfile.TemporaryDirectory(prefix="promisefs-ci-") as directory:
            token = Path(directory) / "token"
            token.touch(0o600)
            token.write_text(self._administer("users", "token", _STORE, _USER))
            self.engine.run("cp", token, f"{container}:{_TOKEN}")

    def _administer(self, *command: str) -> str:
        return self.engine.run("exec", self._container("server"), "promisefsd", *command)

    def kill(self, name: str) -> None:
        self.engine.run("kill", "--signal", "KILL", self._container(name))

    def start_again(self, name: str) -> None:
        self.engine.run("start", self._container(name))

    @contextmanager
    def cut_off(self, client: Client) -> Iterator[None]:
        """The client's container has no network meanwhile; afterwards its address may be another."""
        self.engine.run("network", "disconnect", self.name, client.container)
        try:
            yield
        finally:
            self.engine.run("network", "connect", self.name, client.container)

    def stop(self, client: Client) -> int:
        """SIGTERM; return the status with which the mount ended."""
        self.engine.run("stop", "--time", "30", client.container)
        return int(self.engine.run("inspect", "--format", "{{.State.ExitCode}}", client.container))

    def remove(self) -> None:
        """Remove all containers and the network. What cannot be removed is said."""
        everything = f"label={LABEL}={self.name}"
        try:
            containers = self.engine.run("ps", "--all", "--quiet", "--filter", everything).split()
            if containers:
                self.engine.run("rm", "--force", "--volumes", *containers)
            if self.engine.run("network", "ls", "--quiet", "--filter", everything).split():
                self.engine.run("network", "rm", self.name)
        except EngineError as problem:
            print(f"ci-container: not all of {self.name} could be removed: {problem}", flush=True)

    def _container(self, name: str) -> str:
        return f"{self.name}-{name}"

    def _make(self, how: str, name: str, image: str, *command: str, options: tuple[str, ...] = ()) -> None:
        """`how` is "create", or "run" to start it, too."""
        place = ("--name", self._container(name), "--network", self.name, "--network-alias", name)
        detached = ("--detach",) if how == "run" else ()
        self.engine.run(how, *detached, *self._label, *place, *options, image, *command)

    def _wait_until_ready(self, name: str, *question: str) -> None:
        deadline = time.monotonic() + _READY_S
        while not self.engine.succeeds("exec", self._container(name), *question):
            if time.monotonic() > deadline:
                raise CellError(f"{name} is not ready after {_READY_S:g} s")
            time.sleep(_POLL_S)

    def _show_logs(self) -> None:
        for name in ["server", *(f"client{number + 1}" for number in range(self._clients))]:
            print(f"ci-container: the end of {name}'s log:", flush=True)
            with suppress(EngineError):
                self.engine.show("logs", "--tail", "30", self._container(name), timeout_s=30)
