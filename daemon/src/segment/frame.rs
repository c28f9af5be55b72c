//! What an existence pack has around its entries.
//!
//! The entries of the repository's objects lie without a gap from [`FIRST_ENTRY`] on. Before the
//! first and behind the last are objects of our own whose content we choose, *fillers*: so the
//! first and the last blocks of the pack, which git reads when it opens it, hold nothing that has to
//! be fetched. All of the frame follows from the extent index.

use crate::object::{HashKind, ObjectId};
use crate::range::{BLOCK, ByteRange};
use crate::segment::SegmentKind;
use crate::segment::extents::Extents;
use crate::segment::pack;

/// Where the entry of the first object of the repository starts, in bytes: beyond what the kernel
/// reads ahead when git looks at the header (16 KiB, `mm/readahead.c:get_init_ra_size`), where it could
/// not be told to read no more than it is asked for.
pub const FIRST_ENTRY: u64 = 64 << 10;

/// What the tail has besides the rest of the block in which the last entry ends.
const TAIL: u64 = 32 << 10;

/// What [`pack::entry_len`] adds to a size between 2048 and 65535.
const ENTRY_OVERHEAD: usize = 14;

/// The bytes of an existence pack that belong to no extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// From the start of the pack up to [`FIRST_ENTRY`].
    pub head: Vec<u8>,
    /// From the end of the last extent up to the end of the pack: at least one whole block.
    pub tail: Vec<u8>,
    /// Where `tail` starts, in bytes.
    pub tail_at: u64,
    /// The objects that the frame adds, and where their entries start.
    pub objects: Vec<(ObjectId, u64)>,
    /// The checksum at the end.
    pub trailer: ObjectId,
}

impl Frame {
    /// The frame around entries that end at `end`; `keys` are their objects in the order of the
    /// entries, none of them the empty blob (that one is part of the frame).
    #[must_use]
    pub fn new(hash: HashKind, keys: impl IntoIterator<Item = ObjectId>, end: u64) -> Self {
        let mut count = 0;
        let mut head = pack::header(0).to_vec();
        let mut objects = Vec::new();

        push_blob(hash, &mut head, 0, b"", &mut objects);
        let room = usize::try_from(FIRST_ENTRY).unwrap_or(usize::MAX) - head.len();
        push_blob(hash, &mut head, 0, &filler(b"first", room), &mut objects);

        let mut tail = Vec::new();
        let size = end.next_multiple_of(BLOCK) + TAIL;
        let room = usize::try_from(size - end).unwrap_or(usize::MAX) - hash.id_len();
        let mut last = Vec::new();
        push_blob(hash, &mut tail, end, &filler(b"last", room), &mut last);

        let all = objects.iter().map(|(key, _)| *key).chain(keys);
        let all = all.chain(last.iter().map(|(key, _)| *key)).inspect(|_| count += 1);
        let trailer = pack::trailer(hash, all);
        head[..pack::HEADER_LEN as usize].copy_from_slice(&pack::header(count));
        tail.extend_from_slice(trailer.as_bytes());
        objects.extend(last);
        Self { head, tail, tail_at: end, objects, trailer }
    }

    /// The frame of a pack segment; `None` for any other.
    #[must_use]
    pub fn of(extents: &Extents) -> Option<Self> {
        if extents.kind() != SegmentKind::Pack {
            return None;
        }
        let keys = extents.iter().map(|extent| extent.key);
        Some(Self::new(extents.hash(), keys, entries_end(extents)))
    }

    /// Does the frame of a pack segment have any of these bytes? A cheap question: making a frame
    /// takes a hash of all ids.
    #[must_use]
    pub fn is_in(extents: &Extents, range: ByteRange) -> bool {
        let head = range.offset() < FIRST_ENTRY || range.end() > entries_end(extents);
        extents.kind() == SegmentKind::Pack && !range.is_empty() && head
    }

    /// The size of the pack in bytes, a multiple of [`BLOCK`].
    #[must_use]
    pub fn size(&self) -> u64 {
        self.tail_at + self.tail.len() as u64
    }

