"""SQLite on one mount, in both journal modes; the other mount reads what was committed."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import View

ROWS = 200
WRITER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=30)
for i in range(int(sys.argv[2])):
    with connection:
        connection.execute("INSERT INTO t VALUES (?, ?)", (sys.argv[3], i))
"""


def rows(path: Path) -> list[tuple[str, int]]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute("SELECT who, n FROM t ORDER BY who, n").fetchall()


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_two_processes_write_one_database(cell: View, mode: str) -> None:
    path = cell.a / "db"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(f"PRAGMA journal_mode={mode}").fetchall() == [(mode,)]
        connection.execute("CREATE TABLE t (who TEXT, n INTEGER)")
        connection.commit()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(ROWS // 2), who]) for who in "pq"]
    for writer in writers:
        assert writer.wait(120) == 0
    expected = [(who, n) for who in "pq" for n in range(ROWS // 2)]
    assert rows(path) == expected
    assert rows(cell.b / "db") == expected


def test_a_transaction_that_was_cut_off_is_rolled_back_on_the_other_mount(cell: View) -> None:
    """The journal is found hot, and played back, through a mount that did not write it."""
    path = cell.a / "db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (who TEXT, n INTEGER)")
        connection.executemany("INSERT INTO t VALUES ('p', ?)", [(n,) for n in range(2000)])
        connection.commit()
    cut_off = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size=5")
connection.execute("BEGIN")
connection.execute("UPDATE t SET n = -1")
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", cut_off, path], timeout=60).returncode == 9
    assert (cell.b / "db-journal").exists()
    assert rows(cell.b / "db") == [("p", n) for n in range(2000)]
