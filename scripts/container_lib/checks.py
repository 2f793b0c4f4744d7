"""What is checked between containers. Each check gets a fresh cell and raises CheckFailed, CellError or EngineError."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cell_lib.mmap_program import Seen, Written, match

from .cell import LEASE_S, Client, ContainerCell

STEPS = 50
WAIT_S = LEASE_S + 10.0
"""A change waits for a client that does not answer for one lease at most; the rest is for a slow machine."""


class CheckFailed(Exception):
    """promisefs did not do what it promises; the message says what happened instead."""


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise CheckFailed(otherwise)


def _expect_followed(written: list[Written], seen: list[Seen]) -> None:
    sights = match(written, seen)
    missing = [sight.written.byte for sight in sights if sight.seen is None]
    stale = [sight for sight in sights if sight.stale]
    _expect(not missing, f"never seen through the other container's mapping: {missing}")
    _expect(not stale, f"an older byte was loaded after fsync had returned: {stale[:3]}")


def _make_page(client: Client) -> None:
    client.run("head -c 4096 /dev/zero >page; sync page")


def changes_are_seen(cell: ContainerCell) -> None:
    """Names, contents, modes, sizes and removals, both ways."""
    one, two = cell.new_client(), cell.new_client()
    for here, there in ((one, two), (two, one)):
        here.run("mkdir d; echo first >d/file; ln -s file d/link; chmod 640 d/file")
        said = there.run("cat d/link; stat -c '%a %s' d/file; ls d")
        _expect(said == "first\n640 6\nfile\nlink\n", f"{there.name} sees {said!r}")
        there.run("echo second, longer >>d/file; mv d/file d/renamed")
        said = here.run("cat d/renamed; test ! -e d/file && echo gone")
        _expect(said == "first\nsecond, longer\ngone\n", f"{here.name} sees {said!r}")
        here.run("truncate -s 3 d/renamed")
        said = there.run("cat d/renamed; rm -r d")
        _expect(said == "fir", f"{there.name} sees {said!r}")
        said = here.run("ls -A")
        _expect(said == "", f"{here.name} still sees {said!r}")


def mapping_follows(cell: ContainerCell) -> None:
    """The mmap reader in one container follows the mmap writer in the other, both ways."""
    one, two = cell.new_client(), cell.new_client()
    for writer, reader in ((one, two), (two, one)):
        _make_page(writer)
        with reader.reading_mapped("page") as reading:
            reading.wait_for(0)
            written = writer.write_mapped("page", STEPS)
            reading.wait_for(STEPS)
            _expect_followed(written, reading.seen())


def killed_client_holds_nobody_up(cell: ContainerCell) -> None:
    """A container is killed while it maps and writes: what it had stored stays, others wait one lease at most."""
    one, two = cell.new_client(), cell.new_client()
    _make_page(two)
    one.run("echo kept >stored; sync stored")
    with one.reading_mapped("page") as killed:
        killed.wait_for(0)
        cell.kill(one.name)
    began = time.monotonic()
    written = two.write_mapped("page", STEPS)
    waited_s = time.monotonic() - began
    _expect(waited_s < WAIT_S, f"a writer waited {waited_s:.1f} s for a killed client with a lease of {LEASE_S:g} s")
    _expect(two.run("cat stored") == "kept\n", "what the killed client had stored is gone")
    three = cell.new_client()
    said = three.run("od -An -tu1 -N1 page; cat stored")
    _expect(said.split() == [str(written[-1].byte), "kept"], f"a new client sees {said!r}")


def cut_off_client_shows_nothing_old(cell: ContainerCell) -> None:
    """A container loses its network: no stale byte through its mapping, and it follows again once it is back."""
    one, two = cell.new_client(), cell.new_client()
    _make_page(one)
    with two.reading_mapped("page") as reading:
        reading.wait_for(0)
        written = one.write_mapped("page", STEPS)
        reading.wait_for(STEPS)
        with cell.cut_off(two):
            during = one.write_mapped("page", STEPS)
            longest_s = max(each.done_ns - each.stored_ns for each in during) / 1e9
            _expect(longest_s < WAIT_S, f"an fsync took {longest_s:.1f} s with a lease of {LEASE_S:g} s")
        reading.wait_for(2 * STEPS)
        written += during + one.write_mapped("page", 20)
        reading.wait_for(2 * STEPS + 20)
        _expect_followed(written, reading.seen())
    two.run("echo back >after")
    _expect(one.run("cat after") == "back\n", "what the client wrote after its return is not seen")


def killed_server_comes_back(cell: ContainerCell) -> None:
    """The server's container is killed and started again under a running writer: the reader follows."""
    one, two = cell.new_client(), cell.new_client()
    _make_page(one)
    with two.reading_mapped("page") as reading:
        reading.wait_for(0)
        written = one.write_mapped("page", STEPS)
        cell.kill("server")
        restart = threading.Timer(2.0, cell.start_again, ["server"])
        restart.start()
        try:
            written += one.write_mapped("page", STEPS)
        finally:
            restart.join()
        reading.wait_for(2 * STEPS)
        _expect_followed(written, reading.seen())


def stopped_client_leaves_in_order(cell: ContainerCell) -> None:
    """SIGTERM, as `stop` sends it: what was written and not synced is stored, and the container ends with status 0."""
    one, two = cell.new_client(), cell.new_client()
    # Dirty when the signal comes: the handle is still open, so no close has stored it.
    one.run("mkfifo /run/hold; (exec 3>unsynced; echo data >&3; read x </run/hold) >/dev/null 2>&1 & sleep 0.5")
    status = cell.stop(one)
    said = two.run("cat unsynced")
    _expect(said == "data\n", f"what was written before the stop is {said!r}")
    _expect(status == 0, f"the stopped client's container ended with status {status}")


CHECKS: tuple[Callable[[ContainerCell], None], ...] = (
    changes_are_seen,
    mapping_follows,
    killed_client_holds_nobody_up,
    cut_off_client_shows_nothing_old,
    killed_server_comes_back,
    stopped_client_leaves_in_order,
)
