"""Real cells for the tests of this folder: a real server and real mounts on /dev/fuse.

    def test_it(cell):          a fresh directory in a running cell with two mounts; cell.a and cell.b are its views
    def test_it(make_cell):     cells of the test's own, which it may stop, kill and start again:
                                c = make_cell(mounts=3, server_options=["--lease", "2"], mount_options="timeout=5")
                                and servers=2 for a cell of two servers
    def test_it(make_network_cell):     the same, server and mounts in network namespaces; skips where there are none
    def test_it(mmap_program):  path of the compiled mmap reader and writer
    @pytest.mark.limit_s(300)   instead of the usual time limit of TEST_LIMIT_S
    @pytest.mark.allow_log("...")   regular expressions for log lines that this test provokes

A test that hangs, in a page fault even, is freed by the guard: FUSE connections aborted, daemons killed; it then fails.
The mounts use the FUSE extension, which is built if need be; PROMISEFS_FUSE_EXTENSION=off in the environment runs the
same tests without it.

After every test the daemons' logs must have no traceback, error or warning, and all that was started must end well.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from cell_lib import mmap_program as mmap_source
from cell_lib import mounts, processes
from cell_lib.cell import Cell, CellError, LogWatch
from cell_lib.guard import Guard
from network import NetworkCell, why_networks_are_unusable
from promisefs_client.fuse import fuse_extension_build
from promisefs_client.fuse.fuse_extension import SWITCH

TEST_LIMIT_S = 120.0
"""Time for one test, its own cells' start and end included. The guard needs at most some seconds more."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "limit_s(seconds): time limit of this test of real mounts")
    config.addinivalue_line("markers", "allow_log(pattern, ...): log lines of the daemons that this test provokes")


@dataclass(frozen=True, slots=True)
class View:
    """One fresh directory as two mounts of one server show it."""

    a: Path
    b: Path
    name: str
    """Of the directory, in the root of the volume."""
    running: Cell
    """Shared with other tests: do not stop it. `make_cell` gives cells that may be."""

    @property
    def both(self) -> tuple[Path, Path]:
        return self.a, self.b


MakeCell = Callable[..., Cell]
MakeNetworkCell = Callable[..., NetworkCell]


@dataclass(slots=True)
class Site:
    """Where the session's cells live, with the guard over them."""

    directory: Path
    mark: str
    guard: Guard
    made: int = 0
    shared: Cell | None = None

    def next_place(self) -> tuple[Path, str]:
        self.made += 1
        return self.directory / f"c{self.made}", f"{self.mark}/c{self.made}"

    def new_cell(self, servers: int = 1) -> Cell:
        return Cell(*self.next_place(), servers=servers)

    def new_network_cell(self, mounts: int) -> NetworkCell:
        return NetworkCell(*self.next_place(), mounts)

    def take_down_shared(self) -> list[str]:
        cell, self.shared = self.shared, None
        return _end(cell) if cell else []


def _end(cell: Cell) -> list[str]:
    complaints = cell.down()
    complaints += [f"left behind: process {pid} ({processes.command_line(pid)})" for pid in processes.marked(cell.mark)]
    complaints += [f"left behind: mount {mount.mountpoint}" for mount in mounts.fuse_mounts_below(cell.directory)]
    for server in cell.servers:
        shutil.rmtree(cell.store_of(server.number), ignore_errors=True)
    return complaints


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := mounts.why_fuse_is_unusable():
        pytest.fail(f"tests of real mounts cannot run: {reason}", pytrace=False)
    if os.environ.get(SWITCH) != "off" and not fuse_extension_build.is_current():
        fuse_extension_build.build()
    directory = tmp_path_factory.mktemp("cells").resolve()
    mark = processes.new_mark()
    threads_before = set(threading.enumerate())
    with Guard(directory, mark) as guard:
        site = Site(directory, mark, guard)
        yield site
        complaints = site.take_down_shared()
    complaints += [f"left behind: process {pid}" for pid in processes.marked(mark)]
    complaints += [f"left behind: mount {mount.mountpoint}" for mount in mounts.fuse_mounts_below(directory)]
    complaints += [
        f"left behind: thread {thread.name}"
        for thread in threading.enumerate()
        if thread not in threads_before and not thread.daemon
    ]
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.fixture(autouse=True)
def _time_limit(site: Site, request: pytest.FixtureRequest) -> Iterator[None]:
    marker = request.node.get_closest_marker("limit_s")
    limit_s = float(marker.args[0]) if marker else TEST_LIMIT_S
    # The stacks come first: once the connections are aborted they no longer say where it hung.
    faulthandler.dump_traceback_later(limit_s - 1, exit=False)
    site.guard.arm(limit_s)
    yield
    faulthandler.cancel_dump_traceback_later()
    if site.guard.disarm():
        # What the guard did to the shared cell is no complaint of its own.
        site.take_down_shared()
        pytest.fail(f"not done after {limit_s:g} s; its mounts were aborted", pytrace=False)


def _allowed(request: pytest.FixtureRequest) -> list[str]:
    return [str(pattern) for marker in request.node.iter_markers("allow_log") for pattern in marker.args]


@pytest.fixture
def watched(_time_limit: None, request: pytest.FixtureRequest) -> Iterator[list[tuple[Cell, LogWatch]]]:
    """Cells that end with the test, and their logs."""
    made: list[tuple[Cell, LogWatch]] = []
    yield made
    complaints: list[str] = []
    for cell, watch in reversed(made):
        complaints += _end(cell)
        complaints += watch.new_bad_lines(_allowed(request))
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.fixture
def make_cell(site: Site, watched: list[tuple[Cell, LogWatch]]) -> MakeCell:
    """Return a function that starts cells, which end with the test."""

    def make(mounts: int = 2, servers: int = 1, server_options: Sequence[str] = (), mount_options: str = "") -> Cell:
        cell = site.new_cell(servers)
        cell.directory.mkdir()
        watched.append((cell, LogWatch(cell)))
        return cell.up(mounts, server_options=server_options, mount_options=mount_options)

    return make


@pytest.fixture
def make_network_cell(site: Site, watched: list[tuple[Cell, LogWatch]]) -> MakeNetworkCell:
    """Return a function like that of `make_cell`, for cells with a network between server and mounts."""
    if reason := why_networks_are_unusable():
        pytest.skip(reason)

    def make(mounts: int = 2, server_options: Sequence[str] = (), mount_options: str = "") -> NetworkCell:
        cell = site.new_network_cell(mounts)
        cell.directory.mkdir()
        watched.append((cell, LogWatch(cell)))
        cell.up(mounts, server_options=server_options, mount_options=mount_options)
        return cell

    return make


@pytest.fixture
def cell(site: Site, _time_limit: None, request: pytest.FixtureRequest) -> Iterator[View]:
    """Return a fresh directory of the session's cell. A cell that did not survive a test is replaced for the next."""
    if site.shared and not site.shared.runs():
        site.take_down_shared()
    if site.shared is None:
        new = site.new_cell()
        site.shared = new.up(2)
    running = site.shared
    watch = LogWatch(running)
    name = f"t{os.urandom(4).hex()}"
    a, b = (running.mountpoint(mount) / name for mount in ("m1", "m2"))
    a.mkdir()
    yield View(a, b, name, running)
    complaints = watch.new_bad_lines(_allowed(request))
    if not running.runs():
        complaints.append("the cell's server or one of its mounts ended during this test")
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.fixture(scope="session")
def mmap_program() -> Path:
    """The compiled scripts/mmap_demo.c."""
    return mmap_source.build()


__all__ = ["CellError", "MakeCell", "MakeNetworkCell", "Site", "View"]
