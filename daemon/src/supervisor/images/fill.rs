//! Filling in the background what was pulled by its index alone.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hydrant_api::LayerFill;
use tracing::{debug, info};

use super::super::shard::{GONE, ShardHandle};
use super::super::store::Store;
use super::super::{Supervisor, internal, lock};
use super::catalog;
use crate::admin::ApiError;
use crate::catalog::{Pool, Tree};
use crate::ids::{PoolId, SegmentId};
use crate::object::ObjectId;
use crate::queue::wire::Run;
use crate::range::ByteRange;
use crate::source::oci::fetch::CHUNK;
use crate::source::oci::{digest, trace};

/// The wait after a fill that failed; it doubles.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// How long a start is recorded, at least (`worker/trace.rs`).
const RECORDING: Duration = Duration::from_secs(120);
/// More chunks than any layer has.
const ALL: Run = Run { first: 0, count: u32::MAX };

/// The layers of which the rest is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Wanted {
    All,
    /// Those that were pulled by an index. What was evicted comes when it is read.
    Pulled,
}

/// A layer of which something comes by itself.
#[derive(Debug, Clone)]
pub struct Fill {
    layer: ObjectId,
    pool: PoolId,
    /// What was read before.
    traced: Vec<Run>,
    state: &'static str,
    trouble: Option<String>,
}

/// By their segments.
pub type Fills = BTreeMap<SegmentId, Fill>;

const REPLAYING: &str = "replaying";
const FILLING: &str = "filling";
const WAITING: &str = "waiting";
const DONE: &str = "done";

