"""Rules about rows that SQL can decide: a query that finds what breaks the rule, and a statement that mends it.

A query names `vnode`, the key of the vnode that each row is about or 0, and whatever its text and its repair use by
name. Rules are tried in this order, each after the repairs of those before it, so a later one may rely on an earlier
one. They see volumes that are here or leaving; of others, rows are worth nothing (I2 of `store.volumes`).

When a table or column is added whose content depends on other rows, add the rule that it has to obey.
"""

from __future__ import annotations

from typing import NamedTuple

from promisefs_protocol.ids import MAX_FILE_BYTES, S_IFMNT

from promisefs_server.store.volumes import DIRECTORY_SIZE_BYTES, MAX_VOLUMES, ROOT_VNODE, VNODE_BITS, VNODE_MASK

from .problems import Severity

_TYPE = "(mode & 61440)"
_DIR, _FILE, _LINK = 0o040000, 0o100000, 0o120000
_HERE = f">> {VNODE_BITS} IN (SELECT volume FROM volumes WHERE state IN ('here', 'leaving'))"
_TOUCH = "ctime_ns = ctime_ns + 1"


_PLACES = (
    "WITH counted AS (SELECT e.vnode, directory, count(*) AS names FROM entries AS e JOIN vnodes AS v"
    f" ON v.vnode = e.vnode WHERE {_TYPE} != {_DIR} AND e.vnode {_HERE} GROUP BY e.vnode, directory),"
    " several AS (SELECT * FROM counted WHERE vnode IN (SELECT vnode FROM counted GROUP BY vnode HAVING count(*) > 1))"
)
"""What table places should hold: `several`."""


class RowRule(NamedTuple):
    name: str
    text: str
    """For people; `{name}` is a column of the query."""
    query: str
    repair: str
    """Executed with each row that the query has found."""
    severity: Severity = Severity.DAMAGE


