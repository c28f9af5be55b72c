//! What has killed its workers, and is left alone for a while.
//!
//! A pure state machine, as the [`broker`](super::broker): no clock, no I/O. When an event is given up, the
//! objects that it wanted go into quarantine. Whoever reads them is refused at once, so that a program that
//! tries again and again does not bring the workers down again and again. When the pause is over the next reader
//! is let through *on trial*: one more death and the quarantine begins anew, twice as long. So what always
//! kills costs three workers, then one after [`FIRST_PAUSE`], and in the end one in [`LONGEST_PAUSE`]; what was an accident
//! costs its readers one pause. Bytes that come end it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::SegmentId;
use crate::range::ByteRange;

/// How long the first quarantine of a range lasts.
pub const FIRST_PAUSE: Duration = Duration::from_secs(60);

/// How long a quarantine lasts at most.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// No more ranges than that; the one that ends first makes room.
const MAX_RANGES: usize = 1000;

/// A range in quarantine. Times are by the clock of the events
/// ([`Pending::arrived`](super::broker::Pending::arrived)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    pub segment: SegmentId,
    pub range: ByteRange,
    /// Until then nobody is let through.
    pub until: Duration,
    /// How often in a row it was given up.
    pub times: u32,
}

/// Whether a reader may go to a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    Free,
    /// One more death at which it is in flight is the last.
    OnTrial,
    Refused,
}

/// The ranges of one shard.
#[derive(Debug, Default)]
pub struct Quarantine {
    ranges: Vec<Quarantined>,
}

impl Quarantine {
    /// Whether `range` of `segment` may be fetched at `now`.
    #[must_use]
    pub fn admits(&self, segment: SegmentId, range: ByteRange, now: Duration) -> Admission {
        let concerned = self.ranges.iter().filter(|q| q.segment == segment && overlap(q, range));
        match concerned.map(|q| q.until).max() {
            None => Admission::Free,
            Some(until) if until <= now => Admission::OnTrial,
            Some(_) => Admission::Refused,
        }
    }

    /// Workers have died of this. Gives the quarantine that begins.
    pub fn give_up(&mut self, segment: SegmentId, range: ByteRange, now: Duration) -> Quarantined {
        let concerned = self.ranges.iter().filter(|q| q.segment == segment && overlap(q, range));
        let times = concerned.map(|q| q.times).max().unwrap_or(0).saturating_add(1);
        let doubled = 2u32.saturating_pow(times - 1);
        let until = now.saturating_add(FIRST_PAUSE.saturating_mul(doubled).min(LONGEST_PAUSE));
        let new = Quarantined { segment, range, until, times };
        self.restore(new);
        new
    }

    /// Takes over what is on record.
    pub fn restore(&mut self, new: Quarantined) {
        self.end(new.segment, new.range);
        if self.ranges.len() >= MAX_RANGES
            && let Some(first) = (0..self.ranges.len()).min_by_key(|n| self.ranges[*n].until)
        {
            self.ranges.swap_remove(first);
        }
        self.ranges.push(new);
    }

    /// Its bytes are there. `true`: it was in quarantine.
    pub fn end(&mut self, segment: SegmentId, range: ByteRange) -> bool {
        let before = self.ranges.len();
        self.ranges.retain(|q| q.segment != segment || !overlap(q, range));
        self.ranges.len() < before
    }

    /// The administrator lets everything be tried.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }

    /// All that is in quarantine, or on trial.
    #[must_use]
    pub fn ranges(&self) -> &[Quarantined] {
        &self.ranges
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

fn overlap(quarantined: &Quarantined, range: ByteRange) -> bool {
    let own = quarantined.range;
    own.offset() < range.end() && range.offset() < own.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: SegmentId = SegmentId(1);
    const T: Duration = Duration::from_secs(1000);

    fn range(first: u64, count: u64) -> ByteRange {
        ByteRange::new(first * 4096, count * 4096)
    }

    #[test]
    fn refused_for_a_pause_then_on_trial() {
        let mut quarantine = Quarantine::default();
        assert_eq!(quarantine.admits(S, range(0, 9), T), Admission::Free);
        let first = quarantine.give_up(S, range(2, 2), T);
        assert_eq!((first.times, first.until), (1, T + FIRST_PAUSE));
        for (at, expected) in [
            (range(0, 2), Admission::Free),
            (range(0, 3), Admission::Refused),
            (range(3, 9), Admission::Refused),
            (range(4, 1), Admission::Free),
        ] {
            assert_eq!(quarantine.admits(S, at, T), expected, "{at}");
        }
        assert_eq!(quarantine.admits(SegmentId(2), range(2, 2), T), Admission::Free);
        assert_eq!(quarantine.admits(S, range(2, 2), first.until), Admission::OnTrial);
    }

    #[test]
    fn the_pause_doubles_up_to_the_longest() {
        let mut quarantine = Quarantine::default();
        let mut now = T;
        let mut pauses = Vec::new();
        for times in 1..=9 {
            let new = quarantine.give_up(S, range(2, 2), now);
            assert_eq!(new.times, times);
            pauses.push((new.until - now).as_secs());
            now = new.until;
        }
        assert_eq!(pauses, [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]);
        assert_eq!(quarantine.ranges.len(), 1);
    }

    #[test]
    fn bytes_that_come_end_it() {
        let mut quarantine = Quarantine::default();
        quarantine.give_up(S, range(2, 2), T);
        assert!(!quarantine.end(S, range(4, 1)));
        assert!(quarantine.end(S, range(3, 1)));
        assert!(quarantine.is_empty());
        assert_eq!(quarantine.give_up(S, range(2, 2), T).times, 1);
        quarantine.clear();
        assert_eq!(quarantine.admits(S, range(2, 2), T), Admission::Free);
    }

    #[test]
    fn there_are_not_more_than_so_many() {
        let mut quarantine = Quarantine::default();
        for n in 0..MAX_RANGES as u64 + 10 {
            quarantine.give_up(S, range(2 * n, 1), T + Duration::from_secs(n));
        }
        assert_eq!(quarantine.ranges.len(), MAX_RANGES);
        assert_eq!(quarantine.admits(S, range(18, 1), T), Admission::Free);
        assert_eq!(quarantine.admits(S, range(20, 1), T), Admission::Refused);
    }
}