fn describe(
    store: &Store,
    segment: SegmentId,
    fill: Fill,
    images: Vec<String>,
) -> io::Result<LayerFill> {
    let Fill { layer, pool, traced, state, trouble } = fill;
    let (present, size) = store.present_bytes(pool, segment)?;
    let (mut traced_bytes, mut replayed_bytes) = (0, 0);
    for record in trace::records(&traced) {
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

fn note(fills: &Mutex<Fills>, segment: SegmentId, state: &'static str, trouble: Option<String>) {
    if let Some(fill) = lock(fills).get_mut(&segment) {
        fill.state = state;
        fill.trouble = trouble;
    }
}

/// Fills segments behind whoever reads, one after the other: one that does not come is tried again behind the others.
async fn fill(fills: &Mutex<Fills>, mut missing: VecDeque<(ShardHandle, SegmentId)>) {
    let (mut wait, mut failed) = (FIRST_WAIT, 0);
    while let Some((shard, segment)) = missing.pop_front() {
        note(fills, segment, FILLING, None);
        match shard.prefetch(segment, vec![ALL]).await {
            Ok(Ok(())) => {
                note(fills, segment, DONE, None);
                debug!(%segment, "filled");
                (wait, failed) = (FIRST_WAIT, 0);
            }
            // unmounted: `forget_fills` has been told
            Ok(Err(why)) if why == GONE => debug!(%segment, "not filled: {why}"),
            Ok(Err(why)) => {
                info!(%segment, why, "a layer can't be filled yet");
                note(fills, segment, WAITING, Some(why));
                missing.push_back((shard, segment));
                failed += 1;
            }
            // the daemon ends
            Err(_) => return,
        }
        if !missing.is_empty() && failed >= missing.len() {
            tokio::time::sleep(wait).await;
            (wait, failed) = ((wait * 2).min(LONGEST_WAIT), 0);
        }
    }
}

impl Supervisor {
    /// These pools are not served any more.
    pub(in super::super) fn forget_fills(&self, pools: &HashSet<PoolId>) {
        lock(&self.fills).retain(|_, fill| !pools.contains(&fill.pool));
    }

    /// What has come of layers by itself, for people.
    pub(in super::super) async fn describe_fills(&self) -> Result<Vec<LayerFill>, ApiError> {
        let fills = lock(&self.fills).clone();
        if fills.is_empty() {
            return Ok(Vec::new());
        }
        let layers = self.catalog.layers_by_pool().await.map_err(catalog)?;
        let store = Arc::clone(&self.store);
        // looks for holes
        let described = tokio::task::spawn_blocking(move || {
            let describe = |(segment, fill): (SegmentId, Fill)| {
                let images = layers.get(&fill.pool).map(|layer| layer.images.clone());
                // unless the layer was removed
                describe(&store, segment, fill, images.unwrap_or_default()).ok()
            };
            fills.into_iter().filter_map(describe).collect()
        });
        described.await.map_err(|error| internal("a thread ended", &error))
    }

    /// Begins to fetch what is missing of the layers of a mount, behind whoever reads: what was read of them before, then the
    /// rest, one layer after the other: one that does not come is tried again behind the others. Ends with the mount.
    pub(in super::super) async fn fill_in_background(
        &self,
        trees: &[(Tree, Pool)],
        wanted: Wanted,
    ) {
        let mut missing = Vec::new();
        for (tree, pool) in trees {
            let (Ok(segments), Ok(shard)) =
                (self.catalog.segments_of(tree).await, self.shard(pool.id))
            else {
                continue;
            };
            let wanted = segments.into_iter().filter(|segment| !segment.complete);
            missing.extend(wanted.map(|segment| (tree, shard.clone(), segment.id)));
        }
        let incomplete: Vec<_> = missing.iter().map(|(tree, ..)| *tree).collect();
        let traced = self.traced(&incomplete).await;
        let fills_all = self.config.images.background_fill.unwrap_or(true);
        let is_filled =
            |tree: &Tree| fills_all && (wanted == Wanted::All || !tree.revision.is_empty());
        let mut replays = Vec::new();
        {
            let mut fills = lock(&self.fills);
            for (tree, _, segment) in &missing {
                let runs = traced.iter().find(|(of, _)| of == segment);
                let traced = runs.map(|(_, runs)| runs.clone()).unwrap_or_default();
                let state = match (traced.is_empty(), is_filled(tree)) {
                    (false, _) => REPLAYING,
                    (true, true) => WAITING,
                    (true, false) => continue,
                };
                let (layer, pool) = (tree.commit, tree.pool);
                fills.insert(*segment, Fill { layer, pool, traced, state, trouble: None });
            }
        }
        // in the order in which they were read
        for (segment, runs) in traced {
            let Some((_, shard, _)) = missing.iter().find(|(.., id)| *id == segment) else {
                continue;
            };
            debug!(%segment, runs = runs.len(), "fetching what was read before");
            replays.push((segment, shard.prefetch(segment, runs)));
        }
        missing.retain(|(tree, ..)| is_filled(tree));
        // what comes by itself is not waited for, and would not be recorded
        let (recorded, missing): (VecDeque<_>, VecDeque<_>) = {
            let mut next = lock(&self.recorded_next);
            let parts = missing.into_iter().partition(|(tree, ..)| next.contains(&tree.commit));
            next.retain(|layer| trees.iter().all(|(tree, _)| tree.commit != *layer));
            parts
        };
        let handles = |of: VecDeque<(&Tree, ShardHandle, SegmentId)>| -> VecDeque<_> {
            of.into_iter().map(|(_, shard, id)| (shard, id)).collect()
        };
        let (recorded, missing) = (handles(recorded), handles(missing));
        if !recorded.is_empty() {
            let fills = Arc::clone(&self.fills);
            tokio::spawn(async move {
                tokio::time::sleep(RECORDING).await;
                fill(&fills, recorded).await;
            });
        }
        let fills = Arc::clone(&self.fills);
        tokio::spawn(async move {
            for (segment, replay) in replays {
                let trouble = replay.await.ok().and_then(Result::err);
                if let Some(why) = &trouble {
                    debug!(why, "not all that was read before could be fetched");
                }
                let is_filled = missing.iter().any(|(_, id)| *id == segment);
                note(&fills, segment, if is_filled { WAITING } else { DONE }, trouble);
            }
            fill(&fills, missing).await;
        });
    }
}