ROW_RULES = (
    RowRule(
        "volume-unknown",
        "{count} vnodes belong to volume {volume}, of which the store does not know",
        f"SELECT 0 AS vnode, vnode >> {VNODE_BITS} AS volume, count(*) AS count FROM vnodes"
        f" WHERE vnode >> {VNODE_BITS} NOT IN (SELECT volume FROM volumes) GROUP BY 2",
        "",
        Severity.LOSS,
    ),
    RowRule(
        "type-unknown",
        "mode {mode} is of no known type; it becomes a regular file of mode 0600",
        f"SELECT vnode, mode FROM vnodes WHERE {_TYPE} NOT IN ({_DIR}, {_FILE}, {_LINK}, {S_IFMNT}) OR mode > 65535",
        f"UPDATE vnodes SET mode = {_FILE | 0o600}, {_TOUCH} WHERE vnode = :vnode",
    ),
    RowRule(
        "target-missing",
        "a symbolic link or mount point without a target: nothing is left of it, it is removed",
        f"SELECT vnode FROM vnodes WHERE {_TYPE} IN ({_LINK}, {S_IFMNT}) AND target IS NULL AND vnode {_HERE}",
        "DELETE FROM vnodes WHERE vnode = :vnode",
    ),
    RowRule(
        "target-surplus",
        "a file or directory with a symbolic link's target",
        f"SELECT vnode FROM vnodes WHERE {_TYPE} IN ({_DIR}, {_FILE}) AND target IS NOT NULL AND vnode {_HERE}",
        f"UPDATE vnodes SET target = NULL, {_TOUCH} WHERE vnode = :vnode",
    ),
    RowRule(
        "root-wrong",
        "volume {name} begins at vnode key {root} instead of {right}",
        f"SELECT 0 AS vnode, volume, name, root, volume << {VNODE_BITS} | {ROOT_VNODE} AS right FROM volumes"
        f" WHERE root != volume << {VNODE_BITS} | {ROOT_VNODE}",
        "UPDATE volumes SET root = :right WHERE volume = :volume",
    ),
    RowRule(
        "root-missing",
        "volume {name} has lost its root directory; it gets a new one",
        "SELECT root AS vnode, name, abs(random() % 4294967296) AS uniquifier FROM volumes"
        " WHERE state IN ('here', 'leaving') AND root NOT IN (SELECT vnode FROM vnodes)",
        "INSERT INTO vnodes (vnode, uniquifier, mode, uid, gid, nlink, size, sparse, data_version,"
        " atime_ns, mtime_ns, ctime_ns, xattr_count, parent, target)"
        f" VALUES (:vnode, :uniquifier, {_DIR | 0o755}, 0, 0, 2, {DIRECTORY_SIZE_BYTES}, 0, 1, 0, 0, 1, 0, :vnode,"
        " NULL)",
    ),
    RowRule(
        "root-no-directory",
        "volume {name} has a root that is no directory; it becomes one",
        "SELECT root AS vnode, name FROM volumes WHERE state IN ('here', 'leaving')"
        f" AND root IN (SELECT vnode FROM vnodes WHERE {_TYPE} != {_DIR})",
        f"UPDATE vnodes SET mode = {_DIR | 0o755}, target = NULL, {_TOUCH} WHERE vnode = :vnode",
    ),
    RowRule(
        "directory-missing",
        "{count} names are in a directory that is not there; it is made again, mode 0700",
        "SELECT directory AS vnode, count(*) AS count, abs(random() % 4294967296) AS uniquifier FROM entries"
        f" WHERE directory NOT IN (SELECT vnode FROM vnodes) AND directory {_HERE} GROUP BY directory",
        "INSERT INTO vnodes (vnode, uniquifier, mode, uid, gid, nlink, size, sparse, data_version,"
        " atime_ns, mtime_ns, ctime_ns, xattr_count, parent, target)"
        f" VALUES (:vnode, :uniquifier, {_DIR | 0o700}, 0, 0, 2, {DIRECTORY_SIZE_BYTES}, 0, 1, 0, 0, 1, 0, 0, NULL)",
    ),
    RowRule(
        "entry-in-no-directory",
        "it is no directory, but the name {name} is in it",
        f"SELECT directory AS vnode, name FROM entries WHERE directory {_HERE}"
        f" AND directory IN (SELECT vnode FROM vnodes WHERE {_TYPE} != {_DIR})",
        "DELETE FROM entries WHERE directory = :vnode AND name = :name",
    ),
    RowRule(
        "name-impossible",
        "it has the name {name}, which no file can have",
        f"SELECT directory AS vnode, name FROM entries WHERE directory {_HERE} AND (typeof(name) != 'blob'"
        " OR length(name) NOT BETWEEN 1 AND 255 OR name IN (x'2e', x'2e2e')"
        " OR instr(name, x'2f') OR instr(name, x'00'))",
        "DELETE FROM entries WHERE directory = :vnode AND name = :name",
    ),
    RowRule(
        "entry-of-other-volume",
        "the name {name} in it stands for a vnode of another volume",
        f"SELECT directory AS vnode, name FROM entries WHERE directory {_HERE}"
        f" AND directory >> {VNODE_BITS} != vnode >> {VNODE_BITS}",
        "DELETE FROM entries WHERE directory = :vnode AND name = :name",
    ),
    RowRule(
        "size-impossible",
        "its size is {size}; it is {right} now",
        f"SELECT vnode, size, CASE WHEN size < 0 THEN 0 ELSE {MAX_FILE_BYTES} END AS right FROM vnodes"
        f" WHERE {_TYPE} = {_FILE} AND size NOT BETWEEN 0 AND {MAX_FILE_BYTES} AND vnode {_HERE}",
        f"UPDATE vnodes SET size = :right, sparse = 1, data_version = data_version + 1, {_TOUCH} WHERE vnode = :vnode",
    ),
    RowRule(
        "size-wrong",
        "its size is {size} and should be {right}",
        f"SELECT vnode, size, CASE {_TYPE} WHEN {_DIR} THEN {DIRECTORY_SIZE_BYTES} ELSE length(target) END AS right"
        f" FROM vnodes WHERE {_TYPE} IN ({_DIR}, {_LINK}, {S_IFMNT}) AND vnode {_HERE} AND size IS NOT"
        f" CASE {_TYPE} WHEN {_DIR} THEN {DIRECTORY_SIZE_BYTES} ELSE length(target) END",
        f"UPDATE vnodes SET size = :right, {_TOUCH} WHERE vnode = :vnode",
    ),
    RowRule(
        "xattrs-of-nothing",
        "extended attribute {name} of a vnode that is not there",
        f"SELECT vnode, name FROM xattrs WHERE vnode NOT IN (SELECT vnode FROM vnodes) AND vnode {_HERE}",
        "DELETE FROM xattrs WHERE vnode = :vnode AND name = :name",
    ),
    RowRule(
        "xattr-count-wrong",
        "it counts {xattr_count} extended attributes and has {right}",
        "SELECT v.vnode, xattr_count, coalesce(n, 0) AS right FROM vnodes AS v"
        " LEFT JOIN (SELECT vnode, count(*) AS n FROM xattrs GROUP BY vnode) AS x ON x.vnode = v.vnode"
        f" WHERE xattr_count != coalesce(n, 0) AND v.vnode {_HERE}",
        f"UPDATE vnodes SET xattr_count = :right, {_TOUCH} WHERE vnode = :vnode",
    ),
    RowRule(
        "vnode-number-wrong",
        "volume {name} has a wrong next vnode number: {next_vnode}, and {right} is the first unused",
        "SELECT * FROM (SELECT 0 AS vnode, volume, name, next_vnode,"
        f" (SELECT max(vnode) & {VNODE_MASK} FROM vnodes"
        f" WHERE vnode BETWEEN volume << {VNODE_BITS} AND volume << {VNODE_BITS} | {VNODE_MASK}) + 1 AS right"
        f" FROM volumes WHERE state IN ('here', 'leaving')) WHERE next_vnode NOT BETWEEN right AND {VNODE_MASK}",
        "UPDATE volumes SET next_vnode = :right WHERE volume = :volume",
    ),
    RowRule(
        "volume-number-wrong",
        "the store has a wrong next volume number: {next_volume}, and {right} is the first unused",
        "SELECT * FROM (SELECT 0 AS vnode, next_volume,"
        " (SELECT max(volume & 65535) FROM volumes WHERE volume >> 16 = number) + 1 AS right FROM store)"
        f" WHERE next_volume NOT BETWEEN right AND {MAX_VOLUMES + 1}",
        "UPDATE store SET next_volume = :right",
    ),
    RowRule(
        "usage-wrong",
        "volume {volume} is noted as taking {bytes} bytes, and takes {right}",
        "SELECT 0 AS vnode, volume, coalesce(bytes, 0) AS bytes, coalesce(counted, 0) AS right FROM"
        " (SELECT volume FROM volumes UNION SELECT volume FROM usage) LEFT JOIN usage USING (volume) LEFT JOIN"
        f" (SELECT vnode >> {VNODE_BITS} AS volume, sum(size + 1024) AS counted FROM vnodes GROUP BY 1) USING (volume)"
        " WHERE coalesce(bytes, 0) != coalesce(counted, 0)",
        "INSERT OR REPLACE INTO usage SELECT :volume, :right",
    ),
    RowRule(
        "host-unknown",
        "{count} things are kept for client {host}, which is not known",
        "SELECT 0 AS vnode, host, count(*) AS count FROM"
        " (SELECT host FROM replies UNION ALL SELECT host FROM orphan_holders)"
        " WHERE host NOT IN (SELECT host FROM hosts) GROUP BY host",
        "DELETE FROM replies WHERE host = :host; DELETE FROM orphan_holders WHERE host = :host",
    ),
)

