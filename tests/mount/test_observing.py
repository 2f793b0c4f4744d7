"""What is to be seen of real mounts and servers: events, logs, metrics, live screens."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import termios
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asking import status_of
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from conftest import MakeCell, View

PROMISEFS, PROMISEFSD = (Path(sys.executable).with_name(name) for name in ("promisefs", "promisefsd"))


def test_trace_follows_one_file_and_ends_with_its_reader(cell: View) -> None:
    (cell.a / "f").write_text("1")
    mountpoint = cell.running.mountpoint("m1")
    path = mountpoint / cell.name / "f"
    examined = subprocess.run([PROMISEFS, "fs", "examine", path, "--json"], check=True, capture_output=True, text=True)
    fid = json.loads(examined.stdout)["fid"]
    command = [PROMISEFS, "trace", mountpoint, "--event", "cb_break", "--event", "set_dv", "--fid", fid, "--json"]
    records: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as reader:
        assert reader.stdout is not None
        while {record["event"] for record in records} != {
            "cb_break",
            "set_dv",
        }:  # it says nothing when it has begun: change the file until there are lines
            (cell.b / "f").write_text(f"{time.monotonic_ns()}")
            (cell.a / "f").read_text()
            (cell.a / "g").write_text("another")
            if select.select([reader.stdout], [], [], 0.05)[0]:
                records.append(json.loads(reader.stdout.readline()))
        reader.terminate()
    assert {record["fid"] for record in records} == {fid}


def test_logs_of_json_have_one_object_a_line(make_cell: MakeCell) -> None:
    cell = make_cell(mounts=1, server_options=["--log-format", "json", "-v"])
    (cell.mountpoint("m1") / "f").write_text("1")
    status_of(cell.mountpoint("m1"))
    log = "".join(path.read_text() for path in cell.logs if path.name.startswith("server"))
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    stored = [line for line in lines if line.get("method") == "FS.StoreData"]
    assert stored and stored[0]["event"] == "call" and "m1" in stored[0]["client"] and stored[0]["seconds"] > 0
    connected = [line for line in lines if line.get("event") == "connected"]
    assert connected and connected[0]["level"] == "info" and connected[0]["address"].startswith("127.0.0.1:")


def test_metrics_of_a_mount_and_its_server(make_cell: MakeCell) -> None:
    """What the dashboard asks for is there, and tells what has happened."""
    cell = make_cell(mounts=1, server_options=["--metrics", "127.0.0.1:0"], mount_options="metrics=127.0.0.1:0")
    (cell.mountpoint("m1") / "f").write_text("12345")
    log = "".join(path.read_text() for path in cell.logs if path.name.startswith("server"))
    (of_server,) = re.findall(r"metrics are at (http://\S+)", log)
    mount, server = scraped(status_of(cell.mountpoint("m1"))["metrics"]), scraped(of_server)
    assert mount["promisefs_written_bytes_total", ()] == mount["promisefs_stored_bytes_total", ()] == 5
    assert mount["promisefs_upcall_duration_seconds_count", (("operation", "create"),)] == 1
    assert server["promisefsd_call_duration_seconds_count", (("method", "FS.StoreData"),)] == 1
    assert server["promisefsd_clients", (("state", "connected"),)] == 1
    assert server["promisefsd_volume_files", (("volume", "root"),)] >= 1
    assert mount["process_open_fds", ()] > 0


def scraped(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(url, timeout=20) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_top_of_a_mount_and_of_a_server(cell: View) -> None:
    """One object an interval; on a terminal it is drawn until q is pressed, and leaves the terminal as it was."""
    mountpoint, store = cell.running.mountpoint("m1"), cell.running.store_of(0)
    of_mount = subprocess.Popen([PROMISEFS, "top", mountpoint, "--json", "-n", "2"], stdout=subprocess.PIPE, text=True)
    assert of_mount.stdout is not None
    first = json.loads(of_mount.stdout.readline())
    (cell.a / "f").write_text("12345")
    second = json.loads(of_mount.communicate(timeout=30)[0])
    assert first["mountpoint"] == second["mountpoint"] == str(mountpoint)
    assert second["operations"]["create"]["per_s"] > 0 and second["written_bytes_per_s"] > 0
    command = [PROMISEFSD, "top", store, "--json", "-n", "1"]
    of_server = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=30).stdout)
    assert of_server["clients_connected"] == 2
    for command, title in (([PROMISEFS, "top"], b"mounts"), ([PROMISEFSD, "top", store], b"promisefsd top")):
        assert_drawn_until_q(command, title)


def assert_drawn_until_q(command: list[str | Path], title: bytes) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    before = termios.tcgetattr(theirs)
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    shown = b""
    while title not in shown:
        assert select.select([ours], [], [], 30)[0], shown
        shown += os.read(ours, 65536)
    os.write(ours, b"q")
    while process.poll() is None:
        if select.select([ours], [], [], 0.05)[0]:
            shown += os.read(ours, 65536)
    assert process.returncode == 0, shown
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)
