//! Events that bring their workers down: how often, how, and what becomes of those that read the same.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing::{info, warn};

use super::Shard;
use crate::fanotify::DenyErrno;
use crate::ids::{EventId, PoolId, SegmentId};
use crate::queue::broker::{Answer, Death, MAX_STRIKES, Pending};
use crate::queue::inflight;
use crate::queue::quarantine::{Admission, Quarantine, Quarantined};
use crate::range::ByteRange;
use crate::supervisor::queue::{Paths, process};

/// An event that was given up, for the record.
#[derive(Debug, Clone)]
pub struct GivenUp {
    pub event: EventId,
    pub pool: PoolId,
    pub quarantined: Quarantined,
    /// The quarantine's end, in milliseconds since the epoch.
    pub until: u64,
    pub path: Option<String>,
    pub process: hydrant_api::Process,
    pub attempts: u32,
    /// How its workers ended.
    pub deaths: Vec<String>,
}

/// What a shard knows of such events.
#[derive(Debug, Default)]
pub(super) struct Poison {
    /// How the workers ended that had an event.
    deaths: HashMap<EventId, Vec<Arc<str>>>,
    quarantine: Quarantine,
}

impl Poison {
    /// An event has come to its end.
    pub(super) fn forget(&mut self, event: EventId) {
        self.deaths.remove(&event);
    }
}

impl Shard {
    /// To be called at the death of a worker, while the broker still has its events in flight.
    pub(super) fn note_death(&mut self, death: Death, description: &str) {
        if death == Death::Outside {
            return;
        }
        let description: Arc<str> = description.into();
        let in_flight = self.broker.iter().filter(|(_, pending)| pending.dispatched.is_some());
        for (event, _) in in_flight {
            self.poison.deaths.entry(event).or_default().push(Arc::clone(&description));
        }
    }

    /// The end of an event of which workers died.
    pub(super) fn give_up(&mut self, answer: Answer) {
        let Answer { event, pending: Pending { segment, range, pid, attempts, .. }, .. } = answer;
        let pool = self.segments.get(&segment).map(|segment| segment.pool);
        let deaths = self.poison.deaths.remove(&event).unwrap_or_default();
        let mut range = range;
        let mut path = None;
        if let Some(pool) = pool {
            let mut paths = Paths::new(&self.store);
            path = paths.path(pool, segment, range);
            // the same objects would be fetched for their other bytes
            range = paths.whole_objects(pool, segment, range);
        }
        let quarantined = self.poison.quarantine.give_up(segment, range, Self::now());
        warn!(shard = %self.id, %event, %segment, %range, pid, path, attempts, ?deaths,
            pause_secs = quarantined.until.saturating_sub(Self::now()).as_secs(), "quarantined");
        (self.hooks.on_given_up)(GivenUp {
            event,
            pool: pool.unwrap_or(PoolId(0)),
            quarantined,
            until: to_epoch(quarantined.until),
            path,
            // before the answer: its reader may be gone a moment later
            process: process(pid),
            attempts,
            deaths: deaths.iter().map(|death| death.to_string()).collect(),
        });
        self.finish(answer);
    }

    /// What an event that has just come starts with: strikes, or a denial.
    pub(super) fn admission(
        &self,
        segment: SegmentId,
        range: ByteRange,
    ) -> Result<u32, (DenyErrno, &'static str)> {
        match self.poison.quarantine.admits(segment, range, Self::now()) {
            Admission::Free => Ok(0),
            Admission::OnTrial => {
                info!(shard = %self.id, %segment, %range, "tried again after its quarantine");
                Ok(MAX_STRIKES - 1)
            }
            Admission::Refused => {
                Err((DenyErrno::Eio, "in quarantine: see `hydrant queue --failed`"))
            }
        }
    }

    /// Bytes have come.
    pub(super) fn settle(&mut self, segment: SegmentId, range: ByteRange) {
        if !self.poison.quarantine.is_empty() && self.poison.quarantine.end(segment, range) {
            info!(shard = %self.id, %segment, %range, "its quarantine is over: it was fetched");
            (self.hooks.on_settled)(segment, range);
        }
    }

    /// What is on record.
    pub(super) fn quarantine(&mut self, ranges: Vec<Quarantined>) {
        ranges.into_iter().for_each(|range| self.poison.quarantine.restore(range));
    }

    /// Lets everything be tried.
    pub(super) fn clear_quarantine(&mut self) {
        self.poison.quarantine.clear();
    }
}

fn epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Now, in milliseconds since the epoch.
pub fn epoch_ms() -> u64 {
    crate::supervisor::queue::milliseconds(epoch())
}

/// A time of the events' clock in milliseconds since the epoch.
fn to_epoch(time: Duration) -> u64 {
    let left = time.saturating_sub(Duration::from_nanos(inflight::now()));
    crate::supervisor::queue::milliseconds(epoch() + left)
}

/// And back. What is long past is now.
pub fn from_epoch(time: u64) -> Duration {
    let left = Duration::from_millis(time).saturating_sub(epoch());
    Duration::from_nanos(inflight::now()) + left
}
