//! Filling in the background what was pulled by its index alone.
//!
//! One task fills all layers of all mounts: first with what was [read](replay) of them at an earlier start, then in
//! [pieces](order) behind the readers, and at a [pace] that leaves the line to them. What is known of it is in the [`Filler`].

mod filler;
mod order;
mod pace;
mod replay;

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use hydrant_api::LayerFill;
use tokio::sync::Notify;
use tracing::{debug, info};

use super::super::shard::{self, Command, GONE, ShardHandle};
use super::super::store::Store;
use super::super::{Supervisor, internal, lock};
use super::{catalog, known_origin};
use crate::admin::ApiError;
use crate::catalog::{Pool, Tree};
use crate::ids::{PoolId, SegmentId};
use crate::queue::wire::Run;
use crate::range::ByteRange;
use crate::source::oci::digest;
use crate::source::oci::fetch::CHUNK;
use filler::{End, Fill, Filler, New, Next, Registry};

/// How long a start is recorded, at least (`worker/trace.rs`).
const RECORDING: Duration = Duration::from_secs(120);

/// The layers of which the rest is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Wanted {
    All,
    /// Those that were pulled by an index. What was evicted comes when it is read.
    Pulled,
}

/// The layers of which something comes by itself.
#[derive(Debug, Default)]
pub struct Fills {
    filler: Mutex<Filler>,
    /// For the filler's task: there is more to do, or less to wait for.
    news: Notify,
}

fn describe(
    store: &Store,
    segment: SegmentId,
    fill: Fill,
    state: &str,
    images: Vec<String>,
) -> io::Result<LayerFill> {
    let Fill { layer, pool, traced, trouble } = fill;
    let (present, size) = store.present_bytes(pool, segment)?;
    let (mut traced_bytes, mut replayed_bytes) = (0, 0);
    for record in traced.into_iter().flat_map(Run::range) {
        let piece = ByteRange::new(u64::from(record) * CHUNK, CHUNK).clamp(size);
        traced_bytes += piece.len();
        if !piece.is_empty() && (present == size || store.is_present(pool, segment, piece)?) {
            replayed_bytes += piece.len();
        }
    }
    Ok(LayerFill {
        layer: digest::text(&layer),
        state: state.into(),
        trouble,
        present_bytes: present,
        segment_bytes: size,
        traced_bytes,
        replayed_bytes,
        images,
    })
}

