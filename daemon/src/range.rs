//! Ranges of bytes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The unit in which a segment holds content: a block is absent (a hole) or right. Also the page
/// size that the kernel rounds the ranges of pre-content events to.
pub const BLOCK: u64 = 4096;

/// `len` bytes from `offset`; both in bytes. `offset + len` never overflows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ByteRange {
    offset: u64,
    len: u64,
}

impl ByteRange {
    /// A range; its length is cut short where its end would not fit in 64 bits.
    #[must_use]
    pub fn new(offset: u64, len: u64) -> Self {
        Self { offset, len: len.min(u64::MAX - offset) }
    }

    /// The range from `start` to `end`, empty where `end` is not after `start`.
    #[must_use]
    pub fn between(start: u64, end: u64) -> Self {
        Self { offset: start, len: end.saturating_sub(start) }
    }

    #[must_use]
    pub fn offset(self) -> u64 {
        self.offset
    }

    #[must_use]
    pub fn len(self) -> u64 {
        self.len
    }

    /// The first byte after the range.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset + self.len
    }

    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// What this range has in common with a file of `size` bytes.
    #[must_use]
    pub fn clamp(self, size: u64) -> Self {
        Self::between(self.offset.min(size), self.end().min(size))
    }

    /// The smallest range of whole [`BLOCK`]s that has all of this one.
    #[must_use]
    pub fn to_blocks(self) -> Self {
        let start = self.offset / BLOCK * BLOCK;
        Self::between(start, self.end().checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX))
    }

    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_out_to_blocks() {
        assert_eq!(ByteRange::new(5000, 100).to_blocks(), ByteRange::new(4096, 4096));
        assert_eq!(ByteRange::new(4095, 2).to_blocks(), ByteRange::new(0, 8192));
        assert_eq!(ByteRange::new(4096, 0).to_blocks(), ByteRange::new(4096, 0));
    }

    #[test]
    fn clamps_to_a_file() {
        assert_eq!(ByteRange::new(0, 8192).clamp(5000), ByteRange::new(0, 5000));
        assert!(ByteRange::new(8192, 10).clamp(5000).is_empty());
        assert_eq!(ByteRange::new(u64::MAX, 5).len(), 0);
    }
}
