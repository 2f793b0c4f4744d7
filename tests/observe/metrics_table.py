"""The tables of metrics in docs/observing.md, made from the code. Run this file to write them there anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from promisefs_client.observe.metrics import METRICS as OF_MOUNTS
from promisefs_protocol.observe.metrics import Defined
from promisefs_server.observe.metrics import METRICS as OF_SERVERS

DOCUMENT = Path(__file__).parents[2] / "docs" / "observing.md"
MARK = "<!-- {name} metrics: made by tests/observe/metrics_table.py -->\n"
END = "<!-- end -->"
TABLES = {"mount": OF_MOUNTS, "server": OF_SERVERS}


def table(metrics: Sequence[Defined]) -> str:
    rows = ["| metric | labels | |", "|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.shown_name}` | {labels} | {metric.kind.name.lower()}: {metric.help} |")
    return "\n".join(rows) + "\n"


def written(document: str, name: str) -> str:
    """The table `name` as the document has it."""
    return document.partition(MARK.format(name=name))[2].partition(END)[0]


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    for name, metrics in TABLES.items():
        mark = MARK.format(name=name)
        text = text.replace(mark + written(text, name), mark + table(metrics))
    DOCUMENT.write_text(text)
