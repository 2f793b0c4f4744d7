"""Latencies in buckets: what is counted, what differences and quantiles say."""

from __future__ import annotations

import pytest
from promisefs_protocol.observe.timings import BOUNDS_S, Timing, Timings, between, mean_s, quantile_s, total


def timing_of(*seconds: float) -> Timing:
    timing = Timing()
    for one in seconds:
        timing.started += 1
        timing.took(one)
    return timing


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (1e-5, 0), (1.1e-5, 1), (0.1, 12), (60.0, 19), (1e6, 20)])
def test_a_bucket_has_what_took_no_longer_than_its_bound(seconds: float, bucket: int) -> None:
    buckets = timing_of(seconds).buckets
    assert [i for i, count in enumerate(buckets) if count] == [bucket]
    assert len(buckets) == len(BOUNDS_S) + 1


def test_names_begin_with_the_first_that_is_counted() -> None:
    timings = Timings()
    timings["read"].started += 1
    assert timings["never"].started == 0
    assert timings.counts() == {"read": 1}
    assert set(timings.as_json()) == {"read"}


def test_failures_have_names() -> None:
    timing = timing_of(0.1)
    timing.failed(2)
    timing.failed(2)
    assert timing.as_json({2: "ENOENT"}.__getitem__)["failures"] == {"ENOENT": 2}


def test_between_two_countings() -> None:
    timing = timing_of(0.001, 0.002)
    timing.failed(5)
    before = timing.as_json()
    timing.started += 1
    timing.took(3.0)
    timing.failed(7)
    since = between(before, timing.as_json())
    assert (since["started"], sum(since["buckets"]), since["failures"]) == (1, 1, {"7": 1})
    assert mean_s(since) == pytest.approx(3.0)
    assert between(None, before) == before


def test_total_of_several() -> None:
    one, two = timing_of(0.001, 0.5).as_json(), timing_of(0.5).as_json()
    both = total([one, two])
    assert (both["started"], both["total_s"]) == (3, pytest.approx(1.001))
    assert both["buckets"] == timing_of(0.001, 0.5, 0.5).buckets


def test_quantiles_lie_in_the_bucket_of_what_they_are_of() -> None:
    timing = timing_of(*[0.0015] * 98, 0.03, 0.3).as_json()
    assert 0.001 < quantile_s(timing, 0.5) <= 0.002
    assert 0.02 < quantile_s(timing, 0.99) <= 0.05
    assert 0.2 < quantile_s(timing, 1.0) <= 0.5
    assert quantile_s(timing_of(1e6).as_json(), 0.5) == BOUNDS_S[-1]
    assert quantile_s(Timing().as_json(), 0.5) == mean_s(Timing().as_json()) == 0.0