    /// Puts what the frame has of the bytes from `offset` on into `buffer`, which is to become
    /// these bytes of the pack. The rest of it is left alone.
    pub fn copy_to(&self, offset: u64, buffer: &mut [u8]) {
        let wanted = ByteRange::new(offset, buffer.len() as u64);
        for (at, bytes) in [(0, &self.head), (self.tail_at, &self.tail)] {
            let common = ByteRange::between(
                wanted.offset().max(at),
                wanted.end().min(at + bytes.len() as u64),
            );
            if !common.is_empty() {
                let from = (common.offset() - at) as usize;
                let to = (common.offset() - wanted.offset()) as usize;
                let len = common.len() as usize;
                buffer[to..to + len].copy_from_slice(&bytes[from..from + len]);
            }
        }
    }
}

/// Where the last entry ends.
fn entries_end(extents: &Extents) -> u64 {
    let last = extents.len().checked_sub(1).and_then(|last| extents.get(last));
    last.map_or(FIRST_ENTRY, |extent| extent.range.end())
}

/// Appends the entry of a blob; `start` is where `out` starts in the pack.
fn push_blob(
    hash: HashKind,
    out: &mut Vec<u8>,
    start: u64,
    content: &[u8],
    objects: &mut Vec<(ObjectId, u64)>,
) {
    objects.push((ObjectId::of_blob(hash, content), start + out.len() as u64));
    // At most 65535 bytes, so one stored block (RFC 1951, 3.2.4).
    out.extend_from_slice(&pack::entry_header(content.len() as u64));
    #[expect(clippy::cast_possible_truncation, reason = "at most 65535")]
    let [low, high] = (content.len() as u16).to_le_bytes();
    out.extend_from_slice(&[0x78, 0x01, 1, low, high, !low, !high]);
    out.extend_from_slice(content);
    out.extend_from_slice(&adler2::adler32_slice(content).to_be_bytes());
}

/// Content whose entry is `room` bytes long; `room` is between 2062 and 65549.
fn filler(which: &[u8], room: usize) -> Vec<u8> {
    let line = [b"Not of the repository: fills the ", which, b" block of the pack.\n"].concat();
    line.into_iter().cycle().take(room - ENTRY_OVERHEAD).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_the_first_and_the_last_blocks() {
        let key = ObjectId::of_blob(HashKind::Sha1, b"x");
        for hash in [HashKind::Sha1, HashKind::Sha256] {
            for end in (FIRST_ENTRY..=FIRST_ENTRY + 3 * BLOCK).step_by(7).chain([
                FIRST_ENTRY + 8191,
                FIRST_ENTRY + 8192,
                FIRST_ENTRY + 8193,
            ]) {
                let frame = Frame::new(hash, [key], end);
                assert_eq!(frame.head.len() as u64, FIRST_ENTRY);
                assert_eq!(frame.size() % BLOCK, 0, "{end}");
                assert!(frame.tail.len() as u64 >= BLOCK, "{end}");
                assert!(frame.tail.ends_with(frame.trailer.as_bytes()));
                assert_eq!(frame.head[..12], pack::header(4));
                assert_eq!(frame.objects.len(), 3);
            }
        }
    }

    #[test]
    fn copies_its_part_of_a_range() {
        let end = FIRST_ENTRY as usize + 904;
        let frame = Frame::new(HashKind::Sha1, [], end as u64);
        let mut whole = vec![0xee; frame.size() as usize];
        frame.copy_to(0, &mut whole);
        assert_eq!(whole[..FIRST_ENTRY as usize], frame.head);
        assert!(whole[FIRST_ENTRY as usize..end].iter().all(|b| *b == 0xee));
        assert_eq!(whole[end..], frame.tail);
        let first = FIRST_ENTRY as usize;
        for (offset, len) in
            [(0, 1), (first - 96, 200), (first, 4096), (end - 100, 101), (whole.len() - 9, 9)]
        {
            let mut part = vec![0xee; len];
            frame.copy_to(offset as u64, &mut part);
            assert_eq!(part, whole[offset..offset + len], "{offset}+{len}");
        }
    }
}
