"""Tracepoints and logs: who listens is told, who does not costs nothing, and each line says what it is about."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from promisefs_protocol.ids import Fid
from promisefs_protocol.observe.logs import JsonFormatter
from promisefs_protocol.observe.tracing import Event, Tracepoints, described, log_every_event, tell, tracing

FID = Fid(1, 17, 2923391)


def test_who_listens_is_told_in_types_that_json_has() -> None:
    points, told = Tracepoints(), list[dict[str, Any]]()
    points.listen(told.append)
    points.emit(Event.CB_BREAK, fid=FID, dv=4, seconds=0.12345678, known=True, reason=None, server=("::1", 1))
    (record,) = told
    assert json.loads(json.dumps(record)) == record
    assert record.pop("time") > 1e9
    assert record == {
        "event": "cb_break",
        "fid": "1.17.2923391",
        "dv": 4,
        "seconds": 0.123457,
        "known": True,
        "server": "('::1', 1)",
    }


def test_on_says_whether_anybody_listens() -> None:
    points, told = Tracepoints(), list[dict[str, Any]]()
    assert not points.on
    points.listen(told.append)
    points.listen(print)
    points.ignore(print)
    assert points.on
    points.ignore(told.append)
    assert not points.on
    points.emit(Event.CALL)
    assert not told


def test_lines_for_people() -> None:
    record = {"time": 1.0, "event": "abort", "fid": str(FID), "method": "FS.Lookup", "reason": 'NOENT: "x"\n'}
    assert described(record) == r'abort         1.17.2923391    method=FS.Lookup reason="NOENT: \"x\"\n"'
    assert described({"event": "connected", "server": "h:1"}) == "connected     -               server=h:1"


@pytest.fixture
def written(request: pytest.FixtureRequest) -> tuple[logging.Logger, io.StringIO]:
    logger, stream = logging.getLogger(f"test.{request.node.name}"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    return logger, stream


def test_a_line_of_json_says_what_it_is_about(written: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = written
    tell(logger, logging.WARNING, Event.STORE_FAILED, "storing %s:\n%d bytes", FID, 7, fid=FID, bytes=7, reason=None)
    (line,) = stream.getvalue().splitlines()
    said = json.loads(line)
    assert said.pop("time").endswith("+00:00")
    assert said == {
        "level": "warning",
        "logger": logger.name,
        "message": f"storing {FID}:\n7 bytes",
        "event": "store_failed",
        "fid": str(FID),
        "bytes": 7,
    }


def test_an_exception_is_one_line_too(written: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = written
    try:
        raise ValueError("no")
    except ValueError:
        logger.exception("a defect")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: no" in json.loads(line)["exception"]


def test_verbose_logs_have_every_event_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tracing.listen(log_every_event)
    try:
        tracing.emit(Event.CB_PROMISE, fid=FID)
        tell(logging.getLogger("test"), logging.INFO, Event.CONNECTED, "connected to %s", "h:1", server="h:1")
    finally:
        tracing.ignore(log_every_event)
    assert [record.getMessage() for record in caplog.records] == [
        f"cb_promise    {FID}",
        "connected to h:1",
    ]


def test_every_event_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "observing.md").read_text()
    table = text[text.index("## Events") : text.index("## Logs")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(Event)
