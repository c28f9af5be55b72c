//! What is to be fetched first of a layer, as it is kept beside its image: JSON, `{"version": 1, "unit": 1048576, "runs":
//! [[first, count], ...]}`. A run is of pieces of the layer's segment, each a `unit` of bytes long.

use serde::{Deserialize, Serialize};

use super::fetch::CHUNK;
use crate::queue::wire::Run;

const VERSION: u32 = 1;
/// The longest trace in bytes.
pub const MAX_TRACE: u64 = 64 << 10;
/// More runs, or more pieces, are nothing that a start needs.
const MAX_RUNS: usize = 2000;
const MAX_PIECES: usize = 4096;

#[derive(Debug, Serialize, Deserialize)]
struct Raw {
    version: u32,
    unit: u64,
    runs: Vec<(u32, u32)>,
}

/// Pieces in order as runs, as many of them as a trace may have.
#[must_use]
pub fn runs(records: &[u32]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for record in records.iter().take(MAX_PIECES) {
        if !runs.last_mut().is_some_and(|run| run.take(*record)) {
            runs.push(Run::one(*record));
        }
    }
    runs.truncate(MAX_RUNS);
    runs
}

/// So many bytes at a segment's start. `None`: that is nothing, or more than a trace may have.
#[must_use]
pub fn start(bytes: u64) -> Option<Vec<Run>> {
    let count = u32::try_from(bytes.div_ceil(CHUNK)).ok()?;
    let runs = vec![Run { first: 0, count }];
    is_sound(&runs).then_some(runs)
}

/// Whether runs that somebody else has made are a trace: few enough, and none of them empty or beyond all segments.
#[must_use]
pub fn is_sound(runs: &[Run]) -> bool {
    let pieces: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
    let is_run = |run: &Run| run.count > 0 && run.first.checked_add(run.count).is_some();
    runs.len() <= MAX_RUNS && pieces <= MAX_PIECES as u64 && runs.iter().all(is_run)
}

/// The pieces of runs, in order.
#[must_use]
pub fn records(runs: &[Run]) -> Vec<u32> {
    runs.iter().flat_map(|run| run.first..run.first.saturating_add(run.count)).collect()
}

#[must_use]
pub fn write(runs: &[Run]) -> Vec<u8> {
    let runs = runs.iter().map(|run| (run.first, run.count)).collect();
    // numbers can be written
    serde_json::to_vec(&Raw { version: VERSION, unit: CHUNK, runs }).unwrap_or_default()
}

/// `None`: it is none that is understood.
#[must_use]
pub fn read(bytes: &[u8]) -> Option<Vec<Run>> {
    let Raw { version, unit, runs } = serde_json::from_slice(bytes).ok()?;
    let runs: Vec<_> = runs.into_iter().map(|(first, count)| Run { first, count }).collect();
    ((version, unit) == (VERSION, CHUNK) && is_sound(&runs)).then_some(runs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let order = [7, 8, 9, 3, 4, 0, 100];
        let found = runs(&order);
        assert_eq!(found.len(), 4);
        assert_eq!(records(&found), order);
        assert_eq!(read(&write(&found)).unwrap(), found);
        assert_eq!(read(b"{\"version\":2,\"unit\":1048576,\"runs\":[]}"), None);
    }

    #[test]
    fn what_is_too_long_is_cut_and_can_be_read() {
        for step in [1, 2] {
            let long: Vec<u32> = (0..100_000).map(|n| n * step).collect();
            let written = write(&runs(&long));
            assert!(written.len() as u64 <= MAX_TRACE);
            let read = records(&read(&written).unwrap());
            assert!(read.len() >= MAX_RUNS && long.starts_with(&read));
        }
        let run = |first, count| Run { first, count };
        assert!(is_sound(&[run(0, MAX_PIECES as u32)]));
        for refused in
            [run(0, u32::MAX), run(0, MAX_PIECES as u32 + 1), run(u32::MAX, 1), run(7, 0)]
        {
            assert!(!is_sound(&[refused]), "{refused:?}");
        }
        assert!(!is_sound(&vec![run(0, 1); MAX_RUNS + 1]));
        assert_eq!([start(0), start(1 << 40), start(u64::MAX)], [None, None, None]);
        assert_eq!([start(1), start(CHUNK + 1)], [Some(vec![run(0, 1)]), Some(vec![run(0, 2)])]);
    }

    proptest! {
        #[test]
        fn runs_of_any_kind(
            some in prop::collection::vec((any::<u32>(), prop_oneof![0..2000u32, any::<u32>()]), 0..9)
        ) {
            let raw = Raw { version: VERSION, unit: CHUNK, runs: some };
            if let Some(runs) = read(&serde_json::to_vec(&raw).unwrap()) {
                prop_assert!(records(&runs).len() <= MAX_PIECES);
            }
        }

        #[test]
        fn a_mangled_trace(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
            let mut text = write(&[Run { first: 7, count: 2 }, Run { first: 0, count: 4000 }]);
            for (at, byte) in changes {
                let at = at.index(text.len());
                text[at] = byte;
            }
            if let Some(runs) = read(&text) {
                prop_assert!(is_sound(&runs) && records(&runs).len() <= MAX_PIECES);
            }
        }

        #[test]
        fn texts_of_any_kind(text in prop::collection::vec(any::<u8>(), 0..80)) {
            prop_assert_eq!(read(&text), None);
        }
    }
}
