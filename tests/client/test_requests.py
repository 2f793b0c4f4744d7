"""Which waits a signal ends, and when."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from promisefs_client.fuse.requests import (
    ONLY_IF_KILLED,
    SIGNAL_PATIENCE_S,
    Interrupted,
    Request,
    current_request,
    handling,
    interruptible,
    outlive_request,
)


class Source:
    """Of requests that have begun already."""

    def __init__(self) -> None:
        self.answered: list[Request] = []

    def take(self) -> Request | None:
        return None

    def done(self, request: Request) -> None:
        self.answered.append(request)


@pytest.fixture(autouse=True)
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    source = Source()
    monkeypatch.setattr(handling, "source", source)
    return source


async def _waited_s(request: Request, patience_s: float, wait_s: float = 100.0) -> float:
    began = trio.current_time()
    with pytest.raises(Interrupted), handling(request), interruptible(patience_s):
        await trio.sleep(wait_s)
    return trio.current_time() - began


@pytest.mark.parametrize(
    ("patience_s", "fatal", "expected_s"),
    [(0.0, False, 3.0), (SIGNAL_PATIENCE_S, False, 3.0 + SIGNAL_PATIENCE_S), (ONLY_IF_KILLED, True, 3.0)],
)
async def test_a_signal_ends_a_wait(
    autojump_clock: trio.testing.MockClock, source: Source, patience_s: float, fatal: bool, expected_s: float
) -> None:
    request = Request()
    async with trio.open_nursery() as nursery:

        async def signal() -> None:
            await trio.sleep(3.0)
            request.interrupt(trio.current_time(), fatal)

        nursery.start_soon(signal)
        assert await _waited_s(request, patience_s) == pytest.approx(expected_s)
    assert source.answered == [request]


async def test_a_caught_signal_leaves_a_wait_for_a_change_alone(autojump_clock: trio.testing.MockClock) -> None:
    request = Request()
    request.interrupt(trio.current_time(), fatal=False)
    with handling(request), interruptible(ONLY_IF_KILLED):
        await trio.sleep(1000)
    request.interrupt(trio.current_time(), fatal=True)
    assert await _waited_s(request, ONLY_IF_KILLED) == 0.0


async def test_what_ends_in_time_is_not_interrupted(autojump_clock: trio.testing.MockClock) -> None:
    request = Request()
    request.interrupt(trio.current_time(), fatal=False)
    with handling(request), interruptible(SIGNAL_PATIENCE_S):
        await trio.sleep(SIGNAL_PATIENCE_S - 0.1)
    # The patience counts from the signal, however many waits there are.
    assert await _waited_s(request, SIGNAL_PATIENCE_S) == pytest.approx(0.1)


async def test_tasks_of_the_request_are_interrupted_not_those_that_outlive_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    request = Request()
    ended: list[str] = []

    async def wait(name: str, outlives: bool) -> None:
        if outlives:
            outlive_request()
        try:
            with interruptible():
                await trio.sleep(10)
            ended.append(f"{name} went on")
        except Interrupted:
            ended.append(f"{name} was interrupted")

    with handling(request):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, "child", False)
            nursery.start_soon(wait, "background", True)
            await trio.sleep(1)
            request.interrupt(trio.current_time(), fatal=True)
    assert ended == ["child was interrupted", "background went on"]


async def test_without_a_request_nothing_is_interrupted_or_known(autojump_clock: trio.testing.MockClock) -> None:
    with handling(), interruptible():
        await trio.sleep(5)
    request = current_request()
    assert request.from_page_cache is None and request.lock_owner is None and not request.interrupted
