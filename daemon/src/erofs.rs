//! The tree's image: a metadata-only EROFS filesystem, written by us.
//!
//! [`ImageBuilder`] takes a tree node by node, [`ImageBuilder::layout`] gives each inode its place,
//! [`Layout::write`] streams the image out. What regular files hold is mostly not in the image: their
//! chunks point into *devices*, which are the segments. The same input gives the same bytes.
//!
//! # What is on the disk
//!
//! Everything is little-endian; a *block* is `1 << block_bits` bytes (512 to 4096).
//!
//! | where | what |
//! |---|---|
//! | 0 | 1024 zero bytes |
//! | 1024 | superblock, 128 bytes, with a CRC32C over itself and the rest of its block |
//! | 1152 | device table: 128 bytes for each device, its length in blocks |
//! | next block | shared extended attributes: each entry that more than one inode has, once |
//! | next block | inodes in slots of 32 bytes; behind each its attributes, then its chunk indexes or its tail |
//! | next block | whole blocks of directories, of long symbolic links and of data kept in the image |
//!
//! - An inode's number (`nid`, what `stat` shows) is its offset in slots of 32 bytes from the block
//!   that `meta_blkaddr` names. That is the block before the first inode, so that no inode has
//!   number 0. The root comes first: the superblock has 16 bits for its number.
//! - Inodes are *compact* (32 bytes) or *extended* (64). A compact one has no time of its own (it shows
//!   the superblock's), 16 bits for owner, group and link count, and 32 for the size.
//! - Directories are blocks of sorted names: the entries (12 bytes each), then the names.
//!   `.` and `..` are sorted in among the others. The last, partial block lies behind the inode
//!   (the *inline tail*) if both fit into one block; symbolic links and small data do the same.
//! - A regular file outside the image is *chunk-based*: for each chunk an 8-byte index with
//!   the device (from 1) and the block there, or none for a hole. A contiguous file has one
//!   index: chunks may be as large as `block << 31`.
//! - Inodes lie in tree order: a directory, what is in it except directories, then each of its
//!   subdirectories in the same way. What inline tails leave free in a block is used by inodes that follow.
//!
//! # Limits
//!
//! A block address has 32 bits, in the image and in each device, so a device has fewer than 2^32 blocks (16 TiB
//! of 4096 bytes, 2 TiB of 512). With up to 65535 devices this is 48 bits of block
//! address without the kernel's newer (and still experimental) 48-bit layout. All lists of names together
//! have less than 4 GiB, all data kept in the image likewise, and inodes use less than 128 GiB.
//!
//! # For whoever mounts it
//!
//! Name *each* device, in the table's order (`device=` once for each, or `fsconfig`): with none the kernel takes
//! the image for a flat one and reads file content from the image itself. Bytes of a device between a
//! file's end and the end of its block should be zero: `mmap` shows them.
//!
//! # Sources
//!
//! The kernel's `Documentation/filesystems/erofs.rst`, `fs/erofs/erofs_fs.h` (structures), and what `super.c`,
//! `inode.c`, `data.c`, `dir.c`, `namei.c` and `xattr.c` there make of them. Features used: `SB_CHKSUM`, `MTIME`;
//! `CHUNKED_FILE`, `DEVICE_TABLE` (Linux 5.16), blocks smaller than a page (6.4), file-backed mounts (6.12).

mod builder;
mod dir;
mod error;
mod layout;
mod ondisk;
#[cfg(test)]
mod tests;
mod write;
mod xattr;

pub use builder::ImageBuilder;
pub use error::ErofsError;
pub use layout::Layout;
pub use xattr::XattrSetId;

/// What holds for the whole image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSpec {
    /// The block size in bytes is 2 to this power: 9 (512 bytes) to 12 (4096).
    pub block_bits: u8,
    /// The filesystem's UUID. An overlay's upper directory refers to it: it should be made from the
    /// tree's identity, not at random.
    pub uuid: [u8; 16],
    /// The time that compact inodes show; where most files have the same time, this one.
    pub build_time: Timestamp,
    /// The length of each device in blocks. Device ids count from 1: the first is device 1.
    pub devices: Vec<u64>,
}

impl ImageSpec {
    /// The block size in bytes.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        1 << self.block_bits
    }
}

/// A point in time: seconds since the epoch (may be negative) and nanoseconds after that.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    pub secs: i64,
    /// Less than 1,000,000,000.
    pub nanos: u32,
}

/// What every inode has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits, with set-user-id, set-group-id and sticky: at most `0o7777`.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Shown as atime and ctime too.
    pub mtime: Timestamp,
    /// From [`ImageBuilder::xattr_set`]; the default is none.
    pub xattrs: XattrSetId,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Directory,
    File(FileContent),
    /// A symbolic link's target: 1 to 4095 bytes without NUL.
    Symlink(Vec<u8>),
    /// Major below 2^12, minor below 2^20.
    CharDevice {
        major: u32,
        minor: u32,
    },
    /// Major below 2^12, minor below 2^20.
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
}

impl Node {
    /// What overlayfs takes for "deleted here".
    pub const WHITEOUT: Self = Self::CharDevice { major: 0, minor: 0 };
}

/// The attribute that makes a directory hide the lower layers' one of the same name, to overlayfs.
pub const OPAQUE_XATTR: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");

/// What a regular file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileContent {
    Empty,
    /// Data kept in the image itself: for a few small files.
    Inline(Vec<u8>),
    /// `size` bytes in one piece, from block `block` of device `device` (from 1).
    Contiguous {
        device: u16,
        block: u64,
        size: u64,
    },
    /// `size` bytes in chunks of `1 << chunk_bits` bytes (a block, to a block times 2^31), each at a
    /// (device, block) or, if none, a hole. The last chunk may be used in part.
    Chunks {
        chunk_bits: u8,
        size: u64,
        chunks: Vec<Option<(u16, u64)>>,
    },
}

/// An inode of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u32);
