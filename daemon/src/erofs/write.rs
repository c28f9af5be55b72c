//! Streaming the image out, from its first byte to its last.

use std::io::{self, BufWriter, Write};

use super::builder::{Data, Inode};
use super::dir::{append_block, each_block, with_dots};
use super::layout::{Form, Layout};
use super::ondisk::{
    CHECKSUM_OFFSET, CHUNK_FORMAT_INDEXES, CHUNK_INDEX_SIZE, ChunkIndex, DEVICE_SLOT_SIZE,
    INCOMPAT_CHUNKED_FILE, INCOMPAT_DEVICE_TABLE, LAYOUT_CHUNKED, LAYOUT_INLINE, NULL_BLOCK,
    RawInode, SLOT_SIZE, SUPER_OFFSET, SuperBlock, crc32c, file_type,
};

/// Bytes gathered before they are written.
const BUFFER: usize = 256 << 10;
/// Where in a device's slot its length is.
const DEVICE_BLOCKS_OFFSET: usize = 64;

impl Layout {
    /// Writes the image: [`image_len`](Self::image_len) bytes. `out` need not be buffered.
    pub fn write(&self, out: impl Write) -> io::Result<()> {
        let mut out = Counted { out: BufWriter::with_capacity(BUFFER, out), written: 0 };
        let block_size = self.tree.spec.block_size();
        out.put(&self.head())?;
        out.put(&self.xattrs.shared)?;
        out.pad_to(self.meta_block * block_size)?;
        let parents = self.parents();
        self.write_inodes(&mut out, &parents)?;
        out.pad_to(self.data_block * block_size)?;
        for index in &self.with_blocks {
            self.write_blocks(&mut out, *index, &parents)?;
        }
        out.pad_to(self.image_len())?;
        out.out.flush()
    }

    /// Everything before the shared attributes: superblock and device table.
    fn head(&self) -> Vec<u8> {
        let spec = &self.tree.spec;
        let chunked = |inode: &Inode| matches!(inode.data, Data::Run { .. } | Data::Chunks { .. });
        let mut incompat = 0;
        if self.tree.inodes.iter().any(chunked) {
            incompat |= INCOMPAT_CHUNKED_FILE;
        }
        if !spec.devices.is_empty() {
            incompat |= INCOMPAT_DEVICE_TABLE;
        }
        let sb = SuperBlock {
            block_bits: spec.block_bits,
            root_nid: self.nid_of_slot(0) as u16, // the root is the first inode
            inodes: self.tree.inodes.len() as u64,
            epoch: spec.build_time.secs,
            nanos: spec.build_time.nanos,
            blocks: self.blocks as u32,
            meta_block: self.meta_block as u32 - 1,
            xattr_block: if self.xattrs.shared.is_empty() { 0 } else { self.xattr_block as u32 },
            uuid: spec.uuid,
            incompat,
            devices: spec.devices.len() as u16,
        };
        let mut head = vec![0; SUPER_OFFSET];
        head.extend(sb.bytes());
        for blocks in &spec.devices {
            let slot = head.len();
            head.resize(slot + DEVICE_BLOCKS_OFFSET, 0);
            head.extend((*blocks as u32).to_le_bytes());
            head.resize(slot + DEVICE_SLOT_SIZE, 0);
        }
        let block_size = spec.block_size() as usize;
        head.resize(self.xattr_block as usize * block_size, 0);
        // from the superblock to the end of block 0, or of the superblock's own
        let end = if block_size > SUPER_OFFSET { block_size } else { SUPER_OFFSET + block_size };
        let checksum = crc32c(&head[SUPER_OFFSET..end]);
        let at = SUPER_OFFSET + CHECKSUM_OFFSET;
        head[at..at + 4].copy_from_slice(&checksum.to_le_bytes());
        head
    }

    fn write_inodes<W: Write>(&self, out: &mut Counted<W>, parents: &Parents) -> io::Result<()> {
        let inodes = &self.tree.inodes;
        let mut order: Vec<u32> = (0..inodes.len() as u32).collect();
        order.sort_unstable_by_key(|index| inodes[*index as usize].slot);
        let start = self.meta_block * self.tree.spec.block_size();
        let mut record = Vec::new();
        for index in order {
            let inode = &inodes[index as usize];
            record.clear();
            self.append_inode(&mut record, index, inode, parents);
            out.pad_to(start + u64::from(inode.slot) * SLOT_SIZE)?;
            out.put(&record)?;
        }
        Ok(())
    }

