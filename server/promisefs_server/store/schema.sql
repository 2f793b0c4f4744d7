-- The store's metadata: one SQLite file, WAL. Bytes of regular files are in data files beside it.
--
-- A vnode is known by one 63-bit integer, `volume << 40 | number in the volume`; numbers are never used twice.
-- Times are nanoseconds since the epoch. Names, targets and values are bytes.
--
-- store        one row
--   uuid             16 bytes, of this server for ever
--   starts           how often it was started: differs after every start
--   clean            1 iff it was shut down cleanly and has not been started since
--   lease_ms         no lease that has not ended is longer
--   cell             name of the cell that this server is of, for ever; empty: it is alone
--   number           this server's in the cell, for ever
--   next_volume      a volume made here is `number << 16 | k`; no k from here on has been used
-- volumes      what is served here, and what became of what was; no change of names spans two of them
--   state            see `volumes.VolumeState`
--   other_store      uuid of the store that it is coming from or has gone to, else NULL
--   other_number     that server's number in the cell, else NULL
--   root             vnode of the root directory
--   next_vnode       no number from here on has been used; some are left out at every start that follows an unclean end
--   incarnation      +1 at every start that was not preceded by a clean shutdown
--   quota            the most that `usage.bytes` may grow to; 0: no bound
--   read_only        1: nothing in it is changed
-- usage        what each volume takes, kept by triggers: the sizes of all its vnodes, and 1024 for each
-- vnodes       everything that has a fid
--   uniquifier       random; makes forged and mistaken fids fail
--   mode             type and permission bits, as st_mode; the type 0o160000 is a mount point
--   nlink            names; for a directory 2 + its subdirectories. 0: an orphan, kept for `orphan_holders`
--   size             bytes; of a symlink its target's; of a directory always 4096. The data file may be shorter (zeros) or longer (garbage)
--   sparse           1 once the data file may have a hole
--   data_version     +1 at each change of the bytes or names
--   ctime_ns         strictly greater at each change of the row
--   xattr_count      rows in `xattrs`
--   parent           the directory that it is in (of the root: itself); of a file with several names see `places`
--   target           of a symlink; of a mount point, the name of a volume; else NULL
--   acl              of a directory: its access control list; of an orphan: that of the directory it was in last; 0: administrators only
-- acls         access control lists, each once
--   packed           msgpack, see `access.acl`
-- places       how many names a file has in a directory; only of files that have names in several
-- entries      names: which vnode each stands for
-- xattrs       extended attributes
-- hosts        clients that may hold promises or have orphans open
--   host             small number used elsewhere in the store
--   silent_s         seconds that the server was up and did not hear of it
-- orphan_holders   which hosts have, or may have, an orphan open
-- replies      what was answered to each operation on names that its client may still repeat
--   reply            msgpack, without promises

CREATE TABLE store (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    uuid BLOB NOT NULL,
    starts INTEGER NOT NULL,
    clean INTEGER NOT NULL,
    lease_ms INTEGER NOT NULL,
    cell TEXT NOT NULL,
    number INTEGER NOT NULL,
    next_volume INTEGER NOT NULL
);

CREATE TABLE volumes (
    volume INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    root INTEGER NOT NULL,
    next_vnode INTEGER NOT NULL,
    incarnation INTEGER NOT NULL,
    state TEXT NOT NULL,
    other_store BLOB,
    other_number INTEGER,
    quota INTEGER NOT NULL DEFAULT 0,
    read_only INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX volume_names ON volumes (name) WHERE state IN ('here', 'leaving');

CREATE TABLE vnodes (
    vnode INTEGER PRIMARY KEY,
    uniquifier INTEGER NOT NULL,
    mode INTEGER NOT NULL,
    uid INTEGER NOT NULL,
    gid INTEGER NOT NULL,
    nlink INTEGER NOT NULL,
    size INTEGER NOT NULL,
    sparse INTEGER NOT NULL,
    data_version INTEGER NOT NULL,
    atime_ns INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    xattr_count INTEGER NOT NULL,
    parent INTEGER NOT NULL,
    target BLOB,
    acl INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX orphans ON vnodes (vnode) WHERE nlink = 0;
CREATE INDEX acl_users ON vnodes (acl) WHERE acl <> 0;

CREATE TABLE acls (
    acl INTEGER PRIMARY KEY,
    packed BLOB NOT NULL UNIQUE
);

CREATE TABLE places (
    vnode INTEGER NOT NULL,
    directory INTEGER NOT NULL,
    names INTEGER NOT NULL,
    PRIMARY KEY (vnode, directory)
) WITHOUT ROWID;

CREATE TABLE entries (
    directory INTEGER NOT NULL,
    name BLOB NOT NULL,
    vnode INTEGER NOT NULL,
    PRIMARY KEY (directory, name)
) WITHOUT ROWID;

CREATE TABLE xattrs (
    vnode INTEGER NOT NULL,
    name BLOB NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (vnode, name)
);

CREATE TABLE hosts (
    host INTEGER PRIMARY KEY AUTOINCREMENT,
    uuid BLOB NOT NULL UNIQUE,
    description TEXT NOT NULL,
    silent_s INTEGER NOT NULL
);

CREATE TABLE orphan_holders (
    vnode INTEGER NOT NULL,
    host INTEGER NOT NULL,
    PRIMARY KEY (vnode, host)
) WITHOUT ROWID;
CREATE INDEX orphan_holders_by_host ON orphan_holders (host);

CREATE TABLE replies (
    host INTEGER NOT NULL,
    number INTEGER NOT NULL,
    method TEXT NOT NULL,
    reply BLOB NOT NULL,
    PRIMARY KEY (host, number)
) WITHOUT ROWID;

CREATE TABLE usage (
    volume INTEGER PRIMARY KEY,
    bytes INTEGER NOT NULL
);

CREATE TRIGGER made AFTER INSERT ON vnodes BEGIN
    INSERT INTO usage VALUES (NEW.vnode >> 40, NEW.size + 1024)
        ON CONFLICT (volume) DO UPDATE SET bytes = bytes + excluded.bytes;
END;

CREATE TRIGGER resized AFTER UPDATE OF size ON vnodes WHEN NEW.size <> OLD.size BEGIN
    UPDATE usage SET bytes = bytes + NEW.size - OLD.size WHERE volume = NEW.vnode >> 40;
END;

CREATE TRIGGER deleted AFTER DELETE ON vnodes BEGIN
    UPDATE usage SET bytes = bytes - OLD.size - 1024 WHERE volume = OLD.vnode >> 40;
END;

CREATE TRIGGER bounded AFTER UPDATE OF bytes ON usage WHEN NEW.bytes > OLD.bytes BEGIN
    SELECT RAISE(ABORT, 'over quota') FROM volumes
        WHERE volume = NEW.volume AND quota > 0 AND NEW.bytes > quota AND state = 'here';
END;
