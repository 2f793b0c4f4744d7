"""The clock of promises and leases: trio's, and the time that the machine was suspended.

trio's clock is CLOCK_MONOTONIC, which stands still while a machine is suspended; a server's lease does not.
CLOCK_BOOTTIME goes on, and the difference of the two grows by just the time of each suspension. It is read each time,
so whoever asks after a resume, before any timer has run, already gets the later time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

Clock = Callable[[], float]
"""Seconds since some moment; runs on in suspension."""

NOTICEABLE_S = 0.05
"""A smaller growth of the difference is but the time between reading the two clocks."""


class _Suspensions:
    def __init__(self) -> None:
        self._seen_s = self._difference_s()
        self.total_s = 0.0

    @staticmethod
    def _difference_s() -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)

    def until_now_s(self) -> float:
        """Time in suspension since this process started."""
        difference_s = self._difference_s()
        if difference_s - self._seen_s > NOTICEABLE_S:
            self.total_s += difference_s - self._seen_s
            self._seen_s = difference_s
        return self.total_s


_suspensions = _Suspensions()


def now() -> float:
    """The time for promises and leases."""
    return trio.current_time() + _suspensions.until_now_s()
