"""What `top` makes of two reports, and that its screens fit."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from promisefs_client.commands.top_view import mount_screen, overview_screen
from promisefs_client.observe.activity import activity as mount_activity
from promisefs_protocol.observe.live_screen import (
    Size,
    bytes_text,
    duration,
    heading,
    milliseconds,
    number,
)
from promisefs_protocol.observe.timings import BOUNDS_S, Timing
from promisefs_server.commands.top_view import server_screen
from promisefs_server.observe.activity import activity as server_activity
from rich.console import Console

METHODS = ("FS.FetchStatus", "FS.StoreData", "FS.InlineBulkStatus", "FS.CreateFile", "FS.Lookup", "FS.GiveUpCallBacks")
SIZES = [Size(80, 24), Size(200, 60), Size(60, 14), Size(40, 12), Size(80, 10)]


def timing(count: int, seconds: float = 0.0015) -> dict[str, Any]:
    one = Timing()
    one.started = count
    for _ in range(count):
        one.took(seconds)
    return one.as_json()


def mount_report(scale: int) -> dict[str, Any]:
    """Everything that counts is `scale` times something."""
    server = {"address": "127.0.0.1:7654", "connected": True, "disconnected_s": 0.0, "connects": 1}
    server |= {"lease_left_s": 12.3, "waiting": 0, "longest_wait_s": 0.0}
    zeros = ("waiting", "resets", "early_acks", "overdue", "leases_lost", "timeouts", "store_failures", "files_lost")
    more_zeros = ("bytes_voided", "closes_owed", "bytes_refused", "bytes_in_quarantine", "quarantine_failures")
    caches = ("attributes", "names", "listings", "pages", "kernel_attributes", "kernel_names")
    return {
        "mountpoint": "/mnt/" + "long" * 20,
        "source": "files.example.org:7654/root",
        "mounted_s": 3723.0,
        "connected": True,
        **dict.fromkeys((*zeros, *more_zeros), 0),
        "servers": [server],
        "dirty_bytes": 5,
        "dirty_files": 1,
        "cache_bytes": 10,
        "cache_limit_bytes": 100,
        "promises": 12345,
        "open_files": 3,
        "open_mmaps": {"files": 2, "outlive_close": 1},
        "locks": {"held": 1, "waiting": 0},
        "breaks": scale * 4,
        "break_latency": timing(scale * 4),
        "upcall_latency": {f"operation{n}": timing(scale * (n + 1)) for n in range(30)},
        "rpc_latency": {method: timing(scale) for method in METHODS},
        "caches": {name: {"hits": scale * 3, "misses": scale} for name in caches},
        **dict.fromkeys(("read_bytes", "written_bytes", "fetched_bytes", "stored_bytes"), scale * 1_000_000),
    }


def server_report(scale: int) -> dict[str, Any]:
    client = {"name": "host:/mnt/" + "x" * 80, "uuid": "00", "connected": True, "stale": False, "in_doubt": True}
    client |= {"lease_left_s": 3.0, "promises": 7, "breaks_waiting": 2, "longest_break_s": 1.5}
    return {
        "pid": 1,
        "up_s": 60.0,
        "directory": "/srv/" + "long" * 20,
        "lease_s": 15.0,
        **dict.fromkeys(("clients_known", "clients_connected", "clients_in_doubt", "connections", "promises"), 40),
        "clients": [client] * 40,
        "clients_omitted": 0,
        **dict.fromkeys(("locks_held", "locks_waiting", "calls_waiting", "breaks_waiting"), 2),
        "longest_break_s": 1.5,
        **dict.fromkeys(("breaks", "resets", "leases_ended"), scale),
        "store": {
            "volumes": [{"name": f"volume{n}", "number": n, "files": 3, "bytes": 4} for n in range(30)],
            "transactions": scale * 5,
            **dict.fromkeys(("database_bytes", "wal_bytes", "disk_bytes", "disk_free_bytes"), 10**9),
            "deletions_waiting": 0,
        },
        "bucket_bounds_s": list(BOUNDS_S),
        "call_latency": {method: timing(scale) for method in METHODS},
        **dict.fromkeys(("break_latency", "wait_latency", "commit_latency", "file_sync_latency"), timing(scale)),
    }


def test_a_mount_between_two_reports() -> None:
    state = mount_activity(mount_report(10), mount_report(30), 2.0)
    assert state["operations"]["operation0"]["per_s"] == 10
    assert 0.001 < state["operations"]["operation0"]["p50_s"] <= 0.002
    assert state["calls"]["FS.Lookup"]["mean_s"] == pytest.approx(0.0015)
    assert state["caches"]["pages"] == {"asked_per_s": 40, "hit_rate": 0.75}
    assert (state["breaks_per_s"], state["read_bytes_per_s"], state["dirty_bytes"]) == (40, 10_000_000, 5)
    idle = mount_activity(mount_report(10), mount_report(10), 1.0)
    assert idle["operations"] == {} and idle["caches"]["pages"]["hit_rate"] is None
    first = mount_activity(None, mount_report(10), 10.0)
    assert first["operations"]["operation0"]["per_s"] == 1 and first["breaks_per_s"] == 4
    json.dumps(state)


def test_a_server_between_two_reports() -> None:
    state = server_activity(server_report(10), server_report(30), 2.0)
    assert state["calls"]["FS.Lookup"]["per_s"] == state["breaks_per_s"] == state["commit"]["per_s"] == 10
    assert (state["transactions_per_s"], state["promises"]) == (50, 40)
    assert server_activity(None, server_report(10), 10.0)["wait"]["per_s"] == 1
    json.dumps(state)


def drawn(screen: Any, size: Size) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=size.width, height=size.height, force_terminal=False).print(screen, end="")
    return file.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["mount", "server", "overview", "silent"])
def test_screens_fit(kind: str, size: Size) -> None:
    state = mount_activity(None, mount_report(10), 10.0)
    silent = {"mountpoint": "/mnt", "source": "x", "device": "0:1", "error": "its process 1 is stopped"}
    match kind:
        case "mount":
            screen = mount_screen(state, size)
        case "silent":
            screen = mount_screen(silent, size)
        case "overview":
            screen = overview_screen([state, silent] * 40, size)
        case _:
            screen = server_screen(server_activity(None, server_report(10), 10.0), size)
    lines = drawn(screen, size)
    assert len(lines) <= size.height
    assert max(map(len, lines)) <= size.width
    assert "q quits" in lines[0]


def test_at_80_by_24_numbers_are_whole() -> None:
    state = mount_activity(None, mount_report(10), 10.0)
    lines = drawn(mount_screen(state, Size(80, 24)), Size(80, 24))
    (titles,) = (line for line in lines if line.startswith("operation "))
    assert titles.split() == ["operation", "/s", "mean", "p99", "ms", "call", "/s", "mean", "p99", "ms"]
    (row,) = (line for line in lines if line.startswith("operation29"))
    assert row.split() == ["operation29", "30.0", "1.5", "2.0", "FS.CreateFile", "1.0", "1.5", "2.0"]
    assert "…" not in "".join(lines[1:9])


def test_numbers_for_people() -> None:
    assert [number(n) for n in (0, 9.94, 99.9, 100, 12345, 99_999, 123_456)] == [
        "0.0", "9.9", "99.9", "100", "12,345", "99,999", "123k",
    ]  # fmt: skip
    assert [milliseconds(s) for s in (0.00001, 0.0015, 0.25, 60)] == ["0.01", "1.5", "250", "60,000"]
    assert [bytes_text(n) for n in (0, 999, 1500, 123_456, 5e6, 7e9, 3e12)] == [
        "0 B", "999 B", "1.5 kB", "123 kB", "5.0 MB", "7.0 GB", "3.0 TB",
    ]  # fmt: skip
    assert duration(3723.9) == "1:02:03"
    assert heading("left side", "right", 12).plain == "left … right"
