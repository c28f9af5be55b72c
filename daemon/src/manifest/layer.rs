//! The manifest of an image's layer: each entry has an owner, a time and attributes of its own, and a
//! file's content lies at a given place of a segment.
//!
//! The frame is that of a [git tree's manifest](super). The first record is a [`Header`], the others are
//! [`Entry`]s. What the reader checks is what the builder could otherwise be made to do: names, parents and order, links
//! to what is before them, content within its segment. What an attribute or an owner may be is the writer's
//! decision ([`crate::layer::tree`]).

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::{ManifestError, check_name, check_target, decode, read_record, write_record};

/// The version of the format; another one is refused. It is none of a git tree's.
pub const VERSION: u32 = 0x1_0001;
/// The longest record in bytes: the attributes of an inode, or the pieces of a sparse file.
const MAX_RECORD: u32 = 4 << 20;
/// The unit of places in a segment in bytes, and the block size of the image.
pub const BLOCK: u64 = 512;
/// The most chunks of a sparse file.
pub const MAX_CHUNKS: u64 = 1 << 20;

/// What holds for the whole tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    pub version: u32,
    /// The length of each segment in bytes; a layer has one.
    pub segments: Vec<u64>,
    /// The time that most entries have, in seconds since the epoch.
    pub mtime: i64,
    pub root: Attributes,
}

/// One name. The root directory is number 0 and has no entry; entries count from 1. A directory
/// comes before what is in it; the entries of one directory are in the order of their names' bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The number of the directory that it is in.
    pub parent: u32,
    pub name: Vec<u8>,
    pub node: Node,
}

/// What every inode has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Permission bits: at most `0o7777`.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch, and nanoseconds after that.
    pub mtime: (i64, u32),
    /// With their namespaces. What overlayfs goes by is here, too.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    Inode(Attributes, Kind),
    /// Another name of the entry with this number, which comes before and is neither a directory nor a link itself.
    Link(u32),
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Directory,
    File(Content),
    Symlink(Vec<u8>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

impl Kind {
    /// What overlayfs takes for "deleted here".
    pub const WHITEOUT: Self = Self::CharDevice { major: 0, minor: 0 };
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    Empty,
    /// `size` bytes of a segment (the header's, counted from 0) from `offset`, a multiple of [`BLOCK`].
    At {
        segment: u16,
        offset: u64,
        size: u64,
    },
    /// A sparse file of `size` bytes: what no piece covers is a hole.
    Sparse {
        segment: u16,
        size: u64,
        pieces: Vec<Piece>,
    },
}

/// Part of a sparse file. Pieces are in order and don't overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Where it is in the file: a multiple of [`BLOCK`].
    pub offset: u64,
    /// Where it is in the segment: a multiple of [`BLOCK`].
    pub at: u64,
    /// A multiple of [`BLOCK`], but for the last piece's.
    pub len: u64,
}

/// The largest chunks (their length as a power of two) of which each is in one piece or in a hole, for a
/// file whose pieces lie so that blocks can show them; else why they don't.
pub fn chunk_bits(size: u64, pieces: &[Piece]) -> Result<u8, &'static str> {
    let (mut end, mut grain) = (0, 1u64 << 40);
    for (n, piece) in pieces.iter().enumerate() {
        let piece_end = piece.offset.checked_add(piece.len).filter(|end| *end <= size);
        let piece_end = piece_end.ok_or("a piece is behind the file's end")?;
        if piece.offset < end || piece.len == 0 {
            return Err("its pieces are not in order");
        }
        let is_last = n + 1 == pieces.len();
        if piece.offset % BLOCK != 0 || piece.at % BLOCK != 0 || !is_last && piece.len % BLOCK != 0
        {
            return Err("its pieces are not whole blocks of 512 bytes");
        }
        grain |= piece.offset;
        if piece_end < size {
            grain |= piece_end.next_multiple_of(BLOCK);
        }
        end = piece_end;
    }
    let bits = grain.trailing_zeros() as u8;
    if size.div_ceil(1 << bits) > MAX_CHUNKS {
        return Err("it is in too many pieces for its size");
    }
    Ok(bits)
}

/// Writes a manifest.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    record: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Starts a manifest. `out` should be buffered.
    pub fn new(mut out: W, header: &Header) -> io::Result<Self> {
        let mut record = Vec::new();
        write_record(&mut out, &mut record, header, MAX_RECORD)?;
        Ok(Self { out, record })
    }

    pub fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        write_record(&mut self.out, &mut self.record, entry, MAX_RECORD)
    }

    /// Ends the manifest with an empty record, without which it counts as cut short.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&0u32.to_le_bytes())?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Reads a manifest and checks it.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    header: Header,
    /// For each entry so far, root included.
    seen: Vec<Seen>,
    record: Vec<u8>,
    chunks: u64,
}

