//! Numbers that are handed out once.

use std::ffi::OsStr;
use std::path::Path;

use rusqlite::{Connection, Result, Transaction, params};

use super::records::signed;
use super::{Catalog, CatalogError};
use crate::ids::{MountId, SegmentId, TreeId};

impl Catalog {
    /// `count` new numbers for segments, in ascending order.
    pub async fn allocate_segments(&self, count: u64) -> Result<Vec<SegmentId>, CatalogError> {
        let first = self.run("allocate segments", move |t| take(t, "segment", count)).await?;
        Ok((first..first.saturating_add(count)).map(SegmentId).collect())
    }

    /// A new number for a tree.
    pub async fn allocate_tree(&self) -> Result<TreeId, CatalogError> {
        self.run("allocate a tree", |t| take(t, "tree", 1)).await.map(TreeId)
    }

    /// A new number for a mount.
    pub async fn allocate_mount(&self) -> Result<MountId, CatalogError> {
        self.run("allocate a mount", |t| take(t, "mount", 1)).await.map(MountId)
    }
}

/// The first of `count` new numbers.
pub(super) fn take(transaction: &Transaction<'_>, name: &str, count: u64) -> Result<u64> {
    let first: i64 = transaction.query_row(
        "UPDATE sequence SET next = next + ?2 WHERE name = ?1 RETURNING next - ?2",
        params![name, signed(count)?],
        |row| row.get(0),
    )?;
    u64::try_from(first).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(0, first))
}

/// Lets each sequence of a new catalog begin after the highest number that a file in the state directory bears.
pub(super) fn skip_used(connection: &Connection, state: &Path) -> Result<()> {
    let mut highest = [("pool", 0), ("segment", 0), ("tree", 0), ("mount", 0)];
    let [pool, segment, tree, mount] = &mut highest;
    for (number, name) in numbered(&state.join("pools")) {
        pool.1 = number.max(pool.1);
        for (number, _) in numbered(&state.join("pools").join(name)) {
            segment.1 = number.max(segment.1);
        }
    }
    for (number, _) in numbered(&state.join("trees")) {
        tree.1 = number.max(tree.1);
    }
    for (number, _) in numbered(&state.join("mounts")) {
        mount.1 = number.max(mount.1);
    }
    for (name, number) in highest {
        let next = signed(number)?.saturating_add(1);
        connection.execute(
            "UPDATE sequence SET next = max(next, ?2) WHERE name = ?1",
            params![name, next],
        )?;
    }
    Ok(())
}

/// The files in a directory whose names begin with a number and end there or go on with a dot.
/// None where the directory is missing.
pub(super) fn numbered(directory: &Path) -> Vec<(u64, std::ffi::OsString)> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let number = leading_number(&name)?;
            Some((number, name))
        })
        .collect()
}

fn leading_number(name: &OsStr) -> Option<u64> {
    let text = name.to_str()?;
    text.split_once('.').map_or(text, |(number, _)| number).parse().ok()
}
