//! The structures of the format (`fs/erofs/erofs_fs.h`), as numbers and bytes.

/// Where the superblock is, in bytes.
pub const SUPER_OFFSET: usize = 1024;
/// Superblock without extension slots, in bytes.
pub const SUPER_SIZE: usize = 128;
pub const MAGIC: u32 = 0xe0f5_e1e2;

pub const COMPAT_SB_CHKSUM: u32 = 0x1;
pub const COMPAT_MTIME: u32 = 0x2;
pub const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
pub const INCOMPAT_DEVICE_TABLE: u32 = 0x8;

/// One device in the device table, in bytes.
pub const DEVICE_SLOT_SIZE: usize = 128;
/// Inodes lie at multiples of this, in bytes; an inode's number counts these.
pub const SLOT_SIZE: u64 = 32;
pub const COMPACT_INODE_SIZE: u64 = 32;
pub const EXTENDED_INODE_SIZE: u64 = 64;
/// What `st_mode` has besides permissions.
pub const S_IFMT: u16 = 0o170_000;
pub const S_IFIFO: u16 = 0o010_000;
pub const S_IFCHR: u16 = 0o020_000;
pub const S_IFDIR: u16 = 0o040_000;
pub const S_IFBLK: u16 = 0o060_000;
pub const S_IFREG: u16 = 0o100_000;
pub const S_IFLNK: u16 = 0o120_000;
pub const S_IFSOCK: u16 = 0o140_000;

/// How an inode's data is laid out, with the bit for an extended inode, as in `i_format`.
pub const LAYOUT_PLAIN: u16 = 0;
pub const LAYOUT_INLINE: u16 = 2;
pub const LAYOUT_CHUNKED: u16 = 4;
pub const FORMAT_EXTENDED: u16 = 1;

/// Chunk indexes with device ids; the low five bits are the chunk size's power, less the block's.
pub const CHUNK_FORMAT_INDEXES: u32 = 0x20;
/// The most that those five bits can say.
pub const MAX_CHUNK_SHIFT: u8 = 31;
pub const CHUNK_INDEX_SIZE: u64 = 8;
/// No block: a hole, or no data.
pub const NULL_BLOCK: u32 = u32::MAX;

/// A directory entry without its name, in bytes.
pub const DIRENT_SIZE: usize = 12;
/// The longest name in bytes.
pub const NAME_MAX: usize = 255;

/// The kernel's `FT_*` for a mode.
pub fn file_type(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => 1,
        S_IFDIR => 2,
        S_IFCHR => 3,
        S_IFBLK => 4,
        S_IFIFO => 5,
        S_IFSOCK => 6,
        S_IFLNK => 7,
        _ => 0,
    }
}

/// The superblock's fields that differ from image to image.
#[derive(Debug)]
pub struct SuperBlock {
    pub block_bits: u8,
    pub root_nid: u16,
    pub inodes: u64,
    pub epoch: i64,
    pub nanos: u32,
    /// Length of the image in blocks.
    pub blocks: u32,
    pub meta_block: u32,
    pub xattr_block: u32,
    pub uuid: [u8; 16],
    pub incompat: u32,
    pub devices: u16,
}

impl SuperBlock {
    /// The superblock's bytes, its checksum still 0.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SUPER_SIZE);
        out.extend(MAGIC.to_le_bytes());
        out.extend(0u32.to_le_bytes()); // checksum
        out.extend((COMPAT_SB_CHKSUM | COMPAT_MTIME).to_le_bytes());
        out.extend([self.block_bits, 0]); // no extension slots
        out.extend(self.root_nid.to_le_bytes());
        out.extend(self.inodes.to_le_bytes());
        out.extend(self.epoch.to_le_bytes());
        out.extend(self.nanos.to_le_bytes());
        out.extend(self.blocks.to_le_bytes());
        out.extend(self.meta_block.to_le_bytes());
        out.extend(self.xattr_block.to_le_bytes());
        out.extend(self.uuid);
        out.extend([0; 16]); // volume name
        out.extend(self.incompat.to_le_bytes());
        out.extend(0u16.to_le_bytes()); // no compression
        out.extend(self.devices.to_le_bytes());
        let table = if self.devices == 0 { 0 } else { device_table_slot() };
        out.extend(table.to_le_bytes());
        out.resize(SUPER_SIZE, 0);
        out
    }
}

