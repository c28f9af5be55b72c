//! Our own index of a layer, as it is kept at a registry beside an image that brings none along. It is believed if it is
//! signed (`source/oci/artifact.rs`).
//!
//! As a blob, all numbers little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 8, 4, 4 | `hydrblob`, version, zeros |
//! | 8 | directories of the layer that have no entry of their own |
//! | 8, 8 | the length of the manifest, and of the zstd frame that holds it |
//! | | that frame: the [manifest](crate::manifest::layer) of the layer's tree |
//! | | the [access index](crate::layer::index) to the end, without the windows, which are a blob of their own |

use super::{Layer, Unusable};
use crate::layer::digest::Digest;
use crate::layer::index::{Index, WindowsBlob};
use crate::layer::span::MAX_IN_MEMORY;
use crate::manifest::layer::{Content, Kind, Node, Reader};

/// The version of the format; another one is not used.
pub const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"hydrblob";
const HEAD: usize = 40;
/// The longest blob, and the longest manifest, in bytes.
pub const MAX_BLOB: u64 = 512 << 20;
/// zstd's level for the manifest.
const LEVEL: i32 = 9;

/// What such a blob says.
#[derive(Debug)]
pub struct Own {
    pub index: Index,
    /// A manifest that was read to its end once, and is of a segment as long as the index says.
    pub manifest: Vec<u8>,
    /// Names in the tree, the bytes of all files, directories that have no entry of their own.
    pub names: u64,
    pub bytes: u64,
    pub implicit: u64,
}

/// Whether there is use in an index of a layer: parts of it can be fetched.
#[must_use]
pub fn is_of_use(index: &Index) -> bool {
    !index.is_pinned()
        && index.spans().len() > 1
        && index.spans().iter().all(|span| span.uncompressed.len() <= MAX_IN_MEMORY)
}

/// Makes the blob.
pub fn write(manifest: &[u8], index: &Index, implicit: u64) -> std::io::Result<Vec<u8>> {
    let frame = zstd::bulk::compress(manifest, LEVEL)?;
    let mut blob = Vec::with_capacity(
        HEAD + frame.len() + usize::try_from(index.windows_at()).unwrap_or_default(),
    );
    blob.extend_from_slice(MAGIC);
    blob.extend_from_slice(&VERSION.to_le_bytes());
    blob.extend_from_slice(&[0; 4]);
    for number in [implicit, manifest.len() as u64, frame.len() as u64] {
        blob.extend_from_slice(&number.to_le_bytes());
    }
    blob.extend_from_slice(&frame);
    index.write_head(&mut blob)?;
    Ok(blob)
}