    /// An inode with everything that lies behind it.
    fn append_inode(&self, out: &mut Vec<u8>, index: u32, inode: &Inode, parents: &Parents) {
        let form = self.form(inode);
        let block_bits = self.tree.spec.block_bits;
        let chunk_format = |bits: u8| CHUNK_FORMAT_INDEXES | u32::from(bits - block_bits);
        let in_image = |block: u32| {
            if form.blocks == 0 { NULL_BLOCK } else { self.data_block as u32 + block }
        };
        let union = match inode.data {
            Data::None => 0,
            Data::Device(number) => number,
            Data::Directory { block, .. } | Data::Bytes { block, .. } => in_image(block),
            Data::Run { .. } => chunk_format(chunk_bits(inode.size, block_bits)),
            Data::Chunks { bits, .. } => chunk_format(bits),
        };
        let raw = RawInode {
            extended: form.extended,
            layout: form.layout,
            xattr_len: form.xattr_len,
            mode: inode.mode,
            size: inode.size,
            union,
            ino: index + 1,
            uid: inode.uid,
            gid: inode.gid,
            secs: inode.secs,
            nanos: inode.nanos,
            links: inode.links,
        };
        raw.append_to(out);
        out.extend_from_slice(self.xattrs.body(inode.xattrs));
        match form.layout {
            LAYOUT_INLINE => self.append_tail(out, index, inode, &form, parents),
            LAYOUT_CHUNKED => {
                out.resize(out.len().next_multiple_of(CHUNK_INDEX_SIZE as usize), 0);
                match inode.data {
                    Data::Run { device, block } => out.extend(ChunkIndex { device, block }.bytes()),
                    Data::Chunks { first, count, .. } => {
                        let first = first as usize;
                        let range = first..first + count as usize;
                        self.tree.chunks[range].iter().for_each(|chunk| out.extend(chunk.bytes()));
                    }
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn append_tail(
        &self,
        out: &mut Vec<u8>,
        index: u32,
        inode: &Inode,
        form: &Form,
        parents: &Parents,
    ) {
        match inode.data {
            Data::Bytes { start, .. } => {
                let end = start as usize + inode.size as usize;
                out.extend_from_slice(&self.tree.bytes[end - form.tail_len as usize..end]);
            }
            Data::Directory { first, count, .. } => {
                let names = with_dots(self.names(first, count), index, parents.of(index));
                let mut block = 0;
                let block_size = self.tree.spec.block_size() as usize;
                let tail = each_block(names, block_size, |entries| -> Result<(), ()> {
                    if block == form.blocks {
                        append_block(out, entries, |node| self.describe(node));
                    }
                    block += 1;
                    Ok(())
                });
                debug_assert!(tail.is_ok());
            }
            _ => {}
        }
    }

    /// The whole blocks of a directory or of data.
    fn write_blocks<W: Write>(
        &self,
        out: &mut Counted<W>,
        index: u32,
        parents: &Parents,
    ) -> io::Result<()> {
        let block_size = self.tree.spec.block_size();
        let inode = &self.tree.inodes[index as usize];
        let form = self.form(inode);
        let end = out.written + form.blocks * block_size;
        match inode.data {
            Data::Bytes { start, .. } => {
                let start = start as usize;
                let len = inode.size - form.tail_len;
                out.put(&self.tree.bytes[start..start + len as usize])?;
            }
            Data::Directory { first, count, .. } => {
                let names = with_dots(self.names(first, count), index, parents.of(index));
                let mut bytes = Vec::with_capacity(block_size as usize);
                each_block(names, block_size as usize, |entries| {
                    if out.written == end {
                        return Ok(()); // the tail, which is behind the inode
                    }
                    bytes.clear();
                    append_block(&mut bytes, entries, |node| self.describe(node));
                    out.put(&bytes)?;
                    out.pad_to(out.written.next_multiple_of(block_size))
                })?;
            }
            _ => {}
        }
        out.pad_to(end)
    }

    fn describe(&self, node: u32) -> (u64, u8) {
        let inode = &self.tree.inodes[node as usize];
        (self.nid_of_slot(inode.slot), file_type(inode.mode))
    }

    /// The parent of each directory.
    fn parents(&self) -> Parents {
        let of_directory = |target: u32| self.tree.inodes[target as usize].is_directory();
        let entries = self.tree.entries.iter().filter(|entry| of_directory(entry.target));
        let mut pairs: Vec<(u32, u32)> =
            entries.map(|entry| (entry.target, entry.parent)).collect();
        pairs.sort_unstable();
        Parents(pairs)
    }
}

/// (directory, parent), sorted; the root is its own parent.
struct Parents(Vec<(u32, u32)>);

impl Parents {
    fn of(&self, directory: u32) -> u32 {
        let at = self.0.binary_search_by_key(&directory, |(directory, _)| *directory);
        at.map_or(0, |at| self.0[at].1)
    }
}

/// The power of two of the smallest chunk that has all of `size` bytes.
fn chunk_bits(size: u64, block_bits: u8) -> u8 {
    let bits = size.next_power_of_two().trailing_zeros() as u8;
    bits.max(block_bits)
}

/// A writer that knows how far it is.
struct Counted<W: Write> {
    out: BufWriter<W>,
    written: u64,
}

impl<W: Write> Counted<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Zeros up to `end`; it is never behind what is written.
    fn pad_to(&mut self, end: u64) -> io::Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        debug_assert!(self.written <= end, "{} of {end}", self.written);
        while self.written < end {
            let len = (end - self.written).min(ZEROS.len() as u64) as usize;
            self.put(&ZEROS[..len])?;
        }
        Ok(())
    }
}
