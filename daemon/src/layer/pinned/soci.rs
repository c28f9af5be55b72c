//! SOCI (soci-snapshotter, `docs/index.md`, `ztoc/fbs/ztoc.fbs`): the layer is an ordinary gzip blob; beside it in the registry
//! is a *zTOC*, a FlatBuffer with the archive's entries, and *checkpoints*: places between two deflate blocks, with the 32 KiB
//! before each.
//!
//! Version 2: the image's manifest names the index of all zTOCs, by its digest ([`INDEX_DIGEST`]). Version 1: the index is an artifact
//! that refers to the image, and anybody may have put it there who can push to the repository. It is used only where the
//! administrator has switched that on.
//!
//! The digests are those of compressed bytes; what comes out of them is certain, given the checkpoint's window.

use super::flat::Table;
use super::layout::Layout;
use super::{Gunzip, Layer, MAX_IN_MEMORY, MAX_TOC, Pinned, Unusable, gunzip_from, time};
use crate::layer::digest::Digest;
use crate::layer::indexer::{Compression, MAX_LAYER};
use crate::layer::span::{Codec, Proof, Span};
use crate::layer::tar::{Data, Entry, EntryKind, MAX_PATH, Piece, Timestamp, normalise};
use crate::layer::tree::{MAX_ENTRIES, TreeBuilder};
use crate::range::ByteRange;
use crate::sys::inflate::WINDOW;

/// The annotation of an image's manifest that pins its index.
pub const INDEX_DIGEST: &str = "com.amazon.soci.index-digest";
/// What an index says that it is (the media type of its configuration), of version 2 and of version 1.
pub const INDEX_KIND: &str = "application/vnd.amazon.soci.index.v2+json";
pub const INDEX_KIND_1: &str = "application/vnd.amazon.soci.index.v1+json";
/// The annotation of a zTOC in an index that says of which layer it is.
pub const LAYER_DIGEST: &str = "com.amazon.soci.image-layer-digest";
/// The longest zTOC in bytes.
pub const MAX_ZTOC: u64 = MAX_TOC;

const GZIP: u8 = 1;
/// Where the checkpoints begin: behind their number (4) and the length of spans (8).
const HEAD: usize = 12;
/// A checkpoint: its place in the blob and in the archive (8, 8), bits (1), window.
const CHECKPOINT: usize = 17 + WINDOW;
/// All names, targets and attributes together, in bytes: in a FlatBuffer one may stand for many.
const MAX_NAMES: usize = 256 << 20;
/// The most bytes behind an archive's end that fill its last record.
const MAX_PADDING: u64 = 1 << 20;
const XATTR: &[u8] = b"SCHILY.xattr.";

const DAMAGED: Unusable = Unusable::Format("it is damaged");

/// Reads a zTOC, which has to have this digest. `len`: the length of the archive in bytes, where more is known of that ([`end`]).
pub fn read(
    bytes: &[u8],
    digest: Digest,
    len: Option<u64>,
    layer: &Layer,
) -> Result<Pinned, Unusable> {
    if Digest::of(bytes) != digest {
        return Err(Unusable::Digest);
    }
    let ztoc = Table::root(bytes).ok_or(DAMAGED)?;
    let len = len.or_else(|| u64::try_from(ztoc.long(3)).ok()).filter(|len| *len <= MAX_LAYER);
    let len = len.ok_or(Unusable::Format("the layer is too large"))?;
    if u64::try_from(ztoc.long(2)) != Ok(layer.size) {
        return Err(Unusable::Format("it is of another layer"));
    }
    let layout = spans(ztoc.table(5).ok_or(DAMAGED)?, len, layer.size)?;
    let tree = tree(ztoc.table(4).ok_or(DAMAGED)?, len)?;
    Ok(layout.finish(Compression::Gzip, layer, tree))
}

/// The spans that tell whether an index is understood as it was meant: one that begins in the midst of a byte, and the last.
#[must_use]
pub fn samples(spans: &[Span]) -> Vec<usize> {
    let within = |span: &Span| matches!(span.codec, Codec::Deflate { bits: 1.., .. });
    let mut samples =
        vec![spans.iter().position(within).unwrap_or(0), spans.len().saturating_sub(1)];
    samples.dedup();
    samples
}

