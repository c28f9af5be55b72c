//! What is to be fetched first of a layer, as it is kept beside its image: JSON, `{"version": 1, "unit": 262144, "runs":
//! [[first, count], ...], "places": [place, ...]}`. A run is of pieces of the layer's segment, each a `unit` of bytes long: a
//! [`CHUNK`], or several in traces of an earlier time. Its place is how many pieces of all layers of the image were read
//! before it; traces of an earlier time don't say that.

use serde::{Deserialize, Serialize};

use super::fetch::CHUNK;
use crate::queue::wire::Run;

const VERSION: u32 = 1;
/// The longest trace in bytes.
pub const MAX_TRACE: u64 = 128 << 10;
/// More runs, or more pieces, are nothing that a start needs.
const MAX_RUNS: usize = 2000;
const MAX_PIECES: usize = 16384;

#[derive(Debug, Serialize, Deserialize)]
struct Raw {
    version: u32,
    unit: u64,
    runs: Vec<(u32, u32)>,
    #[serde(default)]
    places: Vec<u32>,
}

/// Chunks of a layer's segment that were read one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traced {
    pub run: Run,
    /// In the trace of all layers of the image, counted in chunks.
    pub place: u32,
}

/// Chunks in order, each with its place, as runs: as many of them as a trace may have.
#[must_use]
pub fn runs(chunks: &[(u32, u32)]) -> Vec<Traced> {
    let mut runs: Vec<Traced> = Vec::new();
    for (chunk, place) in chunks.iter().take(MAX_PIECES) {
        if !runs.last_mut().is_some_and(|traced| traced.run.take(*chunk)) {
            runs.push(Traced { run: Run::one(*chunk), place: *place });
        }
    }
    runs.truncate(MAX_RUNS);
    runs
}

/// So many bytes at a segment's start. `None`: that is nothing, or more than a trace may have.
#[must_use]
pub fn start(bytes: u64) -> Option<Vec<Traced>> {
    let count = u32::try_from(bytes.div_ceil(CHUNK)).ok()?;
    let runs = vec![Traced { run: Run { first: 0, count }, place: 0 }];
    is_sound(&runs).then_some(runs)
}

/// Whether runs that somebody else has made are a trace: few enough, and none of them empty or beyond all segments.
#[must_use]
pub fn is_sound(runs: &[Traced]) -> bool {
    let chunks: u64 = runs.iter().map(|traced| u64::from(traced.run.count)).sum();
    let is_run = |run: Run| run.count > 0 && run.first.checked_add(run.count).is_some();
    runs.len() <= MAX_RUNS
        && chunks <= MAX_PIECES as u64
        && runs.iter().all(|traced| is_run(traced.run))
}

#[must_use]
pub fn write(traced: &[Traced]) -> Vec<u8> {
    let runs = traced.iter().map(|traced| (traced.run.first, traced.run.count)).collect();
    let places = traced.iter().map(|traced| traced.place).collect();
    // numbers can be written
    serde_json::to_vec(&Raw { version: VERSION, unit: CHUNK, runs, places }).unwrap_or_default()
}

