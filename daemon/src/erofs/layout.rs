//! Where everything in the image goes.

use super::builder::{Data, Entry, Inode, NO_SLOT};
use super::dir;
use super::error::{ErofsError, shown};
use super::ondisk::{
    CHUNK_INDEX_SIZE, COMPACT_INODE_SIZE, DEVICE_SLOT_SIZE, EXTENDED_INODE_SIZE, LAYOUT_CHUNKED,
    LAYOUT_INLINE, LAYOUT_PLAIN, SLOT_SIZE, SUPER_OFFSET, SUPER_SIZE,
};
use super::xattr::XattrPlan;
use super::{ImageBuilder, NodeId};

/// An image whose every byte is decided, ready to be written.
#[derive(Debug)]
pub struct Layout {
    pub(super) tree: ImageBuilder,
    pub(super) xattrs: XattrPlan,
    /// The blocks of the shared attributes, of the first inode, of the first data, and the image's length.
    pub(super) xattr_block: u64,
    pub(super) meta_block: u64,
    pub(super) data_block: u64,
    pub(super) blocks: u64,
    /// The inodes with whole blocks of their own, in these blocks' order.
    pub(super) with_blocks: Vec<u32>,
}

/// The shape of an inode.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    pub extended: bool,
    pub layout: u16,
    /// Inode and attributes in bytes.
    pub head_len: u64,
    pub xattr_len: u64,
    /// Chunk indexes behind that, or zero.
    pub indexes: u64,
    /// Bytes of data behind that, which may not cross a block's end.
    pub tail_len: u64,
    /// Whole blocks of data.
    pub blocks: u64,
}

impl Form {
    /// All of it in bytes, without the blocks.
    pub fn len(&self) -> u64 {
        match self.indexes {
            0 => self.head_len + self.tail_len,
            n => self.head_len.next_multiple_of(CHUNK_INDEX_SIZE) + n * CHUNK_INDEX_SIZE,
        }
    }
}

impl Layout {
    pub(super) fn new(mut tree: ImageBuilder) -> Result<Self, ErofsError> {
        sort_entries(&mut tree)?;
        let xattrs = tree.xattrs.plan(tree.inodes.iter().map(|inode| inode.xattrs))?;
        let block_size = tree.spec.block_size();
        let table_len = tree.spec.devices.len() * DEVICE_SLOT_SIZE;
        let xattr_block = ((SUPER_OFFSET + SUPER_SIZE + table_len) as u64).div_ceil(block_size);
        let meta_block = xattr_block + (xattrs.shared.len() as u64).div_ceil(block_size);
        let with_blocks = Vec::new();
        let mut layout =
            Self { tree, xattrs, xattr_block, meta_block, data_block: 0, blocks: 0, with_blocks };
        let (slots, data_blocks) = layout.place_all()?;
        layout.data_block = meta_block + (slots * SLOT_SIZE).div_ceil(block_size);
        layout.blocks = layout.data_block + data_blocks;
        if layout.blocks >= u64::from(u32::MAX) {
            return Err(ErofsError::TooLarge("the image's blocks"));
        }
        Ok(layout)
    }

    /// The inode number of a node, as `stat` shows it on a mount; `None` if it is not of this image.
    #[must_use]
    pub fn nid(&self, id: NodeId) -> Option<u64> {
        self.tree.inodes.get(id.0 as usize).map(|inode| self.nid_of_slot(inode.slot))
    }

    /// The length of the image in bytes.
    #[must_use]
    pub fn image_len(&self) -> u64 {
        self.blocks * self.tree.spec.block_size()
    }

    /// Numbers count from the block before the first inode's.
    pub(super) fn nid_of_slot(&self, slot: u32) -> u64 {
        self.tree.spec.block_size() / SLOT_SIZE + u64::from(slot)
    }

    pub(super) fn form(&self, inode: &Inode) -> Form {
        let block_size = self.tree.spec.block_size();
        let extended = !is_compact(&self.tree, inode);
        let inode_len = if extended { EXTENDED_INODE_SIZE } else { COMPACT_INODE_SIZE };
        let xattr_len = self.xattrs.body(inode.xattrs).len() as u64;
        let head_len = inode_len + xattr_len;
        let plain = Form {
            extended,
            layout: LAYOUT_PLAIN,
            head_len,
            xattr_len,
            indexes: 0,
            tail_len: 0,
            blocks: 0,
        };
        match inode.data {
            Data::None | Data::Device(_) => plain,
            Data::Run { .. } => Form { layout: LAYOUT_CHUNKED, indexes: 1, ..plain },
            Data::Chunks { count, .. } => {
                Form { layout: LAYOUT_CHUNKED, indexes: count.into(), ..plain }
            }
            Data::Directory { .. } | Data::Bytes { .. } => {
                let tail_len = inode.size % block_size;
                if tail_len > 0 && head_len + tail_len <= block_size {
                    let blocks = inode.size / block_size;
                    Form { layout: LAYOUT_INLINE, tail_len, blocks, ..plain }
                } else {
                    Form { blocks: inode.size.div_ceil(block_size), ..plain }
                }
            }
        }
    }

