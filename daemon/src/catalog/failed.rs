//! Events that were given up, and what is in quarantine because of them.

use hydrant_api::Process;
use rusqlite::types::Type;
use rusqlite::{Error, Result, Row, Transaction, params};
use serde::{Deserialize, Serialize};

use super::records::{signed, unsigned};
use super::{Catalog, CatalogError};
use crate::ids::{PoolId, SegmentId};
use crate::range::ByteRange;

/// So many records are kept, the newest.
pub const MAX_FAILED: u64 = 1000;

/// A record. Times are in milliseconds since the epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    pub pool: PoolId,
    pub segment: SegmentId,
    /// What is in quarantine.
    pub range: ByteRange,
    /// How often in a row this range was given up.
    pub times: u32,
    /// The quarantine's end.
    pub until: u64,
    /// It was read since, or given up anew.
    pub settled: bool,
    pub details: FailedDetails,
}

/// What is only shown. As [`hydrant_api::FailedEvent`] has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedDetails {
    pub event: u64,
    pub time: u64,
    pub shard: u16,
    pub attempts: u32,
    pub directory: Option<String>,
    pub path: Option<String>,
    pub origin: Option<String>,
    pub process: Process,
    pub deaths: Vec<String>,
}

impl Catalog {
    /// Takes a record of an event that was given up. It takes the place of those of the same range.
    pub async fn add_failed(&self, failed: Failed) -> Result<(), CatalogError> {
        self.run("record a failed event", move |t| {
            settle(t, failed.segment, failed.range)?;
            let details = serde_json::to_string(&failed.details)
                .map_err(|e| Error::ToSqlConversionFailure(Box::new(e)))?;
            t.execute(
                "INSERT INTO failed_events
                     (pool, segment, start, length, times, until, settled, details)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                params![
                    signed(failed.pool.0)?,
                    signed(failed.segment.0)?,
                    signed(failed.range.offset())?,
                    signed(failed.range.len())?,
                    failed.times,
                    signed(failed.until)?,
                    failed.settled,
                    details,
                ],
            )?;
            t.execute(
                "DELETE FROM failed_events
                 WHERE id <= (SELECT max(id) FROM failed_events) - ?1",
                [signed(MAX_FAILED)?],
            )?;
            Ok(())
        })
        .await
    }

    /// All records, newest first.
    pub async fn failed(&self) -> Result<Vec<Failed>, CatalogError> {
        self.run("list the failed events", |t| select(t, "ORDER BY id DESC")).await
    }

    /// Those whose range has not been read since, and whose segment is still there, oldest first.
    pub async fn quarantined(&self) -> Result<Vec<Failed>, CatalogError> {
        self.run("list what is in quarantine", |t| {
            select(t, "WHERE NOT settled AND segment IN (SELECT id FROM segments) ORDER BY id")
        })
        .await
    }

    /// A range was read: it is in quarantine no more.
    pub async fn settle_failed(
        &self,
        segment: SegmentId,
        range: ByteRange,
    ) -> Result<(), CatalogError> {
        self.run("settle a failed event", move |t| settle(t, segment, range)).await
    }

    /// Forgets all records; gives their number.
    pub async fn clear_failed(&self) -> Result<u64, CatalogError> {
        let removed =
            self.run("clear the failed events", |t| t.execute("DELETE FROM failed_events", []));
        Ok(removed.await? as u64)
    }
}

fn settle(t: &Transaction<'_>, segment: SegmentId, range: ByteRange) -> Result<()> {
    t.execute(
        "UPDATE failed_events SET settled = 1
         WHERE segment = ?1 AND start < ?3 AND start + length > ?2",
        params![signed(segment.0)?, signed(range.offset())?, signed(range.end())?],
    )?;
    Ok(())
}

fn select(t: &Transaction<'_>, which: &str) -> Result<Vec<Failed>> {
    let columns = "pool, segment, start, length, times, until, settled, details";
    let query = format!("SELECT {columns} FROM failed_events {which}");
    t.prepare(&query)?.query_map([], from_row)?.collect()
}

fn from_row(row: &Row<'_>) -> Result<Failed> {
    let details = serde_json::from_str(&row.get::<_, String>(7)?)
        .map_err(|e| Error::FromSqlConversionFailure(7, Type::Text, Box::new(e)))?;
    Ok(Failed {
        pool: PoolId(unsigned(row, 0)?),
        segment: SegmentId(unsigned(row, 1)?),
        range: ByteRange::new(unsigned(row, 2)?, unsigned(row, 3)?),
        times: row.get(4)?,
        until: unsigned(row, 5)?,
        settled: row.get(6)?,
        details,
    })
}
