//! What can be wrong with a tree that is to become an image.

use thiserror::Error;

/// A tree that can't be an EROFS image.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ErofsError {
    #[error("a block size of 2^{0} bytes: only 2^9 (512) to 2^12 (4096) can be mounted")]
    BlockBits(u8),
    #[error("{0} devices: an image has at most 65535")]
    TooManyDevices(usize),
    #[error("device {device} has {blocks} blocks: a device has fewer than 2^32")]
    DeviceTooLarge { device: usize, blocks: u64 },
    #[error("{0} nanoseconds are not less than a second")]
    Nanoseconds(u32),
    #[error("mode {0:o} has more than permission bits")]
    Mode(u16),
    #[error("{name:?} can't be a file's name: {reason}")]
    Name { name: String, reason: &'static str },
    #[error("two entries have the name {0:?}")]
    DuplicateName(String),
    #[error("{name:?} is to be in something that is not a directory of this image")]
    Parent { name: String },
    #[error("{name:?} is to be a hard link to nothing in this image")]
    LinkTarget { name: String },
    #[error("{name:?} is to be a hard link to a directory")]
    LinkToDirectory { name: String },
    #[error("{name:?} can't have this target as a symbolic link: {reason}")]
    Symlink { name: String, reason: &'static str },
    #[error("{name:?} can't be device {major}:{minor}: at most 4095:1048575")]
    DeviceNumber { name: String, major: u32, minor: u32 },
    #[error(
        "{name:?} has {blocks} blocks at block {block} of device {device}, where there are none"
    )]
    Outside { name: String, device: u16, block: u64, blocks: u64 },
    #[error("{name:?} has impossible chunks: {reason}")]
    Chunks { name: String, reason: &'static str },
    #[error("extended attribute {name:?}: {reason}")]
    Xattr { name: String, reason: &'static str },
    #[error("a node that is not of this image")]
    Node,
    #[error("a set of extended attributes that is not of this image")]
    XattrSet,
    #[error("{0} don't fit into one image")]
    TooLarge(&'static str),
}

/// A name as an error shows it.
pub(super) fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
