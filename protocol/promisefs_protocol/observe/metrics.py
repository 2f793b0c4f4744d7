"""Prometheus metrics out of a report: what a mount or server says of itself, as `--json` has it. Core: no I/O.

A table says for each metric where in the report its samples are, so a metric can say nothing that `--json` does not,
and neither costs anything while nobody asks.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .timings import BOUNDS_S

Report = Mapping[str, Any]
Samples = Iterable[tuple[tuple[str, ...], Any]]
"""(values of the labels, value); the value of a histogram is a timing as `timings.Timing.as_json` has it."""


class Kind(enum.Enum):
    COUNTER = CounterMetricFamily
    GAUGE = GaugeMetricFamily
    HISTOGRAM = HistogramMetricFamily


@dataclass(frozen=True, slots=True)
class Defined:
    """One metric. A counter's name is without the `_total` that is shown."""

    name: str
    kind: Kind
    help: str
    samples: Callable[[Report], Samples]
    labels: tuple[str, ...] = ()

    @property
    def shown_name(self) -> str:
        return f"{self.name}_total" if self.kind is Kind.COUNTER else self.name

    def of(self, report: Report) -> Metric:
        family: Metric = self.kind.value(self.name, self.help, labels=self.labels)
        for labels, value in self.samples(report):
            if isinstance(family, HistogramMetricFamily):
                family.add_metric(labels, list(_cumulated(value["buckets"])), value["total_s"])
            elif isinstance(family, CounterMetricFamily | GaugeMetricFamily):
                family.add_metric(labels, value)
        return family


def _cumulated(buckets: Sequence[int]) -> Iterator[tuple[str, float]]:
    count = 0
    for bound, more in zip((*BOUNDS_S, float("inf")), buckets, strict=True):
        count += more
        yield "+Inf" if bound == float("inf") else repr(bound), count


def at(*path: str) -> Callable[[Report], Samples]:
    """The one value there."""

    def samples(report: Report) -> Samples:
        value: Any = report
        for key in path:
            value = value[key]
        yield (), value

    return samples


def each(*path: str) -> Callable[[Report], Samples]:
    """The values of the dictionary there; the label is the key."""

    def samples(report: Report) -> Samples:
        value: Any = report
        for key in path:
            value = value[key]
        for key, one in value.items():
            yield (key,), one

    return samples


def failures(*path: str) -> Callable[[Report], Samples]:
    """Of the timings in the dictionary there; the labels are its key and the error."""

    def samples(report: Report) -> Samples:
        for (key,), timing in each(*path)(report):
            for error, count in timing["failures"].items():
                yield (key, error), count

    return samples


class _Scrape(Collector):
    """One scrape, in the form that prometheus_client encodes."""

    def __init__(self, metrics: Sequence[Defined], report: Report) -> None:
        self._metrics = metrics
        self._report = report

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics:
            yield metric.of(self._report)
        yield from _process.collect()


_process = ProcessCollector(registry=None)


def encoded(metrics: Sequence[Defined], report: Report, accept: str) -> tuple[bytes, str]:
    """(what a scraper that accepts these types is sent, its type)"""
    encode, content_type = choose_encoder(accept)
    return encode(_Scrape(metrics, report)), content_type
