//! Events that bring their workers down: how often, how, and what becomes of those that read the same.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing::{info, warn};

use super::now;
use super::queue::Scope;
use crate::fanotify::DenyErrno;
use crate::ids::{EventId, PoolId, SegmentId};
use crate::queue::broker::{Death, MAX_STRIKES, Pending};
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
pub struct Poison {
    /// How the workers ended that had an event.
    deaths: HashMap<EventId, Vec<Arc<str>>>,
    quarantine: Quarantine,
}

impl Poison {
    /// An event has come to its end.
    pub(super) fn forget(&mut self, event: EventId) {
        self.deaths.remove(&event);
    }

    /// The same of all events but these.
    pub(super) fn retain(&mut self, there: &HashSet<EventId>) {
        self.deaths.retain(|event, _| there.contains(event));
    }

    /// What is on record.
    pub(super) fn quarantine(&mut self, ranges: Vec<Quarantined>) {
        ranges.into_iter().for_each(|range| self.quarantine.restore(range));
    }

    /// What is in quarantine.
    pub(super) fn quarantined(&self) -> &[Quarantined] {
        self.quarantine.ranges()
    }

    /// Lets everything be tried.
    pub(super) fn clear(&mut self) {
        self.quarantine.clear();
    }
}

impl Scope<'_> {
    /// A worker has died that had these events.
    pub fn note_death(
        &mut self,
        death: Death,
        end: &str,
        in_flight: impl IntoIterator<Item = EventId>,
    ) {
        if death == Death::Outside {
            return;
        }
        let end: Arc<str> = end.into();
        for event in in_flight {
            self.poison.deaths.entry(event).or_default().push(Arc::clone(&end));
        }
    }

    /// An event of which workers died is not tried any more. It is to be denied after that.
    pub fn give_up(&mut self, event: EventId, pending: &Pending) {
        let Pending { segment, range, pid, attempts, .. } = *pending;
        let pool = self.pool_of(segment);
        let deaths = self.poison.deaths.remove(&event).unwrap_or_default();
        let mut range = range;
        let mut path = None;
        if let Some(pool) = pool {
            let mut paths = Paths::new(self.store);
            path = paths.path(pool, segment, range);
            // the same objects would be fetched for their other bytes
            range = paths.whole_objects(pool, segment, range);
        }
        let quarantined = self.poison.quarantine.give_up(segment, range, now());
        warn!(shard = %self.shard, %event, %segment, %range, pid, path, attempts, ?deaths,
            pause_secs = quarantined.until.saturating_sub(now()).as_secs(), "quarantined");
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
    }

    /// What an event that has just come starts with: strikes, or a denial.
    pub fn admission(
        &self,
        segment: SegmentId,
        range: ByteRange,
    ) -> Result<u32, (DenyErrno, &'static str)> {
        match self.poison.quarantine.admits(segment, range, now()) {
            Admission::Free => Ok(0),
            Admission::OnTrial => {
                info!(shard = %self.shard, %segment, %range, "tried again after its quarantine");
                Ok(MAX_STRIKES - 1)
            }
            Admission::Refused => {
                Err((DenyErrno::Eio, "in quarantine: see `hydrant queue --failed`"))
            }
        }
    }

    /// Bytes have come.
    pub fn settle(&mut self, segment: SegmentId, range: ByteRange) {
        if !self.poison.quarantine.is_empty() && self.poison.quarantine.end(segment, range) {
            info!(shard = %self.shard, %segment, %range, "its quarantine is over: it was fetched");
            (self.hooks.on_settled)(segment, range);
        }
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
