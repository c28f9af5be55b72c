//! Where each object lies: in a segment that the pool has, or in a new one.
//!
//! Placing goes by object id over the whole pool. New objects are laid out in tree order, the files
//! of a directory before its subdirectories, so that neighbours in the tree are neighbours in the
//! segment.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::builder::contents;
use crate::builder::files::Made;
use crate::builder::tree::{Kind, Tree};
use crate::builder::{BuildError, SegmentUse};
use crate::ids::SegmentId;
use crate::object::{ObjectId, prefix};
use crate::range::BLOCK;
use crate::segment::extents::{Extents, ExtentsWriter};
use crate::segment::{MAX_PACKED_SIZE, SegmentKind};

const NONE: u32 = u32::MAX;
/// The largest object in bytes: more blocks than this the image can't address in a segment.
const MAX_OBJECT: u64 = (u32::MAX as u64 - 1) * BLOCK;
/// The most segments that are open at a time.
const MAX_OPEN: usize = 256;

/// One object's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which of [`Placed::segments`].
    pub segment: u32,
    /// The number of its record in the segment's extent index.
    pub record: u32,
    /// In bytes, a multiple of [`BLOCK`].
    pub offset: u64,
}

/// Where all files of a tree are.
#[derive(Debug)]
pub struct Placed {
    /// The segments that the tree refers to: those that were there, then the new ones, both by
    /// their numbers.
    pub segments: Vec<SegmentUse>,
    /// For each object a node that has it; sorted by id.
    by_id: Vec<u32>,
    places: Vec<Place>,
    /// For each node its object; `NONE` where it has no content to fetch.
    object_of: Vec<u32>,
    /// The nodes that have an object, in tree order.
    order: Vec<u32>,
    pool: PathBuf,
}

/// The path of a segment's content.
#[must_use]
pub fn data_path(pool: &Path, segment: SegmentId) -> PathBuf {
    pool.join(format!("{segment}.data"))
}

/// The path of a segment's extent index.
#[must_use]
pub fn extents_path(pool: &Path, segment: SegmentId) -> PathBuf {
    pool.join(format!("{segment}.extents"))
}

impl Placed {
    /// Places all files of the tree that are not empty. `known` are the segments that the pool has;
    /// new ones get numbers from `first_free` on.
    pub fn new(
        tree: &Tree,
        pool: &Path,
        known: &[SegmentId],
        first_free: SegmentId,
        made: &mut Made,
    ) -> Result<Self, BuildError> {
        let mut files: Vec<u32> =
            tree.numbers().filter(|n| is_file(tree, *n) && tree.size(*n) > 0).collect();
        files.sort_by_cached_key(|n| prefix(tree.id_bytes(*n)));
        // those with one prefix, which are nearly always one object
        for same in
            files.chunk_by_mut(|a, b| prefix(tree.id_bytes(*a)) == prefix(tree.id_bytes(*b)))
        {
            same.sort_unstable_by_key(|n| (tree.id_bytes(*n), *n));
        }
        let mut placed = Self {
            segments: Vec::new(),
            by_id: Vec::new(),
            places: Vec::new(),
            object_of: vec![NONE; tree.len() as usize],
            order: Vec::new(),
            pool: pool.to_owned(),
        };
        for node in &files {
            match placed.by_id.last() {
                Some(last) if tree.id_bytes(*last) == tree.id_bytes(*node) => {
                    let sizes = [tree.size(*last), tree.size(*node)];
                    if sizes[0] != sizes[1] {
                        return Err(BuildError::Sizes { key: tree.id(*node), sizes });
                    }
                }
                _ => placed.by_id.push(*node),
            }
            placed.object_of[*node as usize] = placed.by_id.len() as u32 - 1;
        }
        placed.places = vec![Place { segment: NONE, record: 0, offset: 0 }; placed.by_id.len()];

        let mut known = known.to_vec();
        known.sort_unstable();
        known.dedup();
        for segment in known {
            placed.find_in(tree, segment)?;
        }
        files.sort_unstable_by_key(|n| (tree.parent(*n), *n));
        placed.place_new(tree, &files, first_free, made)?;
        placed.order = files;
        Ok(placed)
    }

