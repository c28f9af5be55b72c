//! Who waits for what is not there: so that whoever fetches behind readers can follow them, and keep out of their way.

use std::collections::HashMap;
use std::time::Duration;

use crate::ids::SegmentId;

/// Where a segment was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    pub segment: SegmentId,
    /// In bytes from the segment's start.
    pub offset: u64,
    /// By the clock of [`now`](super::now).
    pub at: Duration,
}

/// What readers had to wait for. Of each segment only the latest is kept.
#[derive(Debug, Default)]
pub struct Demand {
    last: Option<Duration>,
    reads: HashMap<SegmentId, Read>,
    /// Of the kernel's queue, where it is only seen that there are more: waits that have ended.
    ended: u64,
}

/// The answer to [`Command::Demand`](super::Command::Demand).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demanded {
    /// When a reader was last known to wait: the time of the question if one does. By the clock of [`now`](super::now).
    pub last: Option<Duration>,
    /// Where segments were read since this was asked last.
    pub reads: Vec<Read>,
}

impl Demand {
    /// Somebody waits at this time, or has done so until then.
    pub fn waits(&mut self, now: Duration) {
        self.last = self.last.max(Some(now));
    }

    /// Somebody waits, or did from `read.at` on.
    pub fn reads(&mut self, read: Read) {
        self.waits(read.at);
        let latest = self.reads.entry(read.segment).or_insert(read);
        if latest.at <= read.at {
            *latest = read;
        }
    }

    /// So many waits have ended so far, by a count that may begin anew. They did so since this was said last.
    pub fn have_ended(&mut self, now: Duration, ended: u64) {
        if std::mem::replace(&mut self.ended, ended) != ended {
            self.waits(now);
        }
    }

    pub fn forget(&mut self, segment: SegmentId) {
        self.reads.remove(&segment);
    }

    pub fn take(&mut self) -> Demanded {
        Demanded { last: self.last, reads: self.reads.drain().map(|(_, read)| read).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_latest_read_of_a_segment_is_told_once() {
        let mut demand = Demand::default();
        assert_eq!(demand.take(), Demanded::default());
        let read = |segment, offset, at| Read { segment: SegmentId(segment), offset, at: ms(at) };
        demand.reads(read(1, 5, 10));
        demand.reads(read(1, 7, 20));
        // looked at later
        demand.reads(read(1, 6, 15));
        demand.reads(read(2, 0, 12));
        demand.forget(SegmentId(2));
        let expected = Demanded { last: Some(ms(20)), reads: vec![read(1, 7, 20)] };
        assert_eq!(demand.take(), expected);
        assert_eq!(demand.take(), Demanded { reads: Vec::new(), ..expected });
    }

    /// A wait of a minute is no minute of quiet.
    #[test]
    fn the_end_of_a_wait_counts() {
        let mut demand = Demand::default();
        let read = Read { segment: SegmentId(1), offset: 0, at: ms(10) };
        demand.reads(read);
        demand.waits(ms(60_000));
        // that it began then is found out later
        demand.reads(read);
        assert_eq!(demand.take().last, Some(ms(60_000)));

        demand.have_ended(ms(70_000), 3);
        assert_eq!(demand.take().last, Some(ms(70_000)));
        demand.have_ended(ms(80_000), 3);
        assert_eq!(demand.take().last, Some(ms(70_000)));
        // another worker counts from the beginning
        demand.have_ended(ms(90_000), 1);
        assert_eq!(demand.take().last, Some(ms(90_000)));
    }
}
