"""The log of a daemon: text for people, or one JSON object a line for programs."""

from __future__ import annotations

import enum
import json
import logging
from datetime import UTC, datetime

from .tracing import as_json, log_every_event, tracing


class LogFormat(enum.StrEnum):
    TEXT = "text"
    JSON = "json"


class JsonFormatter(logging.Formatter):
    """`time` (UTC), `level`, `logger`, `message`; `event` and what it is about, if it is one; `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        event = getattr(record, "event", None)
        if event is not None:
            line["event"] = str(event)
            about: dict[str, object] = getattr(record, "about", {})
            line.update(
                (name, as_json(value)) for name, value in about.items() if value is not None and name not in line
            )
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up(handler: logging.Handler, form: LogFormat, text: str, *, verbose: bool) -> None:
    """Have everything logged through `handler`; with `verbose`, every event too. `text` is the format for people."""
    handler.setFormatter(JsonFormatter() if form is LogFormat.JSON else logging.Formatter(text))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    if verbose:
        tracing.listen(log_every_event)
