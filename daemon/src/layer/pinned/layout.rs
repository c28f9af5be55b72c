//! Spans one behind the other.

use super::{Layer, Pinned, Unusable};
use crate::layer::digest::Digest;
use crate::layer::index::Maker;
use crate::layer::indexer::{Compression, MAX_LAYER};
use crate::layer::span::{Codec, MAX_IN_MEMORY, Proof, Span};
use crate::layer::tar::Entry;
use crate::layer::tree::TreeBuilder;
use crate::range::ByteRange;

/// The name of a file behind those that are to be fetched first (stargz-snapshotter, `docs/estargz.md`).
const LANDMARK: &[u8] = b".prefetch.landmark";

/// The segment as it is laid out.
#[derive(Debug, Default)]
pub struct Layout {
    maker: Maker,
    /// Where the next span begins in the segment and in the blob.
    pub at: u64,
    pub compressed: u64,
    before: u64,
    /// Where the part ends that is to be fetched first, if anything says so.
    first: u64,
}

impl Layout {
    /// Where the last span's compressed bytes begin.
    pub fn before(&self) -> u64 {
        self.before
    }

    /// The next span is of the content of `item`.
    pub fn begin(&mut self, item: &Entry) {
        if item.path == LANDMARK {
            self.first = self.at;
        }
    }

    /// Adds a span of `len` bytes, whose compressed bytes end at `end`.
    pub fn span(
        &mut self,
        codec: Codec,
        len: u64,
        end: u64,
        digest: Digest,
        proof: Proof,
    ) -> Result<(), Unusable> {
        self.windowed(codec, len, end, digest, proof, &[])
    }

    /// The same, with what comes before it.
    pub fn windowed(
        &mut self,
        codec: Codec,
        len: u64,
        end: u64,
        digest: Digest,
        proof: Proof,
        window: &[u8],
    ) -> Result<(), Unusable> {
        let to = self.at.checked_add(len).filter(|to| *to <= MAX_LAYER);
        let to = to.ok_or(Unusable::Format("the layer is too large"))?;
        if end <= self.compressed {
            return Err(Unusable::Format("its offsets are not in order"));
        }
        if len > MAX_IN_MEMORY || end - self.compressed > 2 * MAX_IN_MEMORY {
            return Err(Unusable::Format("a part of it is too long"));
        }
        let uncompressed = ByteRange::between(self.at, to);
        let compressed = ByteRange::between(self.compressed, end);
        self.maker.add(Span { uncompressed, compressed, codec, digest, proof }, window)?;
        (self.before, self.at, self.compressed) = (self.compressed, to, end);
        Ok(())
    }

    pub fn finish(self, compression: Compression, layer: &Layer, tree: TreeBuilder) -> Pinned {
        let Layer { digest, size, diff_id } = *layer;
        let index = self.maker.pinned(compression, size, digest, diff_id);
        Pinned { index, tree: tree.finish(), first: self.first }
    }
}
