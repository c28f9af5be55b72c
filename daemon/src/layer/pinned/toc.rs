//! The table of contents that eStargz and zstd:chunked have in common: JSON, one object for each entry of the
//! archive and for each further chunk of a file, in the order of the archive.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::{Unusable, check_chunk, time};
use crate::layer::digest::Digest;
use crate::layer::tar::{Data, Entry, EntryKind, MAX_PATH, Timestamp, normalise};
use crate::layer::tree::MAX_ENTRIES;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawToc {
    version: u32,
    entries: Vec<RawEntry>,
    #[serde(default)]
    tar_split_digest: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEntry {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    size: u64,
    #[serde(default, rename = "modtime")]
    mtime: Option<String>,
    #[serde(default)]
    link_name: String,
    #[serde(default)]
    mode: i64,
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
    #[serde(default)]
    dev_major: u32,
    #[serde(default)]
    dev_minor: u32,
    #[serde(default)]
    xattrs: Option<BTreeMap<String, String>>,
    #[serde(default)]
    digest: String,
    #[serde(default)]
    offset: u64,
    #[serde(default)]
    end_offset: u64,
    #[serde(default)]
    inner_offset: u64,
    #[serde(default)]
    chunk_offset: u64,
    #[serde(default)]
    chunk_size: u64,
    #[serde(default)]
    chunk_digest: String,
}

/// A table of contents.
#[derive(Debug)]
pub struct Toc {
    pub version: u32,
    pub items: Vec<Item>,
    pub tar_split_digest: Option<Digest>,
}

/// An entry of the archive.
#[derive(Debug)]
pub struct Item {
    /// A file has no pieces yet: its place is not known.
    pub entry: Entry,
    /// Of a file's content, in order, without gaps.
    pub chunks: Vec<Chunk>,
    /// Where the last chunk's compressed bytes end, if that is said.
    pub end: u64,
    /// More than its headers take in the archive, in bytes.
    pub room: u64,
}

/// A part of a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Where its compressed bytes begin in the blob.
    pub offset: u64,
    /// In bytes, uncompressed. Not 0.
    pub len: u64,
    pub digest: Digest,
}

impl Toc {
    pub fn parse(json: &[u8]) -> Result<Self, Unusable> {
        let raw: RawToc =
            serde_json::from_slice(json).map_err(|error| Unusable::Json(error.to_string()))?;
        if raw.entries.len() as u64 > MAX_ENTRIES {
            return Err(Unusable::Format("it has too many entries"));
        }
        let mut items: Vec<Item> = Vec::with_capacity(raw.entries.len());
        for (number, raw) in (0..).zip(raw.entries) {
            if raw.kind == "chunk" {
                let item = items.last_mut().ok_or(Unusable::Format("a chunk is of no file"))?;
                item.add_chunk(&raw)?;
                continue;
            }
            if let Some(last) = items.last() {
                last.check()?;
            }
            items.push(Item::read(&raw, number)?);
        }
        items.last().map_or(Ok(()), Item::check)?;
        let tar_split_digest = match raw.tar_split_digest.as_deref() {
            None | Some("") => None,
            Some(text) => Some(text.parse().map_err(|_| Unusable::Format("a digest is none"))?),
        };
        Ok(Self { version: raw.version, items, tar_split_digest })
    }
}