/// Fetches what was read before of all layers, and what else is missing, until nothing is.
async fn run(fills: Arc<Fills>, shards: Vec<ShardHandle>) {
    let mut pieces = FuturesUnordered::new();
    loop {
        // one that has ended has no readers
        let asked = shards.iter().map(|shard| shard.ask(|reply| Command::Demand { reply }));
        let demanded = join_all(asked).await;
        let next = {
            let mut filler = lock(&fills.filler);
            demanded.into_iter().flatten().for_each(|demanded| filler.demanded(demanded));
            filler.next(shard::now())
        };
        let Some(Next { pieces: begun, wake }) = next else { return };
        for piece in begun {
            let shard = shards.iter().find(|shard| shard.id == piece.shard);
            let answer = shard.map(|shard| shard.prefetch(piece.segment, piece.runs.clone()));
            pieces.push(async move {
                let end = match answer {
                    Some(answer) => answer.await,
                    None => Ok(Err(GONE.into())),
                };
                (piece, end)
            });
        }
        let wait = async {
            match wake {
                Some(wake) => tokio::time::sleep(wake).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some((piece, end)) = pieces.next() => {
                let end = match end {
                    Ok(Ok(())) => End::Came,
                    Ok(Err(why)) if why != GONE => {
                        match piece.is_replayed() {
                            true => debug!(why, "not all that was read before could be fetched"),
                            false => {
                                info!(segment = %piece.segment, why, "a layer can't be filled yet");
                            }
                        }
                        End::Failed(why)
                    }
                    // unmounted, or the shard has ended, and with it the daemon
                    Ok(Err(_)) | Err(_) => End::Gone,
                };
                debug!(segment = %piece.segment, runs = ?piece.runs, ?end, "filled");
                lock(&fills.filler).ended(shard::now(), &piece, end);
            }
            () = fills.news.notified() => {}
            () = wait => {}
        }
    }
}

impl Supervisor {
    /// These pools are not served any more.
    pub(in super::super) fn forget_fills(&self, pools: &HashSet<PoolId>) {
        lock(&self.fills.filler).forget(pools);
        self.fills.news.notify_one();
    }

    /// What has come of layers by itself, for people.
    pub(in super::super) async fn describe_fills(&self) -> Result<Vec<LayerFill>, ApiError> {
        let shown = lock(&self.fills.filler).shown();
        if shown.is_empty() {
            return Ok(Vec::new());
        }
        let layers = self.catalog.layers_by_pool().await.map_err(catalog)?;
        let store = Arc::clone(&self.store);
        // looks for holes
        let described = tokio::task::spawn_blocking(move || {
            let describe = |(segment, fill, state): (SegmentId, Fill, &'static str)| {
                let images = layers.get(&fill.pool).map(|layer| layer.images.clone());
                // unless the layer was removed
                describe(&store, segment, fill, state, images.unwrap_or_default()).ok()
            };
            shown.into_iter().filter_map(describe).collect()
        });
        described.await.map_err(|error| internal("a thread ended", &error))
    }

    /// Begins to fetch what is missing of the layers of a mount, behind whoever reads: what was read of them before, then the
    /// rest. Ends with the mount.
    pub(in super::super) async fn fill_in_background(
        &self,
        trees: &[(Tree, Pool)],
        wanted: Wanted,
    ) {
        let mut incomplete = Vec::new();
        for (tree, pool) in trees {
            let (Ok(segments), Ok(shard)) =
                (self.catalog.segments_of(tree).await, self.shard(pool.id))
            else {
                continue;
            };
            let registry = known_origin(pool).map(|origin| origin.registry).unwrap_or_default();
            let registry = Registry::from(registry);
            let segments = segments.into_iter().filter(|segment| !segment.complete);
            incomplete
                .extend(segments.map(|segment| (tree, segment, shard, Arc::clone(&registry))));
        }
        let of: Vec<_> = incomplete.iter().map(|(tree, ..)| *tree).collect();
        let read_before = replay::stretches(&self.traced(&of).await);
        let fills_all = self.config.images.background_fill.unwrap_or(true);
        let is_filled =
            |tree: &Tree| fills_all && (wanted == Wanted::All || !tree.revision.is_empty());
        // what comes by itself is not waited for, and would not be recorded
        let recorded: HashSet<_> = {
            let mut next = lock(&self.recorded_next);
            let layers = trees.iter().map(|(tree, _)| tree.commit);
            layers.filter(|layer| next.remove(layer)).collect()
        };
        let now = shard::now();
        let starts = {
            let mut filler = lock(&self.fills.filler);
            for (tree, segment, shard, registry) in &incomplete {
                let stretches = read_before.get(&segment.id).cloned().unwrap_or_default();
                let traced: Vec<_> = stretches.iter().flat_map(|of| of.runs.clone()).collect();
                if is_filled(tree) || !traced.is_empty() {
                    let (layer, pool) = (tree.commit, tree.pool);
                    filler.show(segment.id, Fill { layer, pool, traced, trouble: None });
                }
                let is_recorded = recorded.contains(&tree.commit);
                let wait = if is_recorded { RECORDING } else { pace::HEAD_START };
                let new = New {
                    segment: segment.id,
                    size: segment.size,
                    pool: tree.pool,
                    shard: shard.id,
                    registry: Arc::clone(registry),
                    from: now.saturating_add(wait),
                };
                debug!(segment = %segment.id, pieces = stretches.len(), "read before");
                filler.replay(now, &new, stretches);
                if is_filled(tree) {
                    filler.add(now, new);
                }
            }
            filler.start()
        };
        if starts {
            tokio::spawn(run(Arc::clone(&self.fills), self.shards.clone()));
        } else {
            self.fills.news.notify_one();
        }
    }
}
