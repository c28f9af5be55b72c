-- A catalog as Hydrant wrote it in version 3, shortened.
PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE failed_events (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    pool     INTEGER NOT NULL,
    segment  INTEGER NOT NULL,
    start    INTEGER NOT NULL,  -- bytes of the segment that are in quarantine
    length   INTEGER NOT NULL,
    times    INTEGER NOT NULL,  -- how often in a row
    until    INTEGER NOT NULL,  -- end of the quarantine, in milliseconds since the epoch
    settled  INTEGER NOT NULL,  -- read since, or given up anew
    details  TEXT NOT NULL      -- JSON
) STRICT;
CREATE TABLE image_layers (
    image     INTEGER NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    position  INTEGER NOT NULL,
    tree      INTEGER NOT NULL REFERENCES trees (id),
    bytes     INTEGER NOT NULL,     -- of what the registry has
    PRIMARY KEY (image, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE images (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    reference  TEXT NOT NULL,
    digest     BLOB NOT NULL,       -- of what the reference led to
    manifest   BLOB NOT NULL,       -- of the manifest for this machine
    config     BLOB NOT NULL,       -- of the configuration
    pulled     INTEGER NOT NULL,    -- seconds since the epoch
    named      INTEGER NOT NULL,    -- 0: the name is another image's by now
    UNIQUE (reference, manifest)
) STRICT;
CREATE TABLE meta (
    name   TEXT PRIMARY KEY,
    value  TEXT NOT NULL
) STRICT;
INSERT INTO "meta" VALUES('boot_id','00000000-0000-4000-8000-000000000000');
INSERT INTO "meta" VALUES('clean','yes');
CREATE TABLE mounts (
    id         INTEGER PRIMARY KEY,
    tree       INTEGER NOT NULL REFERENCES trees (id),
    directory  BLOB NOT NULL UNIQUE,
    read_only  INTEGER NOT NULL,
    owner_uid  INTEGER NOT NULL,
    owner_gid  INTEGER NOT NULL,
    mounted    INTEGER NOT NULL,    -- is to be mounted, also after a restart
    pack       TEXT,                -- name of the existence pack
    history    TEXT NOT NULL,
    created    INTEGER NOT NULL
, image INTEGER REFERENCES images (id)) STRICT;
INSERT INTO "mounts" VALUES(1,1,X'2F686F6D652F616C6963652F74726565',0,0,0,1,'pack-e7cafc8478647686d1e94d0ce0841859d0b709a0','shallow',1795300000,NULL);
CREATE TABLE pools (
    id           INTEGER PRIMARY KEY,
    url          TEXT NOT NULL,
    owner_uid    INTEGER NOT NULL,
    owner_gid    INTEGER NOT NULL,
    hash         TEXT NOT NULL,
    origin       TEXT NOT NULL,     -- JSON
    environment  TEXT NOT NULL,     -- JSON: [[name, value], ...]
    created      INTEGER NOT NULL,  -- seconds since the epoch
    UNIQUE (url, owner_uid, hash)
) STRICT;
INSERT INTO "pools" VALUES(1,'https://example.org/repo.git',0,0,'sha1','{"hash":"sha1","transport":{"Http":{"ca_pem":"pem","client_certificate":null,"credential":null,"extra_headers":[],"insecure":false,"proxy":null,"url":"https://example.org/repo.git","user_agent":null}}}','[["HOME","/home/alice"],["PATH","/usr/bin:/bin"]]',1795300000);
CREATE TABLE segments (
    id        INTEGER PRIMARY KEY,
    pool      INTEGER NOT NULL REFERENCES pools (id),
    kind      TEXT NOT NULL,
    size      INTEGER NOT NULL,     -- bytes
    complete  INTEGER NOT NULL      -- every block is there, and durable
) STRICT;
INSERT INTO "segments" VALUES(1,1,'data',20480,0);
INSERT INTO "segments" VALUES(2,1,'pack',118784,0);
CREATE TABLE sequence (
    name   TEXT PRIMARY KEY,
    next   INTEGER NOT NULL
) STRICT;
INSERT INTO "sequence" VALUES('pool',2);
INSERT INTO "sequence" VALUES('segment',65536);
INSERT INTO "sequence" VALUES('tree',2);
INSERT INTO "sequence" VALUES('mount',2);
CREATE TABLE tree_segments (
    tree      INTEGER NOT NULL REFERENCES trees (id) ON DELETE CASCADE,
    position  INTEGER NOT NULL,
    segment   INTEGER NOT NULL REFERENCES segments (id),
    PRIMARY KEY (tree, position)
) STRICT, WITHOUT ROWID;
INSERT INTO "tree_segments" VALUES(1,0,1);
INSERT INTO "tree_segments" VALUES(1,1,2);
CREATE TABLE trees (
    id         INTEGER PRIMARY KEY,
    pool       INTEGER NOT NULL REFERENCES pools (id),
    git_commit BLOB NOT NULL,       -- object id
    root       BLOB NOT NULL,       -- object id of the tree
    revision   TEXT NOT NULL,       -- as the user named it, or what the origin calls HEAD
    image      TEXT NOT NULL,       -- name of the file in trees/
    files      INTEGER NOT NULL,
    bytes      INTEGER NOT NULL,
    owner_uid  INTEGER NOT NULL,
    owner_gid  INTEGER NOT NULL,
    created    INTEGER NOT NULL
) STRICT;
INSERT INTO "trees" VALUES(1,1,X'68C1434AB29341A625BEE3E5C17DCE04B397555D',X'3B3BDEB2879FB64C0AB7902A1577D560D0DBFB3D','main','1.erofs',1,20000,0,0,1795300000);
CREATE INDEX segments_of_pool ON segments (pool);
CREATE INDEX trees_of_pool ON trees (pool);
CREATE INDEX trees_of_segment ON tree_segments (segment);
CREATE INDEX mounts_of_tree ON mounts (tree);
CREATE INDEX images_of_tree ON image_layers (tree);
CREATE INDEX mounts_of_image ON mounts (image);
COMMIT;
PRAGMA user_version=3;
