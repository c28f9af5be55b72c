//! What was read of layers at an earlier start, in the pieces in which it is asked for at this one.

use std::collections::{HashMap, VecDeque};

use super::pace::REPLAYED;
use crate::catalog::Place;
use crate::ids::SegmentId;
use crate::queue::wire::Run;
use crate::source::oci::fetch::CHUNK;

/// The longest stretch in bytes. What is needed first is hardly behind what was read later; the worker makes one request of
/// several stretches.
pub const LONGEST: u64 = 4 * CHUNK;
// one is on its way when another ends
const _: () = assert!(2 * LONGEST <= REPLAYED);

/// Records of one segment that were read one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// Of the first of them.
    pub place: Place,
    pub runs: Vec<Run>,
}

impl Stretch {
    pub fn bytes(&self) -> u64 {
        bytes(&self.runs)
    }

    /// Takes the record in, if there is room for it.
    fn take(&mut self, record: u32) -> bool {
        let fits = self.bytes() < LONGEST;
        if fits && !self.runs.last_mut().is_some_and(|run| run.take(record)) {
            self.runs.push(Run::one(record));
        }
        fits
    }
}

/// The length of runs; the end of a segment counts as a whole chunk.
pub fn bytes(runs: &[Run]) -> u64 {
    runs.iter().map(|run| u64::from(run.count) * CHUNK).sum()
}

/// Of each segment what was read of it, in order, out of the records of all segments in the order in which they were read.
pub fn stretches(read: &[(Place, SegmentId, u32)]) -> HashMap<SegmentId, VecDeque<Stretch>> {
    let mut of_segments: HashMap<SegmentId, VecDeque<Stretch>> = HashMap::new();
    let mut last = None;
    for (place, segment, record) in read {
        let stretches = of_segments.entry(*segment).or_default();
        let goes_on = last == Some(segment)
            && stretches.back_mut().is_some_and(|stretch| stretch.take(*record));
        if !goes_on {
            stretches.push_back(Stretch { place: *place, runs: vec![Run::one(*record)] });
        }
        last = Some(segment);
    }
    of_segments
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each record with the number of those before it as its place.
    fn placed(records: &[(u64, u32)]) -> Vec<(Place, SegmentId, u32)> {
        let placed =
            |(place, (id, record)): (u32, &(u64, u32))| ((place, 0), SegmentId(*id), *record);
        (0..).zip(records).map(placed).collect()
    }

    #[test]
    fn what_was_read_of_a_layer_in_one_go_is_asked_for_together() {
        let found = stretches(&placed(&[(1, 7), (2, 3), (2, 4), (1, 8), (1, 0), (2, 5)]));
        let stretch = |place, runs: &[(u32, u32)]| {
            let runs = runs.iter().map(|(first, count)| Run { first: *first, count: *count });
            Stretch { place: (place, 0), runs: runs.collect() }
        };
        let expected = HashMap::from([
            (SegmentId(1), VecDeque::from([stretch(0, &[(7, 1)]), stretch(3, &[(8, 1), (0, 1)])])),
            (SegmentId(2), VecDeque::from([stretch(1, &[(3, 2)]), stretch(5, &[(5, 1)])])),
        ]);
        assert_eq!(found, expected);
    }

    #[test]
    fn a_stretch_is_short() {
        let read: Vec<_> = (0..10).map(|record| (1, record)).collect();
        let found = &stretches(&placed(&read))[&SegmentId(1)];
        let found: Vec<_> = found.iter().map(|of| (of.place.0, of.bytes() / CHUNK)).collect();
        assert_eq!(found, [(0, 4), (4, 4), (8, 2)]);
        // however many runs they are
        let read: Vec<_> = (0..10).map(|record| (1, 20 - 2 * record)).collect();
        let found = &stretches(&placed(&read))[&SegmentId(1)];
        assert_eq!(found[1].runs, [12, 10, 8, 6].map(Run::one));
    }
}
