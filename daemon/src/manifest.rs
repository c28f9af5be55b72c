//! The manifest: a tree as plain data, from the importer to the builder.
//!
//! The importer, which has read bytes from the network, writes it; the builder believes nothing of
//! it ([`Reader`] checks each entry) and makes the tree's image out of it. A manifest is a stream of
//! [postcard](https://postcard.jamesmunns.com/wire-format.html) records, each behind its length in
//! four little-endian bytes: one [`Header`], then the entries. This is the manifest of a git tree;
//! that of an image's layer, with records of its own in the same frame, is in [`layer`].

pub mod layer;

use std::fmt;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

use crate::object::{HashKind, ObjectId};

/// The version of the format; another one is refused.
pub const VERSION: u32 = 1;
/// The longest record in bytes. A name has at most 255 bytes, a symbolic link's target 4095.
const MAX_RECORD: u32 = 64 << 10;

/// What holds for the whole tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    pub version: u32,
    pub hash: HashKind,
    /// The commit that the tree belongs to.
    pub commit: ObjectId,
    /// The tree's own id.
    pub tree: ObjectId,
    /// The modification time of every file: seconds since the epoch, in the past.
    pub mtime: i64,
}

/// One name in the tree. The root directory is number 0 and has no entry; entries count from 1. A
/// directory comes before what is in it; the entries of one directory are in the order of
/// their names' bytes, as in git's index (a directory sorts as if its name ended in `/`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The number of the directory that it is in.
    pub parent: u32,
    /// One to 255 bytes without `/` and NUL; not `.` and not `..`.
    pub name: Vec<u8>,
    /// The object: of a blob, a tree, or for a [`EntryKind::Gitlink`] a commit elsewhere.
    pub key: ObjectId,
    pub kind: EntryKind,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryKind {
    Directory,
    File {
        /// The size in bytes of the blob, and so of the file.
        size: u64,
        executable: bool,
    },
    /// A file that git's own rules write (line ends, `ident`, filters): it is not part of the
    /// image but made in the upper directory once the tree is mounted.
    Converted {
        executable: bool,
    },
    /// A symbolic link; its blob is in the repository already.
    Symlink {
        target: Vec<u8>,
    },
    /// A submodule: an empty directory.
    Gitlink,
}

/// A manifest that breaks the rules.
#[derive(Debug, Error)]
pub enum ManifestError {
    #[error("can't read the manifest")]
    Io(#[from] io::Error),
    #[error("the manifest is of version {0}, this program knows {VERSION}")]
    Version(u32),
    #[error("entry {number} of the manifest: {what}")]
    Entry { number: u64, what: String },
}

/// An [`Entry`] on its way out.
#[derive(Debug, Serialize)]
struct EntryRef<'a> {
    parent: u32,
    name: &'a [u8],
    key: &'a ObjectId,
    kind: &'a EntryKind,
}

/// Writes a manifest.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    record: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Starts a manifest. `out` should be buffered.
    pub fn new(out: W, header: &Header) -> io::Result<Self> {
        let mut writer = Self { out, record: Vec::new() };
        writer.record(header)?;
        Ok(writer)
    }

    pub fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        self.put(entry.parent, &entry.name, &entry.key, &entry.kind)
    }

    /// Adds an entry by its parts.
    pub fn put(
        &mut self,
        parent: u32,
        name: &[u8],
        key: &ObjectId,
        kind: &EntryKind,
    ) -> io::Result<()> {
        self.record(&EntryRef { parent, name, key, kind })
    }

    /// Ends the manifest with an empty record, without which it counts as cut short.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&0u32.to_le_bytes())?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn record(&mut self, record: &impl Serialize) -> io::Result<()> {
        write_record(&mut self.out, &mut self.record, record, MAX_RECORD)
    }
}

/// Reads a manifest and checks it: names, parents, order, kinds of ids.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    header: Header,
    /// For each entry so far, root included: is it a directory, and the last name seen in it.
    directories: Vec<Option<Vec<u8>>>,
    record: Vec<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads the header. `input` should be buffered.
    pub fn new(mut input: R) -> Result<Self, ManifestError> {
        let wrong = |what: &str| ManifestError::Entry { number: 0, what: what.to_owned() };
        let mut record = Vec::new();
        if !read_record(&mut input, &mut record, MAX_RECORD)? {
            return Err(wrong("there is no header"));
        }
        let header: Header = decode(&record).map_err(|what| wrong(&what))?;
        if header.version != VERSION {
            return Err(ManifestError::Version(header.version));
        }
        if header.commit.kind() != header.hash || header.tree.kind() != header.hash {
            return Err(wrong("the ids are of another hash function"));
        }
        Ok(Self { input, header, directories: vec![Some(Vec::new())], record })
    }

    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next entry and its number, counted from 1; `None` at the end.
    pub fn next_entry(&mut self) -> Result<Option<(u32, Entry)>, ManifestError> {
        let number = self.directories.len();
        let fail = |what: String| ManifestError::Entry { number: number as u64, what };
        if !read_record(&mut self.input, &mut self.record, MAX_RECORD)? {
            return Ok(None);
        }
        let entry: Entry = decode(&self.record).map_err(fail)?;
        let number = u32::try_from(number).map_err(|_| fail("too many entries".into()))?;
        let shown = Shown(&entry.name);
        let name = &entry.name[..];
        check_name(name).map_err(fail)?;
        // At any depth, as git has it: a repository of the origin's making could run programs.
        if name.eq_ignore_ascii_case(b".git") {
            return Err(fail(format!("{shown:?} is git's own directory")));
        }
        if entry.key.kind() != self.header.hash {
            return Err(fail("its id is of another hash function".into()));
        }
        if let EntryKind::Symlink { target } = &entry.kind {
            check_target(name, target).map_err(fail)?;
        }
        if let EntryKind::File { size, .. } = entry.kind
            && i64::try_from(size).is_err()
        {
            return Err(fail(format!("{shown:?} has an impossible size, {size}")));
        }
        let is_directory = entry.kind == EntryKind::Directory;
        let sort_name = || name.iter().chain(is_directory.then_some(&b'/'));
        match self.directories.get_mut(entry.parent as usize) {
            Some(Some(last)) if last.iter().lt(sort_name()) => {
                last.clear();
                last.extend(sort_name());
            }
            Some(Some(_)) => return Err(fail(format!("{shown:?} is out of order or there twice"))),
            _ => return Err(fail(format!("{shown:?} is in no directory"))),
        }
        self.directories.push(is_directory.then(Vec::new));
        Ok(Some((number, entry)))
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err("it is too long".into()),
        Err(error) => Err(format!("it can't be read: {error}")),
    }
}

