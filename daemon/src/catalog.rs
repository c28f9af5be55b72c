//! The catalog: which pools, segments, trees and mounts there are, in SQLite.
//!
//! One thread owns the connection; [`Catalog`] is the way to it. Nothing on the path of an event
//! touches the catalog. What a segment holds is *not* in here (its hole map is the truth), and neither is
//! anything of the user's: a catalog lost is a cache lost. `upper` directories are never found
//! through the catalog to be removed.
//!
//! Numbers are handed out once and never again, also when what they were for did not come about, and
//! also when the catalog is begun anew over a state directory that has files in it.
//!
//! Every commit is synced (`synchronous=FULL`): when [`Catalog::set_complete`] with `false` has
//! returned, no power cut brings the `true` back.

mod failed;
mod garbage;
mod images;
mod mounts;
mod open;
mod pools;
mod records;
mod runs;
mod schema;
mod sequence;
mod snapshots;
#[cfg(test)]
mod tests;
mod traces;
mod trees;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rusqlite::{Connection, Transaction, TransactionBehavior};
use thiserror::Error;
use tokio::sync::{oneshot, watch};

pub use failed::{Failed, FailedDetails, MAX_FAILED};
pub use garbage::Garbage;
pub use records::{
    Image, Mount, NewImage, NewMount, NewPool, NewSegment, NewTree, Pool, Segment, Tree,
};
pub use runs::LastRun;
pub use snapshots::{Labels, NewSnapshot, Refused, Snapshot, SnapshotKind};
pub use traces::Place;

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// The way to the catalog's thread. Clones lead to the same one; it ends when the last is gone. A
/// call that is dropped half-way may still take effect.
#[derive(Debug, Clone)]
pub struct Catalog {
    jobs: mpsc::Sender<Job>,
    /// Its other end goes with the thread.
    ended: watch::Receiver<()>,
    /// The state directory.
    state: PathBuf,
}

/// A catalog that can't be opened, or a request to it that failed.
#[derive(Debug, Error)]
pub enum CatalogError {
    #[error("can't open the catalog {}", .path.display())]
    Open { path: PathBuf, source: rusqlite::Error },
    #[error(
        "the catalog {} is of version {found}, and this hydrantd knows none above {}: install the one that \
         wrote it, or a later one",
        .path.display(),
        schema::VERSION
    )]
    Newer { path: PathBuf, found: i64 },
    #[error("can't bring the catalog {} to this version's schema", .path.display())]
    Migrate { path: PathBuf, source: rusqlite_migration::Error },
    #[error("can't make room for the catalog")]
    Files(#[from] io::Error),
    // with the cause in it: most of these end in the log, in one line
    #[error("the catalog can't {operation}: {cause}")]
    Query { operation: &'static str, cause: rusqlite::Error },
    #[error("the catalog's thread is gone")]
    Gone,
}

impl CatalogError {
    /// Whether the disk was full.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Query { cause, .. }
            if cause.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull))
    }
}

impl Catalog {
    /// Opens the catalog at `path`, in the state directory; makes it where there is none. A damaged one is
    /// moved aside (`catalog.sqlite.damaged-<seconds>`) and a new one made, with a line in the log.
    /// Blocks; to be called at start.
    pub fn open(path: &Path) -> Result<Self, CatalogError> {
        let mut connection = open::open(path)?;
        let (jobs, receiver) = mpsc::channel::<Job>();
        let (end, ended) = watch::channel(());
        std::thread::Builder::new().name("catalog".into()).spawn(move || {
            for job in receiver {
                job(&mut connection);
            }
            drop(connection);
            drop(end);
        })?;
        let state = path.parent().map(Path::to_owned).unwrap_or_default();
        Ok(Self { jobs, ended, state })
    }

    /// Whether [`open`](Self::open) would take the catalog at `path`, as far as its version goes.
    pub fn check(path: &Path) -> Result<(), CatalogError> {
        open::check(path)
    }

    /// Where the trees of the catalog at `path` belong, by their mounts' names. Changes nothing, whoever
    /// uses the catalog.
    pub fn directories(path: &Path) -> Result<Vec<(String, PathBuf)>, CatalogError> {
        open::directories(path)
    }

    /// Waits until the database is closed, which it is once the other clones are gone as well.
    pub async fn close(self) {
        let Self { jobs, mut ended, .. } = self;
        drop(jobs);
        while ended.changed().await.is_ok() {}
    }

    /// Runs `job` in the catalog's thread, in one transaction that is taken back where the job fails.
    async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        job: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, CatalogError> {
        let (reply, result) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let result = in_transaction(connection, job);
            // Nobody waits any more: nobody to tell.
            let _ = reply.send(result);
        });
        self.jobs.send(job).map_err(|_| CatalogError::Gone)?;
        result
            .await
            .map_err(|_| CatalogError::Gone)?
            .map_err(|cause| CatalogError::Query { operation, cause })
    }
}

fn in_transaction<T>(
    connection: &mut Connection,
    job: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let result = job(&transaction)?;
    transaction.commit()?;
    Ok(result)
}
