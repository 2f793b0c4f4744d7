"""SQLite databases that are written on several mounts at a time, in rollback mode.

PROMISEFS_SQLITE_TRANSACTIONS in the environment says how many each writer makes, instead of TRANSACTIONS.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from promisefs_client.fuse.fuse_extension import SWITCH

if TYPE_CHECKING:
    from conftest import MakeCell

WRITERS = 8
TRANSACTIONS = 12
TRANSACT = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for i in range(int(sys.argv[3])):
    while True:
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO t VALUES (?, ?)", (sys.argv[2], i))
            connection.execute("UPDATE total SET n = n + 1")
            connection.execute("COMMIT")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            if connection.in_transaction:
                connection.execute("ROLLBACK")
"""
READ = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=600)
seen = 0
while seen < int(sys.argv[2]):
    rows, total = connection.execute("SELECT (SELECT count(*) FROM t), n FROM total").fetchone()
    assert rows == total and rows >= seen, (rows, total, seen)
    seen = rows
"""


@pytest.mark.skipif(os.environ.get(SWITCH) == "off", reason="locks need the FUSE extension")
@pytest.mark.limit_s(float(os.environ.get("PROMISEFS_LOCK_LIMIT_S", "300")))
def test_writers_and_readers_on_four_mounts(make_cell: MakeCell) -> None:
    transactions = int(os.environ.get("PROMISEFS_SQLITE_TRANSACTIONS", TRANSACTIONS))
    cell = make_cell(mounts=4)
    paths = [cell.mountpoint(f"m{number}") / "db" for number in range(1, 5)]
    with closing(sqlite3.connect(paths[0])) as connection:
        connection.executescript(
            "CREATE TABLE t (who INTEGER, n INTEGER); CREATE TABLE total (n INTEGER); INSERT INTO total VALUES (0)"
        )
    running = [
        subprocess.Popen([sys.executable, "-c", TRANSACT, paths[who % 4], str(who), str(transactions)])
        for who in range(WRITERS)
    ]
    everything = WRITERS * transactions
    running += [subprocess.Popen([sys.executable, "-c", READ, path, str(everything)]) for path in paths[:2]]
    try:
        assert [process.wait() for process in running] == [0] * len(running)
    finally:
        for process in running:
            process.kill()
            process.wait()
    expected = [(who, n) for who in range(WRITERS) for n in range(transactions)]
    for path in paths:
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("SELECT who, n FROM t ORDER BY who, n").fetchall() == expected
