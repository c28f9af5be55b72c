//! Tar archives, as they come: entries, and where in the archive their data is.
//!
//! A parser of our own, because what an image needs of an archive is the exact place of each file's data,
//! from bytes that are pushed in pieces of any length, within bounds and without a panic; crates for tar read
//! from a stream that they own and give the data, not the places.
//!
//! # What is read
//!
//! POSIX.1-1988 (`ustar`, with its prefix), POSIX.1-2001 (PAX: local and global headers), GNU (long names and
//! links, numbers in base 256, sparse files), star's prefix, and what came before all of these. Where they leave
//! a choice it is made as container runtimes do (Go's `archive/tar`): only regular files have data, an empty
//! PAX value leaves the header's, two zero blocks end the archive and what follows is ignored.
//! Of global headers, which runtimes ignore, times and owners count only if that is wanted
//! ([`TarReader::with_global_headers`]).
//!
//! A sparse file (GNU's old kind, PAX 0.0, 0.1 and 1.0) is like any other a list of [`Piece`]s: what no
//! piece covers is a hole and reads as zeros. An ordinary file has one piece, an empty one none.
//!
//! # Bounds
//!
//! Headers that hold a name or PAX records have at most [`MAX_META`] bytes, a sparse file has at most
//! [`MAX_PIECES`] pieces, a name 255 bytes and a path 4095. Nothing else is kept.

mod header;
mod pax;
mod sparse;

use thiserror::Error;

pub use crate::erofs::Timestamp;

use header::{BLOCK, Header, Kind};
use pax::Pax;
use sparse::Map;

/// The longest header of names or PAX records in bytes.
pub const MAX_META: u64 = 1 << 20;
/// The most pieces of a sparse file.
pub const MAX_PIECES: usize = 1 << 16;
/// The longest path and the longest target of a link in bytes.
pub const MAX_PATH: usize = 4095;
/// The longest component of a path in bytes.
pub const MAX_NAME: usize = 255;

/// An entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Without slashes at its ends, `.` and `..`; empty for the root itself.
    pub path: Vec<u8>,
    pub kind: EntryKind,
    /// Permission bits: at most `0o7777`.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    /// Each name once, in their order.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where its (last) header is in the archive.
    pub header_at: u64,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    File(Data),
    Directory,
    /// With its target: 1 to [`MAX_PATH`] bytes without NUL.
    Symlink(Vec<u8>),
    /// To the path of an earlier entry, normalised as [`Entry::path`] is.
    HardLink(Vec<u8>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// What a regular file holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Data {
    /// In bytes, holes included.
    pub size: u64,
    /// In order, not empty, without overlaps.
    pub pieces: Vec<Piece>,
}

/// Part of a file's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it is in the file.
    pub offset: u64,
    /// Where it is in the archive.
    pub at: u64,
    /// In bytes.
    pub len: u64,
}

/// An archive that can't be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the archive can't be used: at byte {offset}, {fault}")]
pub struct TarError {
    /// Where in the archive, uncompressed: the start of the header concerned, if there is one.
    pub offset: u64,
    pub fault: Fault,
}

