//! The tables. A released migration is never changed; changes are new migrations.

use rusqlite_migration::{M, Migrations};

const FIRST: &str = "
-- Facts about the daemon's runs: see `runs`.
CREATE TABLE meta (
    name   TEXT PRIMARY KEY,
    value  TEXT NOT NULL
) STRICT;

-- The next number of each kind.
CREATE TABLE sequence (
    name   TEXT PRIMARY KEY,
    next   INTEGER NOT NULL
) STRICT;
INSERT INTO sequence (name, next) VALUES ('pool', 1), ('segment', 1), ('tree', 1), ('mount', 1);

-- An origin as one user sees it.
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

CREATE TABLE segments (
    id        INTEGER PRIMARY KEY,
    pool      INTEGER NOT NULL REFERENCES pools (id),
    kind      TEXT NOT NULL,
    size      INTEGER NOT NULL,     -- bytes
    complete  INTEGER NOT NULL      -- every block is there, and durable
) STRICT;
CREATE INDEX segments_of_pool ON segments (pool);

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
CREATE INDEX trees_of_pool ON trees (pool);

-- The devices of a tree's image, in order.
CREATE TABLE tree_segments (
    tree      INTEGER NOT NULL REFERENCES trees (id) ON DELETE CASCADE,
    position  INTEGER NOT NULL,
    segment   INTEGER NOT NULL REFERENCES segments (id),
    PRIMARY KEY (tree, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX trees_of_segment ON tree_segments (segment);

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
) STRICT;
CREATE INDEX mounts_of_tree ON mounts (tree);
";

const FAILED_EVENTS: &str = "
-- Events that were given up because their workers died of them.
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
";

const IMAGES: &str = "
-- Container images, by the names that they were pulled by.
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

-- The trees of an image's layers, the lowest first.
CREATE TABLE image_layers (
    image     INTEGER NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    position  INTEGER NOT NULL,
    tree      INTEGER NOT NULL REFERENCES trees (id),
    bytes     INTEGER NOT NULL,     -- of what the registry has
    PRIMARY KEY (image, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX images_of_tree ON image_layers (tree);

-- Of an image's mount, whose tree is that of the uppermost layer.
ALTER TABLE mounts ADD COLUMN image INTEGER REFERENCES images (id);
CREATE INDEX mounts_of_image ON mounts (image);
";

const SNAPSHOTS: &str = "
-- containerd's snapshots.
CREATE TABLE snapshots (
    id       INTEGER PRIMARY KEY,
    name     TEXT NOT NULL UNIQUE,
    parent   INTEGER REFERENCES snapshots (id),
    kind     TEXT NOT NULL,
    tree     INTEGER REFERENCES trees (id),  -- a layer that is not unpacked
    labels   TEXT NOT NULL,     -- JSON: {name: value, ...}
    created  INTEGER NOT NULL,  -- nanoseconds since the epoch
    updated  INTEGER NOT NULL,
    size     INTEGER NOT NULL,  -- bytes on the disk, as of the commit
    inodes   INTEGER NOT NULL
) STRICT;
CREATE INDEX snapshots_of_parent ON snapshots (parent);
CREATE INDEX snapshots_of_tree ON snapshots (tree);
INSERT INTO sequence (name, next) VALUES ('snapshot', 1);

-- Directories that have no entry of their own in the layer: lower layers say what they are like.
ALTER TABLE trees ADD COLUMN implicit INTEGER NOT NULL DEFAULT 0;

-- 0: pulled for containerd, and goes with its snapshots.
ALTER TABLE images ADD COLUMN held INTEGER NOT NULL DEFAULT 1;
";

const ORIGINS_OF_LAYERS: &str = "
-- How a registry is reached is looked up when it is to be asked.
UPDATE pools SET origin = json_object(
    'registry', json_extract(origin, '$.registry'),
    'repository', json_extract(origin, '$.layer.repository.name'),
    'layer', json_extract(origin, '$.layer.layer'),
    'user', json_extract(origin, '$.user'))
WHERE url LIKE 'oci-layer:%';
";

const TRACES: &str = "
-- What readers of layers wanted when these had just been mounted, in order.
CREATE TABLE traces (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    layer   BLOB NOT NULL,     -- digest of the archive
    record  INTEGER NOT NULL,  -- of its segment
    UNIQUE (layer, record)
) STRICT;
";

const VERDICTS: &str = "
-- Of a layer that was not streamed, once all of it was here: it is what its index says, or why not.
ALTER TABLE trees ADD COLUMN proved INTEGER NOT NULL DEFAULT 0;
ALTER TABLE trees ADD COLUMN refuted TEXT;
";

const CHUNKS_OF_TRACES: &str = "
-- Chunks have a quarter of their earlier length. `place`: of a trace that somebody has shared, where the record is in the trace of
-- its whole image. What is read here has the last one of its layer, or 0.
ALTER TABLE traces RENAME TO traces_before;
CREATE TABLE traces (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    layer   BLOB NOT NULL,     -- digest of the archive
    record  INTEGER NOT NULL,  -- a chunk of its segment
    place   INTEGER NOT NULL DEFAULT 0,
    UNIQUE (layer, record)
) STRICT;
WITH quarters (quarter) AS (VALUES (0), (1), (2), (3))
    INSERT INTO traces (layer, record)
    SELECT layer, record * 4 + quarter FROM traces_before, quarters ORDER BY id, quarter;
DROP TABLE traces_before;
";

const MIGRATIONS: [&str; 8] = [
    FIRST,
    FAILED_EVENTS,
    IMAGES,
    SNAPSHOTS,
    ORIGINS_OF_LAYERS,
    TRACES,
    VERDICTS,
    CHUNKS_OF_TRACES,
];

/// The catalog's version, SQLite's `user_version`: how many migrations there are.
pub(super) const VERSION: i64 = MIGRATIONS.len() as i64;

pub(super) fn migrations() -> Migrations<'static> {
    MIGRATIONS.into_iter().map(M::up).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_migrations_are_sound() {
        super::migrations().validate().unwrap();
    }

    #[test]
    fn traces_are_kept() {
        let mut connection = rusqlite::Connection::open_in_memory().unwrap();
        super::migrations().to_version(&mut connection, 7).unwrap();
        for (layer, record) in [("a", 7), ("b", 0), ("a", 2)] {
            let insert = "INSERT INTO traces (layer, record) VALUES (?1, ?2)";
            connection.execute(insert, rusqlite::params![layer.as_bytes(), record]).unwrap();
        }
        super::migrations().to_latest(&mut connection).unwrap();
        let mut select =
            connection.prepare("SELECT layer, record, place FROM traces ORDER BY id").unwrap();
        let rows = select.query_map([], |row| {
            Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, u32>(1)?, row.get::<_, u32>(2)?))
        });
        let found: Vec<_> = rows.unwrap().map(Result::unwrap).collect();
        let of = |layer: &str, first| (first..first + 4).map(|n| (layer.into(), n, 0)).collect();
        let expected: [Vec<(Vec<u8>, u32, u32)>; 3] = [of("a", 28), of("b", 0), of("a", 8)];
        assert_eq!(found, expected.concat());
    }

    #[test]
    fn origins_of_layers_are_kept() {
        let mut connection = rusqlite::Connection::open_in_memory().unwrap();
        super::migrations().to_version(&mut connection, 4).unwrap();
        let old = r#"{"layer":{"repository":{"registry":{"url":"https://h/"},"name":"a/b"},
            "layer":{"digest":"d","size":1}},"registry":"h","user":{"uid":1,"gid":2}}"#;
        for (id, url, origin) in [(1, "oci-layer:sha256:x", old), (2, "https://x", "{\"git\":1}")] {
            let insert = "INSERT INTO pools VALUES (?1, ?2, 0, 0, 'sha256', ?3, '[]', 0)";
            connection.execute(insert, rusqlite::params![id, url, origin]).unwrap();
        }
        super::migrations().to_latest(&mut connection).unwrap();
        let origin = |id: i64| {
            let select = "SELECT origin FROM pools WHERE id = ?1";
            connection.query_row(select, [id], |row| row.get::<_, String>(0)).unwrap()
        };
        let new = r#"{"registry":"h","repository":"a/b","layer":{"digest":"d","size":1},"user":{"uid":1,"gid":2}}"#;
        assert_eq!(origin(1), new);
        assert_eq!(origin(2), "{\"git\":1}");
    }
}
