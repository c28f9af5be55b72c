//! What a pool has: its segments, which object lies where, and which are there.
//!
//! The truth about what is there is the hole map of the segments' files. The bitmap kept here is a
//! copy of it, made when a segment is first looked at and kept up as objects are written; before a
//! reader is told to go on, the hole map itself is asked ([`Pool::holes`]).

mod holes;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use thiserror::Error;

use super::ObjectNo;
use crate::ids::SegmentId;
use crate::object::ObjectId;
use crate::range::ByteRange;
use crate::segment::SegmentKind;
use crate::segment::extents::{Extents, ExtentsError, Head, Place};
use crate::segment::frame::Frame;

pub use holes::{data_ranges, first_hole, holes};

/// So many bytes of extent indexes are kept in memory.
const LOADED_MAX: u64 = 32 << 20;

/// Something about a segment that makes it unusable.
#[derive(Debug, Error)]
pub enum PoolError {
    #[error("segment {segment}")]
    Extents {
        segment: SegmentId,
        #[source]
        source: ExtentsError,
    },
    #[error("segment {segment}: {operation}")]
    Io {
        segment: SegmentId,
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("segment {0} is not attached")]
    Unknown(SegmentId),
    #[error("segment {segment}: {what}")]
    Wrong { segment: SegmentId, what: &'static str },
}

/// One object of a data segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object {
    pub no: ObjectNo,
    pub key: ObjectId,
    /// Where its content is in the segment, in bytes.
    pub range: ByteRange,
    /// The number of its directory, unique in the pool.
    pub directory: u64,
    /// [`name_hash`](crate::segment::extents::name_hash) of its name.
    pub name: u32,
}

/// A segment that the supervisor has attached.
#[derive(Debug)]
pub struct Segment {
    pub id: SegmentId,
    pub kind: SegmentKind,
    /// In bytes.
    pub size: u64,
    /// The number of extents.
    pub count: u32,
    pub data: Arc<File>,
    /// The frame of a pack, once a part of it was needed: about 100 KB, and all ids hashed.
    pub frame: Arc<OnceLock<Frame>>,
    index: Arc<File>,
    index_len: u64,
    /// The number of the object of record 0, in a data segment.
    first: u32,
    /// How many objects are absent, once that has been looked up.
    missing: Option<u32>,
    loaded: Option<(Arc<Extents>, u64)>,
    /// The supervisor knows that all is there.
    pub told_complete: bool,
}

impl Segment {
    /// Its extent index.
    #[must_use]
    pub fn index(&self) -> Arc<File> {
        Arc::clone(&self.index)
    }

    /// The numbers of its objects; none in a pack.
    #[must_use]
    pub fn objects(&self) -> std::ops::Range<u32> {
        match self.kind {
            SegmentKind::Data => self.first..self.first + self.count,
            SegmentKind::Pack => 0..0,
        }
    }
}

/// The segments of one pool. Costs a bit for each object, and up to 32 MiB of extent indexes that
/// were of use lately.
#[derive(Debug, Default)]
pub struct Pool {
    segments: Vec<Segment>,
    by_id: HashMap<SegmentId, usize>,
    /// Positions in `segments` of the data segments.
    data: Vec<usize>,
    objects: u32,
    present: Vec<u64>,
    clock: u64,
    loaded: u64,
}