/// What is wrong with an archive.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Fault {
    #[error("it ends in the midst of {0}; pull the layer again, or have the image pushed again")]
    Truncated(&'static str),
    #[error("there is no header: its checksum is wrong")]
    Checksum,
    #[error("a single block of zeros is followed by something else")]
    LoneZeros,
    #[error("the {0} is no number or out of range")]
    Number(&'static str),
    #[error("an extended header has {0} bytes, more than {MAX_META}")]
    LongMeta(u64),
    #[error("an extended header is wrong: {0}")]
    Pax(&'static str),
    #[error("the path {path:?} can't be used: {why}")]
    Path { path: String, why: &'static str },
    #[error("the map of a sparse file is wrong: {0}")]
    Sparse(&'static str),
    #[error("an entry is of type {:?}, which is not supported", char::from(*.0))]
    Type(u8),
}

/// What an archive was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// In bytes, with all behind its end.
    pub len: u64,
    pub entries: u64,
    /// Did it say that it ends?
    pub ended: bool,
}

/// Reads an archive in pieces of any length.
#[derive(Debug)]
pub struct TarReader {
    state: State,
    /// What is collected, until there are `want` bytes.
    buffer: Vec<u8>,
    want: usize,
    /// Bytes of data and of the zeros behind it that are passed over.
    data: u64,
    padding: u64,
    /// The zeros are part of a file, so they must be zeros.
    padding_shows: bool,
    offset: u64,
    entries: u64,
    header_at: u64,
    /// From headers that precede an entry's own.
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Option<Pax>,
    globals: Option<Pax>,
}

#[derive(Debug)]
enum State {
    Header,
    /// After one block of zeros.
    Zeros,
    /// The bytes of an extended header, and how many of them count.
    Meta(Kind, usize),
    /// More of the map of GNU's old sparse format.
    OldMap(Box<Header>, Map),
    /// The map at the start of the data, PAX 1.0, and its lines so far.
    NewMap(Box<Header>, usize),
    End,
}

impl Default for TarReader {
    fn default() -> Self {
        Self {
            state: State::Header,
            buffer: Vec::with_capacity(BLOCK),
            want: BLOCK,
            data: 0,
            padding: 0,
            padding_shows: false,
            offset: 0,
            entries: 0,
            header_at: 0,
            long_name: None,
            long_link: None,
            pax: None,
            globals: None,
        }
    }
}

impl TarReader {
    /// A reader for which times and owners in global PAX headers count.
    #[must_use]
    pub fn with_global_headers() -> Self {
        Self { globals: Some(Pax::default()), ..Self::default() }
    }

    /// Takes the next bytes of the archive and gives the entries that are known by them. After an
    /// error it is of no more use.
    pub fn push<E: From<TarError>>(
        &mut self,
        mut bytes: &[u8],
        sink: &mut impl FnMut(Entry) -> Result<(), E>,
    ) -> Result<(), E> {
        while !bytes.is_empty() {
            if let State::End = self.state {
                self.offset += bytes.len() as u64;
                return Ok(());
            }
            let left = if self.data > 0 { self.data } else { self.padding };
            if left > 0 {
                let (passed, rest) = split(bytes, left);
                if self.data > 0 {
                    self.data -= passed.len() as u64;
                } else {
                    if self.padding_shows && passed.iter().any(|byte| *byte != 0) {
                        let what = "its last block has more than the file";
                        return Err(self.fail(Fault::Sparse(what)).into());
                    }
                    self.padding -= passed.len() as u64;
                }
                self.offset += passed.len() as u64;
                bytes = rest;
                continue;
            }
            let missing = self.want.saturating_sub(self.buffer.len());
            let (taken, rest) = split(bytes, missing as u64);
            self.buffer.extend_from_slice(taken);
            self.offset += taken.len() as u64;
            bytes = rest;
            if self.buffer.len() >= self.want {
                let entry = self.step().map_err(|fault| self.fail(fault))?;
                if let Some(entry) = entry {
                    self.entries += 1;
                    sink(entry)?;
                }
            }
        }
        Ok(())
    }

    /// Ends the archive.
    pub fn finish(self) -> Result<Summary, TarError> {
        let what = match self.state {
            State::Meta(..) => Some("an extended header"),
            State::OldMap(..) | State::NewMap(..) => Some("the map of a sparse file"),
            _ if !self.buffer.is_empty() => Some("a header"),
            _ if self.data > 0 => Some("a file's data"),
            State::Header if self.long_name.is_some() || self.long_link.is_some() => {
                Some("an entry")
            }
            State::Header if self.pax.is_some() => Some("an entry"),
            _ => None,
        };
        match what {
            Some(what) => Err(TarError { offset: self.offset, fault: Fault::Truncated(what) }),
            None => {
                let ended = matches!(self.state, State::End);
                Ok(Summary { len: self.offset, entries: self.entries, ended })
            }
        }
    }

    fn fail(&self, fault: Fault) -> TarError {
        TarError { offset: self.header_at, fault }
    }

    /// Takes what was collected.
    fn step(&mut self) -> Result<Option<Entry>, Fault> {
        let at = self.offset - self.buffer.len() as u64;
        match std::mem::replace(&mut self.state, State::Header) {
            State::End => Ok(None),
            state @ (State::Header | State::Zeros) => {
                self.header_at = at;
                let buffer = std::mem::take(&mut self.buffer);
                let result = self.header(&buffer, matches!(state, State::Zeros));
                self.reuse(buffer);
                result
            }
            State::Meta(kind, len) => {
                let buffer = std::mem::take(&mut self.buffer);
                self.want = BLOCK;
                let result = self.meta(kind, &buffer[..len.min(buffer.len())]);
                self.reuse(buffer);
                result.map(|()| None)
            }
            State::OldMap(header, mut map) => {
                let more = map.old_extension(&self.buffer)?;
                self.buffer.clear();
                if more {
                    self.state = State::OldMap(header, map);
                    return Ok(None);
                }
                self.sparse(&header, map).map(Some)
            }
            State::NewMap(mut header, mut lines) => {
                let block = &self.buffer[self.want.saturating_sub(BLOCK)..];
                lines += block.iter().filter(|byte| **byte == b'\n').count();
                if Map::lines(&self.buffer)?.is_none_or(|needed| lines < needed) {
                    // the map has to be within the data
                    if (self.want + BLOCK) as u64 > header.size {
                        return Err(Fault::Sparse("it does not end"));
                    }
                    self.want += BLOCK;
                    self.state = State::NewMap(header, lines);
                    return Ok(None);
                }
                header.size -= self.want as u64;
                self.want = BLOCK;
                let buffer = std::mem::take(&mut self.buffer);
                let map = Map::from_data(&buffer)?;
                self.reuse(buffer);
                self.sparse(&header, map).map(Some)
            }
        }
    }

    /// Keeps a buffer of ordinary size for what comes.
    fn reuse(&mut self, mut buffer: Vec<u8>) {
        buffer.clear();
        buffer.shrink_to(BLOCK);
        self.buffer = buffer;
    }

    fn header(&mut self, block: &[u8], after_zeros: bool) -> Result<Option<Entry>, Fault> {
        if block.iter().all(|byte| *byte == 0) {
            self.state = if after_zeros { State::End } else { State::Zeros };
            return Ok(None);
        }
        if after_zeros {
            return Err(Fault::LoneZeros);
        }
        let mut header = Header::parse(block)?;
        match header.kind {
            Kind::LongName | Kind::LongLink | Kind::Pax | Kind::GlobalPax => {
                if header.size > MAX_META {
                    return Err(Fault::LongMeta(header.size));
                }
                let len = header.size as usize;
                self.want = len.next_multiple_of(BLOCK);
                if len == 0 {
                    self.want = BLOCK;
                    return self.meta(header.kind, &[]).map(|()| None);
                }
                self.state = State::Meta(header.kind, len);
                return Ok(None);
            }
            _ => {}
        }
        let pax = self.pax.take();
        if let Some(globals) = &self.globals {
            globals.apply_globals(&mut header);
        }
        let sparse = match &pax {
            Some(pax) => pax.apply(&mut header)?,
            None => None,
        };
        if let Some(name) = self.long_name.take() {
            header.path = name;
        }
        if let Some(name) = pax.as_ref().and_then(Pax::sparse_name) {
            header.path = name.to_vec();
        }
        if let Some(link) = self.long_link.take() {
            header.link = link;
        }
        header.settle();
        match sparse {
            Some(pax::Sparse::Map(map)) if header.kind == Kind::File => {
                return self.sparse(&header, map).map(Some);
            }
            Some(pax::Sparse::InData) if header.kind == Kind::File => {
                if header.size < BLOCK as u64 {
                    return Err(Fault::Sparse("it is missing"));
                }
                self.state = State::NewMap(Box::new(header), 0);
                return Ok(None);
            }
            _ => {}
        }
        if header.kind == Kind::OldSparse {
            let (map, more) = Map::old(block, header.is_gnu)?;
            header.real_size = Some(map.size);
            if more {
                self.state = State::OldMap(Box::new(header), map);
                return Ok(None);
            }
            return self.sparse(&header, map).map(Some);
        }
        let mut data = Data::default();
        if header.kind == Kind::File {
            data.size = header.size;
            if header.size > 0 {
                data.pieces.push(Piece { offset: 0, at: self.offset, len: header.size });
            }
            self.pass(header.size, false)?;
        }
        self.entry(&header, data).map(Some)
    }

    /// A sparse file whose data starts here.
    fn sparse(&mut self, header: &Header, map: Map) -> Result<Entry, Fault> {
        let size = header.real_size.unwrap_or(map.size);
        let data = map.into_data(size, self.offset, header.size)?;
        let ends_in_hole = data.pieces.last().is_some_and(|last| last.offset + last.len < size);
        self.pass(header.size, ends_in_hole)?;
        self.entry(header, data)
    }

    /// Passes over so many bytes of data and the zeros behind.
    fn pass(&mut self, size: u64, padding_shows: bool) -> Result<(), Fault> {
        let end = self.offset.checked_add(size).and_then(|end| end.checked_next_multiple_of(512));
        end.ok_or(Fault::Number("size"))?;
        self.data = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        self.padding_shows = padding_shows;
        Ok(())
    }

    fn meta(&mut self, kind: Kind, bytes: &[u8]) -> Result<(), Fault> {
        let text = || {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            bytes[..end].to_vec()
        };
        match kind {
            Kind::LongName => self.long_name = Some(text()).filter(|name| !name.is_empty()),
            Kind::LongLink => self.long_link = Some(text()).filter(|link| !link.is_empty()),
            Kind::GlobalPax => {
                let pax = Pax::parse(bytes)?;
                if let Some(globals) = &mut self.globals {
                    globals.merge_globals(&pax);
                }
            }
            _ => self.pax = Some(Pax::parse(bytes)?),
        }
        Ok(())
    }

    fn entry(&mut self, header: &Header, data: Data) -> Result<Entry, Fault> {
        let kind = match header.kind {
            Kind::File | Kind::OldSparse => EntryKind::File(data),
            Kind::Directory => EntryKind::Directory,
            Kind::Symlink => EntryKind::Symlink(symlink(&header.link)?),
            Kind::HardLink => EntryKind::HardLink(normalise(&header.link)?),
            Kind::Char => EntryKind::CharDevice { major: header.major, minor: header.minor },
            Kind::Block => EntryKind::BlockDevice { major: header.major, minor: header.minor },
            Kind::Fifo => EntryKind::Fifo,
            Kind::Other(kind) => return Err(Fault::Type(kind)),
            Kind::LongName | Kind::LongLink | Kind::Pax | Kind::GlobalPax => {
                return Err(Fault::Type(b'x'));
            }
        };
        Ok(Entry {
            path: normalise(&header.path)?,
            kind,
            mode: header.mode,
            uid: owner(header.uid, "uid")?,
            gid: owner(header.gid, "gid")?,
            mtime: header.mtime,
            xattrs: header.xattrs.clone(),
            header_at: self.header_at,
        })
    }
}

fn split(bytes: &[u8], most: u64) -> (&[u8], &[u8]) {
    bytes.split_at(usize::try_from(most).unwrap_or(usize::MAX).min(bytes.len()))
}

/// An owner's number. The highest means "nobody's" to the kernel's calls.
fn owner(id: i64, what: &'static str) -> Result<u32, Fault> {
    u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or(Fault::Number(what))
}

fn bad_path(path: &[u8], why: &'static str) -> Fault {
    let shown = &path[..path.len().min(200)];
    Fault::Path { path: String::from_utf8_lossy(shown).into_owned(), why }
}

/// A path without slashes at its ends, double slashes and `.`; refused if it has `..` or is too long.
pub fn normalise(path: &[u8]) -> Result<Vec<u8>, Fault> {
    let mut normal = Vec::with_capacity(path.len().min(MAX_PATH));
    if path.contains(&0) {
        return Err(bad_path(path, "it has a NUL in it"));
    }
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => continue,
            b".." => return Err(bad_path(path, "`..` could lead out of the tree")),
            _ if name.len() > MAX_NAME => {
                return Err(bad_path(path, "a name has at most 255 bytes"));
            }
            _ => {}
        }
        if !normal.is_empty() {
            normal.push(b'/');
        }
        normal.extend_from_slice(name);
        if normal.len() > MAX_PATH {
            return Err(bad_path(path, "it has more than 4095 bytes"));
        }
    }
    Ok(normal)
}

fn symlink(target: &[u8]) -> Result<Vec<u8>, Fault> {
    match target {
        b"" => Err(bad_path(target, "a symbolic link leads somewhere")),
        _ if target.contains(&0) => Err(bad_path(target, "it has a NUL in it")),
        _ if target.len() > MAX_PATH => Err(bad_path(target, "it has more than 4095 bytes")),
        _ => Ok(target.to_vec()),
    }
}
