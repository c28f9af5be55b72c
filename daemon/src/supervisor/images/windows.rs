//! Windows of indexes that came without them (`layer/index.rs`).
//!
//! A pull by a published index does not wait for them: workers ask the registry for those that they need. Behind the pull, all of
//! them are fetched and put where they belong, at the end of the index's file. Until that is done the layer is fetched from the
//! repository that has the index, whatever others are found to have the layer.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Seek, SeekFrom};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hydrant_api::ErrorCode;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{info, warn};

use super::super::{Supervisor, blocking, internal, lock};
use super::publish::tempfile_of;
use super::puller::Puller;
use super::{catalog, is_signed, is_vouched_for};
use crate::admin::ApiError;
use crate::catalog::{Pool, Tree};
use crate::ids::PoolId;
use crate::layer::index::{HEAD_LEN, Head, WindowsBlob};
use crate::layer::pinned::own::MAX_BLOB;

/// However large an index is, it is complete by then, or something is wrong.
const PATIENCE: Duration = Duration::from_secs(1800);
/// How long the readers of what was just pulled have the line to themselves.
const HEAD_START: Duration = Duration::from_secs(5);
/// What could not be had is tried again after this time, which doubles, and at last this often.
const FIRST_WAIT: Duration = Duration::from_secs(30);
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

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
struct Missing {
    index: File,
    /// Where they belong, in bytes from its start.
    at: u64,
    blob: WindowsBlob,
}

impl Missing {
    fn of(index: File) -> io::Result<Option<Self>> {
        let mut start = Vec::with_capacity(HEAD_LEN);
        (&index).take(HEAD_LEN as u64).read_to_end(&mut start)?;
        let head = Head::parse(&start).map_err(io::Error::other)?;
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
    fn put(mut self, windows: &mut File) -> io::Result<()> {
        let len = windows.metadata()?.len();
        if len != self.blob.len {
            return Err(io::Error::other(format!("{len} bytes came instead of {}", self.blob.len)));
        }
        windows.rewind()?;
        self.index.seek(SeekFrom::Start(self.at))?;
        io::copy(&mut windows.take(len.saturating_sub(1)), &mut self.index)?;
        self.index.sync_data()?;
        io::copy(windows, &mut self.index)?;
        self.index.sync_data()
    }
}

impl Supervisor {
    /// Fetches the windows of the layer's index if it has come without.
    async fn fetch_windows(&self, tree: &Tree, pool: &Pool) -> Result<(), ApiError> {
        let Some(segment) = tree.segments.first().copied().filter(|_| is_signed(tree)) else {
            return Ok(());
        };
        let (store, id) = (Arc::clone(&self.store), pool.id);
        let cant = |what: &'static str| move |error: io::Error| internal(what, &error);
        let missing = blocking(move || match store.open_index(id, segment).and_then(Missing::of) {
            // it was removed
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            missing => missing.map_err(cant("can't read a layer's index")),
        });
        let Some(missing) = missing.await? else { return Ok(()) };
        let mut file =
            tempfile_of(&self.store.pools_dir()).map_err(cant("can't make a scratch file"))?;
        let (origin, access) = self.layer_origin(pool)?;
        let mut puller = Puller::start(&self.store, &self.cgroups, access)?;
        let fetched = puller.windows(origin.repository, self.limits(), missing.blob, &file);
        let fetched = tokio::time::timeout(PATIENCE, fetched).await;
        puller.end();
        fetched.unwrap_or_else(|_| Err(ApiError::internal("it takes too long")))?;
        let bytes = missing.blob.len;
        let put = move || missing.put(&mut file).map_err(cant("can't complete a layer's index"));
        blocking(put).await?;
        info!(layer = %tree.commit, bytes, "the layer's index is complete");
        Ok(())
    }

    /// Sees to it that all of the layer's index is here before that time.
    pub(super) async fn complete_index(
        &self,
        tree: &Tree,
        pool: &Pool,
        until: Instant,
    ) -> Result<(), ApiError> {
        let fetched = tokio::time::timeout_at(until, self.fetch_windows(tree, pool)).await;
        fetched.unwrap_or_else(|_| {
            Err(ApiError::new(ErrorCode::Origin, "what its index needs does not come in time"))
        })
    }

    /// It could not be had when it was last tried in the background.
    pub(super) fn index_is_stuck(&self, pool: PoolId) -> bool {
        lock(&self.windows.wanted).get(&pool).is_some_and(|wanted| wanted.failures > 0)
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
                lock(&supervisor.windows.wanted).remove(&pool);
                if let Err(error) = supervisor.fetch_windows_of(pool).await {
                    let wait = FIRST_WAIT.saturating_mul(1 << failures.min(16)).min(LONGEST_WAIT);
                    warn!(%pool, %error, ?wait, "can't get all of a layer's index yet");
                    let again = Wanted { at: Instant::now() + wait, failures: failures + 1 };
                    lock(&supervisor.windows.wanted).entry(pool).or_insert(again);
                }
            }
        });
    }

    async fn fetch_windows_of(&self, pool: PoolId) -> Result<(), ApiError> {
        let pool = self.catalog.pool(pool).await.map_err(catalog)?;
        let Some(pool) = pool else { return Ok(()) }; // it was removed
        match self.catalog.tree_of_pool(pool.id).await.map_err(catalog)? {
            Some(tree) => self.fetch_windows(&tree, &pool).await,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::FileExt;

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
            missing.put(&mut file_of(index.windows())).unwrap();
            assert!(bytes(&file) == whole);
        }
        let file = file_of(&head);
        let missing = || {
            file.try_clone().unwrap().rewind().unwrap();
            Missing::of(file.try_clone().unwrap()).unwrap()
        };
        let error = missing().unwrap().put(&mut file_of(&index.windows()[1..])).unwrap_err();
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
