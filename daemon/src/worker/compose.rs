//! Makes blocks of an existence pack out of the objects that its entries repeat.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use super::fill;
use crate::range::ByteRange;
use crate::segment::extents::Extents;
use crate::segment::frame::Frame;
use crate::segment::pack;

/// The most bytes made at a time; a multiple of the block size.
const PIECE: u64 = 1 << 20;

/// What is needed to make some blocks of a pack. All objects are there.
#[derive(Debug)]
pub struct Composition {
    pub pack: Arc<File>,
    /// The extents of the pack.
    pub extents: Arc<Extents>,
    /// Its frame, once one has been made.
    pub frame: Arc<OnceLock<Frame>>,
    /// What is to be written: whole blocks within the pack.
    pub holes: Vec<ByteRange>,
    /// For each entry that has a byte in a hole, in order: its record, and where its content is.
    pub contents: Vec<(usize, Arc<File>, u64)>,
}

impl Composition {
    /// Writes the blocks. Reads and writes files, so it belongs on a thread of its own.
    pub fn write(&self) -> io::Result<()> {
        for hole in &self.holes {
            let mut at = hole.offset();
            while at < hole.end() {
                let piece = ByteRange::new(at, PIECE.min(hole.end() - at));
                fill::write(&self.pack, &self.make(piece)?, at)?;
                at = piece.end();
            }
        }
        Ok(())
    }

    fn frame(&self) -> Option<&Frame> {
        if self.frame.get().is_none() {
            // two at once make the same
            self.frame.set(Frame::of(&self.extents)?).ok();
        }
        self.frame.get()
    }

    fn make(&self, range: ByteRange) -> io::Result<Vec<u8>> {
        let mut out = vec![0; usize::try_from(range.len()).map_err(io::Error::other)?];
        let mut put = |at: u64, bytes: &[u8]| {
            let piece = ByteRange::new(at, bytes.len() as u64);
            if piece.overlaps(range) {
                let common =
                    ByteRange::between(at.max(range.offset()), piece.end().min(range.end()));
                let (from, to) =
                    ((common.offset() - at) as usize, common.offset() - range.offset());
                let len = common.len() as usize;
                out[to as usize..to as usize + len].copy_from_slice(&bytes[from..from + len]);
            }
        };
        for (record, file, offset) in &self.contents {
            let Some(entry) = self.extents.get(*record) else { continue };
            if !entry.range.overlaps(range) {
                continue;
            }
            let start = range.offset().max(entry.range.offset());
            let end = range.end().min(entry.range.end());
            let part = ByteRange::between(start - entry.range.offset(), end - entry.range.offset());
            let bytes = pack::compose(entry.size, entry.range.len(), part, |at, buffer| {
                file.read_exact_at(buffer, offset + at)
            })?;
            put(start, &bytes);
        }
        // the last entry ends within a block whose rest is the frame's
        if Frame::is_in(&self.extents, range)
            && let Some(frame) = self.frame()
        {
            frame.copy_to(range.offset(), &mut out);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SegmentId;
    use crate::object::{HashKind, ObjectId};
    use crate::range::BLOCK;
    use crate::segment::SegmentKind;
    use crate::segment::extents::ExtentsWriter;
    use crate::segment::frame::FIRST_ENTRY;

    #[test]
    fn any_blocks_in_any_order_make_the_pack() {
        let sizes = [1u64, 5, 3000, 10, 70_000, 2, 4096, 200_000];
        let data = Arc::new(tempfile::tempfile().unwrap());
        let mut writer = ExtentsWriter::new(SegmentId(2), SegmentKind::Pack, HashKind::Sha1);
        let mut expected = vec![0; FIRST_ENTRY as usize];
        let mut contents = Vec::new();
        let (mut home, mut keys) = (0, Vec::new());
        for (n, size) in sizes.iter().enumerate() {
            let content: Vec<u8> = (0..*size).map(|at| (at % 247) as u8 ^ n as u8).collect();
            data.write_all_at(&content, home).unwrap();
            contents.push((n, Arc::clone(&data), home));
            home += size.next_multiple_of(BLOCK);
            let key = ObjectId::of_blob(HashKind::Sha1, &[n as u8]);
            keys.push(key);
            // as they were, and as they are laid out now
            let len = [pack::entry_len, pack::padded_len][usize::from(n > 3)](*size);
            let range = ByteRange::new(expected.len() as u64, len);
            writer.push_entry(range, *size, key, SegmentId(1), n as u32);
            let whole = ByteRange::new(0, u64::MAX);
            let entry = pack::compose(*size, len, whole, |at, buffer| {
                let at = at as usize;
                buffer.copy_from_slice(&content[at..at + buffer.len()]);
                Ok(())
            });
            expected.extend(entry.unwrap());
        }
        let frame = Frame::new(HashKind::Sha1, keys, expected.len() as u64);
        let size = frame.size();
        expected.resize(size as usize, 0);
        frame.copy_to(0, &mut expected);
        let mut index = Vec::new();
        writer.write(&mut index, size).unwrap();
        let extents = Arc::new(Extents::read(&index[..]).unwrap());

        let pack = Arc::new(tempfile::tempfile().unwrap());
        pack.set_len(size).unwrap();
        let made_frame = Arc::default();
        let blocks: Vec<u64> = (0..size / BLOCK).collect();
        for group in blocks.chunks(7).rev() {
            let hole = ByteRange::new(group[0] * BLOCK, group.len() as u64 * BLOCK);
            let records = extents.overlapping(hole);
            let contents = contents[records].to_vec();
            let (pack, extents) = (Arc::clone(&pack), Arc::clone(&extents));
            let frame: Arc<OnceLock<Frame>> = Arc::clone(&made_frame);
            Composition { pack, extents, frame, holes: vec![hole], contents }.write().unwrap();
        }
        let mut made = vec![0; size as usize];
        pack.read_exact_at(&mut made, 0).unwrap();
        assert!(made == expected);
        assert_eq!(made_frame.get(), Some(&frame), "kept for the next time");
    }
}
