//! Trees for the builder's tests.

use std::io::Write;

use crate::manifest::{Entry, EntryKind, Header, VERSION, Writer};
use crate::object::{HashKind, ObjectId};

/// The id of a blob in a SHA-1 repository.
pub fn blob(content: &[u8]) -> ObjectId {
    ObjectId::of_blob(HashKind::Sha1, content)
}

/// Collects entries of a manifest.
#[derive(Debug, Clone, Default)]
pub struct Maker {
    entries: Vec<Entry>,
}

impl Maker {
    /// Adds an entry and gives its number.
    pub fn add(&mut self, parent: u32, name: &[u8], content: &[u8], kind: EntryKind) -> u32 {
        self.entries.push(Self::entry(parent, name, content, kind));
        self.entries.len() as u32
    }

    pub fn directory(&mut self, parent: u32, name: &[u8]) -> u32 {
        self.add(parent, name, name, EntryKind::Directory)
    }

    /// A file in the root directory.
    pub fn file(&mut self, name: &[u8], content: &[u8]) -> u32 {
        self.file_in(0, name, content)
    }

    pub fn file_in(&mut self, parent: u32, name: &[u8], content: &[u8]) -> u32 {
        let kind = EntryKind::File { size: content.len() as u64, executable: false };
        self.add(parent, name, content, kind)
    }

    /// A file whose content doesn't matter but for its size.
    pub fn sized(&mut self, parent: u32, name: &[u8], key: &[u8], size: u64) -> u32 {
        self.add(parent, name, key, EntryKind::File { size, executable: false })
    }

    pub fn entry(parent: u32, name: &[u8], content: &[u8], kind: EntryKind) -> Entry {
        Entry { parent, name: name.to_vec(), key: blob(content), kind }
    }

    /// Starts a manifest.
    pub fn writer<W: Write>(out: W) -> Writer<W> {
        let hash = HashKind::Sha1;
        let header =
            Header { version: VERSION, hash, commit: blob(b"c"), tree: blob(b"t"), mtime: 1000 };
        Writer::new(out, &header).unwrap()
    }

    pub fn manifest(&self) -> Vec<u8> {
        let mut writer = Self::writer(Vec::new());
        self.entries.iter().for_each(|entry| writer.entry(entry).unwrap());
        writer.finish().unwrap()
    }
}
