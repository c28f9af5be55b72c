//! eStargz (stargz-snapshotter, `docs/estargz.md`): gzip members, one for each chunk of each file.
//!
//! A member has a chunk of a file and, behind the last one of a file, the headers up to the next file's content. The last
//! entry of the archive, `stargz.index.json` in a member of its own, is the table of contents. An empty member of 51 bytes
//! ends the blob and says where that is; it is not believed, but what it leads to has a digest.

use super::layout::Layout;
use super::toc::Toc;
use super::{Layer, MAX_TOC, Pinned, Unusable, gunzip};
use crate::layer::digest::Digest;
use crate::layer::indexer::Compression;
use crate::layer::span::{Codec, Proof, TRAILER};
use crate::layer::tar::{Data, Entry, EntryKind, Piece, TarReader};
use crate::layer::tree::TreeBuilder;

/// The annotation of a layer that pins its table of contents.
pub const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// The name of the table of contents in the archive.
const TOC_NAME: &[u8] = b"stargz.index.json";
/// The length of what ends a blob, in bytes.
pub const FOOTER_LEN: u64 = 51;
const BLOCK: u64 = 512;

/// Where the table of contents begins in a blob of `size` bytes that ends with `footer`.
pub fn toc_at(footer: &[u8], size: u64) -> Result<u64, Unusable> {
    let none = Unusable::Format("the blob does not end as eStargz does");
    let fixed: &[u8; 16] = &[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0];
    let Some(footer) = footer.last_chunk::<{ FOOTER_LEN as usize }>() else { return Err(none) };
    // the system's number (byte 9) is of no meaning
    let is_fixed = footer.iter().zip(fixed).enumerate().all(|(n, (a, b))| n == 9 || a == b);
    let number = std::str::from_utf8(&footer[16..32]).unwrap_or_default();
    if !is_fixed || &footer[32..38] != b"STARGZ" || number.starts_with('+') {
        return Err(none);
    }
    let at = u64::from_str_radix(number, 16).map_err(|_| none.clone())?;
    let len = size.checked_sub(at).ok_or(none)?;
    if len <= FOOTER_LEN || len > MAX_TOC || at == 0 {
        return Err(Unusable::Format("its table of contents has an impossible length"));
    }
    Ok(at)
}

/// Reads the index. `end` is the end of the blob, from `toc_at` on.
pub fn read(end: &[u8], toc_at: u64, toc: Digest, layer: &Layer) -> Result<Pinned, Unusable> {
    if toc_at.checked_add(end.len() as u64) != Some(layer.size) {
        return Err(Unusable::Format("it is not the end of the blob"));
    }
    let tail = gunzip(end, MAX_TOC)?;
    let mut own: Vec<Entry> = Vec::new();
    let mut reader = TarReader::default();
    reader.push(&tail, &mut |entry| {
        own.push(entry);
        Ok::<_, Unusable>(())
    })?;
    reader.finish()?;
    let json = match &own[..] {
        [Entry { path, kind: EntryKind::File(data), .. }] if path == TOC_NAME => {
            content(data, &tail)
        }
        _ => None,
    };
    let json = json.ok_or(Unusable::Format("it has no table of contents"))?;
    if Digest::of(json) != toc {
        return Err(Unusable::Digest);
    }
    let toc = Toc::parse(json)?;

    let mut tree = TreeBuilder::default();
    let mut layout = Layout::default();
    // what is known of the span that is not closed: length, digest, room for the headers behind it
    let (mut len, mut digest, mut room) = (0, Digest::of(b""), 0);
    for item in toc.items {
        room += item.room;
        let mut entry = item.entry;
        for (number, chunk) in item.chunks.iter().enumerate() {
            if number == 0 {
                open_ended(&mut layout, len, room, chunk.offset, digest)?;
                room = 0;
                layout.begin(&entry);
                if let EntryKind::File(data) = &mut entry.kind {
                    data.pieces = vec![Piece { offset: 0, at: layout.at, len: data.size }];
                }
            } else {
                layout.span(Codec::Gzip, len, chunk.offset, digest, Proof::Whole)?;
            }
            (len, digest) = (chunk.len, chunk.digest);
        }
        tree.add(entry)?;
    }
    open_ended(&mut layout, len, room, toc_at, digest)?;
    for mut entry in own {
        if let EntryKind::File(data) = &mut entry.kind {
            data.pieces.iter_mut().for_each(|piece| piece.at += layout.at);
        }
        tree.add(entry)?;
    }
    let whole = tail.len() as u64;
    layout.span(Codec::Gzip, whole, layer.size, Digest::of(&tail), Proof::Whole)?;
    Ok(layout.finish(Compression::Gzip, layer, tree))
}

/// A span of `len` bytes of a file, then headers; it ends where a file's data may begin.
fn open_ended(
    layout: &mut Layout,
    len: u64,
    room: u64,
    end: u64,
    digest: Digest,
) -> Result<(), Unusable> {
    let to = (layout.at + len).next_multiple_of(BLOCK).saturating_add(room + TRAILER);
    let to = to.checked_next_multiple_of(BLOCK).ok_or(Unusable::Format("it is too large"))?;
    layout.span(Codec::Gzip, to - layout.at, end, digest, Proof::Start(len))
}

/// A file's data, in one piece.
fn content<'a>(data: &Data, tail: &'a [u8]) -> Option<&'a [u8]> {
    let [Piece { offset: 0, at, len }] = data.pieces[..] else { return None };
    let (at, len) = (usize::try_from(at).ok()?, usize::try_from(len).ok()?);
    tail.get(at..at.checked_add(len)?)
}
