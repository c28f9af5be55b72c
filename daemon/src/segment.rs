//! Segments: where content is kept.
//!
//! A segment is one sparse file. A hole is "not fetched", data is "fetched"; the file's own extent
//! map is the truth about what is present. Beside it lies its [extent index](extents), which says
//! which object belongs where and is written once, when the segment is laid out.

pub mod extents;
pub mod frame;
pub mod pack;
pub mod presence;

use serde::{Deserialize, Serialize};

/// What the bytes of a segment are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SegmentKind {
    /// Objects as files hold them: each starts at a multiple of [`BLOCK`](crate::range::BLOCK), its
    /// last block is filled up with zeros.
    Data,
    /// A git pack whose entries are made of zlib *stored* blocks, so that the place of every byte is
    /// known from the sizes of the objects alone. The content of an entry comes from the data
    /// segment that the extent names.
    Pack,
}

/// The largest size in bytes to which objects are laid together in one segment. An object that is
/// larger has a segment of its own.
pub const MAX_PACKED_SIZE: u64 = 64 << 20;