    /// Takes the places of objects that a segment of the pool has.
    fn find_in(&mut self, tree: &Tree, segment: SegmentId) -> Result<(), BuildError> {
        let path = extents_path(&self.pool, segment);
        let file = fs_err::File::open(&path).map_err(BuildError::io("read an extent index"))?;
        let fail = |source| BuildError::Extents { segment, source };
        let extents = Extents::read(BufReader::new(file)).map_err(fail)?;
        if extents.kind() != SegmentKind::Data || extents.hash() != tree.header().hash {
            return Ok(());
        }
        let mut number = NONE;
        for (record, extent) in extents.iter().enumerate() {
            let Some(object) = self.find(tree, &extent.key) else { continue };
            let node = self.by_id[object];
            if tree.size(node) != extent.size {
                let sizes = [extent.size, tree.size(node)];
                return Err(BuildError::Sizes { key: extent.key, sizes });
            }
            if self.places[object].segment != NONE {
                continue;
            }
            if number == NONE {
                number = self.segments.len() as u32;
                let (kind, size) = (SegmentKind::Data, extents.size());
                self.segments.push(SegmentUse { segment, kind, size, new: false });
            }
            let (record, offset) = (record as u32, extent.range.offset());
            self.places[object] = Place { segment: number, record, offset };
        }
        Ok(())
    }

    /// The number of an object of the tree.
    fn find(&self, tree: &Tree, key: &ObjectId) -> Option<usize> {
        self.by_id.binary_search_by_key(&key.as_bytes(), |node| tree.id_bytes(*node)).ok()
    }

    fn place_new(
        &mut self,
        tree: &Tree,
        files: &[u32],
        first_free: SegmentId,
        made: &mut Made,
    ) -> Result<(), BuildError> {
        let mut next = first_free.0;
        let mut packed: Option<NewSegment> = None;
        let mut directory = (0, Vec::new());
        let mut path = Vec::new();
        for node in files {
            let object = self.object_of[*node as usize] as usize;
            if self.places[object].segment != NONE {
                continue;
            }
            let size = tree.size(*node);
            if size > MAX_OBJECT {
                let key = tree.id(*node);
                return Err(BuildError::Tree(format!("object {key} can't be so large: {size}")));
            }
            let room = size.next_multiple_of(BLOCK);
            let mut own = None;
            let target = if room > MAX_PACKED_SIZE { &mut own } else { &mut packed };
            if let Some(full) = target.take_if(|s| s.size + room > MAX_PACKED_SIZE) {
                self.finish(full, made)?;
            }
            let segment = match target {
                Some(segment) => segment,
                None => {
                    let id = SegmentId(next);
                    next += 1;
                    let number = self.segments.len() as u32;
                    let kind = SegmentKind::Data;
                    self.segments.push(SegmentUse { segment: id, kind, size: 0, new: true });
                    let extents = ExtentsWriter::new(id, kind, tree.header().hash);
                    target.insert(NewSegment { number, extents, size: 0 })
                }
            };
            let parent = tree.parent(*node);
            if directory.0 != parent {
                tree.path(parent, &mut directory.1);
                directory.1.push(b'/');
                directory.0 = parent;
            }
            path.clone_from(&directory.1);
            path.extend_from_slice(tree.name(*node));
            let record = segment.extents.count();
            let offset = segment.size;
            segment.extents.push_file(offset, size, tree.id(*node), parent, &path);
            segment.size += room;
            self.places[object] = Place { segment: segment.number, record, offset };
            if let Some(own) = own {
                self.finish(own, made)?;
            }
        }
        packed.map_or(Ok(()), |last| self.finish(last, made))
    }

    /// Makes the files of a new segment.
    fn finish(&mut self, new: NewSegment, made: &mut Made) -> Result<(), BuildError> {
        let entry = &mut self.segments[new.number as usize];
        entry.size = new.size;
        write_segment(&self.pool, entry.segment, &new.extents, new.size, made, |_| Ok(()))
    }