/// Where the device table is, in units of its slots: right behind the superblock.
const fn device_table_slot() -> u16 {
    ((SUPER_OFFSET + SUPER_SIZE) / DEVICE_SLOT_SIZE) as u16
}

/// Where in the superblock its checksum is.
pub const CHECKSUM_OFFSET: usize = 4;

/// The checksum of a superblock: CRC32C, reflected, without the final inversion.
pub fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| {
        let index = (crc ^ u32::from(*byte)) & 0xff;
        (0..8).fold(index, |c, _| (c >> 1) ^ (if c & 1 == 1 { 0x82f6_3b78 } else { 0 }))
            ^ (crc >> 8)
    })
}

/// What `i_u` of a character or block device says; `None` if the numbers are too large.
pub fn encode_device(major: u32, minor: u32) -> Option<u32> {
    let fits = major < 1 << 12 && minor < 1 << 20;
    fits.then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// An inode as it is written, whichever its size.
#[derive(Debug)]
pub struct RawInode {
    pub extended: bool,
    pub layout: u16,
    /// Length of the attributes behind it in bytes.
    pub xattr_len: u64,
    pub mode: u16,
    pub size: u64,
    /// First block, device number or chunk format.
    pub union: u32,
    /// A number for programs that can't take 64-bit ones.
    pub ino: u32,
    pub uid: u32,
    pub gid: u32,
    pub secs: i64,
    pub nanos: u32,
    pub links: u32,
}

impl RawInode {
    /// Appends the inode. What a compact inode has no room for must fit: see `Inode::is_compact`.
    pub fn append_to(&self, out: &mut Vec<u8>) {
        let format = self.layout << 1 | if self.extended { FORMAT_EXTENDED } else { 0 };
        out.extend(format.to_le_bytes());
        out.extend(xattr_count(self.xattr_len).to_le_bytes());
        out.extend(self.mode.to_le_bytes());
        if self.extended {
            out.extend([0; 2]);
            out.extend(self.size.to_le_bytes());
            out.extend(self.union.to_le_bytes());
            out.extend(self.ino.to_le_bytes());
            out.extend(self.uid.to_le_bytes());
            out.extend(self.gid.to_le_bytes());
            out.extend(self.secs.to_le_bytes());
            out.extend(self.nanos.to_le_bytes());
            out.extend(self.links.to_le_bytes());
            out.extend([0; 16]);
        } else {
            out.extend((self.links as u16).to_le_bytes());
            out.extend((self.size as u32).to_le_bytes());
            out.extend([0; 4]);
            out.extend(self.union.to_le_bytes());
            out.extend(self.ino.to_le_bytes());
            out.extend((self.uid as u16).to_le_bytes());
            out.extend((self.gid as u16).to_le_bytes());
            out.extend([0; 4]);
        }
    }
}

/// The attributes' header in bytes.
pub const XATTR_HEADER_SIZE: u64 = 12;
/// The most attributes behind an inode, header included, in bytes: a 16-bit count of words.
pub const MAX_XATTR_LEN: u64 = XATTR_HEADER_SIZE + 4 * (u16::MAX as u64 - 1);

/// `i_xattr_icount`: 0 for none, else 1 and the words after the header.
fn xattr_count(len: u64) -> u16 {
    if len == 0 { 0 } else { ((len - XATTR_HEADER_SIZE) / 4 + 1) as u16 }
}

/// One chunk of a file. Holes are device 0 and [`NULL_BLOCK`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkIndex {
    pub device: u16,
    pub block: u32,
}

impl ChunkIndex {
    pub fn bytes(self) -> [u8; 8] {
        let ([d0, d1], [b0, b1, b2, b3]) = (self.device.to_le_bytes(), self.block.to_le_bytes());
        [0, 0, d0, d1, b0, b1, b2, b3]
    }
}
