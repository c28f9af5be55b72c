//! What the background fill asks for next: what is behind the readers, then the rest.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::time::Duration;

use crate::queue::wire::Run;
use crate::source::oci::fetch::CHUNK;

/// Chunks in a piece, which is what is asked for at a time: a reader does not wait long behind a few of them.
const CHUNKS: u32 = 16;
const PIECE: u64 = CHUNKS as u64 * CHUNK;

/// The records of a piece. The last one of a segment may have less.
pub fn run(piece: u32) -> Run {
    Run { first: piece.saturating_mul(CHUNKS), count: CHUNKS }
}

/// Which layer comes first, the greatest: the one that was read last; of those that nobody has read, the first.
pub fn rank(read: Option<Duration>, place: usize) -> impl Ord {
    (read, Reverse(place))
}

/// The pieces of a segment that have not been asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pieces {
    left: BTreeSet<u32>,
    /// They did not come: tried again behind the others.
    failed: BTreeSet<u32>,
}

impl Pieces {
    /// All of a segment of so many bytes.
    pub fn new(size: u64) -> Self {
        let count = u32::try_from(size.div_ceil(PIECE)).unwrap_or(u32::MAX);
        Self { left: (0..count).collect(), failed: BTreeSet::new() }
    }

    pub fn is_empty(&self) -> bool {
        self.left.is_empty() && self.failed.is_empty()
    }

    /// The next one where readers are at `offset`: theirs, or one behind it; then from the start.
    pub fn take(&mut self, offset: u64) -> Option<u32> {
        if self.left.is_empty() {
            std::mem::swap(&mut self.left, &mut self.failed);
        }
        let at = u32::try_from(offset / PIECE).unwrap_or(u32::MAX);
        let next = self.left.range(at..).next().or_else(|| self.left.first()).copied()?;
        self.left.remove(&next);
        Some(next)
    }

    /// This one has not come.
    pub fn put_back(&mut self, piece: u32) {
        self.failed.insert(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn pieces_cover_a_segment() {
        for (size, pieces) in [(0, 0), (1, 1), (4 * MIB, 1), (4 * MIB + 1, 2), (100 * MIB, 25)] {
            let mut of_size = Pieces::new(size);
            let taken: Vec<_> = std::iter::from_fn(|| of_size.take(0)).map(run).collect();
            assert_eq!(taken.len(), pieces);
            let mut end = 0;
            for run in taken {
                assert_eq!(run.first, end);
                end += run.count;
            }
            assert!(u64::from(end) * CHUNK >= size);
        }
    }

    #[test]
    fn readers_are_followed() {
        let mut pieces = Pieces::new(32 * MIB);
        assert_eq!(pieces.take(0), Some(0));
        assert_eq!(pieces.take(17 * MIB), Some(4));
        assert_eq!(pieces.take(17 * MIB), Some(5));
        // elsewhere now
        assert_eq!(pieces.take(8 * MIB), Some(2));
        assert_eq!(pieces.take(24 * MIB), Some(6));
        // at the end
        assert_eq!(pieces.take(u64::MAX), Some(1));
        assert_eq!(pieces.take(30 * MIB), Some(7));
        assert_eq!(pieces.take(30 * MIB), Some(3));
        assert!(pieces.is_empty());
        assert_eq!(pieces.take(0), None);
    }

    #[test]
    fn what_failed_is_the_last() {
        let mut pieces = Pieces::new(12 * MIB);
        assert_eq!(pieces.take(0), Some(0));
        pieces.put_back(0);
        assert_eq!((pieces.take(0), pieces.take(0)), (Some(1), Some(2)));
        assert!(!pieces.is_empty());
        assert_eq!((pieces.take(0), pieces.take(0)), (Some(0), None));
    }

    #[test]
    fn the_layer_that_was_read_last_is_the_first() {
        let at = |ms| Some(Duration::from_millis(ms));
        let layers = [None, at(5), None, at(9)];
        let mut order = [0, 1, 2, 3];
        order.sort_by_key(|place| Reverse(rank(layers[*place], *place)));
        assert_eq!(order, [3, 1, 0, 2]);
    }
}
