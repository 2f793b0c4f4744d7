"""The Prometheus metrics of a server: where in its report (`statistics`) each is."""

from __future__ import annotations

from collections.abc import Callable

from promisefs_protocol.observe.metrics import Defined, Kind, Report, Samples, at, each, failures

COUNTER, GAUGE, HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM


def _store(report: Report) -> Samples:
    yield (report["directory"],), 1


def _clients(report: Report) -> Samples:
    for state in ("known", "connected", "in_doubt"):
        yield (state,), report[f"clients_{state}"]


def _owing(name: str) -> Callable[[Report], Samples]:
    """A value of each client that changes wait for: the others are many."""
    return lambda report: (
        ((client["name"], client["uuid"]), client[name]) for client in report["clients"] if client["breaks_waiting"]
    )


def _volumes(name: str) -> Callable[[Report], Samples]:
    return lambda report: (((volume["name"],), volume[name]) for volume in report["store"]["volumes"])


def _undelivered(report: Report) -> Samples:
    yield (), sum(report["break_latency"]["failures"].values())


_CLIENT = ("client", "uuid")

METRICS = (
    Defined("promisefsd_store_info", GAUGE, "1; which store is served.", _store, ("directory",)),
    Defined("promisefsd_lease_seconds", GAUGE, "How long a client that does not answer holds up a change.",
            at("lease_s")),
    Defined("promisefsd_call_duration_seconds", HISTOGRAM, "Calls, until they were answered.",
            each("call_latency"), ("method",)),
    Defined("promisefsd_call_failures", COUNTER, "Calls that were refused.",
            failures("call_latency"), ("method", "error")),
    Defined("promisefsd_calls_waiting", GAUGE, "Calls that are not answered yet.", at("calls_waiting")),
    Defined("promisefsd_clients", GAUGE, "Clients; in_doubt: those that every change waits for.",
            _clients, ("state",)),
    Defined("promisefsd_connections", GAUGE, "Connections of clients.", at("connections")),
    Defined("promisefsd_promises", GAUGE, "Promises held by clients.", at("promises")),
    Defined("promisefsd_breaks_sent", COUNTER, "Promises broken.", at("breaks")),
    Defined("promisefsd_break_delivery_seconds", HISTOGRAM, "CB.CallBack calls, until they were acknowledged or not.",
            lambda report: [((), report["break_latency"])]),
    Defined("promisefsd_breaks_undelivered", COUNTER, "Those that were not acknowledged.", _undelivered),
    Defined("promisefsd_breaks_waiting", GAUGE, "Breaks that are not acknowledged yet.", at("breaks_waiting")),
    Defined("promisefsd_longest_break_seconds", GAUGE, "For how long the oldest has not been.", at("longest_break_s")),
    Defined("promisefsd_client_breaks_waiting", GAUGE, "Breaks that a client has not acknowledged yet.",
            _owing("breaks_waiting"), _CLIENT),
    Defined("promisefsd_client_lease_left_seconds", GAUGE, "How long such a client can still hold up changes.",
            _owing("lease_left_s"), _CLIENT),
    Defined("promisefsd_change_wait_seconds", HISTOGRAM, "Changes that waited for acknowledgements.",
            lambda report: [((), report["wait_latency"])]),
    Defined("promisefsd_resets_sent", COUNTER, "InitCallBackState3 calls.", at("resets")),
    Defined("promisefsd_leases_ended", COUNTER, "Clients whose lease ended while they owed acknowledgements.",
            at("leases_ended")),
    Defined("promisefsd_locks_held", GAUGE, "Locks held by clients.", at("locks_held")),
    Defined("promisefsd_locks_waiting", GAUGE, "Locks waited for.", at("locks_waiting")),
    Defined("promisefsd_commit_duration_seconds", HISTOGRAM, "Durable commits: fdatasync of the write-ahead log.",
            lambda report: [((), report["commit_latency"])]),
    Defined("promisefsd_file_sync_duration_seconds", HISTOGRAM, "fdatasync of data files.",
            lambda report: [((), report["file_sync_latency"])]),
    Defined("promisefsd_transactions", COUNTER, "Transactions of the database.", at("store", "transactions")),
    Defined("promisefsd_database_bytes", GAUGE, "Size of the database.", at("store", "database_bytes")),
    Defined("promisefsd_wal_bytes", GAUGE, "Size of its write-ahead log.", at("store", "wal_bytes")),
    Defined("promisefsd_disk_bytes", GAUGE, "Size of the disk that the store is on.", at("store", "disk_bytes")),
    Defined("promisefsd_disk_free_bytes", GAUGE, "What is free of it.", at("store", "disk_free_bytes")),
    Defined("promisefsd_deletions_waiting", GAUGE, "Data files that are still to be deleted.",
            at("store", "deletions_waiting")),
    Defined("promisefsd_volume_files", GAUGE, "Files and directories of a volume, counted once a minute.",
            _volumes("files"), ("volume",)),
    Defined("promisefsd_volume_used_bytes", GAUGE, "What counts against a volume's quota.",
            _volumes("used_bytes"), ("volume",)),
    Defined("promisefsd_volume_quota_bytes", GAUGE, "A volume's quota; 0 for none.",
            _volumes("quota_bytes"), ("volume",)),
    Defined("promisefsd_volume_read_only", GAUGE, "1 if nothing in the volume can be changed.",
            _volumes("read_only"), ("volume",)),
    Defined("promisefsd_volume_bytes", GAUGE, "Their sizes.", _volumes("bytes"), ("volume",)),
)  # fmt: skip