    /// A directory's own names, sorted.
    pub(super) fn names(&self, first: u32, count: u32) -> impl Iterator<Item = dir::Named<'_>> {
        let range = first as usize..(first + count) as usize;
        self.tree.entries[range].iter().map(|entry| (self.tree.name(entry), entry.target))
    }

    /// Gives all inodes their places, in tree order. The numbers of slots and data blocks used.
    fn place_all(&mut self) -> Result<(u64, u64), ErofsError> {
        let block_size = self.tree.spec.block_size();
        let mut slots = Slots::new(block_size / SLOT_SIZE);
        let mut blocks = 0;
        // directories to do, with their parents
        let mut stack = vec![(0u32, 0u32)];
        while let Some((directory, parent)) = stack.pop() {
            let Data::Directory { first, count, .. } = self.tree.inodes[directory as usize].data
            else {
                continue;
            };
            let names = dir::with_dots(self.names(first, count), directory, parent);
            self.tree.inodes[directory as usize].size = dir::size(names, block_size as usize);
            self.place(directory, &mut slots, &mut blocks)?;
            let below = stack.len();
            for n in first..first + count {
                let target = self.tree.entries[n as usize].target;
                let inode = &self.tree.inodes[target as usize];
                if inode.is_directory() {
                    stack.push((target, directory));
                } else if inode.slot == NO_SLOT {
                    self.place(target, &mut slots, &mut blocks)?;
                }
            }
            stack[below..].reverse();
        }
        Ok((slots.next, blocks))
    }

    fn place(&mut self, index: u32, slots: &mut Slots, blocks: &mut u64) -> Result<(), ErofsError> {
        let form = self.form(&self.tree.inodes[index as usize]);
        let len = form.len().div_ceil(SLOT_SIZE);
        let slot = if form.tail_len > 0 { slots.in_block(len) } else { slots.anywhere(len) };
        let slot = u32::try_from(slot).ok().filter(|slot| *slot != NO_SLOT);
        let inode = &mut self.tree.inodes[index as usize];
        inode.slot = slot.ok_or(ErofsError::TooLarge("the inodes"))?;
        if form.blocks > 0 {
            self.with_blocks.push(index);
            let start = u32::try_from(*blocks).map_err(|_| ErofsError::TooLarge("the data"))?;
            match &mut inode.data {
                Data::Directory { block, .. } | Data::Bytes { block, .. } => *block = start,
                _ => {}
            }
            *blocks += form.blocks;
        }
        Ok(())
    }
}

/// Can the inode be one of 32 bytes?
fn is_compact(tree: &ImageBuilder, inode: &Inode) -> bool {
    let time = tree.spec.build_time;
    let narrow = |value: u32| u16::try_from(value).is_ok();
    (inode.secs, inode.nanos) == (time.secs, time.nanos)
        && u32::try_from(inode.size).is_ok()
        && narrow(inode.uid)
        && narrow(inode.gid)
        && narrow(inode.links)
}

/// Sorts the entries by directory and name and tells each directory which are its own.
fn sort_entries(tree: &mut ImageBuilder) -> Result<(), ErofsError> {
    let mut entries = std::mem::take(&mut tree.entries);
    entries.sort_unstable_by(|a, b| {
        a.parent.cmp(&b.parent).then_with(|| tree.name(a).cmp(tree.name(b)))
    });
    let equal = |pair: &[Entry]| {
        pair[0].parent == pair[1].parent && tree.name(&pair[0]) == tree.name(&pair[1])
    };
    if let Some(pair) = entries.windows(2).find(|pair| equal(pair)) {
        return Err(ErofsError::DuplicateName(path(tree, &entries, &pair[0])));
    }
    let mut start = 0;
    for group in entries.chunk_by(|a, b| a.parent == b.parent) {
        let own = Data::Directory { first: start, count: group.len() as u32, block: 0 };
        tree.inodes[group[0].parent as usize].data = own;
        start += group.len() as u32;
    }
    tree.entries = entries;
    Ok(())
}

/// The path of an entry, for an error.
fn path(tree: &ImageBuilder, entries: &[Entry], entry: &Entry) -> String {
    let mut path = shown(tree.name(entry));
    let mut parent = entry.parent;
    while let Some(above) = entries.iter().find(|entry| parent != 0 && entry.target == parent) {
        path = format!("{}/{path}", shown(tree.name(above)));
        parent = above.parent;
    }
    path
}

/// Hands out slots in order. What inline tails leave free at a block's end goes to later inodes that
/// fit there: the smallest free place, and of several the latest, so that neighbours stay near.
struct Slots {
    in_block: u64,
    next: u64,
    /// Starts of the free places of each length. None crosses a block's end.
    gaps: Vec<Vec<u64>>,
}

impl Slots {
    fn new(in_block: u64) -> Self {
        Self { in_block, next: 0, gaps: vec![Vec::new(); in_block as usize] }
    }

    fn anywhere(&mut self, len: u64) -> u64 {
        if let Some(start) = self.take_gap(len) {
            return start;
        }
        let start = self.next;
        self.next += len;
        start
    }

    /// Slots of one block; `len` must not be more than a block has.
    fn in_block(&mut self, len: u64) -> u64 {
        if let Some(start) = self.take_gap(len) {
            return start;
        }
        let left = self.next.next_multiple_of(self.in_block) - self.next;
        if left < len {
            self.free(self.next, left);
            self.next += left;
        }
        let start = self.next;
        self.next += len;
        start
    }

    fn free(&mut self, start: u64, len: u64) {
        if len > 0 {
            self.gaps[len as usize].push(start);
        }
    }

    fn take_gap(&mut self, len: u64) -> Option<u64> {
        let found = (len..self.in_block).find(|free| !self.gaps[*free as usize].is_empty())?;
        let start = self.gaps[found as usize].pop()?;
        self.free(start + len, found - len);
        Some(start)
    }
}
