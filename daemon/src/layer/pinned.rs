//! Indexes that an image brings along, so that its layers need not be streamed before they are of use.
//!
//! Each of these formats compiles to the model that an own index is of: [`Span`](super::span::Span)s and a tree.
//!
//! # Which index is believed
//!
//! One that the image itself pins: the manifest, whose digest everything hangs on, has the index's digest in an annotation
//! ([`Pin::of`]), and the index has the digest of each piece of content. An index that is merely found at the registry,
//! beside the image or at the end of a blob, is somebody's claim and is not used (but for the two below); nor is a pinned one with another digest.
//! The layer is then streamed, as any other.
//!
//! | format | the image pins | proved before a reader sees it | proved when all is here |
//! |---|---|---|---|
//! | eStargz | the TOC (annotation `…stargz/toc.digest`) | each chunk of each file, and what the tree says, by the TOC | the archive, by `diff_id` |
//! | SOCI, version 2 | the index of the layers' zTOCs (annotation of the manifest `…soci.index-digest`), it the zTOC | the compressed bytes, and what the tree says | the archive, by `diff_id` |
//! | SOCI, version 1, if switched on | nothing: whoever can push to the repository says what is in the layer | as version 2 | the archive, by `diff_id` |
//! | our own ([`own`]), signed | nothing: who has signed it has seen the archive, and names image and index | each byte of the archive, and what the tree says | the archive, by `diff_id` |
//! | zstd:chunked | TOC (`…zstd-chunked.manifest-checksum`) and, in it, the headers of the archive | each byte of the archive | the archive, by `diff_id` |
//!
//! What these say of trees is taken as the archive's own entries are ([`TreeBuilder`](super::tree::TreeBuilder)): the same
//! rules, the same refusals.
//!
//! # The segment
//!
//! zstd:chunked and SOCI tell where each byte of the archive is, so the segment is the archive. eStargz does not tell how long the
//! headers are that stand between two files, so the segment has room for more than are expected
//! ([`Proof::Start`](super::span::Proof::Start)); without that room it is the archive. A layer whose headers need more room
//! shows its files all the same; only `diff_id` can't be proved then. The TOC has times in whole seconds.

pub mod estargz;
mod flat;
mod layout;
pub mod own;
pub mod soci;
#[cfg(test)]
pub(crate) mod tests;
mod time;
mod toc;
pub mod zstd_chunked;

use std::collections::BTreeMap;

use thiserror::Error;

use super::digest::Digest;
use super::gunzip::Gunzip;
use super::index::{Index, IndexError, WindowsBlob};
use super::span::{MAX_IN_MEMORY, PIECE};
use super::tar::TarError;
use super::tree::{Tree, TreeError};

/// The longest table of contents, compressed or not, in bytes.
pub const MAX_TOC: u64 = 96 << 20;

/// What the image says of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Of the blob.
    pub digest: Digest,
    /// The length of the blob in bytes.
    pub size: u64,
    /// Of the archive in it.
    pub diff_id: Digest,
}

/// An index that a manifest pins, or that stands beside the image and is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pin {
    Estargz {
        toc: Digest,
    },
    ZstdChunked(zstd_chunked::Places),
    /// A blob of its own, of so many bytes.
    Soci {
        ztoc: Digest,
        size: u64,
        /// 2, or 1: not by the image, but by somebody who can push there.
        version: u8,
    },
    /// Not by the image, but by somebody who is trusted: a blob of its own, of so many bytes.
    Own {
        blob: Digest,
        size: u64,
        /// What the index needs, and is beside it.
        windows: Option<WindowsBlob>,
    },
}

/// What an index says.
#[derive(Debug)]
pub struct Pinned {
    pub index: Index,
    pub tree: Tree,
    /// So many bytes at the segment's start are to be fetched first, as who has made the layer says.
    pub first: u64,
}

/// Why an index is not used. The layer may be good.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unusable {
    #[error("it is not the one that the image names")]
    Digest,
    #[error("{0}")]
    Format(&'static str),
    #[error("it can't be read: {0}")]
    Json(String),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Index(#[from] IndexError),
}

impl From<TarError> for Unusable {
    fn from(error: TarError) -> Self {
        Self::Tree(error.into())
    }
}

impl Pin {
    /// What the annotations of a layer's descriptor pin.
    #[must_use]
    pub fn of(annotations: &BTreeMap<String, String>) -> Option<Self> {
        let get = |name: &str| annotations.get(name).map(String::as_str);
        if let Some(places) = zstd_chunked::Places::of(&get) {
            return Some(Self::ZstdChunked(places));
        }
        let toc = get(estargz::TOC_DIGEST)?.parse().ok()?;
        Some(Self::Estargz { toc })
    }
}

/// All that gzip members make, at most `limit` bytes.
fn gunzip(input: &[u8], limit: u64) -> Result<Vec<u8>, Unusable> {
    gunzip_from(Gunzip::new().map_err(Unusable::Format)?, input, limit)
}

/// The same, from wherever this one has come to.
fn gunzip_from(mut gunzip: Gunzip, mut input: &[u8], limit: u64) -> Result<Vec<u8>, Unusable> {
    let (mut out, mut piece) = (Vec::new(), vec![0; PIECE]);
    loop {
        let step = gunzip.step(input, &mut piece).map_err(Unusable::Format)?;
        input = &input[step.consumed..];
        out.extend_from_slice(&piece[..step.produced]);
        if out.len() as u64 > limit {
            return Err(Unusable::Format("it is too long"));
        }
        if step.consumed == 0 && step.produced == 0 {
            break;
        }
    }
    if input.is_empty() && gunzip.is_at_end() {
        Ok(out)
    } else {
        Err(Unusable::Format("it ends too early"))
    }
}

/// A chunk has to be decoded in memory.
fn check_chunk(len: u64) -> Result<(), Unusable> {
    if len <= MAX_IN_MEMORY / 2 { Ok(()) } else { Err(Unusable::Format("a chunk is too long")) }
}
