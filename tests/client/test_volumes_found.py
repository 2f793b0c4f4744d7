"""Where volumes are: what servers said of it, and how they are asked."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
import trio
from promisefs_client.errors import FsError, ServerUnavailable
from promisefs_client.network.locator import ORDER_WAIT_S, Locator
from promisefs_client.network.servers import Server
from promisefs_client.vnodes.volumes import TwoServersHaveIt, Volumes
from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.ids import Fid
from promisefs_protocol.messages import GetEntryByName, VolumeEntry

ROOT, ATLAS = Fid(1, 1, 1), Fid(65537, 1, 1)


@pytest.fixture
def servers() -> tuple[Server, Server]:
    return Server("alpha"), Server("beta")


# The core


def test_a_name_counts_until_its_server_is_reset(servers: tuple[Server, Server]) -> None:
    alpha, beta = servers
    volumes = Volumes()
    root, atlas = volumes.learn(1, "root", ROOT, alpha), volumes.learn(65537, "atlas", ATLAS, beta)
    assert volumes.named("atlas") is atlas
    volumes.lose_all_of(beta)
    assert volumes.named("atlas") is None and not atlas.located
    assert volumes.named("root") is root and root.located
    assert volumes[65537] is atlas and atlas.server is beta, "the last that is known of it"
    volumes.check_invariants()


def test_a_volume_of_uncertain_location_may_be_found_elsewhere_and_is_the_same(servers: tuple[Server, Server]) -> None:
    alpha, beta = servers
    volumes = Volumes()
    atlas = volumes.learn(65537, "atlas", ATLAS, beta)
    volumes.lose(atlas)
    assert volumes.learn(65537, "globe", ATLAS, alpha) is atlas
    assert (atlas.server, atlas.name, atlas.located) == (alpha, "globe", True)
    assert volumes.named("globe") is atlas and volumes.named("atlas") is None
    volumes.check_invariants()


def test_two_servers_cannot_have_one_volume(servers: tuple[Server, Server]) -> None:
    alpha, beta = servers
    volumes = Volumes()
    atlas = volumes.learn(65537, "atlas", ATLAS, beta)
    with pytest.raises(TwoServersHaveIt, match="alpha says that it has volume 65537, but beta has it"):
        volumes.learn(65537, "other", ATLAS, alpha)
    assert (atlas.server, atlas.name) == (beta, "atlas")
    assert volumes.named("other") is None
    volumes.check_invariants()


def test_an_answer_makes_a_location_certain_unless_a_reset_came_between(servers: tuple[Server, Server]) -> None:
    alpha, beta = servers
    volumes = Volumes()
    root = volumes.learn(1, "root", ROOT, alpha)
    volumes.lose(root)
    before = alpha.begin_call(0.0)
    alpha.broke_all()
    volumes.confirm(root, before)
    volumes.confirm(root, beta.begin_call(0.0))
    assert not root.located
    volumes.confirm(root, alpha.begin_call(0.0))
    assert root.located


# Asking


class AnsweringSession:
    """What the locator knows of a session: it can be called, and is of a server."""

    def __init__(self, server: Server, answer: VolumeEntry | Exception, after_s: float = 0.0) -> None:
        self.server = server
        self._answer = answer
        self._after_s = after_s
        self.asked = 0
        self.before_answer: Callable[[], None] = lambda: None

    async def call(self, request: Any) -> tuple[VolumeEntry, None]:
        self.asked += 1
        await trio.sleep(self._after_s)
        self.before_answer()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer, None


NOT_HERE = Aborted(AbortCode.VNOVOL)
MOVED = Aborted(AbortCode.VMOVED)
AWAY = ServerUnavailable("away")
HERE = VolumeEntry("atlas", 65537, ATLAS)
HERE_TOO = VolumeEntry("atlas", 65538, Fid(65538, 1, 1))


def locator(*sessions: AnsweringSession) -> Locator:
    return Locator(sessions, Volumes())  # type: ignore[arg-type]


async def test_whoever_has_it_is_found_and_asked_once(servers: tuple[Server, Server]) -> None:
    alpha, beta = AnsweringSession(servers[0], NOT_HERE), AnsweringSession(servers[1], HERE)
    finder = locator(alpha, beta)
    volume = await finder.by_name("atlas")
    assert (volume.number, volume.server) == (65537, servers[1])
    assert await finder.by_name("atlas") is volume
    assert (alpha.asked, beta.asked) == (1, 1)


async def test_nowhere_is_certain_only_if_all_were_asked_and_is_not_remembered(servers: tuple[Server, Server]) -> None:
    alpha, beta = AnsweringSession(servers[0], NOT_HERE), AnsweringSession(servers[1], MOVED)
    finder = locator(alpha, beta)
    for turn in (1, 2):
        with pytest.raises(Aborted) as refusal:
            await finder.by_name("atlas")
        assert refusal.value.code == AbortCode.VNOVOL
        assert alpha.asked == beta.asked == turn
    with pytest.raises(ServerUnavailable):
        await locator(alpha, AnsweringSession(servers[1], AWAY)).by_name("atlas")


async def test_the_first_in_order_wins_if_it_answers_soon(servers: tuple[Server, Server]) -> None:
    soon = AnsweringSession(servers[0], HERE, ORDER_WAIT_S / 2)
    late = AnsweringSession(servers[0], HERE, 60.0)
    other = AnsweringSession(servers[1], HERE_TOO)
    assert (await locator(soon, other).by_name("atlas")).number == 65537
    start = trio.current_time()
    assert (await locator(late, other).by_name("atlas")).number == 65538
    assert (await locator(other, late).by_name("atlas")).number == 65538
    assert trio.current_time() - start < 2 * ORDER_WAIT_S


async def test_an_answer_from_before_a_reset_does_not_count(servers: tuple[Server, Server]) -> None:
    alpha = AnsweringSession(servers[0], HERE)

    def reset_once() -> None:
        alpha.before_answer = lambda: None
        servers[0].broke_all()

    alpha.before_answer = reset_once
    await locator(alpha).by_name("atlas")
    assert alpha.asked == 2


async def test_the_second_server_with_a_volume_is_refused(
    servers: tuple[Server, Server], caplog: pytest.LogCaptureFixture
) -> None:
    alpha = AnsweringSession(servers[0], HERE)
    beta = AnsweringSession(servers[1], HERE._replace(name="other"))
    volumes = Volumes()
    await Locator([alpha], volumes).by_name("atlas")  # type: ignore[list-item]
    with pytest.raises(FsError) as refusal:
        await Locator([beta], volumes)._find(GetEntryByName("other"))  # type: ignore[list-item]
    assert refusal.value.errno == errno.ENODEV
    assert "beta says that it has volume 65537, but alpha has it" in caplog.text
