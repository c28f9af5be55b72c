//! The extent index of a segment: which object lies where.
//!
//! A file of its own beside the segment, written once and never changed: a header of
//! 48 bytes, records of one length sorted by offset, then the paths that the records
//! name. All numbers are little-endian. The header carries a CRC-32 of all that follows it.

use std::io::{self, Read, Write};
use std::ops::Range;

use thiserror::Error;

use super::SegmentKind;
use crate::ids::SegmentId;
use crate::object::{HashKind, ObjectId};
use crate::range::ByteRange;

const MAGIC: &[u8; 8] = b"hydrext1";
const HEADER_LEN: usize = 48;
/// offset, size, two or three numbers (see [`Place`]), then the object's id.
const FIXED_LEN: usize = 8 + 8 + 12;

/// Which file an object belongs to, or which object an entry of a pack repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a [`SegmentKind::Data`] segment.
    File {
        /// The number of the directory, the same for all files of one directory in one tree.
        directory: u32,
        /// [`name_hash`] of the last component of the path.
        name: u32,
        /// Where the path starts in the index's table of paths.
        path: u32,
    },
    /// In a [`SegmentKind::Pack`] segment: record `record` of the data segment `segment`.
    Repeats { segment: SegmentId, record: u32 },
}

/// One object's place in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// In a data segment: the object's content. In a pack: the whole entry, header and all.
    pub range: ByteRange,
    /// The length of the object's content in bytes.
    pub size: u64,
    pub key: ObjectId,
    pub place: Place,
}

/// An extent index that can't be used.
#[derive(Debug, Error)]
pub enum ExtentsError {
    #[error("can't read the extent index")]
    Io(#[from] io::Error),
    #[error("the extent index is damaged: {0}; remove the tree and clone it again")]
    Damaged(&'static str),
}

/// A hash of a file's name, for [`Place::File`]: FNV-1a, 32 bits.
#[must_use]
pub fn name_hash(name: &[u8]) -> u32 {
    name.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Collects the extents of one segment and writes them out.
#[derive(Debug)]
pub struct ExtentsWriter {
    segment: SegmentId,
    kind: SegmentKind,
    hash: HashKind,
    records: Vec<u8>,
    paths: Vec<u8>,
    count: u32,
    end: u64,
}

impl ExtentsWriter {
    #[must_use]
    pub fn new(segment: SegmentId, kind: SegmentKind, hash: HashKind) -> Self {
        Self { segment, kind, hash, records: Vec::new(), paths: Vec::new(), count: 0, end: 0 }
    }

    /// The number of extents so far, and so the record number of the next.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Adds a file's object to a data segment. Extents come in the order of their offsets and don't
    /// overlap.
    pub fn push_file(
        &mut self,
        offset: u64,
        size: u64,
        key: ObjectId,
        directory: u32,
        path: &[u8],
    ) {
        let name = path.rsplit(|b| *b == b'/').next().unwrap_or(path);
        let at = u32::try_from(self.paths.len()).unwrap_or(u32::MAX);
        self.paths.extend_from_slice(path);
        self.paths.push(0);
        self.push(ByteRange::new(offset, size), size, &key, [directory, name_hash(name), at]);
    }

    /// Adds an entry to a pack segment: `range` is the whole entry, `size` the object's.
    pub fn push_entry(
        &mut self,
        range: ByteRange,
        size: u64,
        key: ObjectId,
        home: SegmentId,
        record: u32,
    ) {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves of the number")]
        let home = [home.0 as u32, (home.0 >> 32) as u32];
        self.push(range, size, &key, [home[0], home[1], record]);
    }

    fn push(&mut self, range: ByteRange, size: u64, key: &ObjectId, numbers: [u32; 3]) {
        debug_assert!(range.offset() >= self.end, "extents come in the order of their offsets");
        debug_assert_eq!(key.kind(), self.hash);
        // In a pack the entry's end is the next entry's start, or the trailer: kept as length.
        let len = match self.kind {
            SegmentKind::Data => size,
            SegmentKind::Pack => range.len(),
        };
        self.records.extend_from_slice(&range.offset().to_le_bytes());
        self.records.extend_from_slice(&len.to_le_bytes());
        for number in numbers {
            self.records.extend_from_slice(&number.to_le_bytes());
        }
        if self.kind == SegmentKind::Pack {
            self.records.extend_from_slice(&size.to_le_bytes());
        }
        self.records.extend_from_slice(key.as_bytes());
        self.count += 1;
        self.end = range.end();
    }

    /// Writes the index; `size` is the size of the segment in bytes. The caller makes it durable.
    pub fn write(&self, mut out: impl Write, size: u64) -> io::Result<()> {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&self.records);
        crc.update(&self.paths);
        let mut header = Vec::with_capacity(HEADER_LEN);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&self.segment.0.to_le_bytes());
        header.extend_from_slice(&size.to_le_bytes());
        header.extend_from_slice(&(self.paths.len() as u64).to_le_bytes());
        header.extend_from_slice(&self.count.to_le_bytes());
        header.push(u8::from(self.kind == SegmentKind::Pack));
        header.push(u8::from(self.hash == HashKind::Sha256));
        header.extend_from_slice(&[0; 6]);
        header.extend_from_slice(&crc.finalize().to_le_bytes());
        debug_assert_eq!(header.len(), HEADER_LEN);
        out.write_all(&header)?;
        out.write_all(&self.records)?;
        out.write_all(&self.paths)
    }
}

/// What the header of an index says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub segment: SegmentId,
    pub kind: SegmentKind,
    pub hash: HashKind,
    /// The size of the segment in bytes.
    pub size: u64,
    /// The number of extents.
    pub count: u32,
    paths_len: u64,
    crc: u32,
}

