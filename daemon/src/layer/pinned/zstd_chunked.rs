//! zstd:chunked (containers/storage, `pkg/chunked`): zstd frames, one or more for each chunk of each file, and others for
//! the headers between.
//!
//! Behind the archive stand, in frames that are skipped, a table of contents like eStargz' and *tar-split*: all of the
//! archive that is no file's content. Annotations say where both are ([`Places`]) and pin the first, which pins the second.

use std::io::BufRead;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::layout::Layout;
use super::toc::{Item, Toc};
use super::{Layer, MAX_TOC, Pinned, Unusable};
use crate::layer::digest::Digest;
use crate::layer::indexer::Compression;
use crate::layer::span::{Codec, Proof};
use crate::layer::tar::{EntryKind, Piece};
use crate::layer::tree::TreeBuilder;
use crate::range::ByteRange;

const PREFIX: &str = "io.github.containers.zstd-chunked.";
const FILE: u32 = 1;
const SEGMENT: u32 = 2;

/// Where the index is in the blob, as the manifest says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    pub toc: Place,
    pub toc_digest: Digest,
    pub tar_split: Place,
}

/// A part of the blob, and the length of what comes out of it in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub compressed: ByteRange,
    pub len: u64,
}

impl Place {
    /// Reads `offset:length:uncompressed length`, which more may follow.
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(':').map(|number| match number.as_bytes() {
            [b'0'..=b'9', ..] => number.parse::<u64>().ok(),
            _ => None,
        });
        let (offset, len, whole) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let end = offset.checked_add(len)?;
        let fits = len > 0 && len <= MAX_TOC && whole <= MAX_TOC;
        fits.then(|| Self { compressed: ByteRange::between(offset, end), len: whole })
    }

    /// Decompresses what is there.
    fn read(&self, bytes: &[u8]) -> Result<Vec<u8>, Unusable> {
        // it was checked against MAX_TOC
        let len = usize::try_from(self.len).unwrap_or_default();
        let read = zstd::bulk::decompress(bytes, len).unwrap_or_default();
        if read.len() == len { Ok(read) } else { Err(Unusable::Format("a part of it is damaged")) }
    }
}

impl Places {
    /// What the annotations of a layer say; `None` unless they say all of it.
    pub(super) fn of<'a>(get: &impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        let get = |name: &str| get(&format!("{PREFIX}{name}"));
        Some(Self {
            toc: Place::parse(get("manifest-position")?)?,
            toc_digest: get("manifest-checksum")?.parse().ok()?,
            tar_split: Place::parse(get("tarsplit-position")?)?,
        })
    }

    /// What has to be fetched of a blob of `size` bytes: both parts, with what is between.
    pub fn both(&self, size: u64) -> Result<ByteRange, Unusable> {
        let (toc, split) = (self.toc.compressed, self.tar_split.compressed);
        let from = toc.offset().min(split.offset());
        let to = toc.end().max(split.end());
        if to > size || to - from > 2 * MAX_TOC {
            return Err(Unusable::Format("it is not where it is said to be"));
        }
        Ok(ByteRange::between(from, to))
    }
}

/// A line of tar-split.
#[derive(Debug, Deserialize)]
struct Line {
    #[serde(rename = "type")]
    kind: u32,
    #[serde(default)]
    size: i64,
    #[serde(default)]
    payload: Option<String>,
}

/// Reads the index. `bytes` are those of [`Places::both`].
pub fn read(bytes: &[u8], places: &Places, layer: &Layer) -> Result<Pinned, Unusable> {
    let both = places.both(layer.size)?;
    let part = |place: &Place| {
        let from = (place.compressed.offset() - both.offset()) as usize;
        let part = bytes.get(from..from + place.compressed.len() as usize);
        part.ok_or(Unusable::Format("it is cut short"))
    };
    let (toc, split) = (part(&places.toc)?, part(&places.tar_split)?);
    if Digest::of(toc) != places.toc_digest {
        return Err(Unusable::Digest);
    }
    let toc = Toc::parse(&places.toc.read(toc)?)?;
    if toc.version != 1 {
        return Err(Unusable::Format("it is of an unknown version"));
    }
    if toc.tar_split_digest != Some(Digest::of(split)) {
        return Err(Unusable::Digest);
    }
    let split = places.tar_split.read(split)?;

    let mut tree = TreeBuilder::default();
    let mut layout = Layout::default();
    // the archive's bytes since the last file's content
    let mut headers = Vec::new();
    let mut items = toc.items.into_iter();
    for line in split.as_slice().lines() {
        let line = line.map_err(|error| Unusable::Json(error.to_string()))?;
        let line: Line =
            serde_json::from_str(&line).map_err(|error| Unusable::Json(error.to_string()))?;
        match (line.kind, u64::try_from(line.size)) {
            (SEGMENT, _) => {
                let bytes = STANDARD.decode(line.payload.unwrap_or_default());
                headers.extend(bytes.map_err(|_| Unusable::Format("a header is not base64"))?);
            }
            (FILE, Ok(0)) => {}
            (FILE, Ok(size)) => {
                // what has no content has nothing to be placed
                for item in items.by_ref() {
                    let found = !item.chunks.is_empty();
                    if found && item.size() != size {
                        return Err(Unusable::Format("its two parts do not fit together"));
                    }
                    add(&mut layout, &mut headers, item, &mut tree)?;
                    if found {
                        break;
                    }
                }
            }
            _ => return Err(Unusable::Format("a part of the archive is of an unknown kind")),
        }
    }
    for item in items {
        if !item.chunks.is_empty() {
            return Err(Unusable::Format("its two parts do not fit together"));
        }
        add(&mut layout, &mut headers, item, &mut tree)?;
    }
    // where the frames end that are the archive's: those that are skipped have a head of 8 bytes
    let end = both.offset().checked_sub(8).ok_or(Unusable::Format("there is no archive"))?;
    flush(&mut layout, &mut headers, end)?;
    Ok(layout.finish(Compression::Zstd, layer, tree))
}

fn flush(layout: &mut Layout, headers: &mut Vec<u8>, end: u64) -> Result<(), Unusable> {
    if headers.is_empty() {
        return Ok(());
    }
    let (len, digest) = (headers.len() as u64, Digest::of(headers));
    headers.clear();
    layout.span(Codec::Zstd, len, end, digest, Proof::Whole)
}

fn add(
    layout: &mut Layout,
    headers: &mut Vec<u8>,
    item: Item,
    tree: &mut TreeBuilder,
) -> Result<(), Unusable> {
    let mut entry = item.entry;
    let ends = item.chunks.iter().skip(1).map(|chunk| chunk.offset).chain([item.end]);
    for (number, (chunk, end)) in item.chunks.iter().zip(ends).enumerate() {
        if number == 0 {
            flush(layout, headers, chunk.offset)?;
            if !layout.at.is_multiple_of(512) {
                return Err(Unusable::Format("a file begins in the midst of a block"));
            }
            layout.begin(&entry);
            if let EntryKind::File(data) = &mut entry.kind {
                data.pieces = vec![Piece { offset: 0, at: layout.at, len: data.size }];
            }
        }
        if chunk.offset != layout.compressed {
            return Err(Unusable::Format("there is something between two chunks"));
        }
        layout.span(Codec::Zstd, chunk.len, end, chunk.digest, Proof::Whole)?;
    }
    Ok(tree.add(entry)?)
}
