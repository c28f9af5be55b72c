//! Filling in the background what was pulled by its index alone.

use std::time::Duration;

use tracing::{debug, info};

use super::super::Supervisor;
use super::super::shard::{Command, GONE};
use crate::catalog::{Pool, Tree};

/// The wait after a fill that failed; it doubles.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// More chunks than any layer has.
const ALL: u32 = u32::MAX;

impl Supervisor {
    /// Begins to fetch what is missing of the layers of a mount that were never complete, one layer after the other,
    /// behind whoever reads. Ends with the mount.
    pub(in super::super) async fn fill_in_background(&self, trees: &[(Tree, Pool)]) {
        if !self.config.images.background_fill.unwrap_or(true) {
            return;
        }
        let mut missing = Vec::new();
        for (tree, pool) in trees {
            // pulled by an index
            if tree.revision.is_empty() {
                continue;
            }
            let (Ok(segments), Ok(shard)) =
                (self.catalog.segments(pool.id).await, self.shard(pool.id))
            else {
                continue;
            };
            let wanted = segments.into_iter();
            let wanted = wanted.filter(|s| !s.complete && tree.segments.contains(&s.id));
            missing.extend(wanted.map(|segment| (shard.clone(), segment.id)));
        }
        if missing.is_empty() {
            return;
        }
        tokio::spawn(async move {
            for (shard, segment) in missing {
                let mut wait = FIRST_WAIT;
                loop {
                    let (reply, answer) = tokio::sync::oneshot::channel();
                    let count = ALL;
                    shard.send(Command::Prefetch { segment, first: 0, count, reply });
                    match answer.await {
                        Ok(Ok(())) => break,
                        Ok(Err(why)) if why != GONE => {
                            info!(%segment, why, "a layer can't be filled yet");
                            tokio::time::sleep(wait).await;
                            wait = (wait * 2).min(LONGEST_WAIT);
                        }
                        // unmounted, or the daemon ends
                        _ => return,
                    }
                }
                debug!(%segment, "filled");
            }
        });
    }
}
