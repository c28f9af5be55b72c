//! Taking a tree in, node by node: everything is checked here, and kept in compact form.

use super::error::{ErofsError, shown};
use super::ondisk::{
    ChunkIndex, MAX_CHUNK_SHIFT, NAME_MAX, NULL_BLOCK, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK,
    S_IFMT, S_IFREG, S_IFSOCK, encode_device,
};
use super::xattr::XattrTable;
use super::{FileContent, ImageSpec, Layout, Meta, Node, NodeId, Timestamp, XattrSetId};

/// The slot of an inode that has no place yet.
pub(super) const NO_SLOT: u32 = u32::MAX;
/// The longest target of a symbolic link in bytes (`PATH_MAX` less the NUL).
const TARGET_MAX: usize = 4095;

/// An inode: 64 bytes.
#[derive(Debug)]
pub(super) struct Inode {
    /// In bytes; of a directory once it is laid out.
    pub size: u64,
    pub secs: i64,
    pub nanos: u32,
    pub uid: u32,
    pub gid: u32,
    pub xattrs: XattrSetId,
    pub links: u32,
    /// Where it is, counted from the first inode.
    pub slot: u32,
    pub data: Data,
    /// With the type.
    pub mode: u16,
}

/// What an inode is or holds. `block`s of the image count from the first data block.
#[derive(Debug, Clone, Copy)]
pub(super) enum Data {
    None,
    /// The number of a device file.
    Device(u32),
    /// `count` entries from number `first`, once they are sorted.
    Directory {
        first: u32,
        count: u32,
        block: u32,
    },
    /// Bytes in the image, from `start` in the builder's.
    Bytes {
        start: u32,
        block: u32,
    },
    /// One chunk.
    Run {
        device: u16,
        block: u32,
    },
    /// Chunk indexes, from number `first`.
    Chunks {
        first: u32,
        count: u32,
        bits: u8,
    },
}

impl Inode {
    pub fn is_directory(&self) -> bool {
        self.mode & S_IFMT == S_IFDIR
    }
}

/// A name in a directory: 16 bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub parent: u32,
    pub target: u32,
    name_start: u32,
    name_len: u8,
}

/// A tree on its way to an image. It has a root, owned by root with mode 755, from the start.
#[derive(Debug)]
pub struct ImageBuilder {
    pub(super) spec: ImageSpec,
    pub(super) inodes: Vec<Inode>,
    pub(super) entries: Vec<Entry>,
    names: Vec<u8>,
    pub(super) bytes: Vec<u8>,
    pub(super) chunks: Vec<ChunkIndex>,
    pub(super) xattrs: XattrTable,
}

impl ImageBuilder {
    /// An image with nothing but its root.
    pub fn new(spec: ImageSpec) -> Result<Self, ErofsError> {
        if !(9..=12).contains(&spec.block_bits) {
            return Err(ErofsError::BlockBits(spec.block_bits));
        }
        if spec.devices.len() > usize::from(u16::MAX) {
            return Err(ErofsError::TooManyDevices(spec.devices.len()));
        }
        let too_large = |(_, blocks): &(usize, &u64)| **blocks > u64::from(u32::MAX);
        if let Some((index, blocks)) = spec.devices.iter().enumerate().find(too_large) {
            return Err(ErofsError::DeviceTooLarge { device: index + 1, blocks: *blocks });
        }
        check_time(spec.build_time)?;
        let meta = Meta { mode: 0o755, mtime: spec.build_time, ..Meta::default() };
        let root = directory(&meta);
        Ok(Self {
            spec,
            inodes: vec![root],
            entries: Vec::new(),
            names: Vec::new(),
            bytes: Vec::new(),
            chunks: Vec::new(),
            xattrs: XattrTable::default(),
        })
    }

