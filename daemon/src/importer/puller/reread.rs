//! What the archive of a layer says that was filled by an index: the index alone was believed until then.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use anyhow::Context;

use super::{LAYER_FDS, write_manifest};
use crate::layer::index::Index;
use crate::layer::span::{Proof, TRAILER};
use crate::layer::tar::{Entry, EntryKind, TarReader};
use crate::layer::tree::{Tree, TreeBuilder};
use crate::queue::wire::image::Shown;

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// A part of the archive: where it is there and in the segment, and its length in bytes.
#[derive(Debug, Clone, Copy)]
struct Part {
    archive: u64,
    segment: u64,
    len: u64,
}

/// Writes the manifest of the segment's archive.
pub fn read(files: [OwnedFd; LAYER_FDS]) -> anyhow::Result<Shown> {
    let [segment, access, manifest] = files.map(File::from);
    let index = Index::read(access).context("can't read the layer's index")??;
    let tree = tree_of(&index, &segment)?;
    write_manifest(&tree, index.uncompressed_len(), manifest)
}

pub fn tree_of(index: &Index, segment: &File) -> anyhow::Result<Tree> {
    let parts = parts(index, segment)?;
    let mut reader = TarReader::default();
    let mut tree = TreeBuilder::default();
    let mut take = |entry| place(&parts, entry).and_then(|entry| Ok(tree.add(entry)?));
    let mut piece = vec![0; PIECE];
    for part in &parts {
        let mut at = 0;
        while at < part.len {
            let wanted = usize::try_from(part.len - at).unwrap_or(PIECE).min(PIECE);
            let wanted = &mut piece[..wanted];
            segment.read_exact_at(wanted, part.segment + at).context("can't read the segment")?;
            reader.push(wanted, &mut take)?;
            at += wanted.len() as u64;
        }
    }
    reader.finish()?;
    Ok(tree.finish())
}

/// The archive is in so many parts of the segment: between them is room that its headers did not take.
fn parts(index: &Index, segment: &File) -> anyhow::Result<Vec<Part>> {
    let mut parts = Vec::with_capacity(index.spans().len());
    let mut archive = 0u64;
    for span in index.spans() {
        let (at, mut len) = (span.uncompressed.offset(), span.uncompressed.len());
        if let Proof::Start(_) = span.proof {
            let mut trailer = [0; TRAILER as usize];
            let trailer_at = span.uncompressed.end().saturating_sub(TRAILER);
            segment.read_exact_at(&mut trailer, trailer_at).context("can't read the segment")?;
            let came = u64::from_le_bytes(trailer);
            anyhow::ensure!(came <= len.saturating_sub(TRAILER), "its headers are too long");
            len = came;
        }
        parts.push(Part { archive, segment: at, len });
        archive += len;
    }
    Ok(parts)
}

/// Turns the places of a file's data in the archive into those in the segment.
fn place(parts: &[Part], mut entry: Entry) -> anyhow::Result<Entry> {
    let EntryKind::File(data) = &mut entry.kind else { return Ok(entry) };
    for piece in data.pieces.iter_mut().filter(|piece| piece.len > 0) {
        let first = in_segment(parts, piece.at);
        let last = piece.at.checked_add(piece.len - 1).and_then(|last| in_segment(parts, last));
        let (first, last) = first.zip(last).context("a file is outside the archive")?;
        anyhow::ensure!(last - first == piece.len - 1, "a file is not in one piece");
        piece.at = first;
    }
    Ok(entry)
}

fn in_segment(parts: &[Part], at: u64) -> Option<u64> {
    let number = parts.partition_point(|part| part.archive <= at).checked_sub(1)?;
    // of several that begin there, the last one is not empty
    let part = parts.get(number).filter(|part| at - part.archive < part.len)?;
    Some(part.segment + (at - part.archive))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::builder::segment::same::difference;
    use crate::layer::pinned::{Pinned, tests as blobs};

    fn manifest(tree: &Tree, len: u64) -> Vec<u8> {
        tree.write(Vec::new(), len).unwrap()
    }

    /// The segment of an index, filled; and how what the index says differs from what is there.
    fn differ(pinned: &Pinned, segment: &[u8]) -> Option<String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(segment).unwrap();
        let truth = tree_of(&pinned.index, &file).unwrap();
        let len = pinned.index.uncompressed_len();
        difference(&manifest(&pinned.tree, len)[..], &manifest(&truth, len)[..]).unwrap()
    }

    #[test]
    fn the_archive_says_what_a_true_index_says() {
        for (blob, pinned) in blobs::all() {
            let (segment, _) = blobs::filled(&pinned.index, &blob);
            assert_eq!(differ(&pinned, &segment), None);
        }
    }
}
