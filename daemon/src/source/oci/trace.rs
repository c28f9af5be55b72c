//! What is to be fetched first of a layer, as it is kept beside its image: JSON, `{"version": 1, "unit": 1048576, "runs":
//! [[first, count], ...]}`. A run is of pieces of the layer's segment, each a `unit` of bytes long.

use serde::{Deserialize, Serialize};

use super::fetch::CHUNK;
use crate::queue::wire::Run;

const VERSION: u32 = 1;
/// The longest trace in bytes.
pub const MAX_TRACE: u64 = 1 << 20;
/// More runs, or more pieces, are nothing that a start needs.
pub const MAX_RUNS: usize = 2000;
const MAX_PIECES: u64 = 1 << 16;

#[derive(Debug, Serialize, Deserialize)]
struct Raw {
    version: u32,
    unit: u64,
    runs: Vec<(u32, u32)>,
}

/// Pieces in order as runs.
#[must_use]
pub fn runs(records: &[u32]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for record in records {
        match runs.last_mut() {
            Some(run) if run.first.checked_add(run.count) == Some(*record) => run.count += 1,
            _ => runs.push(Run { first: *record, count: 1 }),
        }
    }
    runs
}

/// The pieces of runs, in order.
#[must_use]
pub fn records(runs: &[Run]) -> Vec<u32> {
    runs.iter().flat_map(|run| run.first..run.first.saturating_add(run.count)).collect()
}

#[must_use]
pub fn write(runs: &[Run]) -> Vec<u8> {
    let runs = runs.iter().take(MAX_RUNS).map(|run| (run.first, run.count)).collect();
    // numbers can be written
    serde_json::to_vec(&Raw { version: VERSION, unit: CHUNK, runs }).unwrap_or_default()
}

/// `None`: it is none that is understood.
#[must_use]
pub fn read(bytes: &[u8]) -> Option<Vec<Run>> {
    let Raw { version, unit, runs } = serde_json::from_slice(bytes).ok()?;
    let pieces: u64 = runs.iter().map(|(_, count)| u64::from(*count)).sum();
    let is_good = |(first, count): &(u32, u32)| *count > 0 && first.checked_add(*count).is_some();
    if (version, unit) != (VERSION, CHUNK) || runs.len() > MAX_RUNS || pieces > MAX_PIECES {
        return None;
    }
    runs.iter()
        .all(is_good)
        .then(|| runs.into_iter().map(|(first, count)| Run { first, count }).collect())
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

    proptest! {
        #[test]
        fn runs_of_any_kind(some in prop::collection::vec((any::<u32>(), any::<u32>()), 0..9)) {
            let raw = Raw { version: VERSION, unit: CHUNK, runs: some };
            if let Some(runs) = read(&serde_json::to_vec(&raw).unwrap()) {
                prop_assert!(records(&runs).len() as u64 <= MAX_PIECES);
            }
        }

        #[test]
        fn texts_of_any_kind(text in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = read(&text);
        }
    }
}