impl Head {
    /// Reads the header alone, the first bytes of an index.
    pub fn read(mut input: impl Read) -> Result<Self, ExtentsError> {
        let mut header = [0; HEADER_LEN];
        input.read_exact(&mut header)?;
        let u64_at =
            |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap_or_default());
        let u32_at =
            |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap_or_default());
        if &header[..8] != MAGIC {
            return Err(ExtentsError::Damaged("not an extent index"));
        }
        Ok(Self {
            segment: SegmentId(u64_at(8)),
            kind: if header[36] == 1 { SegmentKind::Pack } else { SegmentKind::Data },
            hash: if header[37] == 1 { HashKind::Sha256 } else { HashKind::Sha1 },
            size: u64_at(16),
            count: u32_at(32),
            paths_len: u64_at(24),
            crc: u32_at(44),
        })
    }
}

/// The extents of one segment, in memory.
#[derive(Debug)]
pub struct Extents {
    segment: SegmentId,
    kind: SegmentKind,
    hash: HashKind,
    size: u64,
    count: usize,
    /// Records, then paths.
    bytes: Vec<u8>,
}

impl Extents {
    /// Reads an index, whole: at most about 1 MiB for each [`super::MAX_PACKED_SIZE`] of content,
    /// more for a pack.
    pub fn read(mut input: impl Read) -> Result<Self, ExtentsError> {
        let head = Head::read(&mut input)?;
        let mut index = Self {
            segment: head.segment,
            kind: head.kind,
            hash: head.hash,
            size: head.size,
            count: head.count as usize,
            bytes: Vec::new(),
        };
        let len = (index.count as u64)
            .checked_mul(index.record_len() as u64)
            .and_then(|records| records.checked_add(head.paths_len))
            .ok_or(ExtentsError::Damaged("its lengths are too large"))?;
        input.take(len).read_to_end(&mut index.bytes)?;
        if index.bytes.len() as u64 != len {
            return Err(ExtentsError::Damaged("it ends too early"));
        }
        if crc32fast::hash(&index.bytes) != head.crc {
            return Err(ExtentsError::Damaged("its checksum is wrong"));
        }
        Ok(index)
    }

    fn record_len(&self) -> usize {
        let pack = if self.kind == SegmentKind::Pack { 8 } else { 0 };
        FIXED_LEN + pack + self.hash.id_len()
    }

    #[must_use]
    pub fn segment(&self) -> SegmentId {
        self.segment
    }

    #[must_use]
    pub fn kind(&self) -> SegmentKind {
        self.kind
    }

    #[must_use]
    pub fn hash(&self) -> HashKind {
        self.hash
    }

