"""The lease as the client counts it: shorter than the server does, and going on in suspension."""

from __future__ import annotations

import pytest
import trio
from client_mount import ClientMount, World
from promisefs_client.network import clock
from promisefs_client.network.session import LEASE_CHECK_S
from promisefs_protocol.messages import FetchStatus


class SuspendableClock:
    """What `clock.now` is on a machine that is suspended now and then."""

    def __init__(self) -> None:
        self.suspended_s = 0.0

    def __call__(self) -> float:
        return trio.current_time() + self.suspended_s


def test_time_in_suspension_is_counted_once_and_jitter_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    suspensions = clock._Suspensions()
    assert suspensions.until_now_s() == 0.0
    suspensions._seen_s -= 20.0
    assert suspensions.until_now_s() == pytest.approx(20.0, abs=0.01)
    assert suspensions.until_now_s() == pytest.approx(20.0, abs=0.01)
    suspensions._seen_s -= clock.NOTICEABLE_S / 2
    assert suspensions.until_now_s() == pytest.approx(20.0, abs=0.01)


async def test_the_client_ends_its_lease_well_before_the_server_does(world: World) -> None:
    mount = await world.mount()
    host = next(iter(world.server.server.hosts))
    lease_s = mount.session.lease_s
    assert mount.session.server.lease_until <= host.lease_end_s - lease_s / 10
    assert mount.session.server.lease_until > trio.current_time() + lease_s / 2


async def test_after_a_resume_nothing_is_served_unasked(world: World) -> None:
    now = SuspendableClock()
    mount = await world.mount(now=now)
    await cache_root(mount)
    asked = len(mount.session.sent_of(FetchStatus))
    await mount.cell.validate(mount.root)
    assert len(mount.session.sent_of(FetchStatus)) == asked, "it is cached"
    now.suspended_s += mount.session.lease_s
    assert not mount.cell.valid(mount.root)
    await mount.cell.validate(mount.root)
    assert len(mount.session.sent_of(FetchStatus)) == asked + 1


async def test_after_a_resume_the_kernel_is_made_to_forget(world: World) -> None:
    now = SuspendableClock()
    mount = await world.mount(now=now)
    await cache_root(mount)
    assert mount.kernel.dropped == []
    now.suspended_s += mount.session.lease_s
    await trio.sleep(LEASE_CHECK_S * 1.5)
    assert [item.ino for item in mount.kernel.dropped] == [mount.root.ino]


async def cache_root(mount: ClientMount) -> None:
    await mount.cell.fetch_status(mount.root)
    assert mount.cell.valid(mount.root)
