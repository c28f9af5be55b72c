//! Filling in the background what was pulled by its index alone.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hydrant_api::LayerFill;
use tracing::{debug, info};

use super::super::shard::GONE;
use super::super::{Supervisor, lock};
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

fn note(fills: &Mutex<Fills>, segment: SegmentId, state: &'static str, trouble: Option<String>) {
    if let Some(fill) = lock(fills).get_mut(&segment) {
        fill.state = state;
        fill.trouble = trouble;
    }
}

impl Supervisor {
    /// These pools are not served any more.
    pub(in super::super) fn forget_fills(&self, pools: &HashSet<PoolId>) {
        lock(&self.fills).retain(|_, fill| !pools.contains(&fill.pool));
    }

    /// What has come of layers by itself, for people.
    pub(in super::super) fn describe_fills(&self) -> Vec<LayerFill> {
        let fills = lock(&self.fills).clone();
        let mut described = Vec::new();
        for (segment, Fill { layer, pool, traced, state, trouble }) in fills {
            // a layer that was removed
            let Ok((present, size)) = self.store.present_bytes(pool, segment) else { continue };
            let pieces: Vec<_> = trace::records(&traced)
                .into_iter()
                .map(|record| ByteRange::new(u64::from(record) * CHUNK, CHUNK).clamp(size))
                .filter(|piece| !piece.is_empty())
                .collect();
            let is_there = |piece: &&ByteRange| {
                matches!(self.store.is_present(pool, segment, **piece), Ok(true))
            };
            described.push(LayerFill {
                layer: digest::text(&layer),
                state: state.into(),
                trouble,
                present_bytes: present,
                segment_bytes: size,
                traced_bytes: pieces.iter().map(|piece| piece.len()).sum(),
                replayed_bytes: pieces.iter().filter(is_there).map(|piece| piece.len()).sum(),
            });
        }
        described
    }

    /// Begins to fetch what is missing of the layers of a mount, behind whoever reads: what was read of them before, then the
    /// rest, one layer after the other. Ends with the mount.
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
        let missing: Vec<_> = missing.into_iter().map(|(_, shard, id)| (shard, id)).collect();
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
            for (shard, segment) in missing {
                note(&fills, segment, FILLING, None);
                let mut wait = FIRST_WAIT;
                loop {
                    match shard.prefetch(segment, vec![ALL]).await {
                        Ok(Ok(())) => break,
                        Ok(Err(why)) if why != GONE => {
                            info!(%segment, why, "a layer can't be filled yet");
                            note(&fills, segment, WAITING, Some(why));
                            tokio::time::sleep(wait).await;
                            wait = (wait * 2).min(LONGEST_WAIT);
                        }
                        // unmounted, or the daemon ends
                        _ => {
                            lock(&fills).remove(&segment);
                            return;
                        }
                    }
                }
                note(&fills, segment, DONE, None);
                debug!(%segment, "filled");
            }
        });
    }
}