    /// The size of the segment in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The number of extents.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Extent `record`; `None` past the last.
    #[must_use]
    pub fn get(&self, record: usize) -> Option<Extent> {
        if record >= self.count {
            return None;
        }
        let at = record * self.record_len();
        let bytes = self.bytes.get(at..at + self.record_len())?;
        let u64_at =
            |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        let u32_at =
            |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or_default());
        let range = ByteRange::new(u64_at(0), u64_at(8));
        let numbers = [u32_at(16), u32_at(20), u32_at(24)];
        let (size, place, key) = match self.kind {
            SegmentKind::Data => {
                let [directory, name, path] = numbers;
                (range.len(), Place::File { directory, name, path }, &bytes[FIXED_LEN..])
            }
            SegmentKind::Pack => {
                let segment = SegmentId(u64::from(numbers[0]) | u64::from(numbers[1]) << 32);
                let place = Place::Repeats { segment, record: numbers[2] };
                (u64_at(FIXED_LEN), place, &bytes[FIXED_LEN + 8..])
            }
        };
        Some(Extent { range, size, key: ObjectId::from_bytes(key).ok()?, place })
    }

    fn offset(&self, record: usize) -> u64 {
        let at = record * self.record_len();
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap_or_default())
    }

    /// The records that have a byte in the blocks of `range`, in order. Of a data segment these are
    /// the objects that must be there before a reader may see the range.
    #[must_use]
    pub fn overlapping(&self, range: ByteRange) -> Range<usize> {
        let range = range.to_blocks();
        let mut first = self.first_from(range.offset());
        if first > 0 && self.get(first - 1).is_some_and(|e| e.range.end() > range.offset()) {
            first -= 1;
        }
        first..self.first_from(range.end()).max(first)
    }

    /// The first record that starts at `offset` or after it.
    fn first_from(&self, offset: u64) -> usize {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low.midpoint(high);
            if self.offset(middle) < offset {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }

    /// The path of a file in the tree that first had it; empty for an entry of a pack.
    #[must_use]
    pub fn path(&self, extent: &Extent) -> &[u8] {
        let Place::File { path, .. } = extent.place else { return &[] };
        let paths = &self.bytes[self.count * self.record_len()..];
        let tail = paths.get(path as usize..).unwrap_or_default();
        tail.split(|b| *b == 0).next().unwrap_or_default()
    }

    /// All extents, in the order of their offsets.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        (0..self.count).filter_map(|record| self.get(record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> ObjectId {
        ObjectId::of_blob(HashKind::Sha1, &[n])
    }

    #[test]
    fn data_round_trip_and_lookup() {
        let mut writer = ExtentsWriter::new(SegmentId(7), SegmentKind::Data, HashKind::Sha1);
        writer.push_file(0, 5000, key(1), 0, b"a/b.c");
        writer.push_file(8192, 1, key(2), 0, b"a/Kconfig");
        writer.push_file(12288, 4096, key(3), 1, b"Kconfig");
        let mut bytes = Vec::new();
        writer.write(&mut bytes, 16384).unwrap();
        let extents = Extents::read(&bytes[..]).unwrap();
        assert_eq!((extents.len(), extents.size(), extents.segment()), (3, 16384, SegmentId(7)));
        assert_eq!(extents.overlapping(ByteRange::new(4096, 4096)), 0..1);
        assert_eq!(extents.overlapping(ByteRange::new(4096, 4097)), 0..2);
        assert_eq!(extents.overlapping(ByteRange::new(12288, 1)), 2..3);
        assert_eq!(extents.overlapping(ByteRange::new(16384, 4096)), 3..3);
        let extent = extents.get(1).unwrap();
        assert_eq!((extent.key, extents.path(&extent)), (key(2), &b"a/Kconfig"[..]));
        let Place::File { name, .. } = extent.place else { panic!("a file") };
        assert_eq!(name, name_hash(b"Kconfig"));

        bytes[60] ^= 1;
        assert!(matches!(Extents::read(&bytes[..]), Err(ExtentsError::Damaged(_))));
    }

    /// Indexes are never written anew, so all that was ever written is to be read. This is one of version 1.
    #[test]
    fn version_1_is_read_for_ever() {
        const WRITTEN: &str = concat!(
            "687964726578743107000000000000000020000000000000060000000000000001000000000000000000000066885f3e",
            "0000000000000000881300000000000003000000f61e6870000000006b2aaa7640726588bcd3d57e1de4b1315b7f315e",
            "612f622e6300",
        );
        let digit = |at: usize| u8::from_str_radix(&WRITTEN[at..at + 2], 16).unwrap();
        let bytes: Vec<u8> = (0..WRITTEN.len()).step_by(2).map(digit).collect();
        let extents = Extents::read(&bytes[..]).unwrap();
        assert_eq!((extents.len(), extents.size(), extents.segment()), (1, 8192, SegmentId(7)));
        let extent = extents.get(0).unwrap();
        let range = ByteRange::new(0, 5000);
        let place = Place::File { directory: 3, name: name_hash(b"b.c"), path: 0 };
        assert_eq!(extent, Extent { range, size: 5000, key: key(1), place });
        assert_eq!(extents.path(&extent), b"a/b.c");
    }

    #[test]
    fn pack_round_trip() {
        let mut writer = ExtentsWriter::new(SegmentId(1 << 40), SegmentKind::Pack, HashKind::Sha1);
        writer.push_entry(ByteRange::new(4096, 20), 5, key(1), SegmentId(u64::MAX - 1), 9);
        writer.push_entry(ByteRange::new(4116, 30), 12, key(2), SegmentId(3), 10);
        let mut bytes = Vec::new();
        writer.write(&mut bytes, 8192).unwrap();
        let extents = Extents::read(&bytes[..]).unwrap();
        let first = extents.get(0).unwrap();
        assert_eq!((first.size, first.range), (5, ByteRange::new(4096, 20)));
        assert_eq!(first.place, Place::Repeats { segment: SegmentId(u64::MAX - 1), record: 9 });
        assert_eq!(extents.overlapping(ByteRange::new(4096, 1)), 0..2);
    }
}