/// Reads a blob, which has to have this digest and to be of this layer. `windows`: what is beside it.
pub fn read(
    blob: &[u8],
    digest: Digest,
    windows: Option<WindowsBlob>,
    layer: &Layer,
) -> Result<Own, Unusable> {
    if Digest::of(blob) != digest {
        return Err(Unusable::Digest);
    }
    let damaged = Unusable::Format("it is damaged");
    let (head, rest) = blob.split_at_checked(HEAD).ok_or_else(|| damaged.clone())?;
    let number = |at: usize| {
        let bytes = head[at..at + 8].try_into().unwrap_or_default();
        u64::from_le_bytes(bytes)
    };
    if &head[..8] != MAGIC || head[8..12] != VERSION.to_le_bytes() {
        return Err(Unusable::Format("it is of an unknown version"));
    }
    let (implicit, len, frame) = (number(16), number(24), number(32));
    let len = usize::try_from(len).ok().filter(|_| len <= MAX_BLOB);
    let len = len.ok_or(Unusable::Format("it is too long"))?;
    let frame = usize::try_from(frame).ok().and_then(|frame| rest.split_at_checked(frame));
    let (frame, access) = frame.ok_or_else(|| damaged.clone())?;
    let manifest = zstd::bulk::decompress(frame, len).map_err(|_| damaged.clone())?;
    let index = Index::parse(access)?;
    // a span that is not proved by its own bytes would be as good as its window
    if index.is_pinned() {
        return Err(Unusable::Format("it was made of another index"));
    }
    let spans = 0..index.spans().len();
    if index.windows_blob().is_none() && !index.frames_at(spans).is_empty() {
        return Err(Unusable::Format("it is without its windows"));
    }
    if let Some(needed) = index.windows_blob().filter(|_| index.windows().is_empty()) {
        if windows != Some(needed) {
            return Err(Unusable::Format("it is without its windows"));
        }
        if needed.len > MAX_BLOB {
            return Err(Unusable::Format("its windows are too long"));
        }
    }
    let index = index.into_pinned();
    let is_of_it = index.digest() == layer.digest
        && index.diff_id() == layer.diff_id
        && index.compressed_len() == layer.size;
    if !is_of_it || manifest.len() != len {
        return Err(Unusable::Format("it is of another layer"));
    }
    if index.spans().iter().any(|span| span.uncompressed.len() > MAX_IN_MEMORY) {
        return Err(Unusable::Format("a part of it is too long"));
    }
    let unreadable = |_| Unusable::Format("its tree can't be read");
    let mut reader = Reader::new(&manifest[..]).map_err(unreadable)?;
    if reader.header().segments != [index.uncompressed_len()] {
        return Err(Unusable::Format("its tree is of another layer"));
    }
    // the root
    let (mut names, mut bytes) = (1u64, 0u64);
    while let Some((_, entry)) = reader.next_entry().map_err(unreadable)? {
        match entry.node {
            Node::Inode(_, kind) if kind == Kind::WHITEOUT => {}
            Node::Inode(_, kind) => {
                names += 1;
                if let Kind::File(Content::At { size, .. } | Content::Sparse { size, .. }) = kind {
                    bytes = bytes.saturating_add(size);
                }
            }
            Node::Link(_) => {}
        }
    }
    drop(reader);
    Ok(Own { index, manifest, names, bytes, implicit })
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::builder;
    use crate::layer::indexer::Indexer;
    use crate::layer::pinned::tests::{filled, gzip, large_archive};
    use crate::layer::tests::{changes, index_by, mangle, tree};

    type Made = (Vec<u8>, Layer, Vec<u8>, Option<WindowsBlob>);

    /// A gzip layer, the blob of its index and what that needs.
    fn made() -> Made {
        let archive = large_archive();
        let layer = gzip(&archive);
        let (index, found) = index_by(Indexer::new(64 << 10), &layer, 10_000).unwrap();
        assert!(found == archive && is_of_use(&index));
        let manifest = tree(&archive).unwrap().write(Vec::new(), archive.len() as u64).unwrap();
        let of =
            Layer { digest: index.digest(), size: layer.len() as u64, diff_id: index.diff_id() };
        (layer, of, write(&manifest, &index, 3).unwrap(), index.windows_blob())
    }

    #[test]
    fn it_says_what_streaming_said() {
        let (layer, of, blob, windows) = made();
        let own = read(&blob, Digest::of(&blob), windows, &of).unwrap();
        assert!(read(&blob, Digest::of(&blob), None, &of).is_err());
        assert!(own.index.is_pinned() && own.implicit == 3);
        let truth = tree(&large_archive()).unwrap();
        let len = own.index.uncompressed_len();
        assert!(own.manifest == truth.write(Vec::new(), len).unwrap());
        assert_eq!(own.bytes, truth.summary().bytes);
        // the windows are another blob
        let (index, _) = index_by(Indexer::new(64 << 10), &layer, 10_000).unwrap();
        assert!(own.index.windows().is_empty() && !index.windows().is_empty());
        assert_eq!(own.index.windows_blob(), index.windows_blob());
        let mut file = Vec::new();
        own.index.write_head(&mut file).unwrap();
        file.extend_from_slice(index.windows());
        let (segment, _) = filled(&Index::parse(&file).unwrap(), &layer);
        assert_eq!(Digest::of(&segment), of.diff_id);
        assert_eq!(read(&blob, Digest::of(b""), windows, &of).unwrap_err(), Unusable::Digest);
        let other = Layer { diff_id: Digest::of(b""), ..of };
        assert!(read(&blob, Digest::of(&blob), windows, &other).is_err());
    }

    static MADE: LazyLock<Made> = LazyLock::new(made);

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn what_is_damaged_is_refused_or_sound(changes in changes(), cut in 0usize..4) {
            let (_, of, blob, windows) = &*MADE;
            let mut blob = blob.clone();
            mangle(&mut blob, &changes, cut, false);
            // whoever has signed it may be mistaken
            if let Ok(own) = read(&blob, Digest::of(&blob), *windows, of) {
                builder::layer::image(&own.manifest[..])
                    .map_err(|e| TestCaseError::fail(format!("{e}")))?;
                prop_assert_eq!(own.index.diff_id(), of.diff_id);
            }
        }
    }
}
