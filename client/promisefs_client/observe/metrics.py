"""The Prometheus metrics of a mount: where in its report (`control.status`) each is."""

from __future__ import annotations

from collections.abc import Callable

from promisefs_protocol.observe.metrics import Defined, Kind, Report, Samples, at, each, failures

COUNTER, GAUGE, HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM


def _of_servers(name: str) -> Callable[[Report], Samples]:
    """A value of each server; the label is its address."""
    return lambda report: (((server["address"],), server[name]) for server in report["servers"])


def _calls(report: Report) -> Samples:
    for server in report["servers"]:
        for method, timing in server["rpc_latency"].items():
            yield (server["address"], method), timing


def _failed_calls(report: Report) -> Samples:
    for (server, method), timing in _calls(report):
        for error, count in timing["failures"].items():
            yield (server, method, error), count


def _cache(what: str) -> Callable[[Report], Samples]:
    return lambda report: (((cache,), counted[what]) for cache, counted in report["caches"].items())


def _mount(report: Report) -> Samples:
    yield (report["mountpoint"], report["source"]), 1


_SERVER = ("server",)

METRICS = (
    Defined("promisefs_mount_info", GAUGE, "1; what is mounted, and where.", _mount, ("mountpoint", "source")),
    Defined(
        "promisefs_upcall_duration_seconds", HISTOGRAM, "Requests of the kernel, until they were answered.",
        each("upcall_latency"), ("operation",),
    ),
    Defined(
        "promisefs_upcall_failures", COUNTER, "Requests of the kernel that were answered with an error.",
        failures("upcall_latency"), ("operation", "error"),
    ),
    Defined(
        "promisefs_call_duration_seconds", HISTOGRAM, "Calls to servers, waiting for one that is away included.",
        _calls, ("server", "method"),
    ),
    Defined(
        "promisefs_call_failures", COUNTER, "Calls that were refused, or not answered in time.",
        _failed_calls, ("server", "method", "error"),
    ),
    Defined("promisefs_calls_waiting", GAUGE, "Calls that are not answered yet.", _of_servers("waiting"), _SERVER),
    Defined("promisefs_longest_wait_seconds", GAUGE, "For how long the oldest has not been.",
            _of_servers("longest_wait_s"), _SERVER),
    Defined("promisefs_call_timeouts", COUNTER, "Calls given up for want of an answer.",
            _of_servers("timeouts"), _SERVER),
    Defined("promisefs_server_connected", GAUGE, "1 if there is a connection.", _of_servers("connected"), _SERVER),
    Defined("promisefs_connects", COUNTER, "Connections made.", _of_servers("connects"), _SERVER),
    Defined("promisefs_lease_left_seconds", GAUGE, "How long the server's promises are worth something.",
            _of_servers("lease_left_s"), _SERVER),
    Defined("promisefs_leases_lost", COUNTER, "Leases that ran out.", _of_servers("leases_lost"), _SERVER),
    Defined("promisefs_breaks_received", COUNTER, "Promises broken by the server.", _of_servers("breaks"), _SERVER),
    Defined("promisefs_resets_received", COUNTER, "InitCallBackState3 calls.", _of_servers("resets"), _SERVER),
    Defined(
        "promisefs_break_acknowledgement_seconds", HISTOGRAM, "Breaks and resets, until they were acknowledged.",
        _of_servers("break_latency"), _SERVER,
    ),
    Defined(
        "promisefs_early_acknowledgements", COUNTER, "Breaks acknowledged before the kernel had dropped everything.",
        _of_servers("early_acks"), _SERVER,
    ),
    Defined("promisefs_overdue_acknowledgements", GAUGE, "Those of them for which it has not dropped it yet.",
            _of_servers("overdue"), _SERVER),
    Defined("promisefs_cache_hits", COUNTER, "Questions to a cache that it answered.", _cache("hits"), ("cache",)),
    Defined("promisefs_cache_misses", COUNTER, "Those that it did not.", _cache("misses"), ("cache",)),
    Defined("promisefs_cache_bytes", GAUGE, "Clean bytes in the page cache.", at("cache_bytes")),
    Defined("promisefs_cache_limit_bytes", GAUGE, "Limit of clean and dirty bytes.", at("cache_limit_bytes")),
    Defined("promisefs_dirty_bytes", GAUGE, "Bytes that no server has yet.", at("dirty_bytes")),
    Defined("promisefs_dirty_files", GAUGE, "Files that have some.", at("dirty_files")),
    Defined("promisefs_read_bytes", COUNTER, "Bytes that the kernel read from the mount.", at("read_bytes")),
    Defined("promisefs_written_bytes", COUNTER, "Bytes that it wrote.", at("written_bytes")),
    Defined("promisefs_fetched_bytes", COUNTER, "Bytes fetched from servers.", at("fetched_bytes")),
    Defined("promisefs_stored_bytes", COUNTER, "Bytes stored at servers.", at("stored_bytes")),
    Defined("promisefs_vnodes", GAUGE, "Files and directories of which something is known.", at("vnodes")),
    Defined("promisefs_promises", GAUGE, "Those of them with a promise.", at("promises")),
    Defined("promisefs_open_handles", GAUGE, "Open handles of files.", at("open_files")),
    Defined("promisefs_open_files", GAUGE, "Files that are open or mapped.", at("open_mmaps", "files")),
    Defined("promisefs_mapped_files", GAUGE, "Those that outlive their last close: mapped, most likely.",
            at("open_mmaps", "outlive_close")),
    Defined("promisefs_store_failures", COUNTER, "Stores that failed.", at("store_failures")),
    Defined("promisefs_files_lost", COUNTER, "Files removed elsewhere before all was stored.", at("files_lost")),
    Defined("promisefs_refused_bytes", COUNTER, "Bytes that a server refused for good.", at("bytes_refused")),
    Defined("promisefs_quarantined_bytes", COUNTER, "Bytes put into the quarantine.", at("bytes_in_quarantine")),
    Defined("promisefs_quarantine_failures", COUNTER, "How often that was not possible.", at("quarantine_failures")),
    Defined("promisefs_voided_bytes", COUNTER, "Bytes thrown away with a lost lock.", at("bytes_voided")),
    Defined("promisefs_closes_owed", GAUGE, "Removed and closed files that a server does not know of yet.",
            at("closes_owed")),
    Defined("promisefs_tokens", GAUGE, "Tokens of local users.", at("tokens", "held")),
    Defined("promisefs_tokens_expired", GAUGE, "Those of them that have expired.", at("tokens", "expired")),
    Defined("promisefs_locks_held", GAUGE, "Locks held.", at("locks", "held")),
    Defined("promisefs_locks_waiting", GAUGE, "Locks waited for.", at("locks", "waiting")),
    Defined("promisefs_locks_lost", COUNTER, "Locks lost.", at("locks", "lost")),
)  # fmt: skip