/// Reads a file from a position of its own: the fd's position is shared with the supervisor.
#[derive(Debug)]
struct At<'a> {
    file: &'a File,
    at: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read_at(buffer, self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Pool {
    /// Takes a segment: its data, and its extent index. The index itself is read when needed.
    pub fn attach(
        &mut self,
        id: SegmentId,
        data: OwnedFd,
        index: OwnedFd,
    ) -> Result<(), PoolError> {
        let io = |operation| move |source| PoolError::Io { segment: id, operation, source };
        let wrong = |what| PoolError::Wrong { segment: id, what };
        if self.by_id.contains_key(&id) {
            return Err(wrong("is attached already"));
        }
        let (data, index) = (File::from(data), File::from(index));
        let meta = data.metadata().map_err(io("can't stat it"))?;
        let index_len = index.metadata().map_err(io("can't stat its index"))?.len();
        let head = Head::read(At { file: &index, at: 0 })
            .map_err(|source| PoolError::Extents { segment: id, source })?;
        if head.segment != id {
            return Err(wrong("its extent index is another segment's"));
        }
        if !meta.is_file() || meta.len() < head.size {
            return Err(wrong("its file is shorter than its extent index says"));
        }
        let first = self.objects;
        if head.kind == SegmentKind::Data {
            self.objects = first.checked_add(head.count).ok_or(wrong("has too many objects"))?;
            self.present.resize((self.objects as usize).div_ceil(64), 0);
            self.data.push(self.segments.len());
        }
        self.by_id.insert(id, self.segments.len());
        self.segments.push(Segment {
            id,
            kind: head.kind,
            size: head.size,
            count: head.count,
            data: Arc::new(data),
            frame: Arc::default(),
            index: Arc::new(index),
            index_len,
            first,
            missing: None,
            loaded: None,
            told_complete: false,
        });
        Ok(())
    }

    /// The number of objects in data segments.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.objects
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.objects == 0
    }

    pub fn segment(&self, id: SegmentId) -> Result<&Segment, PoolError> {
        self.position(id).map(|at| &self.segments[at])
    }

    pub fn segment_mut(&mut self, id: SegmentId) -> Result<&mut Segment, PoolError> {
        self.position(id).map(|at| &mut self.segments[at])
    }

    fn position(&self, id: SegmentId) -> Result<usize, PoolError> {
        self.by_id.get(&id).copied().ok_or(PoolError::Unknown(id))
    }

    /// The segments' ids, in the order in which they were attached.
    pub fn segments(&self) -> impl Iterator<Item = SegmentId> + '_ {
        self.segments.iter().map(|segment| segment.id)
    }

    /// The data segment that has an object: its position in `segments`.
    fn home(&self, no: ObjectNo) -> Option<usize> {
        if no.0 >= self.objects {
            return None;
        }
        let after = self.data.partition_point(|at| self.segments[*at].first <= no.0);
        // Segments without objects share their first number with the next.
        self.data[..after].iter().rev().copied().find(|at| self.segments[*at].count > 0)
    }

    /// The segment of an object.
    #[must_use]
    pub fn segment_of(&self, no: ObjectNo) -> Option<&Segment> {
        self.home(no).map(|at| &self.segments[at])
    }

    /// The number of the object in record `record` of a data segment.
    pub fn number(&self, id: SegmentId, record: u32) -> Result<ObjectNo, PoolError> {
        let segment = self.segment(id)?;
        if segment.kind != SegmentKind::Data || record >= segment.count {
            return Err(PoolError::Wrong { segment: id, what: "it has no such object" });
        }
        Ok(ObjectNo(segment.first + record))
    }

    /// The extent index of a segment, read if it is not in memory.
    pub fn extents(&mut self, id: SegmentId) -> Result<Arc<Extents>, PoolError> {
        let at = self.position(id)?;
        self.load(at)
    }

    fn load(&mut self, at: usize) -> Result<Arc<Extents>, PoolError> {
        self.clock += 1;
        let clock = self.clock;
        if let Some((extents, used)) = &mut self.segments[at].loaded {
            *used = clock;
            return Ok(Arc::clone(extents));
        }
        let segment = &self.segments[at];
        let failed = |source| PoolError::Extents { segment: segment.id, source };
        let extents = Arc::new(Extents::read(At { file: &segment.index, at: 0 }).map_err(failed)?);
        if extents.len() != segment.count as usize || extents.kind() != segment.kind {
            return Err(failed(ExtentsError::Damaged("it has changed")));
        }
        self.loaded += segment.index_len;
        self.segments[at].loaded = Some((Arc::clone(&extents), clock));
        self.unload(at);
        if self.segments[at].kind == SegmentKind::Data && self.segments[at].missing.is_none() {
            self.survey(at, &extents)?;
        }
        Ok(extents)
    }

    /// Forgets the indexes that have not been used for longest, but not the one at `keep`.
    fn unload(&mut self, keep: usize) {
        while self.loaded > LOADED_MAX {
            let oldest = (0..self.segments.len())
                .filter(|at| *at != keep)
                .filter_map(|at| Some((self.segments[at].loaded.as_ref()?.1, at)))
                .min();
            let Some((_, at)) = oldest else { return };
            self.segments[at].loaded = None;
            self.loaded -= self.segments[at].index_len;
        }
    }

    /// Bytes of extent indexes in memory.
    #[must_use]
    pub fn loaded_bytes(&self) -> u64 {
        self.loaded
    }

    /// Sets the bits of a data segment from its hole map.
    fn survey(&mut self, at: usize, extents: &Extents) -> Result<(), PoolError> {
        let segment = &self.segments[at];
        let (id, first) = (segment.id, segment.first);
        let data =
            data_ranges(&segment.data, ByteRange::new(0, segment.size)).map_err(|source| {
                PoolError::Io { segment: id, operation: "can't read its hole map", source }
            })?;
        let mut data = data.into_iter().peekable();
        let mut missing = 0;
        for (extent, no) in extents.iter().zip(first..) {
            // The segment's end need not be a multiple of a block.
            let blocks = extent.range.to_blocks().clamp(extents.size());
            while data.peek().is_some_and(|range| range.end() <= blocks.offset()) {
                data.next();
            }
            let there = extent.range.is_empty()
                || data.peek().is_some_and(|range| {
                    range.offset() <= blocks.offset() && blocks.end() <= range.end()
                });
            missing += u32::from(!there);
            self.set(ObjectNo(no), there);
        }
        self.segments[at].missing = Some(missing);
        Ok(())
    }

    fn set(&mut self, no: ObjectNo, present: bool) {
        if let Some(word) = self.present.get_mut(no.0 as usize / 64) {
            let bit = 1 << (no.0 % 64);
            *word = if present { *word | bit } else { *word & !bit };
        }
    }

    fn bit(&self, no: ObjectNo) -> bool {
        self.present.get(no.0 as usize / 64).is_some_and(|word| word >> (no.0 % 64) & 1 == 1)
    }

    /// The object is in its segment, as far as is known here.
    pub fn is_present(&mut self, no: ObjectNo) -> Result<bool, PoolError> {
        if let Some(at) = self.home(no)
            && self.segments[at].missing.is_none()
        {
            self.load(at)?;
        }
        Ok(self.bit(no))
    }

    /// An object.
    pub fn object(&mut self, no: ObjectNo) -> Result<Option<Object>, PoolError> {
        let Some(at) = self.home(no) else { return Ok(None) };
        let extents = self.load(at)?;
        let first = self.segments[at].first;
        let Some(extent) = extents.get((no.0 - first) as usize) else { return Ok(None) };
        let Place::File { directory, name, .. } = extent.place else { return Ok(None) };
        let directory = (at as u64) << 32 | u64::from(directory);
        Ok(Some(Object { no, key: extent.key, range: extent.range, directory, name }))
    }

    /// The object has been written. The segment, where that was the last that it lacked.
    pub fn arrived(&mut self, no: ObjectNo) -> Option<SegmentId> {
        let at = self.home(no)?;
        if self.bit(no) {
            return None;
        }
        self.set(no, true);
        let missing = self.segments[at].missing.as_mut()?;
        *missing = missing.saturating_sub(1);
        (*missing == 0).then_some(self.segments[at].id)
    }

    /// The object turned out to be absent although it was thought to be there.
    pub fn vanished(&mut self, no: ObjectNo) {
        let Some(at) = self.home(no) else { return };
        if self.bit(no) {
            self.set(no, false);
            self.segments[at].told_complete = false;
            if let Some(missing) = &mut self.segments[at].missing {
                *missing += 1;
            }
        }
    }

    /// What the file itself says of `range`: its parts that are holes. In whole blocks, within the
    /// segment.
    pub fn holes(&self, id: SegmentId, range: ByteRange) -> Result<Vec<ByteRange>, PoolError> {
        let segment = self.segment(id)?;
        holes(&segment.data, range.to_blocks().clamp(segment.size)).map_err(|source| {
            PoolError::Io { segment: id, operation: "can't read its hole map", source }
        })
    }

    /// All objects of a data segment are there, as far as is known here.
    #[must_use]
    pub fn lacks_nothing(&self, id: SegmentId) -> bool {
        self.segment(id).is_ok_and(|segment| segment.missing == Some(0))
    }

    /// Nothing of the segment is a hole.
    pub fn is_full(&self, id: SegmentId) -> Result<bool, PoolError> {
        let segment = self.segment(id)?;
        let hole = first_hole(&segment.data).map_err(|source| PoolError::Io {
            segment: id,
            operation: "can't read its hole map",
            source,
        })?;
        Ok(hole >= segment.size)
    }

    /// What is needed to read all extent indexes of data segments elsewhere: the first object's
    /// number and the file.
    #[must_use]
    pub fn indexes(&self) -> Vec<(u32, Arc<File>)> {
        let segment = |at: &usize| &self.segments[*at];
        self.data.iter().map(|at| (segment(at).first, Arc::clone(&segment(at).index))).collect()
    }
}

