"""Cells whose server and mounts live in network namespaces of their own, and faults between them.

Each client has a pair of veth devices to the server's namespace, with its own subnet. Packets are dropped (or rejected,
or some of them lost) by nftables where they arrive: in the server's namespace for what comes from a client, in the
client's for what goes to it. Nothing of this is visible from outside, and no namespace has a name: each lives as
long as the process that holds it, which carries the cell's mark, so that it ends with the cell or by the guard.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cell_lib import processes
from cell_lib.cell import Cell

PORT = 7654
_COMMAND_S = 10.0


class NetworkError(Exception):
    """A command failed; the message has what it said."""


def run(*command: str, given: str | None = None) -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


class Namespace:
    """A network namespace without a name, held by a process."""

    def __init__(self, mark: str) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo .; exec sleep infinity"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=processes.environment(mark),
            start_new_session=True,
        )
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if not self._holder.stdout.readline():
            text = self._holder.stderr.read().decode(errors="replace").strip()
            self.end()
            raise NetworkError(f"no network namespace can be made: {text}")
        self.run("ip", "link", "set", "lo", "up")

    @property
    def pid(self) -> int:
        return self._holder.pid

    @property
    def prefix(self) -> list[str]:
        """Runs a command inside, in the file systems of outside."""
        return ["nsenter", "--target", str(self.pid), "--net"]

    def run(self, *command: str, given: str | None = None) -> None:
        run(*self.prefix, *command, given=given)

    def end(self) -> None:
        self._holder.kill()
        self._holder.wait(_COMMAND_S)
        for pipe in (self._holder.stdout, self._holder.stderr):
            assert pipe is not None
            pipe.close()


class Link:
    """What joins one client to the server."""

    def __init__(self, server: Namespace, client: Namespace, number: int) -> None:
        self._server = server
        self._client = client
        self.device = f"c{number}"
        self.server_address = f"10.77.{number}.1"
        client_address = f"10.77.{number}.2"
        server.run(
            "ip", "link", "add", self.device, "type", "veth", "peer", "name", self.device, "netns", str(client.pid)
        )
        for namespace, address in ((server, self.server_address), (client, client_address)):
            namespace.run("ip", "address", "add", f"{address}/24", "dev", self.device)
            namespace.run("ip", "link", "set", self.device, "up")

    def _faults(self, namespace: Namespace, rule: str) -> None:
        chain = f"inet faults {self.device}"
        script = (
            "add table inet faults",
            f"add chain {chain} {{ type filter hook input priority 0; }}",
            f"flush chain {chain}",
            f"add rule {chain} iifname {self.device} {rule}",
        )
        namespace.run("nft", "-f", "-", given="\n".join(script) + "\n")

    @contextmanager
    def _with(self, from_client: str | None, to_client: str | None) -> Iterator[None]:
        for namespace, rule in ((self._server, from_client), (self._client, to_client)):
            if rule:
                self._faults(namespace, rule)
        try:
            yield
        finally:
            self.heal()

    def heal(self) -> None:
        for namespace in (self._server, self._client):
            self._faults(namespace, "accept")

    @contextmanager
    def cut(self, direction: str = "both") -> Iterator[None]:
        """Packets vanish: "both" ways, or only those "from" or "to" the client."""
        with self._with(
            "drop" if direction in ("both", "from") else None, "drop" if direction in ("both", "to") else None
        ):
            yield

    @contextmanager
    def resetting(self) -> Iterator[None]:
        """Every packet of a client's TCP connection is answered with a reset: connections end on both sides."""
        with self._with("meta l4proto tcp reject with tcp reset", None):
            yield

    @contextmanager
    def losing(self, percent: int) -> Iterator[None]:
        """Of the packets each way so many get lost."""
        rule = f"numgen random mod 100 < {percent} drop"
        with self._with(rule, rule):
            yield

    @contextmanager
    def delaying(self, delay_ms: int, jitter_ms: int) -> Iterator[None]:
        """Packets take longer, each way; with jitter they overtake each other. Raise NetworkError without netem."""
        netem = ["root", "netem", "delay", f"{delay_ms}ms", f"{jitter_ms}ms"]
        for namespace in (self._server, self._client):
            namespace.run("tc", "qdisc", "add", "dev", self.device, *netem)
        try:
            yield
        finally:
            for namespace in (self._server, self._client):
                namespace.run("tc", "qdisc", "delete", "dev", self.device, "root")


class NetworkCell(Cell):
    """A cell whose server has a namespace, and each mount m1, m2, ... too. Takes its namespaces down with it."""

    def __init__(self, directory: Path, mark: str, mount_count: int) -> None:
        super().__init__(directory, mark)
        self.servers[0].port = PORT
        self._namespaces: dict[str, Namespace] = {}
        self.links: dict[str, Link] = {}
        try:
            server = self._namespaces["server"] = Namespace(f"{mark}/network")
            for number in range(1, mount_count + 1):
                client = self._namespaces[f"m{number}"] = Namespace(f"{mark}/network")
                self.links[f"m{number}"] = Link(server, client, number)
                self.links[f"m{number}"].heal()
        except BaseException:
            self.end_network()
            raise

    def end_network(self) -> None:
        for namespace in self._namespaces.values():
            namespace.end()

    @property
    def address(self) -> str:
        return f"0.0.0.0:{self.port}"

    def address_for(self, name: str) -> str:
        return f"{self.links[name].server_address}:{self.port}"

    def prefix_for(self, name: str) -> Sequence[str]:
        return self._namespaces[name].prefix

    def start_server(self, *options: str, number: int = 0) -> None:
        super().start_server("--insecure", "--trust-everybody", *options, number=number)

    def down(self) -> list[str]:
        for link in self.links.values():
            link.heal()
        try:
            return super().down()
        finally:
            self.end_network()


@functools.cache
def why_networks_are_unusable() -> str | None:
    """One line saying why there can be no NetworkCell here, or None."""
    if os.geteuid() != 0:
        return "network namespaces and nftables need root"
    for command, package in (
        ("unshare", "util-linux"),
        ("nsenter", "util-linux"),
        ("ip", "iproute2"),
        ("nft", "nftables"),
    ):
        if shutil.which(command) is None:
            return f"{command} is missing: install the package {package}"
    namespaces: list[Namespace] = []
    try:
        for _ in range(2):
            namespaces.append(Namespace(processes.new_mark()))
        link = Link(namespaces[0], namespaces[1], 1)
        link.heal()
        with link.cut(), link.losing(1):
            pass
    except (NetworkError, OSError, subprocess.SubprocessError) as problem:
        return f"network faults cannot be made here: {problem}"
    finally:
        for namespace in namespaces:
            namespace.end()
    return None
