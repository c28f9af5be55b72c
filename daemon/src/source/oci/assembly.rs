//! Chunks of a layer's segment that are put together from its spans.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;

use crate::object::ObjectId;
use crate::range::ByteRange;

/// A span, decoded.
#[derive(Debug, Clone)]
pub struct Piece {
    /// Its bytes in the segment.
    pub range: ByteRange,
    pub bytes: Bytes,
    /// It has not come with this request, or not with this try.
    pub from_memory: bool,
}

/// A chunk all of whose spans have come.
#[derive(Debug)]
pub struct Complete {
    pub key: ObjectId,
    pub place: ByteRange,
    pub content: Vec<u8>,
    /// A part of it is.
    pub from_memory: bool,
}

/// Chunks that are wanted, and what there is of them. Spans may come in any order. A copy costs little: it shares the bytes.
#[derive(Debug, Default, Clone)]
pub struct Assembly {
    open: Vec<Open>,
    /// By their numbers, as long as a chunk is open that needs them.
    pieces: BTreeMap<usize, Piece>,
}

#[derive(Debug, Clone)]
struct Open {
    key: ObjectId,
    place: ByteRange,
    spans: Range<usize>,
    /// How many of them have not come.
    missing: usize,
}

impl Assembly {
    /// Each chunk's key, its place in the segment and the numbers of the spans that cover it.
    pub fn new(wanted: impl IntoIterator<Item = (ObjectId, ByteRange, Range<usize>)>) -> Self {
        let open = wanted.into_iter().map(|(key, place, spans)| {
            let missing = spans.len();
            Open { key, place, spans, missing }
        });
        Self { open: open.collect(), pieces: BTreeMap::new() }
    }

    /// A chunk that is not complete.
    #[must_use]
    pub fn open(&self) -> Option<ObjectId> {
        self.open.first().map(|open| open.key)
    }

    /// Takes a span; gives the chunks that are complete with it.
    pub fn take(&mut self, number: usize, piece: Piece) -> Vec<Complete> {
        let mut is_needed = false;
        if self.pieces.contains_key(&number) {
            return Vec::new();
        }
        for open in self.open.iter_mut().filter(|open| open.spans.contains(&number)) {
            open.missing -= 1;
            is_needed = true;
        }
        if !is_needed {
            return Vec::new();
        }
        self.pieces.insert(number, piece);
        let complete: Vec<_> = self.open.extract_if(.., |open| open.missing == 0).collect();
        let chunks: Vec<_> = complete.into_iter().map(|open| self.put_together(open)).collect();
        if !chunks.is_empty() {
            let Self { open, pieces } = self;
            pieces.retain(|number, _| open.iter().any(|open| open.spans.contains(number)));
        }
        chunks
    }

    /// The first of these spans that a chunk needs which is not complete.
    #[must_use]
    pub fn first_needed(&self, spans: Range<usize>) -> Option<usize> {
        let open = self.open.iter().map(|open| open.spans.start.max(spans.start)..open.spans.end);
        open.filter(|needed| needed.start < needed.end.min(spans.end)).map(|of| of.start).min()
    }

    /// These spans have not come after all: what was taken of them is to come again.
    pub fn give_back(&mut self, spans: Range<usize>) {
        while let Some((number, _)) = self.pieces.range(spans.clone()).next() {
            let number = *number;
            self.pieces.remove(&number);
            for open in self.open.iter_mut().filter(|open| open.spans.contains(&number)) {
                open.missing += 1;
            }
        }
    }