/// Where the files of one name are: (hash of the name, number, size), sorted by hash and number.
/// 12 bytes a file.
#[derive(Debug, Default)]
pub struct NameIndex(Vec<(u32, ObjectNo, u32)>);

impl NameIndex {
    /// Reads all extent indexes; takes a while and belongs on a thread of its own.
    pub fn build(indexes: &[(u32, Arc<File>)]) -> Result<Self, ExtentsError> {
        let mut all = Vec::new();
        for (first, file) in indexes {
            let extents = Extents::read(At { file, at: 0 })?;
            all.extend(extents.iter().zip(*first..).filter_map(|(extent, no)| {
                let Place::File { name, .. } = extent.place else { return None };
                let size = u32::try_from(extent.size).unwrap_or(u32::MAX);
                Some((name, ObjectNo(no), size))
            }));
        }
        all.sort_unstable();
        Ok(Self(all))
    }

    /// From (hash of the name, number, size) in any order.
    #[must_use]
    pub fn new(mut all: Vec<(u32, ObjectNo, u32)>) -> Self {
        all.sort_unstable();
        Self(all)
    }

    /// The files of a name, in the order of their numbers.
    #[must_use]
    pub fn get(&self, name: u32) -> &[(u32, ObjectNo, u32)] {
        let first = self.0.partition_point(|(hash, ..)| *hash < name);
        let tail = &self.0[first..];
        &tail[..tail.partition_point(|(hash, ..)| *hash == name)]
    }
}

#[cfg(test)]
mod tests;
