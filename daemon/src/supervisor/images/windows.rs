//! Windows of indexes that came without them (`layer/index.rs`).
//!
//! A pull by a published index does not wait for them: workers ask the registry for those that they need. Behind the pull, all of
//! them are fetched and put where they belong, at the end of the index's file. Until that is done the layer is fetched from the
//! repository that has the index, whatever others are found to have the layer.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hydrant_api::ErrorCode;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{info, warn};

use super::super::{Supervisor, blocking, lock};
use super::publish::tempfile_of;
use super::puller::{Puller, cant};
use super::{catalog, is_signed, is_vouched_for};
use crate::admin::ApiError;
use crate::catalog::{Pool, Tree};
use crate::ids::PoolId;
use crate::layer::index::{Head, WindowsBlob};
use crate::layer::pinned::own::MAX_BLOB;

/// How long windows are waited for, and how many bytes of them come in a second at least.
const PATIENCE: Duration = Duration::from_secs(60);
const PACE: u64 = 64 << 10;
/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;
/// How long the readers of what was just pulled have the line to themselves.
const HEAD_START: Duration = Duration::from_secs(5);
/// What could not be had is tried again after this time, which doubles, and at last this often.
const FIRST_WAIT: Duration = Duration::from_secs(30);
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
/// What could not be had so often is not waited for by others.
const STUCK: u32 = 3;

/// Layers whose windows are to be fetched.
#[derive(Debug, Default)]
pub struct Windows {
    wanted: Mutex<HashMap<PoolId, Wanted>>,
    news: Notify,
}

#[derive(Debug, Clone, Copy)]
struct Wanted {
    at: Instant,
    failures: u32,
}

/// The windows that the file of an index lacks.
pub(super) struct Missing {
    index: File,
    /// Where they belong, in bytes from its start.
    at: u64,
    blob: WindowsBlob,
}

impl Missing {
    fn of(index: File) -> io::Result<Option<Self>> {
        let head = Head::read(&index)?;
        let (at, len) = (head.windows_at(), index.metadata()?.len());
        let blob = head.windows.filter(|blob| len < at.saturating_add(blob.len));
        match blob {
            Some(blob) if blob.len > MAX_BLOB => {
                Err(io::Error::other(format!("it says that it lacks {} bytes", blob.len)))
            }
            blob => Ok(blob.map(|blob| Self { index, at, blob })),
        }
    }

    /// The file has its whole length only once all of them are on the disk.
    fn put(&self, windows: &File) -> io::Result<()> {
        let len = windows.metadata()?.len();
        if len != self.blob.len {
            return Err(io::Error::other(format!("{len} bytes came instead of {}", self.blob.len)));
        }
        self.copy(windows, 0..len.saturating_sub(1))?;
        self.copy(windows, len.saturating_sub(1)..len)
    }

    /// Who wrote the windows has the file open, and may still do whatever it likes with it: that is bounded here.
    fn copy(&self, windows: &File, bytes: Range<u64>) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        let mut from = bytes.start;
        while from < bytes.end {
            let len = usize::try_from(bytes.end - from).unwrap_or(PIECE).min(PIECE);
            let piece = piece.get_mut(..len).unwrap_or_default();
            windows.read_exact_at(piece, from)?;
            self.index.write_all_at(piece, self.at + from)?;
            from += len as u64;
        }
        self.index.sync_data()
    }
}

impl Supervisor {
    /// What the layer's index has come without.
    pub(super) async fn missing_windows(&self, tree: &Tree) -> Result<Option<Missing>, ApiError> {
        let Some(segment) = tree.segments.first().copied().filter(|_| is_signed(tree)) else {
            return Ok(None);
        };
        let (store, id) = (Arc::clone(&self.store), tree.pool);
        let missing = blocking(move || match store.open_index(id, segment).and_then(Missing::of) {
            // it was removed
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            missing => missing.map_err(cant("can't read a layer's index")),
        });
        missing.await
    }

    /// Fetches that.
    async fn fetch_windows(
        &self,
        tree: &Tree,
        pool: &Pool,
        missing: Missing,
    ) -> Result<(), ApiError> {
        let file =
            tempfile_of(&self.store.pools_dir()).map_err(cant("can't make a scratch file"))?;
        let (origin, access) = self.layer_origin(pool)?;
        let mut puller = Puller::start(&self.store, &self.cgroups, access)?;
        let fetched = puller.windows(origin.repository, self.limits(), missing.blob, &file);
        let patience = PATIENCE + Duration::from_secs(missing.blob.len / PACE);
        let fetched = tokio::time::timeout(patience, fetched).await;
        puller.end();
        fetched.unwrap_or_else(|_| Err(ApiError::internal("it takes too long")))?;
        let bytes = missing.blob.len;
        let put = move || missing.put(&file).map_err(cant("can't complete a layer's index"));
        blocking(put).await?;
        info!(layer = %tree.commit, bytes, "the layer's index is complete");
        Ok(())
    }