/// Where a span that was fetched ends in the archive. For the last one that may be behind where the zTOC says: SOCI counts what its tar
/// reader reads, which ends at the archive's end and before what fills its last record.
pub fn end(span: &Span, window: &[u8], compressed: &[u8]) -> Result<u64, Unusable> {
    let said = span.uncompressed;
    if span.decode(compressed, window).is_ok() {
        return Ok(said.end());
    }
    let wrong = Unusable::Format("a part of it that was tried is wrong");
    let Codec::Deflate { bits, .. } = span.codec else { return Err(wrong) };
    let gunzip = Gunzip::within(bits, window).map_err(|_| wrong.clone())?;
    let limit = (said.len() + MAX_PADDING).min(MAX_IN_MEMORY);
    let found = gunzip_from(gunzip, compressed, limit).map_err(|_| wrong.clone())?;
    let uncompressed = ByteRange::new(said.offset(), found.len() as u64);
    let span = Span { uncompressed, ..span.clone() };
    match uncompressed.len() > said.len() && span.decode(compressed, window).is_ok() {
        true => Ok(uncompressed.end()),
        false => Err(wrong),
    }
}

fn spans(info: Table<'_>, len: u64, size: u64) -> Result<Layout, Unusable> {
    if info.byte(0).unwrap_or(GZIP) != GZIP {
        return Err(Unusable::Format("the layer is not compressed by gzip"));
    }
    let digests = info.vector(2).ok_or(DAMAGED)?;
    let checkpoints = info.bytes(3).ok_or(DAMAGED)?;
    let (head, records) = checkpoints.split_first_chunk::<HEAD>().ok_or(DAMAGED)?;
    let count = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    // the first may be left out: it is at the start, behind a header without a name
    let implied = match count.checked_sub(records.len() / CHECKPOINT) {
        _ if !records.len().is_multiple_of(CHECKPOINT) => return Err(DAMAGED),
        Some(implied @ 0..=1) => implied == 1,
        _ => return Err(DAMAGED),
    };
    if count < 3 {
        return Err(Unusable::Format("the layer is so small that it is better streamed"));
    }
    if digests.len != count || info.int(1) as usize != count - 1 {
        return Err(Unusable::Format("it has not one digest for each span"));
    }
    let first = implied.then_some((10, 0, 0, &[][..]));
    let records = records.chunks_exact(CHECKPOINT).map(|record| {
        let number = |at: usize| {
            let bytes = record[at..at + 8].try_into().unwrap_or_default();
            u64::from_le_bytes(bytes)
        };
        (number(0), number(8), record[16], &record[17..])
    });
    let mut points = first.into_iter().chain(records).enumerate().peekable();
    let mut layout = Layout::default();
    while let Some((number, (from, at, bits, window))) = points.next() {
        let (end, to) = points.peek().map_or((size, len), |(_, next)| (next.0, next.1));
        let span = to.checked_sub(at).filter(|span| *span > 0 && at == layout.at);
        let span = span.ok_or(Unusable::Format("its checkpoints are not in order"))?;
        // the byte before has the first bits
        let from = from.checked_sub(u64::from(bits > 0)).filter(|from| *from >= layout.before());
        let from = from.ok_or(Unusable::Format("its checkpoints are not in order"))?;
        if bits > 7 || end > size {
            return Err(DAMAGED);
        }
        let digest = digests.string(number).and_then(|text| std::str::from_utf8(text).ok());
        let digest = digest.and_then(|text| text.parse().ok());
        let digest = digest.ok_or(Unusable::Format("a digest is none"))?;
        // what comes before the archive is nothing
        let have = usize::try_from(at).unwrap_or(WINDOW).min(WINDOW).min(window.len());
        let window = &window[window.len() - have..];
        let codec = Codec::Deflate { bits, window: have as u32 };
        layout.compressed = from;
        layout.windowed(codec, span, end, digest, Proof::Compressed, window)?;
    }
    Ok(layout)
}

