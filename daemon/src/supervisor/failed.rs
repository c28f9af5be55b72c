//! The events that were given up: the record of them, and what is left in quarantine after a restart.

use std::sync::Arc;

use hydrant_api::{Cleared, FailedEvent};
use tokio::sync::mpsc;
use tracing::error;

use super::shard::{Command, GivenUp, Quarantined, epoch_ms, from_epoch};
use super::{Supervisor, internal};
use crate::admin::ApiError;
use crate::catalog::{Failed, FailedDetails};
use crate::ids::{SegmentId, ShardId};
use crate::range::ByteRange;

/// What shards tell that goes into the catalog.
#[derive(Debug)]
pub enum News {
    GivenUp(ShardId, Box<GivenUp>),
    /// The range was in quarantine, and now its bytes are there.
    Settled(SegmentId, ByteRange),
    /// Readers of a layer wanted these records.
    Touched(SegmentId, Vec<u32>),
    /// A layer is not what its index says.
    Refuted(SegmentId, String),
}

impl Supervisor {
    /// Gives the shards what is in quarantine. To be called before they serve.
    pub(super) async fn restore_quarantine(&self) {
        let failed = match self.catalog.quarantined().await {
            Ok(failed) => failed,
            Err(error) => {
                error!(%error, "can't read what is in quarantine: it is tried again");
                return;
            }
        };
        for shard in &self.shards {
            let ranges = failed.iter().filter(|failed| self.shard_id(failed.pool) == shard.id);
            let ranges = ranges.map(|failed| Quarantined {
                segment: failed.segment,
                range: failed.range,
                until: from_epoch(failed.until),
                times: failed.times,
            });
            shard.send(Command::Quarantine { ranges: ranges.collect() });
        }
    }

    /// Writes down what the shards tell.
    pub(super) fn record_failures(self: &Arc<Self>, mut news: mpsc::UnboundedReceiver<News>) {
        let supervisor = Arc::clone(self);
        tokio::spawn(async move {
            while let Some(news) = news.recv().await {
                let noted = match news {
                    News::GivenUp(shard, given_up) => {
                        let failed = supervisor.record_of(shard, *given_up).await;
                        supervisor.catalog.add_failed(failed).await
                    }
                    News::Touched(segment, records) => {
                        supervisor.add_to_trace(segment, records).await;
                        continue;
                    }
                    News::Refuted(segment, why) => {
                        // it may have to wait for whoever mounts layers, and news does not
                        let supervisor = Arc::clone(&supervisor);
                        tokio::spawn(async move { supervisor.refute_layer(segment, why).await });
                        continue;
                    }
                    News::Settled(segment, range) => {
                        supervisor.catalog.settle_failed(segment, range).await
                    }
                };
                if let Err(error) = noted {
                    error!(%error, "can't record what has become of a failed event");
                }
            }
        });
    }

    async fn record_of(&self, shard: ShardId, given_up: GivenUp) -> Failed {
        let GivenUp { event, pool, quarantined, until, path, process, attempts, deaths } = given_up;
        let Quarantined { segment, range, times, .. } = quarantined;
        let directory = self.directories_of_pools().await.remove(&pool);
        let origin = self.origins.url(pool);
        let details = FailedDetails {
            event: super::queue::public_id(event, shard),
            time: epoch_ms(),
            shard: shard.0,
            attempts,
            directory,
            path,
            origin,
            process,
            deaths,
        };
        Failed { pool, segment, range, times, until, settled: false, details }
    }

    /// `hydrant queue --failed`, newest first.
    pub(super) async fn failed_events(&self) -> Result<Vec<FailedEvent>, ApiError> {
        let failed = self.catalog.failed().await;
        let failed = failed.map_err(|error| internal("can't read the catalog", &error))?;
        Ok(failed.into_iter().map(|failed| describe(failed, epoch_ms())).collect())
    }

    /// Forgets all records and lets everything be tried at once.
    pub(super) async fn clear_failed_events(&self) -> Result<Cleared, ApiError> {
        let cleared = self.catalog.clear_failed().await;
        let cleared = cleared.map_err(|error| internal("can't clear the records", &error))?;
        for shard in &self.shards {
            shard.ask(|reply| Command::ClearQuarantine { reply }).await;
        }
        Ok(Cleared { cleared })
    }
}

/// A record as clients see it at `now`, in milliseconds since the epoch.
fn describe(failed: Failed, now: u64) -> FailedEvent {
    let Failed { segment, range, times, until, settled, details, .. } = failed;
    let (state, retry_in_ms) = match until.saturating_sub(now) {
        _ if settled => ("settled", None),
        0 => ("on_trial", None),
        left => ("quarantined", Some(left)),
    };
    FailedEvent {
        id: details.event,
        time_ms: details.time,
        state: state.into(),
        retry_in_ms,
        times,
        directory: details.directory,
        path: details.path,
        segment: segment.0,
        offset: range.offset(),
        count: range.len(),
        process: details.process,
        shard: details.shard,
        attempts: details.attempts,
        origin: details.origin,
        deaths: details.deaths,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::PoolId;

    #[test]
    fn states_of_a_record() {
        let failed = |until, settled| Failed {
            pool: PoolId(1),
            segment: SegmentId(2),
            range: ByteRange::new(4096, 8192),
            times: 1,
            until,
            settled,
            details: FailedDetails::default(),
        };
        let state = |failed| {
            let described = describe(failed, 1000);
            (described.state, described.retry_in_ms)
        };
        assert_eq!(state(failed(1500, false)), ("quarantined".into(), Some(500)));
        assert_eq!(state(failed(1000, false)), ("on_trial".into(), None));
        assert_eq!(state(failed(1500, true)), ("settled".into(), None));
    }
}