    /// Fetches what the layer's index lacks, if it comes before that time.
    pub(super) async fn complete_index(
        &self,
        tree: &Tree,
        pool: &Pool,
        missing: Missing,
        until: Instant,
    ) -> Result<(), ApiError> {
        let fetched = self.fetch_windows(tree, pool, missing);
        let fetched = tokio::time::timeout_at(until, fetched).await;
        fetched.unwrap_or_else(|_| {
            Err(ApiError::new(ErrorCode::Origin, "what its index needs does not come in time"))
        })
    }

    /// What is missing could not be had for some time.
    pub(super) fn index_is_stuck(&self, pool: PoolId) -> bool {
        lock(&self.windows.wanted).get(&pool).is_some_and(|wanted| wanted.failures >= STUCK)
    }

    /// The layer's index may lack its windows. They are fetched in the background.
    pub(super) fn want_windows(&self, tree: &Tree) {
        if is_signed(tree) && is_vouched_for(tree, &self.config.images.index_keys) {
            let wanted = Wanted { at: Instant::now() + HEAD_START, failures: 0 };
            lock(&self.windows.wanted).entry(tree.pool).or_insert(wanted);
            self.windows.news.notify_one();
        }
    }

    /// Fetches windows that are wanted, one layer's after the other's, also those of an earlier supervisor's layers.
    pub(in super::super) fn fetch_windows_behind(self: &Arc<Self>) {
        let supervisor = Arc::clone(self);
        tokio::spawn(async move {
            match supervisor.catalog.trees().await {
                Ok(trees) => trees.iter().for_each(|tree| supervisor.want_windows(tree)),
                Err(error) => warn!(%error, "can't look for indexes that are not complete"),
            }
            loop {
                let next = {
                    let wanted = lock(&supervisor.windows.wanted);
                    wanted.iter().min_by_key(|(_, of)| of.at).map(|(pool, of)| (*pool, *of))
                };
                let Some((pool, Wanted { at, failures })) = next else {
                    supervisor.windows.news.notified().await;
                    continue;
                };
                if at > Instant::now() {
                    let news = supervisor.windows.news.notified();
                    tokio::time::timeout_at(at, news).await.ok();
                    continue;
                }
                let Err(error) = supervisor.fetch_windows_of(pool).await else {
                    lock(&supervisor.windows.wanted).remove(&pool);
                    continue;
                };
                let wait = FIRST_WAIT.saturating_mul(1 << failures.min(16)).min(LONGEST_WAIT);
                warn!(%pool, %error, ?wait, "can't get all of a layer's index yet");
                let again = Wanted { at: Instant::now() + wait, failures: failures + 1 };
                lock(&supervisor.windows.wanted).insert(pool, again);
            }
        });
    }

    async fn fetch_windows_of(&self, pool: PoolId) -> Result<(), ApiError> {
        let pool = self.catalog.pool(pool).await.map_err(catalog)?;
        let Some(pool) = pool else { return Ok(()) }; // it was removed
        let tree = self.catalog.tree_of_pool(pool.id).await.map_err(catalog)?;
        let Some(tree) = tree else { return Ok(()) };
        match self.missing_windows(&tree).await? {
            Some(missing) => self.fetch_windows(&tree, &pool, missing).await,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};

    use super::*;
    use crate::layer::index::Index;
    use crate::layer::indexer::Indexer;
    use crate::layer::pinned::tests::gzip;
    use crate::layer::tests::{index_by, noise};

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    fn bytes(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn windows_come_behind_the_rest_of_an_index() {
        let (index, _) = index_by(Indexer::new(8 << 10), &gzip(&noise(100_000, 1)), 1000).unwrap();
        assert!(!index.windows().is_empty());
        let (mut head, mut whole) = (Vec::new(), Vec::new());
        index.write_head(&mut head).unwrap();
        index.write(&mut whole).unwrap();
        assert!(Missing::of(file_of(&whole)).unwrap().is_none());

        // also what was cut short
        for len in [head.len(), head.len() + 1, whole.len() - 1] {
            let file = file_of(&whole[..len]);
            let missing = Missing::of(file.try_clone().unwrap()).unwrap().unwrap();
            assert_eq!(Some(missing.blob), index.windows_blob());
            missing.put(&file_of(index.windows())).unwrap();
            assert!(bytes(&file) == whole);
        }
        let file = file_of(&head);
        let missing = || {
            file.try_clone().unwrap().rewind().unwrap();
            Missing::of(file.try_clone().unwrap()).unwrap()
        };
        let error = missing().unwrap().put(&file_of(&index.windows()[1..])).unwrap_err();
        assert!(error.to_string().contains("instead of"), "{error}");
        assert!(bytes(&file) == head && missing().is_some());

        // a layer that needs none
        let (index, _) = index_by(Indexer::default(), &[0; 1024], 1000).unwrap();
        let mut head = Vec::new();
        index.write_head(&mut head).unwrap();
        assert!(Missing::of(file_of(&head)).unwrap().is_none());
        assert!(Missing::of(file_of(b"none")).is_err());
        assert!(Index::parse(&head).is_ok());
    }
}