fn tree(toc: Table<'_>, len: u64) -> Result<TreeBuilder, Unusable> {
    let entries = toc.vector(0).ok_or(DAMAGED)?;
    if entries.len as u64 > MAX_ENTRIES {
        return Err(Unusable::Format("it has too many entries"));
    }
    let mut tree = TreeBuilder::default();
    let mut names = 0;
    for number in 0..entries.len {
        let raw = entries.table(number).ok_or(DAMAGED)?;
        let entry = entry(raw, number as u64, len, &mut names)?;
        tree.add(entry)?;
    }
    Ok(tree)
}

fn entry(raw: Table<'_>, number: u64, len: u64, names: &mut usize) -> Result<Entry, Unusable> {
    let wrong = |_| Unusable::Format("a path can't be used");
    let mut text = |field| {
        let text = raw.bytes(field).unwrap_or_default();
        *names = names.saturating_add(text.len());
        text
    };
    let (name, link) = (text(0), text(4));
    let device = |field| {
        let number = u32::try_from(raw.long(field));
        number.map_err(|_| Unusable::Format("a device's number is none"))
    };
    let kind = match raw.bytes(1).unwrap_or_default() {
        b"reg" => EntryKind::File(data(raw.long(2), raw.long(3), len)?),
        b"dir" => EntryKind::Directory,
        b"symlink" => {
            if link.is_empty() || link.len() > MAX_PATH || link.contains(&0) {
                return Err(Unusable::Format("a symbolic link's target can't be used"));
            }
            EntryKind::Symlink(link.to_vec())
        }
        b"hardlink" => EntryKind::HardLink(normalise(link).map_err(wrong)?),
        b"char" => EntryKind::CharDevice { major: device(11)?, minor: device(12)? },
        b"block" => EntryKind::BlockDevice { major: device(11)?, minor: device(12)? },
        b"fifo" => EntryKind::Fifo,
        _ => return Err(Unusable::Format("an entry is of an unknown type")),
    };
    let mtime = match raw.bytes(10).unwrap_or_default() {
        b"" => Timestamp::default(),
        text => {
            let time = std::str::from_utf8(text).ok().and_then(time::parse);
            time.ok_or(Unusable::Format("a time is none"))?
        }
    };
    let mut xattrs = std::collections::BTreeMap::new();
    if let Some(records) = raw.vector(13) {
        for number in 0..records.len {
            let record = records.table(number).ok_or(DAMAGED)?;
            let (key, value) = record.bytes(0).zip(record.bytes(1)).ok_or(DAMAGED)?;
            *names = names.saturating_add(key.len() + value.len());
            // all PAX records are here
            if let Some(name) = key.strip_prefix(XATTR)
                && *names <= MAX_NAMES
            {
                xattrs.insert(name.to_vec(), value.to_vec());
            }
        }
    }
    if *names > MAX_NAMES {
        return Err(Unusable::Format("its names are too long"));
    }
    Ok(Entry {
        path: normalise(name).map_err(wrong)?,
        kind,
        // only the permission bits count
        mode: (raw.long(5) & 0o7777) as u16,
        uid: raw.int(6),
        gid: raw.int(7),
        mtime,
        xattrs: xattrs.into_iter().collect(),
        header_at: number,
    })
}

/// A file's data, which has to be in the archive.
fn data(at: i64, size: i64, len: u64) -> Result<Data, Unusable> {
    let range = u64::try_from(at).ok().zip(u64::try_from(size).ok());
    let range = range.filter(|(at, size)| at.checked_add(*size).is_some_and(|end| end <= len));
    let (at, size) = range.ok_or(Unusable::Format("a file is outside the layer"))?;
    if size == 0 {
        return Ok(Data::default());
    }
    if !at.is_multiple_of(512) {
        return Err(Unusable::Format("a file begins in the midst of a block"));
    }
    let range = ByteRange::new(at, size);
    Ok(Data { size, pieces: vec![Piece { offset: 0, at, len: range.len() }] })
}
