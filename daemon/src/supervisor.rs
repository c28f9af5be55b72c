//! The supervisor: root, small, no network, parses no remote bytes.
//!
//! It owns the fanotify groups (one a shard), the marks, the mounts, the catalog and the
//! workers, and answers on the admin socket. What it knows of a tree is in the catalog; what is
//! present in a segment, only the segment's file tells.

mod cgroups;
mod clone;
mod durable;
mod failed;
pub(crate) mod git;
mod history;
mod images;
mod import;
mod kept;
mod known;
mod manager;
mod mounts;
pub(crate) mod origins;
mod prefetch;
mod queue;
mod remove;
mod run;
mod service;
pub(crate) mod shard;
mod snapshots;
mod status;
pub(crate) mod store;
mod succession;
mod target;
mod worker;
mod workers;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use hydrant_api::{Directories, ErrorCode, Owner};
use tokio::sync::watch;

pub use kept::{Kept, KeptShard};
pub use manager::awaited;
pub use run::{Outcome, run};
pub use shard::STRAY_ANSWERS;

use crate::admin::ApiError;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::fanotify::QueueKind;
use crate::ids::{PoolId, ShardId};
use crate::object::ObjectId;
use crate::queue::wire::Limits;
use cgroups::Cgroups;
use origins::Origins;
use shard::ShardHandle;
use store::Store;

/// All of the daemon's state that requests share.
#[derive(Debug)]
pub struct Supervisor {
    directories: Directories,
    config: Config,
    catalog: Catalog,
    store: Arc<Store>,
    origins: Arc<Origins>,
    cgroups: Arc<Cgroups>,
    shards: Vec<ShardHandle>,
    /// Of all of them.
    queue: QueueKind,
    /// The shards whose group came from the supervisor before this one: what they guard has been
    /// guarded all the time.
    kept: HashSet<ShardId>,
    /// The directories that an operation is working on.
    busy: Mutex<HashSet<std::path::PathBuf>>,
    /// What is mounted at the moment. Taken before `cloning` where both are.
    live: Arc<Mutex<mounts::LiveMounts>>,
    /// Pools that a clone is adding to, or of which a tree is being mounted.
    cloning: Arc<Mutex<Vec<PoolId>>>,
    /// Histories that are being fetched.
    histories: Mutex<history::Fetches>,
    /// Held by the one pull that goes on.
    pulling: tokio::sync::Mutex<()>,
    /// Layers come into use with it, and are evicted by whoever has it alone.
    eviction: tokio::sync::RwLock<()>,
    /// Held by who mounts or unmounts layers for containerd.
    layers: tokio::sync::Mutex<()>,
    /// Pulls for containerd that were of no use, and when.
    useless_pulls: Mutex<HashMap<String, Instant>>,
    /// Layers (digests of their archives) of which the next mount is recorded, undisturbed by what comes by itself.
    recorded_next: Mutex<HashSet<ObjectId>>,
    /// Layers of which something comes by itself.
    fills: Arc<images::Fills>,
    /// Layers of whose indexes a part has yet to come.
    windows: images::Windows,
    end: watch::Sender<Option<manager::End>>,
    /// No other supervisor on this machine has, had or will have it until the next boot.
    instance: u64,
    started: Instant,
}

/// The right to work on a directory, until it is dropped.
#[derive(Debug)]
struct Busy<'a> {
    supervisor: &'a Supervisor,
    directory: std::path::PathBuf,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        lock(&self.supervisor.busy).remove(&self.directory);
    }
}

/// A lock that is held for a moment. A panic elsewhere is no reason to panic here: what these locks
/// guard is right between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does what may wait for a file system, which need not answer, on a thread where that is no harm.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| internal("an operation ended", &error))?
}

/// Which of `count` shards serves a pool. Must not change as long as anything of it is mounted.
fn shard_of(pool: PoolId, count: u16) -> Option<ShardId> {
    let id = pool.0.checked_rem(u64::from(count))?;
    u16::try_from(id).ok().map(ShardId)
}

impl Supervisor {
    /// Takes a directory for one operation; others are refused meanwhile.
    fn begin(&self, directory: &std::path::Path) -> Result<Busy<'_>, ApiError> {
        let directory = directory.to_owned();
        if lock(&self.busy).insert(directory.clone()) {
            return Ok(Busy { supervisor: self, directory });
        }
        Err(ApiError::conflict(format!("another operation on {} goes on", directory.display())))
    }

    /// The shard of a pool: all of a pool is served by one.
    fn shard(&self, pool: PoolId) -> Result<&ShardHandle, ApiError> {
        let id = u16::try_from(self.shards.len()).ok().and_then(|count| shard_of(pool, count));
        let found = self.shards.iter().find(|shard| Some(shard.id) == id);
        found.ok_or_else(|| ApiError::internal("there are no shards"))
    }

    fn shard_id(&self, pool: PoolId) -> ShardId {
        self.shard(pool).map_or(ShardId(0), |shard| shard.id)
    }

    fn limits(&self) -> Limits {
        self.config.limits()
    }
}

/// An internal error with the chain of its reasons.
fn internal(what: &str, error: &(dyn std::error::Error + 'static)) -> ApiError {
    let mut error = ApiError::from_error(ErrorCode::Internal, error);
    error.message = format!("{what}: {}", error.message);
    error
}

/// Who may do something with a mount: its owner, and root.
fn require_owner(
    caller: &crate::admin::Caller,
    owner: Owner,
    directory: &str,
) -> Result<(), ApiError> {
    if caller.may_change(owner) {
        return Ok(());
    }
    Err(ApiError::forbidden(format!("{directory} belongs to another user")))
}