    /// Changes the filesystem's UUID, for whoever knows it only once all is added.
    pub fn set_uuid(&mut self, uuid: [u8; 16]) {
        self.spec.uuid = uuid;
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> NodeId {
        NodeId(0)
    }

    /// Makes a set of extended attributes (name with its namespace, value), in any order, for
    /// [`Meta::xattrs`]. Equal sets are one. Namespaces: `user.`, `trusted.`, `security.` and the two
    /// POSIX ACLs (their values as `getxattr` gives them).
    pub fn xattr_set(&mut self, xattrs: &[(&[u8], &[u8])]) -> Result<XattrSetId, ErofsError> {
        self.xattrs.intern(xattrs)
    }

    /// Changes mode, owner, time and attributes of a node.
    pub fn set_meta(&mut self, id: NodeId, meta: &Meta) -> Result<(), ErofsError> {
        self.check_meta(meta)?;
        let inode = self.inodes.get_mut(id.0 as usize).ok_or(ErofsError::Node)?;
        inode.mode = inode.mode & S_IFMT | meta.mode;
        (inode.uid, inode.gid, inode.xattrs) = (meta.uid, meta.gid, meta.xattrs);
        (inode.secs, inode.nanos) = (meta.mtime.secs, meta.mtime.nanos);
        Ok(())
    }

    /// Adds a node as `name` to the directory `parent`. That no name is there twice is checked by
    /// [`layout`](Self::layout).
    pub fn add(
        &mut self,
        parent: NodeId,
        name: &[u8],
        meta: &Meta,
        node: Node,
    ) -> Result<NodeId, ErofsError> {
        self.check_name(parent, name)?;
        self.check_meta(meta)?;
        let is_directory = node == Node::Directory;
        let (kind, size, data) = self.take_content(name, node)?;
        let target = u32::try_from(self.inodes.len()).ok().filter(|id| *id != u32::MAX);
        let target = target.ok_or(ErofsError::TooLarge("so many files"))?;
        self.add_entry(parent, name, target)?;
        let mut inode = directory(meta);
        inode.mode = kind | meta.mode;
        (inode.size, inode.data) = (size, data);
        if is_directory {
            self.inodes[parent.0 as usize].links += 1;
        } else {
            inode.links = 1;
        }
        self.inodes.push(inode);
        Ok(NodeId(target))
    }

    /// Adds another name for a node that is not a directory.
    pub fn link(&mut self, parent: NodeId, name: &[u8], target: NodeId) -> Result<(), ErofsError> {
        self.check_name(parent, name)?;
        match self.inodes.get(target.0 as usize) {
            None => return Err(ErofsError::LinkTarget { name: shown(name) }),
            Some(inode) if inode.is_directory() => {
                return Err(ErofsError::LinkToDirectory { name: shown(name) });
            }
            Some(inode) if inode.links == u32::MAX => {
                return Err(ErofsError::TooLarge("so many links of one file"));
            }
            Some(_) => {}
        }
        self.add_entry(parent, name, target.0)?;
        self.inodes[target.0 as usize].links += 1;
        Ok(())
    }

    /// Gives every inode its place.
    pub fn layout(self) -> Result<Layout, ErofsError> {
        Layout::new(self)
    }

    pub(super) fn name(&self, entry: &Entry) -> &[u8] {
        let start = entry.name_start as usize;
        &self.names[start..start + usize::from(entry.name_len)]
    }

    fn add_entry(&mut self, parent: NodeId, name: &[u8], target: u32) -> Result<(), ErofsError> {
        let name_start = u32::try_from(self.names.len()).ok();
        let name_start = name_start.filter(|_| self.entries.len() < u32::MAX as usize);
        let name_start = name_start.ok_or(ErofsError::TooLarge("so many names"))?;
        let name_len = name.len() as u8; // check_name has seen to it that it fits
        self.names.extend_from_slice(name);
        self.entries.push(Entry { parent: parent.0, target, name_start, name_len });
        Ok(())
    }

    fn check_name(&self, parent: NodeId, name: &[u8]) -> Result<(), ErofsError> {
        let fail = |reason| Err(ErofsError::Name { name: shown(name), reason });
        match name {
            b"" => return fail("it is empty"),
            b"." | b".." => return fail("every directory has it already"),
            _ if name.len() > NAME_MAX => return fail("it is longer than 255 bytes"),
            _ if name.contains(&b'/') => return fail("it has a slash in it"),
            _ if name.contains(&0) => return fail("it has a NUL in it"),
            _ => {}
        }
        match self.inodes.get(parent.0 as usize) {
            Some(inode) if inode.is_directory() => Ok(()),
            _ => Err(ErofsError::Parent { name: shown(name) }),
        }
    }

    fn check_meta(&self, meta: &Meta) -> Result<(), ErofsError> {
        if meta.mode > 0o7777 {
            return Err(ErofsError::Mode(meta.mode));
        }
        if !self.xattrs.has(meta.xattrs) {
            return Err(ErofsError::XattrSet);
        }
        check_time(meta.mtime)
    }

    /// Type, size and data of a node; what it holds is taken over.
    fn take_content(&mut self, name: &[u8], node: Node) -> Result<(u16, u64, Data), ErofsError> {
        Ok(match node {
            Node::Directory => (S_IFDIR, 0, Data::Directory { first: 0, count: 0, block: 0 }),
            Node::Symlink(target) => {
                let fail = |reason| Err(ErofsError::Symlink { name: shown(name), reason });
                match target.len() {
                    0 => return fail("it is empty"),
                    len if len > TARGET_MAX => return fail("it is longer than 4095 bytes"),
                    _ if target.contains(&0) => return fail("it has a NUL in it"),
                    _ => (S_IFLNK, target.len() as u64, self.take_bytes(&target)?),
                }
            }
            Node::CharDevice { major, minor } => (S_IFCHR, 0, device(name, major, minor)?),
            Node::BlockDevice { major, minor } => (S_IFBLK, 0, device(name, major, minor)?),
            Node::Fifo => (S_IFIFO, 0, Data::None),
            Node::Socket => (S_IFSOCK, 0, Data::None),
            Node::File(FileContent::Empty) => (S_IFREG, 0, Data::None),
            Node::File(FileContent::Inline(bytes)) if bytes.is_empty() => (S_IFREG, 0, Data::None),
            Node::File(FileContent::Inline(bytes)) => {
                (S_IFREG, bytes.len() as u64, self.take_bytes(&bytes)?)
            }
            Node::File(FileContent::Contiguous { size: 0, .. }) => (S_IFREG, 0, Data::None),
            Node::File(FileContent::Contiguous { device, block, size }) => {
                (S_IFREG, size, self.take_run(name, device, block, size)?)
            }
            Node::File(FileContent::Chunks { chunk_bits, size, chunks }) => {
                (S_IFREG, size, self.take_chunks(name, chunk_bits, size, &chunks)?)
            }
        })
    }

    fn take_bytes(&mut self, bytes: &[u8]) -> Result<Data, ErofsError> {
        let start =
            u32::try_from(self.bytes.len()).map_err(|_| ErofsError::TooLarge("the data"))?;
        self.bytes.extend_from_slice(bytes);
        Ok(Data::Bytes { start, block: 0 })
    }

    /// A contiguous file: one chunk, or several of the largest size.
    fn take_run(
        &mut self,
        name: &[u8],
        device: u16,
        block: u64,
        size: u64,
    ) -> Result<Data, ErofsError> {
        let max_bits = self.spec.block_bits + MAX_CHUNK_SHIFT;
        if size <= 1 << max_bits {
            let ChunkIndex { device, block } = self.index(name, device, block, size)?;
            return Ok(Data::Run { device, block });
        }
        // all of it is in the device, so there are few chunks
        self.index(name, device, block, size)?;
        let count = size.div_ceil(1 << max_bits);
        let block_of = |n: u64| block + (n << MAX_CHUNK_SHIFT);
        let chunks: Vec<_> = (0..count).map(|n| Some((device, block_of(n)))).collect();
        self.take_chunks(name, max_bits, size, &chunks)
    }

    fn take_chunks(
        &mut self,
        name: &[u8],
        bits: u8,
        size: u64,
        chunks: &[Option<(u16, u64)>],
    ) -> Result<Data, ErofsError> {
        let fail = |reason| ErofsError::Chunks { name: shown(name), reason };
        let block_bits = self.spec.block_bits;
        if !(block_bits..=block_bits + MAX_CHUNK_SHIFT).contains(&bits) {
            return Err(fail("a chunk is a block to 2^31 blocks"));
        }
        if i64::try_from(size).is_err() {
            return Err(fail("the size is larger than a file can be"));
        }
        if chunks.len() as u64 != size.div_ceil(1 << bits) {
            return Err(fail("their number is not the size's"));
        }
        if chunks.is_empty() {
            return Ok(Data::None);
        }
        let first = u32::try_from(self.chunks.len()).map_err(|_| ErofsError::TooLarge("chunks"))?;
        let count = u32::try_from(chunks.len()).map_err(|_| ErofsError::TooLarge("chunks"))?;
        let mut indexes = Vec::with_capacity(chunks.len());
        for (n, chunk) in chunks.iter().enumerate() {
            let len = (1 << bits).min(size - ((n as u64) << bits));
            indexes.push(match chunk {
                Some((device, block)) => self.index(name, *device, *block, len)?,
                None => ChunkIndex { device: 0, block: NULL_BLOCK },
            });
        }
        self.chunks.append(&mut indexes);
        Ok(Data::Chunks { first, count, bits })
    }

    /// The index of a chunk of `len` bytes, which must be in its device.
    fn index(
        &self,
        name: &[u8],
        device: u16,
        block: u64,
        len: u64,
    ) -> Result<ChunkIndex, ErofsError> {
        let blocks = len.div_ceil(self.spec.block_size());
        let end = block.checked_add(blocks);
        let has = usize::from(device).checked_sub(1).and_then(|n| self.spec.devices.get(n));
        match (has, end, u32::try_from(block)) {
            (Some(has), Some(end), Ok(block)) if end <= *has => Ok(ChunkIndex { device, block }),
            _ => Err(ErofsError::Outside { name: shown(name), device, block, blocks }),
        }
    }
}

/// An empty directory.
fn directory(meta: &Meta) -> Inode {
    Inode {
        size: 0,
        secs: meta.mtime.secs,
        nanos: meta.mtime.nanos,
        uid: meta.uid,
        gid: meta.gid,
        xattrs: meta.xattrs,
        links: 2,
        slot: NO_SLOT,
        data: Data::Directory { first: 0, count: 0, block: 0 },
        mode: S_IFDIR | meta.mode,
    }
}

fn device(name: &[u8], major: u32, minor: u32) -> Result<Data, ErofsError> {
    let number = encode_device(major, minor);
    let number =
        number.ok_or_else(|| ErofsError::DeviceNumber { name: shown(name), major, minor })?;
    Ok(Data::Device(number))
}

fn check_time(time: Timestamp) -> Result<(), ErofsError> {
    if time.nanos < 1_000_000_000 { Ok(()) } else { Err(ErofsError::Nanoseconds(time.nanos)) }
}
