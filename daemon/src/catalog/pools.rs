//! Pools and their segments.

use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{OptionalExtension, params};

use super::records::{kind_text, signed};
use super::{Catalog, CatalogError, NewPool, NewSegment, Pool, Segment, Tree, sequence};
use crate::ids::{PoolId, SegmentId};
use crate::object::HashKind;

impl Catalog {
    /// The owner's pool for this URL and kind of hash, made where there is none. Where there is
    /// one, it takes over the new `origin` and `environment`.
    pub async fn pool_for(&self, wanted: NewPool) -> Result<Pool, CatalogError> {
        self.run("find a pool", move |t| {
            let NewPool { url, owner, hash, origin, environment } = wanted;
            let json = |value: serde_json::Result<String>| {
                value.map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))
            };
            let origin = json(serde_json::to_string(&origin))?;
            let environment = json(serde_json::to_string(&environment))?;
            let found: Option<i64> = t
                .query_row(
                    "UPDATE pools SET origin = ?4, environment = ?5, owner_gid = ?6
                     WHERE url = ?1 AND owner_uid = ?2 AND hash = ?3 RETURNING id",
                    params![url, owner.uid, hash.name(), origin, environment, owner.gid],
                    |row| row.get(0),
                )
                .optional()?;
            let id = match found {
                Some(id) => id,
                None => {
                    let id = signed(sequence::take(t, "pool", 1)?)?;
                    t.execute(
                        "INSERT INTO pools
                             (id, url, owner_uid, owner_gid, hash, origin, environment, created)
                         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                        params![
                            id,
                            url,
                            owner.uid,
                            owner.gid,
                            hash.name(),
                            origin,
                            environment,
                            now()
                        ],
                    )?;
                    id
                }
            };
            let query = format!("SELECT {} FROM pools WHERE id = ?1", Pool::COLUMNS);
            t.query_row(&query, [id], Pool::from_row)
        })
        .await
    }

    /// The owner's pool for this URL and kind of hash, if there is one.
    pub async fn find_pool(
        &self,
        url: String,
        uid: u32,
        hash: HashKind,
    ) -> Result<Option<Pool>, CatalogError> {
        self.run("find a pool", move |t| {
            let query = format!(
                "SELECT {} FROM pools WHERE url = ?1 AND owner_uid = ?2 AND hash = ?3",
                Pool::COLUMNS
            );
            t.query_row(&query, params![url, uid, hash.name()], Pool::from_row).optional()
        })
        .await
    }

    pub async fn pool(&self, id: PoolId) -> Result<Option<Pool>, CatalogError> {
        self.run("read a pool", move |t| {
            let query = format!("SELECT {} FROM pools WHERE id = ?1", Pool::COLUMNS);
            t.query_row(&query, [signed(id.0)?], Pool::from_row).optional()
        })
        .await
    }

    pub async fn pools(&self) -> Result<Vec<Pool>, CatalogError> {
        self.run("list the pools", |t| {
            let query = format!("SELECT {} FROM pools ORDER BY id", Pool::COLUMNS);
            t.prepare(&query)?.query_map([], Pool::from_row)?.collect()
        })
        .await
    }

    /// The segments of a pool, oldest first.
    pub async fn segments(&self, pool: PoolId) -> Result<Vec<Segment>, CatalogError> {
        self.run("list the segments", move |t| {
            let query =
                format!("SELECT {} FROM segments WHERE pool = ?1 ORDER BY id", Segment::COLUMNS);
            t.prepare(&query)?.query_map([signed(pool.0)?], Segment::from_row)?.collect()
        })
        .await
    }

    /// Those of its pool's segments that have content of a tree, oldest first.
    pub async fn segments_of(&self, tree: &Tree) -> Result<Vec<Segment>, CatalogError> {
        let mut segments = self.segments(tree.pool).await?;
        segments.retain(|segment| tree.segments.contains(&segment.id));
        Ok(segments)
    }

    /// Whether every block of the segment is there and durable. `false` must be on record before
    /// anything of it is evicted. A segment that is not known is left out.
    pub async fn set_complete(&self, id: SegmentId, complete: bool) -> Result<(), CatalogError> {
        self.run("mark a segment complete", move |t| {
            t.execute(
                "UPDATE segments SET complete = ?2 WHERE id = ?1",
                params![signed(id.0)?, complete],
            )?;
            Ok(())
        })
        .await
    }
}

pub(super) fn insert_segment(
    t: &rusqlite::Transaction<'_>,
    pool: PoolId,
    segment: NewSegment,
) -> rusqlite::Result<()> {
    let NewSegment { id, kind, size } = segment;
    t.execute(
        "INSERT INTO segments (id, pool, kind, size, complete) VALUES (?1, ?2, ?3, ?4, 0)",
        params![signed(id.0)?, signed(pool.0)?, kind_text(kind), signed(size)?],
    )?;
    Ok(())
}

/// Seconds since the epoch.
pub(super) fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}