impl Item {
    fn read(raw: &RawEntry, number: u64) -> Result<Self, Unusable> {
        let wrong = |_| Unusable::Format("a path can't be used");
        // Go writes this where a name is not UTF-8, and what it was is lost
        if raw.name.contains('\u{fffd}') || raw.link_name.contains('\u{fffd}') {
            return Err(Unusable::Format("a name is not UTF-8, which JSON can't express"));
        }
        let (major, minor) = (raw.dev_major, raw.dev_minor);
        let link = raw.link_name.as_bytes();
        let kind = match raw.kind.as_str() {
            "reg" => EntryKind::File(Data { size: raw.size, pieces: Vec::new() }),
            "dir" => EntryKind::Directory,
            "symlink" => {
                if link.is_empty() || link.len() > MAX_PATH || link.contains(&0) {
                    return Err(Unusable::Format("a symbolic link's target can't be used"));
                }
                EntryKind::Symlink(link.to_vec())
            }
            "hardlink" => EntryKind::HardLink(normalise(link).map_err(wrong)?),
            "char" => EntryKind::CharDevice { major, minor },
            "block" => EntryKind::BlockDevice { major, minor },
            "fifo" => EntryKind::Fifo,
            _ => return Err(Unusable::Format("an entry is of an unknown type")),
        };
        let mtime = match raw.mtime.as_deref() {
            None | Some("") => Timestamp::default(),
            Some(text) => time::parse(text).ok_or(Unusable::Format("a time is none"))?,
        };
        let mut xattrs = Vec::new();
        for (name, value) in raw.xattrs.iter().flatten() {
            let value = STANDARD.decode(value);
            let value = value.map_err(|_| Unusable::Format("an attribute is not base64"))?;
            xattrs.push((name.as_bytes().to_vec(), value));
        }
        let entry = Entry {
            path: normalise(raw.name.as_bytes()).map_err(wrong)?,
            // only the permission bits count
            mode: (raw.mode & 0o7777) as u16,
            uid: raw.uid,
            gid: raw.gid,
            mtime,
            xattrs,
            header_at: number,
            kind,
        };
        let mut item = Self { room: room(raw, &entry), entry, chunks: Vec::new(), end: 0 };
        if raw.kind == "reg" && raw.size > 0 {
            item.end = raw.end_offset;
            item.add_chunk(raw)?;
        }
        Ok(item)
    }

    /// The length of a file.
    pub fn size(&self) -> u64 {
        match &self.entry.kind {
            EntryKind::File(data) => data.size,
            _ => 0,
        }
    }

    fn known(&self) -> u64 {
        self.chunks.iter().map(|chunk| chunk.len).sum()
    }

    fn add_chunk(&mut self, raw: &RawEntry) -> Result<(), Unusable> {
        let (size, known) = (self.size(), self.known());
        if raw.inner_offset > 0 {
            return Err(Unusable::Format("several chunks are compressed together"));
        }
        if raw.chunk_offset != known || known >= size {
            return Err(Unusable::Format("a file's chunks are not its content"));
        }
        let len = if raw.chunk_size > 0 { raw.chunk_size } else { size - known };
        if len > size - known {
            return Err(Unusable::Format("a chunk is longer than its file"));
        }
        check_chunk(len)?;
        // of a file of one chunk there may be one digest only
        let digest = match raw.chunk_digest.as_str() {
            "" if len == size => &raw.digest,
            some => some,
        };
        let digest = digest.parse().map_err(|_| Unusable::Format("a chunk has no digest"))?;
        self.chunks.push(Chunk { offset: raw.offset, len, digest });
        Ok(())
    }

    fn check(&self) -> Result<(), Unusable> {
        if self.known() == self.size() {
            Ok(())
        } else {
            Err(Unusable::Format("a file's chunks are not its content"))
        }
    }
}

/// More than the headers of an entry take: its own, and PAX records or GNU's long names before it.
fn room(raw: &RawEntry, entry: &Entry) -> u64 {
    let xattrs = entry.xattrs.iter().map(|(name, value)| name.len() + value.len() + 64);
    let names = [raw.name.len(), raw.link_name.len()];
    let long = names.map(|len| if len >= 100 { 512 + (len + 1).next_multiple_of(512) } else { 0 });
    // times, owners, the names of both, and what else is said in records
    let records = 256 + names.iter().sum::<usize>() + xattrs.sum::<usize>();
    let pax = 512 + records.next_multiple_of(512);
    (512 + pax + long.iter().sum::<usize>()) as u64
}
