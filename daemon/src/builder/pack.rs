//! The existence pack of a tree.
//!
//! Git's `commit` and `switch` ask whether every blob of the index exists. In a partial clone each
//! one that is missing is fetched, all of the tree. So there is a pack that has them: its index is
//! a real file, and the pack itself a segment like others, whose content comes when something reads it.
//! Whether an object exists is answered from the index alone.
//!
//! The pack is the only file of an [image of its own](image_path), which is mounted beside the tree's: git maps
//! the pack into its memory, and how much the kernel reads around a page that is missing there is
//! set for a whole file system. An object's entry is of whole blocks, so that nothing but it is
//! fetched for it.
//!
//! It has a `.keep` file, so that `gc` and `repack` neither read nor remove it, and no `.promisor` file:
//! with that they would take all its objects into a pack of their own.
//!
//! The pack's index says nothing that isn't known: where offsets fit in 32 bits it is of version 1,
//! which has no checksums of the entries. In version 2 they are there and are zero; git compares
//! them only when it copies entries into another local pack, complains, and packs the object anew.

use std::collections::HashSet;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::builder::files::Made;
use crate::builder::place::{Placed, write_segment};
use crate::builder::tree::Tree;
use crate::builder::{BuildError, Owner, SegmentUse};
use crate::ids::SegmentId;
use crate::object::{HashKind, Hasher, ObjectId};
use crate::range::{BLOCK, ByteRange};
use crate::segment::SegmentKind;
use crate::segment::extents::ExtentsWriter;
use crate::segment::frame::{FIRST_ENTRY, Frame};
use crate::segment::pack;

/// The most bytes of entries: a segment has fewer than 2^32 blocks.
const MAX_PACK: u64 = (u32::MAX as u64 - 4) * BLOCK;

/// An existence pack that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pack {
    /// The files' name without its ending: `pack-<hex>`.
    pub name: String,
    /// The repository's objects in it.
    pub objects: u64,
    /// In bytes, a multiple of the block size.
    pub size: u64,
    /// Which of the tree's segments it is: the last.
    pub device: u32,
}

/// Where the image with the pack of a tree is, given where the tree's is.
#[must_use]
pub fn image_path(tree: &Path) -> PathBuf {
    tree.with_extension("pack.erofs")
}

/// An existence pack that is laid out, and in no file yet.
#[derive(Debug)]
pub struct Plan {
    pub pack: Pack,
    segment: SegmentId,
    frame: Frame,
    extents: ExtentsWriter,
    /// Where each object's entry is; 0 for what is not in the pack.
    offsets: Vec<u64>,
}

impl Plan {
    /// What stands in for the pack's checksum.
    #[must_use]
    pub fn trailer(&self) -> ObjectId {
        self.frame.trailer
    }
}

/// Lays out the pack of all files of the tree but those whose objects are `in_repository`; `segment` is
/// to be its segment. `None` when no object is left.
pub fn plan(
    tree: &Tree,
    placed: &mut Placed,
    in_repository: &HashSet<ObjectId>,
    segment: SegmentId,
) -> Result<Option<Plan>, BuildError> {
    let hash = tree.header().hash;
    let mut offsets = vec![0; placed.objects().len()];
    let mut extents = ExtentsWriter::new(segment, SegmentKind::Pack, hash);
    let mut keys = Vec::new();
    let mut end = FIRST_ENTRY;
    for node in placed.tree_order() {
        let (Some(object), Some(place)) = (placed.object(*node), placed.place(*node)) else {
            continue;
        };
        let key = tree.id(*node);
        if offsets[object as usize] != 0 || in_repository.contains(&key) {
            continue;
        }
        let size = tree.size(*node);
        let range = ByteRange::new(end, pack::padded_len(size));
        if range.end() > MAX_PACK {
            return Err(BuildError::Tree("its files are too large for one pack".into()));
        }
        let home = placed.segments[place.segment as usize].segment;
        extents.push_entry(range, size, key, home, place.record);
        offsets[object as usize] = end;
        keys.push(*node);
        end = range.end();
    }
    if keys.is_empty() {
        return Ok(None);
    }
    let frame = Frame::new(hash, keys.iter().map(|node| tree.id(*node)), end);
    let size = frame.size();
    let device = placed.segments.len() as u32;
    placed.segments.push(SegmentUse { segment, kind: SegmentKind::Pack, size, new: true });
    let name = format!("pack-{}", frame.trailer);
    let pack = Pack { name, objects: keys.len() as u64, size, device };
    Ok(Some(Plan { pack, segment, frame, extents, offsets }))
}