    fn put_together(&self, chunk: Open) -> Complete {
        let Open { key, place, spans, .. } = chunk;
        let (mut content, mut from_memory) = (Vec::with_capacity(place.len() as usize), false);
        for piece in self.pieces.range(spans).map(|(_, piece)| piece) {
            let within = |at: u64| at.saturating_sub(piece.range.offset()) as usize;
            let part = within(place.offset())..within(place.end()).min(piece.bytes.len());
            content.extend_from_slice(piece.bytes.get(part).unwrap_or_default());
            from_memory |= piece.from_memory;
        }
        Complete { key, place, content, from_memory }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::source::oci::fetch::chunk_key;

    fn piece(content: &[u8], from: usize, to: usize) -> Piece {
        Piece {
            range: ByteRange::between(from as u64, to as u64),
            bytes: Bytes::copy_from_slice(&content[from..to]),
            from_memory: from % 2 == 1,
        }
    }

    /// A segment of these bytes, cut at these places into spans; of its chunks of `chunk` bytes those that are `wanted`.
    fn assembly(len: usize, cuts: &BTreeSet<usize>, chunk: usize, wanted: &[bool]) -> Assembly {
        let starts: Vec<_> = cuts.iter().copied().collect();
        Assembly::new(wanted.iter().enumerate().filter(|(_, wanted)| **wanted).map(|(no, _)| {
            let (from, to) = (no * chunk, len.min((no + 1) * chunk));
            let first = starts.partition_point(|start| *start <= from) - 1;
            let end = starts.partition_point(|start| *start < to);
            let place = ByteRange::between(from as u64, to as u64);
            (chunk_key(from as u64, &[]), place, first..end)
        }))
    }

    #[test]
    fn what_is_given_back_is_needed_again() {
        let content: Vec<u8> = (0..40).collect();
        let chunk = |place: Range<usize>| {
            let content = content[place.clone()].to_vec();
            let place = ByteRange::between(place.start as u64, place.end as u64);
            (chunk_key(place.offset(), &content), place)
        };
        // each span has five bytes
        let ((first, place), (second, next), (third, last)) =
            (chunk(0..8), chunk(8..14), chunk(30..40));
        let mut assembly =
            Assembly::new([(first, place, 0..2), (second, next, 1..3), (third, last, 6..8)]);
        let take = |assembly: &mut Assembly, number: usize| {
            let complete = assembly.take(number, piece(&content, 5 * number, 5 * number + 5));
            let right = |chunk: &Complete| chunk_key(chunk.place.offset(), &chunk.content);
            assert!(complete.iter().all(|chunk| right(chunk) == chunk.key));
            complete.into_iter().map(|chunk| chunk.key).collect::<Vec<_>>()
        };
        assert_eq!((assembly.first_needed(0..9), assembly.first_needed(3..9)), (Some(0), Some(6)));
        assert_eq!(assembly.first_needed(3..6), None);
        assert_eq!(take(&mut assembly, 0), []);
        assembly.give_back(1..9);
        assert_eq!(take(&mut assembly, 1), [first]);
        assert_eq!(assembly.first_needed(0..9), Some(1));
        assembly.give_back(1..9);
        assert_eq!(take(&mut assembly, 2), []);
        assert_eq!(take(&mut assembly, 1), [second]);
        assert_eq!(assembly.first_needed(0..9), Some(6));
        assert!(assembly.pieces.is_empty());
    }

    proptest! {
        /// Whatever comes, in whatever order and however often: each chunk that is wanted is given once, with the last of its
        /// spans, and is what the segment has there.
        #[test]
        fn spans_make_chunks_in_any_order(
            len in 1..500usize,
            cuts in proptest::collection::btree_set(0..500usize, 0..40),
            chunk in 1..120usize,
            wanted in proptest::collection::vec(any::<bool>(), 500),
            seed in any::<u64>(),
        ) {
            let content: Vec<u8> = (0..len).map(|at| (at * 7 + at / 256) as u8).collect();
            let mut cuts: BTreeSet<_> = cuts.into_iter().filter(|cut| *cut < len).collect();
            cuts.insert(0);
            let wanted = &wanted[..len.div_ceil(chunk)];
            let mut assembly = assembly(len, &cuts, chunk, wanted);
            let starts: Vec<_> = cuts.iter().copied().collect();
            let ends = starts[1..].iter().copied().chain([len]);
            let mut spans: Vec<_> = starts.iter().copied().zip(ends).enumerate().collect();
            // some of them twice, all in no order
            spans.extend_from_within(..spans.len() / 2);
            spans.sort_by_key(|(number, (from, _))| {
                (*number as u64 + 1).wrapping_mul(seed | 1).rotate_left(*from as u32 % 64)
            });
            let (mut came, mut given) = (BTreeSet::new(), BTreeSet::new());
            for (number, (from, to)) in spans {
                came.insert(number);
                for chunk in assembly.take(number, piece(&content, from, to)) {
                    let (from, to) = (chunk.place.offset() as usize, chunk.place.end() as usize);
                    prop_assert_eq!(&chunk.content[..], &content[from..to]);
                    let of = |number: usize| {
                        let end = starts.get(number + 1).copied().unwrap_or(len);
                        starts[number] < to && from < end
                    };
                    let needed: Vec<_> = (0..starts.len()).filter(|number| of(*number)).collect();
                    prop_assert!(needed.iter().all(|number| came.contains(number)));
                    prop_assert_eq!(chunk.from_memory, needed.iter().any(|n| starts[*n] % 2 == 1));
                    prop_assert!(given.insert(from), "given once");
                }
            }
            let wanted = wanted.iter().enumerate().filter(|(_, wanted)| **wanted);
            prop_assert_eq!(given, wanted.map(|(no, _)| no * chunk).collect::<BTreeSet<_>>());
            prop_assert!(assembly.open().is_none() && assembly.pieces.is_empty());
        }
    }

    #[test]
    fn a_span_that_is_missing_leaves_a_chunk_open() {
        let content = [1; 30];
        let mut assembly = assembly(30, &BTreeSet::from([0, 8, 12, 20]), 20, &[true, false]);
        assert!(assembly.take(0, piece(&content, 0, 8)).is_empty());
        assert!(assembly.take(2, piece(&content, 12, 20)).is_empty());
        assert!(assembly.open().is_some());
        // 20..30 is in no chunk that is wanted
        assert!(assembly.take(3, piece(&content, 20, 30)).is_empty());
        assert_eq!(assembly.pieces.len(), 2);
        assert_eq!(assembly.take(1, piece(&content, 8, 12)).len(), 1);
    }
}