    /// Writes content that is here already into the new segments; `input` is a stream of
    /// [`contents`]. Returns how many bytes of content were written. Objects whose place is in an
    /// older segment, which may be in use, or that are no file's are only passed over.
    pub fn fill(&self, tree: &Tree, input: impl Read) -> Result<u64, BuildError> {
        let doing = "take in content that was fetched with the metadata";
        let mut open: HashMap<u32, fs_err::File> = HashMap::new();
        let mut reader = contents::Reader::new(input, tree.header().hash);
        let mut buffer = vec![0; 1 << 20];
        let mut written = 0;
        while let Some((key, len)) = reader.next_object().map_err(BuildError::io(doing))? {
            let place = self.find(tree, &key).map(|object| {
                let size = tree.size(self.by_id[object]);
                (self.places[object], size)
            });
            if let Some((_, size)) = place
                && size != len
            {
                return Err(BuildError::Sizes { key, sizes: [len, size] });
            }
            let place = place.map(|(place, _)| place);
            let place = place.filter(|place| self.segments[place.segment as usize].new);
            let file = place.map(|place| self.opened(&mut open, place.segment));
            let file = file.transpose().map_err(BuildError::io(doing))?;
            let sink = |at: u64, piece: &[u8]| match (place, file) {
                (Some(place), Some(file)) => write_blocks(file, place.offset + at, piece),
                _ => Ok(()),
            };
            reader.content(&key, len, &mut buffer, sink).map_err(BuildError::io(doing))?;
            written += place.map_or(0, |_| len);
        }
        sync_all(&mut open).map_err(BuildError::io(doing))?;
        Ok(written)
    }

    /// A new segment's file, from those that are open or opened now.
    fn opened<'a>(
        &self,
        open: &'a mut HashMap<u32, fs_err::File>,
        segment: u32,
    ) -> io::Result<&'a std::fs::File> {
        if open.len() >= MAX_OPEN && !open.contains_key(&segment) {
            sync_all(open)?;
        }
        match open.entry(segment) {
            Entry::Occupied(entry) => Ok(entry.into_mut().file()),
            Entry::Vacant(entry) => {
                let path = data_path(&self.pool, self.segments[segment as usize].segment);
                let file = fs_err::OpenOptions::new().write(true).open(path)?;
                Ok(entry.insert(file).file())
            }
        }
    }

    /// The first number that no new segment has taken.
    #[must_use]
    pub fn next_free(&self, first_free: SegmentId) -> SegmentId {
        SegmentId(first_free.0 + self.segments.iter().filter(|s| s.new).count() as u64)
    }

    /// Where a file's content is; `None` for an empty file and for what is no file.
    #[must_use]
    pub fn place(&self, node: u32) -> Option<Place> {
        self.places.get(self.object_of[node as usize] as usize).copied()
    }

    /// The number of the node's object among [`objects`](Self::objects), in the order of ids.
    #[must_use]
    pub fn object(&self, node: u32) -> Option<u32> {
        Some(self.object_of[node as usize]).filter(|object| *object != NONE)
    }

    /// For each object, in the order of their ids, a node that has it.
    #[must_use]
    pub fn objects(&self) -> &[u32] {
        &self.by_id
    }

    /// The nodes that have an object, in tree order: the files of a directory, then its
    /// subdirectories.
    #[must_use]
    pub fn tree_order(&self) -> &[u32] {
        &self.order
    }
}

/// Is it a regular file of the image?
#[must_use]
pub fn is_file(tree: &Tree, node: u32) -> bool {
    matches!(tree.kind(node), Kind::File | Kind::Executable)
}

#[derive(Debug)]
struct NewSegment {
    number: u32,
    extents: ExtentsWriter,
    size: u64,
}

/// Makes a segment's sparse file of `size` bytes, which `content` may write parts of, and its extent
/// index. The caller [settles](Made::settle) them and makes the directory durable.
pub fn write_segment(
    pool: &Path,
    segment: SegmentId,
    extents: &ExtentsWriter,
    size: u64,
    made: &mut Made,
    content: impl FnOnce(&std::fs::File) -> io::Result<()>,
) -> Result<(), BuildError> {
    let fail = BuildError::io("make a segment");
    let make = || {
        let data = made.create(&data_path(pool, segment), 0o600)?;
        data.set_len(size)?;
        content(data.file())?;
        made.written(data)?;
        made.write(&extents_path(pool, segment), 0o600, |out| extents.write(out, size))
    };
    make().map_err(fail)
}

/// Makes files durable and closes them.
fn sync_all(open: &mut HashMap<u32, fs_err::File>) -> io::Result<()> {
    open.drain().try_for_each(|(_, file)| file.sync_all())
}

/// Writes a piece of content that starts at a block, with zeros up to the next block's start.
fn write_blocks(file: &std::fs::File, offset: u64, piece: &[u8]) -> io::Result<()> {
    file.write_all_at(piece, offset)?;
    let rest = piece.len().next_multiple_of(BLOCK as usize) - piece.len();
    file.write_all_at(&[0; BLOCK as usize][..rest], offset + piece.len() as u64)
}
