"""Metrics: what a scrape has is what the tables, the documentation and the dashboard name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from metrics_table import DOCUMENT, TABLES, table, written
from prometheus_client.parser import text_string_to_metric_families
from promisefs_protocol.observe.metrics import Defined, Kind, at, each, encoded, failures
from promisefs_protocol.observe.timings import Timing

DASHBOARD = DOCUMENT.with_name("grafana") / "promisefs.json"
_NAME = re.compile(r"\bpromisefsd?_[a-z0-9_]+")


def samples_of(metrics: list[Defined], report: dict[str, Any]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text, content_type = encoded(metrics, report, "")
    assert content_type.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.startswith("process_")
    }


def test_values_of_a_report() -> None:
    timing = Timing()
    timing.started = 2
    timing.took(0.0015)
    timing.took(100.0)
    timing.failed(5)
    report = {"a": {"b": 7}, "calls": {"read": timing.as_json()}}
    found = samples_of(
        [
            Defined("x_bytes", Kind.GAUGE, "Bytes.", at("a", "b")),
            Defined("x_calls", Kind.COUNTER, "Calls.", failures("calls"), ("call", "error")),
            Defined("x_seconds", Kind.HISTOGRAM, "Times.", each("calls"), ("call",)),
        ],
        report,
    )
    read = ("call", "read")
    assert found["x_bytes", ()] == 7
    assert found["x_calls_total", (read, ("error", "5"))] == 1
    assert found["x_seconds_count", (read,)] == found["x_seconds_bucket", (read, ("le", "+Inf"))] == 2
    assert found["x_seconds_bucket", (read, ("le", "0.001"))] == 0
    assert found["x_seconds_bucket", (read, ("le", "0.002"))] == found["x_seconds_bucket", (read, ("le", "60.0"))] == 1
    assert found["x_seconds_sum", (read,)] == pytest.approx(100.0015)


@pytest.mark.parametrize("name", list(TABLES))
def test_every_metric_is_documented(name: str) -> None:
    assert written(DOCUMENT.read_text(), name) == table(TABLES[name]), "run python tests/observe/metrics_table.py"


def series_of(metric: Defined) -> set[str]:
    """What can be queried of a metric."""
    if metric.kind is Kind.HISTOGRAM:
        return {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
    return {metric.shown_name}


def queries(panels: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for panel in panels:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def test_every_query_of_the_dashboard_names_metrics_and_labels_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    known = {name: metric for metrics in TABLES.values() for metric in metrics for name in series_of(metric)}
    labels = {"instance", "le"} | {label for metric in known.values() for label in metric.labels}
    asked = list(queries(dashboard["panels"]))
    assert len(asked) > 40
    for title, query in asked:
        names = _NAME.findall(query)
        assert names, f"{title}: {query} asks for nothing of ours"
        for name in names:
            assert name in known, f"{title}: there is no metric {name}"
        for label in re.findall(r"by \((.*?)\)", query):
            used = set(label.split(", ")) - {"instance", "le"}
            for name in names:
                assert used <= set(known[name].labels), f"{title}: {name} has no label {used}"
        for label in re.findall(r"[{,](\w+)=", query):
            assert label in labels, f"{title}: no metric has a label {label}"
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            (name,) = _NAME.findall(variable["definition"])
            assert name in known


def test_the_dashboard_shows_what_must_stay_at_zero() -> None:
    shown = Path(DASHBOARD).read_text()
    for name in ("files_lost", "leases_lost", "early_acknowledgements", "store_failures", "locks_lost"):
        assert f"promisefs_{name}_total" in shown
