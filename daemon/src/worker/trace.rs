//! What the readers of a layer want when it has just been mounted: the next time it comes before they ask.

use std::collections::HashSet;
use std::ops::Range;

use super::schedule::Now;
use crate::ids::SegmentId;

/// What is read later than this has nothing to do with a start.
const LENGTH: Now = Now::from_secs(120);

/// The chunks of a layer's segment that were touched, in order, each once.
#[derive(Debug)]
pub struct Trace {
    segment: SegmentId,
    until: Now,
    seen: HashSet<u32>,
    /// Not told yet.
    news: Vec<u32>,
}

impl Trace {
    #[must_use]
    pub fn begin(now: Now, segment: SegmentId) -> Self {
        Self { segment, until: now + LENGTH, seen: HashSet::new(), news: Vec::new() }
    }

    #[must_use]
    pub fn wants(&self, now: Now, segment: SegmentId) -> bool {
        segment == self.segment && now < self.until
    }

    pub fn touched(&mut self, chunks: Range<u32>) {
        for chunk in chunks {
            if self.seen.insert(chunk) {
                self.news.push(chunk);
            }
        }
    }

    /// What has come since the last time, if anything.
    pub fn take(&mut self) -> Option<(SegmentId, Vec<u32>)> {
        (!self.news.is_empty()).then(|| (self.segment, std::mem::take(&mut self.news)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_record_once_and_in_order_until_the_start_is_over() {
        let segment = SegmentId(1);
        let mut trace = Trace::begin(Now::from_secs(5), segment);
        assert_eq!(trace.take(), None);
        trace.touched(3..5);
        trace.touched(1..4);
        assert_eq!(trace.take(), Some((segment, vec![3, 4, 1, 2])));
        trace.touched(2..3);
        assert_eq!(trace.take(), None);
        assert!(trace.wants(Now::from_secs(124), segment));
        assert!(!trace.wants(Now::from_secs(125), segment));
        assert!(!trace.wants(Now::from_secs(6), SegmentId(2)));
    }
}