/// `None`: it is none that is understood.
#[must_use]
pub fn read(bytes: &[u8]) -> Option<Vec<Traced>> {
    let Raw { version, unit, runs, places } = serde_json::from_slice(bytes).ok()?;
    if version != VERSION || !unit.is_multiple_of(CHUNK) {
        return None;
    }
    let chunks = |pieces: u32| u32::try_from(u64::from(pieces).checked_mul(unit / CHUNK)?).ok();
    let places = places.into_iter().chain(std::iter::repeat(0));
    let traced = runs.into_iter().zip(places).map(|((first, count), place)| {
        Some(Traced { run: Run { first: chunks(first)?, count: chunks(count)? }, place })
    });
    let traced = traced.collect::<Option<Vec<_>>>()?;
    is_sound(&traced).then_some(traced)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn traced(first: u32, count: u32) -> Traced {
        Traced { run: Run { first, count }, place: 0 }
    }

    fn chunks_of(traced: &[Traced]) -> Vec<u32> {
        traced.iter().flat_map(|traced| traced.run.range()).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let order = [(7, 0), (8, 1), (9, 5), (3, 6), (4, 7), (0, 20), (100, 21)];
        let found = runs(&order);
        let places: Vec<_> = found.iter().map(|traced| traced.place).collect();
        assert_eq!(places, [0, 6, 20, 21]);
        assert_eq!(chunks_of(&found), order.map(|(chunk, _)| chunk));
        assert_eq!(read(&write(&found)).unwrap(), found);
        assert_eq!(read(b"{\"version\":2,\"unit\":262144,\"runs\":[]}"), None);
    }

    #[test]
    fn traces_of_an_earlier_time_are_read() {
        let text = |unit: u64, runs: &str| {
            format!("{{\"version\":1,\"unit\":{unit},\"runs\":{runs}}}").into_bytes()
        };
        let found = read(&text(4 * CHUNK, "[[3,2],[0,1]]")).unwrap();
        assert_eq!(found, [traced(12, 8), traced(0, 4)]);
        assert_eq!(read(&text(CHUNK, "[[3,2]]")).unwrap(), [traced(3, 2)]);
        for unit in [0, 1, CHUNK / 2, CHUNK + 1, CHUNK << 40, 1 << 63] {
            assert_eq!(read(&text(unit, "[[3,2]]")), None, "{unit}");
        }
        assert_eq!(read(&text(4 * CHUNK, "[[2000000000,1]]")), None);
    }

    #[test]
    fn what_is_too_long_is_cut_and_can_be_read() {
        for step in [1, 2] {
            let long: Vec<_> = (0..100_000).map(|n| (n * step, u32::MAX - 1)).collect();
            let written = write(&runs(&long));
            assert!(written.len() as u64 <= MAX_TRACE);
            let read = chunks_of(&read(&written).unwrap());
            let long: Vec<_> = long.into_iter().map(|(chunk, _)| chunk).collect();
            assert!(read.len() >= MAX_RUNS && long.starts_with(&read));
        }
        assert!(is_sound(&[traced(0, MAX_PIECES as u32)]));
        for (first, count) in [(0, u32::MAX), (0, MAX_PIECES as u32 + 1), (u32::MAX, 1), (7, 0)] {
            assert!(!is_sound(&[traced(first, count)]), "{first}, {count}");
        }
        assert!(!is_sound(&vec![traced(0, 1); MAX_RUNS + 1]));
        assert_eq!([start(0), start(1 << 40), start(u64::MAX)], [None, None, None]);
        let starts = [start(1), start(CHUNK + 1)];
        assert_eq!(starts, [Some(vec![traced(0, 1)]), Some(vec![traced(0, 2)])]);
    }

    proptest! {
        #[test]
        fn runs_of_any_kind(
            some in prop::collection::vec((any::<u32>(), prop_oneof![0..2000u32, any::<u32>()]), 0..9),
            places in prop::collection::vec(any::<u32>(), 0..12),
        ) {
            let raw = Raw { version: VERSION, unit: CHUNK, runs: some, places };
            if let Some(runs) = read(&serde_json::to_vec(&raw).unwrap()) {
                prop_assert!(chunks_of(&runs).len() <= MAX_PIECES);
            }
        }

        #[test]
        fn a_mangled_trace(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
            let mut text = write(&[traced(7, 2), traced(0, 16_000)]);
            for (at, byte) in changes {
                let at = at.index(text.len());
                text[at] = byte;
            }
            if let Some(runs) = read(&text) {
                prop_assert!(is_sound(&runs) && chunks_of(&runs).len() <= MAX_PIECES);
            }
        }

        #[test]
        fn texts_of_any_kind(text in prop::collection::vec(any::<u8>(), 0..80)) {
            prop_assert_eq!(read(&text), None);
        }
    }
}
