-- Who is known to this server: one SQLite file, mode 0600, WAL. It holds secrets.
--
-- principals   users and groups; ids are never used twice
--   owner            id of a user or group
--   password         argon2 hash; NULL: cannot log in with one
--   generation       tokens of another generation than this are revoked
-- members      who is in which group
-- signing_keys the one with the greatest number signs
--   verify_until_s   no token that it has signed is good after this; NULL for the one that signs
-- revoked      tokens that were revoked one by one, until they would have expired
-- next_ids     no id from here on, or below, has been given

CREATE TABLE principals (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    owner INTEGER NOT NULL,
    creator INTEGER NOT NULL,
    disabled INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    password TEXT
);

CREATE TABLE members (
    group_id INTEGER NOT NULL,
    member INTEGER NOT NULL,
    PRIMARY KEY (group_id, member)
) WITHOUT ROWID;

CREATE INDEX members_by_member ON members (member);

CREATE TABLE signing_keys (
    number INTEGER PRIMARY KEY,
    secret BLOB NOT NULL,
    verify_until_s INTEGER
);

CREATE TABLE revoked (
    serial TEXT PRIMARY KEY,
    expires_s INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE next_ids (
    user INTEGER NOT NULL,
    group_id INTEGER NOT NULL
)