/// Makes the pack's segment in the pool, and `<name>.idx` and `<name>.keep` in `pack_dir`, both the
/// owner's. The caller [settles](Made::settle) them.
pub fn write(
    plan: &Plan,
    tree: &Tree,
    placed: &Placed,
    pool: &Path,
    (pack_dir, owner): (&Path, Owner),
    made: &mut Made,
) -> Result<(), BuildError> {
    let hash = tree.header().hash;
    let Plan { pack, segment, frame, extents, offsets } = plan;
    write_segment(pool, *segment, extents, pack.size, made, |data| {
        data.write_all_at(&frame.head, 0)?;
        // it begins at a block: entries are whole blocks
        data.write_all_at(&frame.tail, frame.tail_at)
    })?;

    let name = &pack.name;
    let objects = placed.objects().iter().zip(offsets);
    let entries = objects.filter(|(_, offset)| **offset != 0);
    let entries = entries.map(|(node, offset)| (tree.id(*node), *offset));
    let write = || {
        let idx = pack_dir.join(format!("{name}.idx"));
        made.write(&idx, 0o444, |out| {
            write_index(out, frame, hash, entries)?;
            owner.give(out.get_ref())
        })?;
        let keep = pack_dir.join(format!("{name}.keep"));
        made.write(&keep, 0o444, |out| {
            out.write_all(b"hydrant: the objects of the checked out tree, fetched when read\n")?;
            owner.give(out.get_ref())
        })
    };
    write().map_err(BuildError::io("write the index of the existence pack"))
}

/// Writes an index (gitformat-pack(5)); `entries` are sorted by id.
fn write_index(
    out: &mut BufWriter<impl Write>,
    frame: &Frame,
    hash: HashKind,
    entries: impl Iterator<Item = (ObjectId, u64)>,
) -> io::Result<()> {
    let mut own = frame.objects.clone();
    own.sort_unstable();
    let mut own = own.into_iter().peekable();
    let mut all = Vec::new();
    for entry in entries {
        while let Some(first) = own.next_if(|own| *own < entry) {
            all.push(first);
        }
        all.push(entry);
    }
    all.extend(own);

    let mut out = Hashing { out, hasher: hash.hasher() };
    let wide = frame.size() > u64::from(u32::MAX);
    if wide {
        out.write_all(b"\xfftOc\0\0\0\x02")?;
    }
    let mut seen = 0;
    for first in 0..=u8::MAX {
        seen += all[seen..].iter().take_while(|(id, _)| id.as_bytes()[0] == first).count();
        out.write_all(&be32(seen as u64))?;
    }
    if wide {
        all.iter().try_for_each(|(id, _)| out.write_all(id.as_bytes()))?;
        all.iter().try_for_each(|_| out.write_all(&[0; 4]))?;
        let mut large = 0;
        for (_, offset) in &all {
            if *offset < 1 << 31 {
                out.write_all(&be32(*offset))?;
            } else {
                out.write_all(&be32(1 << 31 | large))?;
                large += 1;
            }
        }
        let mut large = all.iter().filter(|(_, offset)| *offset >= 1 << 31);
        large.try_for_each(|(_, offset)| out.write_all(&offset.to_be_bytes()))?;
    } else {
        for (id, offset) in &all {
            out.write_all(&be32(*offset))?;
            out.write_all(id.as_bytes())?;
        }
    }
    out.write_all(frame.trailer.as_bytes())?;
    let Hashing { out, hasher } = out;
    out.write_all(hasher.finish().as_bytes())
}

#[expect(clippy::cast_possible_truncation, reason = "the callers' numbers fit")]
fn be32(number: u64) -> [u8; 4] {
    (number as u32).to_be_bytes()
}

/// Hashes what it writes.
#[derive(Debug)]
pub struct Hashing<'a, W: Write> {
    pub out: &'a mut BufWriter<W>,
    pub hasher: Hasher,
}

impl<W: Write> Hashing<'_, W> {
    pub fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.out.write_all(bytes)
    }
}
