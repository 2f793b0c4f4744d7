"""The salvager: checks a whole store against its rules, and mends what can be mended.

A check changes nothing. It looks at one state of the database: that of a stopped store, or, while a server runs, a
snapshot; data files change beside that, so what is wrong with them counts only if it still is when looked at again.

A repair needs the stopped store, locked. It keeps a copy of the database first (`COPY_SUFFIX`) and makes all its
changes in one transaction, so an interrupted one has changed nothing. It deletes no data file. Afterwards no client
may go by what it knew: saved promises are deleted before, and every volume gets a new incarnation.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from promisefs_server.promises import callback_state
from promisefs_server.store.copying import copy_database
from promisefs_server.store.datafiles import DataFiles
from promisefs_server.store.store import Store

from .byte_rules import ByteRules
from .findings import Finding, of_rule, of_sqlite, of_types
from .problems import Report, Severity
from .row_rules import AFTER_TREE, ROW_RULES
from .tree_rules import TreeRules, names_of_nothing

COPY_SUFFIX = ".before-repair"
SECOND_LOOK_S = 1.0
NO_QUOTAS = "UPDATE volumes SET quota = -quota"
"""Before and after changes that no quota may prevent, in their transaction: the database enforces positive ones."""

Group = Callable[[], Iterable[Finding]]
"""Rules that are looked at together."""


def check(connection: sqlite3.Connection, files: DataFiles, *, clean: bool) -> Report:
    """Look at everything. `clean`: the store was shut down cleanly. Raise sqlite3.Error, OSError."""
    report = Report()
    for group in _groups(connection, files, clean=clean):
        for finding in group():
            report.add(finding.problem)
    return report


def check_live(connection: sqlite3.Connection, files: DataFiles) -> Report:
    """The same for a store that is being served. `connection` is not the server's."""
    report = Report()
    connection.execute("BEGIN")
    for group in _row_groups(connection, files):
        for finding in group():
            report.add(finding.problem)
    suspects = {f.problem for f in ByteRules(connection, files, clean=False).lengths() if _is_wrong(f)}
    connection.execute("COMMIT")
    if suspects:
        time.sleep(SECOND_LOOK_S)
        for finding in ByteRules(connection, files, clean=False).lengths():
            if finding.problem in suspects:
                report.add(finding.problem)
    return report


def repair(store: Store) -> Report:
    """Mend a stopped store. Return what was wrong with it. Raise sqlite3.Error, OSError: then nothing has changed."""
    database = store.database
    copy_database(database.connection, database.path.with_name(database.path.name + COPY_SUFFIX))
    callback_state.forget(store.folder)
    report = Report()
    with database.transaction():
        database.execute(NO_QUOTAS)
        for group in _groups(database.connection, store.files, clean=store.was_clean):
            for finding in list(group()):
                report.add(finding.problem)
                for sql, values in finding.repair:
                    database.execute(sql, values)
        database.execute("UPDATE volumes SET incarnation = incarnation + 1")
        database.execute(NO_QUOTAS)
    return report


def _groups(connection: sqlite3.Connection, files: DataFiles, *, clean: bool) -> Iterator[Group]:
    bytes_of = ByteRules(connection, files, clean=clean)
    yield bytes_of.surplus
    yield from _row_groups(connection, files)
    yield bytes_of.lengths


def _row_groups(connection: sqlite3.Connection, files: DataFiles) -> Iterator[Group]:
    yield partial(of_sqlite, connection)
    yield partial(of_types, connection)
    for rule in ROW_RULES:
        yield partial(of_rule, connection, rule)
    yield partial(names_of_nothing, connection, files)
    yield lambda: TreeRules(connection).findings()
    for rule in AFTER_TREE:
        yield partial(of_rule, connection, rule)


def _is_wrong(finding: Finding) -> bool:
    return finding.problem.severity is not Severity.NOTE
