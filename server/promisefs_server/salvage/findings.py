"""A problem together with the statements that mend it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any, NamedTuple

from .problems import Problem, Severity
from .row_rules import RowRule

Statement = tuple[str, dict[str, Any]]


class Finding(NamedTuple):
    problem: Problem
    repair: tuple[Statement, ...] = ()


def of_rule(connection: sqlite3.Connection, rule: RowRule) -> list[Finding]:
    """What breaks one rule now."""
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row
    findings = []
    for row in cursor.execute(rule.query).fetchall():
        values = {name: row[name] for name in row.keys()}
        text = rule.text.format(**{name: printable(value) for name, value in values.items()})
        repair = rule.repair.split(";") if rule.repair else []
        problem = Problem(rule.name, rule.severity, values["vnode"], text)
        findings.append(Finding(problem, tuple((sql, values) for sql in repair)))
    return findings


def of_sqlite(connection: sqlite3.Connection) -> Iterator[Finding]:
    """What SQLite itself finds wrong with the file. Indices can be made again from their tables."""
    lines = [str(line) for (line,) in connection.execute("PRAGMA integrity_check(100)")]
    if lines == ["ok"]:
        return
    mendable = all(" index " in line for line in lines)
    for line in lines:
        severity = Severity.DAMAGE if mendable else Severity.LOSS
        hint = "" if mendable else "; restore the store from a backup, or the database with 'sqlite3 .recover'"
        statements: tuple[Statement, ...] = (("REINDEX", {}),) if mendable else ()
        yield Finding(Problem("database-damaged", severity, 0, line + hint), statements)


def of_types(connection: sqlite3.Connection) -> Iterator[Finding]:
    """Values of another type than their column's, which SQLite allows and nothing here expects."""
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    for table in tables:
        if table.startswith("sqlite_"):
            continue
        for _, column, declared, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
            (count,) = connection.execute(
                f"SELECT count(*) FROM {table} WHERE typeof({column}) NOT IN ('null', ?)", (declared.lower(),)
            ).fetchone()
            if count:
                text = f"{count} values in column {column} of table {table} are not of type {declared}"
                yield Finding(Problem("type-wrong", Severity.LOSS, 0, text + "; restore the store from a backup"))


def printable(value: object) -> str:
    return repr(value)[1:] if isinstance(value, bytes) else str(value)