/// A name for people to read.
struct Shown<'a>(&'a [u8]);

impl fmt::Debug for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&String::from_utf8_lossy(self.0), f)
    }
}

/// Can it be the name of something in a directory?
fn check_name(name: &[u8]) -> Result<(), String> {
    let shown = Shown(name);
    if name.is_empty() || name.len() > 255 || name == b"." || name == b".." {
        return Err(format!("{shown:?} can't be a file's name"));
    }
    if name.contains(&b'/') || name.contains(&0) {
        return Err(format!("{shown:?} has a slash or a NUL in it"));
    }
    Ok(())
}

/// Can a symbolic link lead there?
fn check_target(name: &[u8], target: &[u8]) -> Result<(), String> {
    if target.is_empty() || target.len() > 4095 || target.contains(&0) {
        return Err(format!("{:?} is a symbolic link that can't be made", Shown(name)));
    }
    Ok(())
}

/// Writes a record of at most `max` bytes, made in `bytes`.
fn write_record(
    out: &mut impl Write,
    bytes: &mut Vec<u8>,
    record: &impl Serialize,
    max: u32,
) -> io::Result<()> {
    bytes.clear();
    bytes.extend_from_slice(&[0; 4]);
    *bytes = postcard::to_extend(record, std::mem::take(bytes)).map_err(io::Error::other)?;
    let len = u32::try_from(bytes.len() - 4).ok().filter(|len| *len <= max);
    let len = len.ok_or_else(|| io::Error::other("a record of the manifest is too long"))?;
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    out.write_all(bytes)
}

/// Reads the next record, of at most `max` bytes, into `bytes`; false at the empty record that ends
/// a manifest.
fn read_record(input: &mut impl Read, bytes: &mut Vec<u8>, max: u32) -> io::Result<bool> {
    let mut len = [0; 4];
    input.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len);
    if len == 0 {
        return Ok(false);
    }
    if len > max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a record is too long"));
    }
    // in steps, so that a record's length alone takes no memory
    bytes.clear();
    input.take(u64::from(len)).read_to_end(bytes)?;
    if bytes.len() == len as usize { Ok(true) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> ObjectId {
        ObjectId::of_blob(HashKind::Sha1, &[n])
    }

    fn header() -> Header {
        Header { version: VERSION, hash: HashKind::Sha1, commit: id(1), tree: id(2), mtime: 1 }
    }

    fn file(parent: u32, name: &[u8]) -> Entry {
        let kind = EntryKind::File { size: 3, executable: false };
        Entry { parent, name: name.to_vec(), key: id(3), kind }
    }

    fn dir(parent: u32, name: &[u8]) -> Entry {
        Entry { parent, name: name.to_vec(), key: id(4), kind: EntryKind::Directory }
    }

    fn read(entries: &[Entry]) -> Result<usize, ManifestError> {
        let mut writer = Writer::new(Vec::new(), &header()).unwrap();
        entries.iter().for_each(|e| writer.entry(e).unwrap());
        let bytes = writer.finish().unwrap();
        let mut reader = Reader::new(&bytes[..])?;
        let mut count = 0;
        while reader.next_entry()?.is_some() {
            count += 1;
        }
        Ok(count)
    }

    #[test]
    fn takes_what_git_lists() {
        // "a.c" sorts before the directory "a", whose name counts as "a/"
        let entries = [file(0, b"a.c"), dir(0, b"a"), file(2, b"x"), file(0, b"b\xff c")];
        assert_eq!(read(&entries).unwrap(), 4);
    }

    #[test]
    fn refuses_what_would_leave_the_tree() {
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'n'; 256], b".git", b".GIT"] {
            assert!(read(&[file(0, name)]).is_err(), "{name:?}");
        }
        assert!(read(&[dir(0, b"a"), dir(1, b".Git")]).is_err(), "a repository further down");
        assert!(read(&[file(1, b"x")]).is_err(), "its own parent");
        assert!(read(&[file(0, b"x"), file(1, b"y")]).is_err(), "in a file");
        assert!(read(&[file(0, b"x"), file(0, b"x")]).is_err(), "twice");
        assert!(read(&[file(0, b"y"), file(0, b"x")]).is_err(), "out of order");
    }

    #[test]
    fn refuses_a_manifest_cut_short() {
        let mut writer = Writer::new(Vec::new(), &header()).unwrap();
        writer.entry(&file(0, b"x")).unwrap();
        let bytes = writer.finish().unwrap();
        for len in 0..bytes.len() {
            let read = Reader::new(&bytes[..len]).and_then(|mut r| {
                while r.next_entry()?.is_some() {}
                Ok(())
            });
            assert!(read.is_err(), "{len} of {} bytes", bytes.len());
        }
    }
}
