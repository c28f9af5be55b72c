//! Filling in the background what was pulled by its index alone.

use std::collections::VecDeque;
use std::time::Duration;

use tracing::{debug, info};

use super::super::Supervisor;
use super::super::shard::GONE;
use crate::catalog::{Pool, Tree};
use crate::queue::wire::Run;

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

impl Supervisor {
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
        let mut replays = Vec::new();
        for (segment, runs) in traced {
            let Some((_, shard, _)) = missing.iter().find(|(.., id)| *id == segment) else {
                continue;
            };
            debug!(%segment, runs = runs.len(), "fetching what was read before");
            replays.push(shard.prefetch(segment, runs));
        }
        missing.retain(|(tree, ..)| wanted == Wanted::All || !tree.revision.is_empty());
        if !self.config.images.background_fill.unwrap_or(true) {
            missing.clear();
        }
        let mut missing: VecDeque<_> =
            missing.into_iter().map(|(_, shard, id)| (shard, id)).collect();
        tokio::spawn(async move {
            for replay in replays {
                if let Ok(Err(why)) = replay.await {
                    debug!(why, "not all that was read before could be fetched");
                }
            }
            let (mut wait, mut failed) = (FIRST_WAIT, 0);
            while let Some((shard, segment)) = missing.pop_front() {
                match shard.prefetch(segment, vec![ALL]).await {
                    Ok(Ok(())) => {
                        debug!(%segment, "filled");
                        (wait, failed) = (FIRST_WAIT, 0);
                    }
                    Ok(Err(why)) if why == GONE => debug!(%segment, "not filled: {why}"),
                    Ok(Err(why)) => {
                        info!(%segment, why, "a layer can't be filled yet");
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
        });
    }
}
