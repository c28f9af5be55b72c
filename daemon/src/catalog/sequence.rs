//! Numbers that are handed out once.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;

use fs_err as fs;
use rusqlite::{Connection, Result, Transaction, params};

use super::records::signed;
use super::{Catalog, CatalogError};
use crate::ids::{MountId, SegmentId, SnapshotId, TreeId};

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

    /// A new number for a snapshot.
    pub async fn allocate_snapshot(&self) -> Result<SnapshotId, CatalogError> {
        self.run("allocate a snapshot", |t| take(t, "snapshot", 1)).await.map(SnapshotId)
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

/// The highest numbers that files in a state directory bear.
#[derive(Debug, Default)]
pub(super) struct Used {
    pool: u64,
    segment: u64,
    tree: u64,
    mount: u64,
    snapshot: u64,
}

impl Used {
    pub(super) fn find(state: &Path) -> io::Result<Self> {
        let highest = |files: &[(u64, OsString)]| files.iter().map(|(number, _)| *number).max();
        let pools = numbered(&state.join("pools"))?;
        let mut used = Self {
            pool: highest(&pools).unwrap_or(0),
            segment: 0,
            tree: highest(&numbered(&state.join("trees"))?).unwrap_or(0),
            mount: highest(&numbered(&state.join("mounts"))?).unwrap_or(0),
            snapshot: highest(&numbered(&state.join("snapshots"))?).unwrap_or(0),
        };
        for (_, name) in pools {
            let segments = numbered(&state.join("pools").join(name))?;
            used.segment = used.segment.max(highest(&segments).unwrap_or(0));
        }
        Ok(used)
    }

    /// Lets the numbers of a new catalog begin after these.
    pub(super) fn skip(&self, connection: &Connection) -> Result<()> {
        for (name, number) in [
            ("pool", self.pool),
            ("segment", self.segment),
            ("tree", self.tree),
            ("mount", self.mount),
            ("snapshot", self.snapshot),
        ] {
            let next = signed(number)?.saturating_add(1);
            connection.execute(
                "UPDATE sequence SET next = max(next, ?2) WHERE name = ?1",
                params![name, next],
            )?;
        }
        Ok(())
    }
}

/// The files in a directory whose names begin with a number and end there or go on with a dot.
/// None where the directory is missing.
pub(super) fn numbered(directory: &Path) -> io::Result<Vec<(u64, OsString)>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        if let Some(number) = leading_number(&name) {
            found.push((number, name));
        }
    }
    Ok(found)
}

fn leading_number(name: &OsStr) -> Option<u64> {
    let text = name.to_str()?;
    text.split_once('.').map_or(text, |(number, _)| number).parse().ok()
}
