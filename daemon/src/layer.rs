//! Layers of container images.
//!
//! A layer is a tar archive, mostly compressed. Its *segment* is the archive uncompressed, byte for byte;
//! the tree's image points into it. Here is all that this needs and that does no I/O:
//!
//! - [`indexer`]: the compressed layer, streamed once, into its uncompressed bytes, both digests and an
//!   [`Index`](index::Index). How it is compressed is found by looking.
//! - [`tar`]: the uncompressed bytes, streamed, into entries that know where in the archive their data is.
//! - [`tree`]: entries into a tree: later ones replace earlier ones, whiteouts become overlayfs' own, hard links
//!   are resolved. It writes the [manifest](crate::manifest::layer) from which the builder makes
//!   the image.
//! - [`index`]: which [`Span`](span::Span)s a range of the segment needs, and which bytes of the compressed
//!   layer they are.
//! - [`span`]: compressed bytes into verified bytes of the segment.
//!
//! The first contact with a layer, in full:
//!
//! ```
//! use hydrant_daemon::layer::{indexer::Indexer, tar::TarReader, tree::TreeBuilder};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let compressed = [[0u8; 512], [0; 512]];
//! let mut segment = Vec::new();
//! let (mut indexer, mut reader, mut tree) =
//!     (Indexer::default(), TarReader::default(), TreeBuilder::default());
//! for chunk in compressed {
//!     indexer.push(&chunk, &mut |bytes: &[u8]| {
//!         segment.extend_from_slice(bytes);
//!         reader.push(bytes, &mut |entry| tree.add(entry))
//!     })?;
//! }
//! let index = indexer.finish(&mut |bytes: &[u8]| {
//!     segment.extend_from_slice(bytes);
//!     reader.push(bytes, &mut |entry| tree.add(entry))
//! })?;
//! reader.finish()?;
//! // index.diff_id() and index.digest() are to be compared with what the image says.
//! let tree = tree.finish();
//! let manifest = tree.write(Vec::new(), index.uncompressed_len())?;
//! # Ok(())
//! # }
//! ```
//!
//! # Formats and what they give
//!
//! | format | spans | window |
//! |---|---|---|
//! | plain tar | pieces of [`SPAN`](indexer::SPAN) bytes | none |
//! | gzip | from one end of a deflate block to another, about as long; several small members share one | 32 KiB, but for a span that starts with a member |
//! | zstd | whole frames, several small ones together; one frame, one span, however long | none |
//!
//! A span of the last kind can't be decoded in part, so a layer of one zstd frame is lazy only as a whole.

pub mod digest;
mod gunzip;
pub mod index;
pub mod indexer;
pub mod names;
pub mod pinned;
pub mod span;
pub mod tar;
#[cfg(test)]
pub(crate) mod tests;
pub mod tree;
mod window;