AFTER_TREE = (
    RowRule(
        "parent-of-file-wrong",
        "it uses the access control list of a directory that it is not in; now that of one in which it is",
        "SELECT e.vnode, min(directory) AS right FROM entries AS e JOIN vnodes AS v ON v.vnode = e.vnode"
        f" WHERE {_TYPE} != {_DIR} AND e.vnode {_HERE} GROUP BY e.vnode HAVING sum(directory = parent) = 0",
        f"UPDATE vnodes SET parent = :right, {_TOUCH} WHERE vnode = :vnode",
    ),
    RowRule(
        "places-missing",
        "it has {names} names in one of its directories, which are not counted, or wrongly",
        f"{_PLACES} SELECT vnode, directory, names FROM several EXCEPT SELECT vnode, directory, names FROM places",
        "INSERT OR REPLACE INTO places VALUES (:vnode, :directory, :names)",
    ),
    RowRule(
        "places-surplus",
        "names of it are counted in a directory where it has none, or does not need to be counted",
        f"{_PLACES} SELECT vnode, directory FROM places WHERE vnode {_HERE}"
        " EXCEPT SELECT vnode, directory FROM several",
        "DELETE FROM places WHERE vnode = :vnode AND directory = :directory",
    ),
    RowRule(
        "list-missing",
        "its access control list, number {acl}, is lost; it is the administrators' now",
        f"SELECT vnode, acl FROM vnodes WHERE acl != 0 AND acl NOT IN (SELECT acl FROM acls) AND vnode {_HERE}",
        f"UPDATE vnodes SET acl = 0, {_TOUCH} WHERE vnode = :vnode",
    ),
    RowRule(
        "links-wrong",
        "it counts {nlink} names and has {right}",
        "SELECT v.vnode, nlink, coalesce(n, 0) AS right FROM vnodes AS v"
        " LEFT JOIN (SELECT vnode, count(*) AS n FROM entries GROUP BY vnode) AS e ON e.vnode = v.vnode"
        f" WHERE {_TYPE} != {_DIR} AND nlink != coalesce(n, 0) AND v.vnode {_HERE}",
        f"UPDATE vnodes SET nlink = :right, {_TOUCH} WHERE vnode = :vnode",
    ),
    RowRule(
        "list-surplus",
        "a file with an access control list of its own",
        f"SELECT vnode FROM vnodes WHERE acl != 0 AND nlink != 0 AND {_TYPE} != {_DIR} AND vnode {_HERE}",
        f"UPDATE vnodes SET acl = 0, {_TOUCH} WHERE vnode = :vnode",
    ),
    RowRule(
        "subdirectories-wrong",
        "it counts {nlink} links and should have {right}",
        "SELECT v.vnode, nlink, 2 + coalesce(n, 0) AS right FROM vnodes AS v LEFT JOIN"
        f" (SELECT directory, count(*) AS n FROM entries AS e JOIN vnodes AS d USING (vnode) WHERE {_TYPE} = {_DIR}"
        " GROUP BY directory) AS s ON s.directory = v.vnode"
        f" WHERE {_TYPE} = {_DIR} AND nlink != 2 + coalesce(n, 0) AND v.vnode {_HERE}",
        f"UPDATE vnodes SET nlink = :right, {_TOUCH} WHERE vnode = :vnode",
    ),
    RowRule(
        "holder-surplus",
        "client {host} is noted to have it open as a removed file, which it is not",
        "SELECT vnode, host FROM orphan_holders"
        f" WHERE vnode NOT IN (SELECT vnode FROM vnodes WHERE nlink = 0) AND vnode {_HERE}",
        "DELETE FROM orphan_holders WHERE vnode = :vnode AND host = :host",
    ),
    RowRule(
        "removed-and-not-open",
        "a removed file that nobody has open is still there; the next start deletes it",
        f"SELECT vnode FROM vnodes WHERE nlink = 0 AND vnode {_HERE}"
        " AND vnode NOT IN (SELECT vnode FROM orphan_holders) AND vnode NOT IN (SELECT vnode FROM entries)",
        "",
        Severity.NOTE,
    ),
)
"""Those that presume that names and directories are in order."""
