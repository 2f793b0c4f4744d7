"""Every acknowledgement that goes out before the kernel has dropped everything is counted, and how long it lasts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import trio
from client_mount import ClientMount, World, settled
from promisefs_client.control.status import mount_report


def report(mount: ClientMount) -> dict[str, Any]:
    return mount_report(mount.cell, mount.files, mount.pages, [mount.callbacks], 0, 1.0, trio.current_time())


async def test_breaks_acknowledged_early(world: World) -> None:
    mount = await world.mount(ack_wait_s=0.05)
    other = await world.server.connected()
    made = await other.create(b"f")
    vnode = await mount.open(b"f")
    before = report(mount)["breaks"]
    await other.store(made.fid, b"one")
    assert (report(mount)["breaks"] - before, report(mount)["early_acks"], report(mount)["overdue"]) == (1, 0, 0)
    await mount.cell.validate(vnode)
    mount.kernel.drops_end = trio.Event()  # the kernel waits for a READ
    began = time.monotonic()
    await other.store(made.fid, b"two")
    assert time.monotonic() - began >= 0.05
    assert (report(mount)["breaks"] - before, report(mount)["early_acks"], report(mount)["overdue"]) == (2, 1, 1)
    mount.kernel.drops_end.set()
    await settled()
    state = report(mount)
    assert (state["early_acks"], state["overdue"]) == (1, 0)
    assert state["servers"][0]["early_acks"] == 1


NAMES = """
    pid mounted_s connected waiting servers vnodes promises open_files cache_bytes cache_limit_bytes dirty_bytes
    dirty_files store_failures files_lost closes_owed breaks resets early_acks overdue leases_lost timeouts
    kernel_epochs upcalls rpcs
"""
OF_A_SERVER = """
    address connected disconnected_s connects lease_left_s waiting longest_wait_s breaks resets early_acks overdue
    leases_lost timeouts rpcs
"""


async def test_the_names_of_what_status_says_stay(mount: ClientMount) -> None:
    """Programs read them: add to these, take none away."""
    state = report(mount)
    assert set(state) >= set(NAMES.split())
    assert set(state["servers"][0]) >= set(OF_A_SERVER.split())
    page = (Path(__file__).parents[2] / "docs/observing.md").read_text()
    for name in ("early_acks", "overdue", "leases_lost", "waiting", "timeouts", "files_lost", "closes_owed"):
        assert f"`{name}`" in page


async def test_a_lost_lease_is_counted(world: World) -> None:
    mount = await world.mount()
    mount.session.server.lease_until = 0.0
    with trio.fail_after(10):
        while not report(mount)["leases_lost"]:  # noqa: ASYNC110 (nothing says it)
            await trio.sleep(0.01)