#[derive(Debug)]
enum Seen {
    /// With the last name in it.
    Directory(Vec<u8>),
    Other,
    Link,
}

impl<R: Read> Reader<R> {
    /// Reads the header. `input` should be buffered.
    pub fn new(mut input: R) -> Result<Self, ManifestError> {
        let wrong = |what: &str| ManifestError::Entry { number: 0, what: what.to_owned() };
        let mut record = Vec::new();
        if !read_record(&mut input, &mut record, MAX_RECORD)? {
            return Err(wrong("there is no header"));
        }
        // the version comes first, whatever follows
        let version = postcard::take_from_bytes::<u32>(&record).map(|(version, _)| version);
        let version = version.map_err(|_| wrong("there is no version"))?;
        if version != VERSION {
            return Err(ManifestError::Version(version));
        }
        let header: Header = decode(&record).map_err(|what| wrong(&what))?;
        check_attributes(&header.root).map_err(|what| wrong(&what))?;
        if header.segments.len() >= usize::from(u16::MAX) {
            return Err(wrong("it has too many segments"));
        }
        let seen = vec![Seen::Directory(Vec::new())];
        Ok(Self { input, header, seen, record, chunks: 0 })
    }

    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next entry and its number, counted from 1; `None` at the end.
    pub fn next_entry(&mut self) -> Result<Option<(u32, Entry)>, ManifestError> {
        let number = self.seen.len();
        let fail = |what: String| ManifestError::Entry { number: number as u64, what };
        if !read_record(&mut self.input, &mut self.record, MAX_RECORD)? {
            return Ok(None);
        }
        let entry: Entry = decode(&self.record).map_err(fail)?;
        let number = u32::try_from(number).map_err(|_| fail("too many entries".into()))?;
        let shown = super::Shown(&entry.name);
        check_name(&entry.name).map_err(fail)?;
        let seen = match &entry.node {
            Node::Link(target) => match self.seen.get(*target as usize) {
                Some(Seen::Other) => Seen::Link,
                _ => return Err(fail(format!("{shown:?} is a link to nothing before it"))),
            },
            Node::Inode(attributes, kind) => {
                check_attributes(attributes).map_err(fail)?;
                match kind {
                    Kind::Directory => Seen::Directory(Vec::new()),
                    Kind::Symlink(target) => {
                        check_target(&entry.name, target).map_err(fail)?;
                        Seen::Other
                    }
                    Kind::File(content) => {
                        let checked = self.check_content(content);
                        checked
                            .map_err(|what| fail(format!("the content of {shown:?}: {what}")))?;
                        Seen::Other
                    }
                    _ => Seen::Other,
                }
            }
        };
        match self.seen.get_mut(entry.parent as usize) {
            Some(Seen::Directory(last)) if *last < entry.name => last.clone_from(&entry.name),
            Some(Seen::Directory(_)) => {
                return Err(fail(format!("{shown:?} is out of order or there twice")));
            }
            _ => return Err(fail(format!("{shown:?} is in no directory"))),
        }
        self.seen.push(seen);
        Ok(Some((number, entry)))
    }

    fn check_content(&mut self, content: &Content) -> Result<(), &'static str> {
        let within = |segment: &u16, at: u64, len: u64| {
            let size = self.header.segments.get(usize::from(*segment));
            let size = size.ok_or("it is in no segment")?;
            let end = at.checked_add(len).filter(|end| end <= size);
            end.map(|_| ()).ok_or("it is not in its segment")
        };
        match content {
            Content::Empty => Ok(()),
            Content::At { segment, offset, size } => {
                if offset % BLOCK != 0 || *size == 0 {
                    return Err("it does not start with a block");
                }
                within(segment, *offset, *size)
            }
            Content::Sparse { segment, size, pieces } => {
                if i64::try_from(*size).is_err() {
                    return Err("no file is so large");
                }
                pieces.iter().try_for_each(|piece| within(segment, piece.at, piece.len))?;
                let bits = chunk_bits(*size, pieces)?;
                self.chunks += size.div_ceil(1 << bits);
                // all of them are in memory at once
                if self.chunks > 16 * MAX_CHUNKS {
                    Err("there are too many sparse files")
                } else {
                    Ok(())
                }
            }
        }
    }
}

fn check_attributes(attributes: &Attributes) -> Result<(), String> {
    if attributes.mode > 0o7777 || attributes.mtime.1 >= 1_000_000_000 {
        return Err("its mode or time is impossible".into());
    }
    Ok(())
}
