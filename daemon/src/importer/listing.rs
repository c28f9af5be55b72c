//! What `git ls-tree -r -t -z --full-tree <commit>` says, in memory.

use std::io::{self, BufRead, Read};

use thiserror::Error;

use crate::object::{HashKind, ObjectId};

/// The longest record in bytes: mode, type, id and a path of `PATH_MAX`.
const MAX_RECORD: u64 = 8 << 10;

/// What a tree's entry is, from its mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
    Executable,
    Symlink,
    Gitlink,
}

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed<'a> {
    /// The number of the directory it is in; 0 is the root.
    pub parent: u32,
    pub name: &'a [u8],
    pub key: ObjectId,
    pub kind: Kind,
}

/// A listing that can't be used.
#[derive(Debug, Error)]
pub enum ListingError {
    #[error("can't read the listing of the tree")]
    Io(#[from] io::Error),
    #[error("entry {number} of the tree, {entry:?}: {what}")]
    Entry { number: u32, entry: String, what: &'static str },
}

#[derive(Debug)]
struct Node {
    name: usize,
    parent: u32,
    name_len: u8,
    kind: Kind,
}

/// A whole tree. Entries count from 1, in git's order.
#[derive(Debug)]
pub struct Listing {
    hash: HashKind,
    nodes: Vec<Node>,
    names: Vec<u8>,
    ids: Vec<u8>,
}

impl Listing {
    /// Reads a listing to its end. `hash` is the repository's.
    pub fn read(hash: HashKind, mut input: impl BufRead) -> Result<Self, ListingError> {
        let (nodes, names, ids) = (Vec::new(), Vec::new(), Vec::new());
        let mut listing = Self { hash, nodes, names, ids };
        // The directories that the next entry can be in: their numbers and paths with a slash.
        let mut open: Vec<(u32, Vec<u8>)> = vec![(0, Vec::new())];
        let mut record = Vec::new();
        loop {
            record.clear();
            input.by_ref().take(MAX_RECORD).read_until(0, &mut record)?;
            if record.is_empty() {
                return Ok(listing);
            }
            let number = listing.len() + 1;
            let fail = |what| {
                let text = String::from_utf8_lossy(&record);
                let entry = text.trim_end_matches('\0').chars().take(400).collect();
                ListingError::Entry { number, entry, what }
            };
            let (b, [0]) = record.split_at(record.len() - 1) else {
                return Err(fail("it is cut short or too long"));
            };
            let (kind, key, path) = parse(b).map_err(fail)?;
            if key.kind() != hash {
                return Err(fail("its id is of another hash function"));
            }
            while open.last().is_some_and(|(_, prefix)| !path.starts_with(prefix)) {
                open.pop();
            }
            let Some((parent, prefix)) = open.last() else { return Err(fail("it is nowhere")) };
            let name = &path[prefix.len()..];
            if name.contains(&b'/') {
                return Err(fail("its directory has not been listed"));
            }
            if name.is_empty() || name == b"." || name == b".." {
                return Err(fail("no file can have this name"));
            }
            if name.eq_ignore_ascii_case(b".git") {
                return Err(fail("this name is git's own"));
            }
            let Ok(name_len) = u8::try_from(name.len()) else {
                return Err(fail("its name is longer than 255 bytes"));
            };
            let name_at = listing.names.len();
            listing.nodes.push(Node { name: name_at, parent: *parent, name_len, kind });
            listing.names.extend_from_slice(name);
            listing.ids.extend_from_slice(key.as_bytes());
            if kind == Kind::Directory {
                open.push((number, [path, b"/"].concat()));
            }
        }
    }

    #[must_use]
    pub fn hash(&self) -> HashKind {
        self.hash
    }

    /// The number of entries.
    #[must_use]
    pub fn len(&self) -> u32 {
        u32::try_from(self.nodes.len()).unwrap_or(u32::MAX)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// All entries with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Listed<'_>)> {
        let ids = self.ids.chunks_exact(self.hash.id_len());
        self.nodes.iter().zip(ids).zip(1..).filter_map(|((node, id), number)| {
            let name = &self.names[node.name..][..usize::from(node.name_len)];
            let key = ObjectId::from_bytes(id).ok()?;
            Some((number, Listed { parent: node.parent, name, key, kind: node.kind }))
        })
    }

    /// The objects of all files and symbolic links, in the order of the listing, with repetitions.
    #[must_use]
    pub fn blobs(&self) -> Vec<ObjectId> {
        let is_blob = |kind| matches!(kind, Kind::File | Kind::Executable | Kind::Symlink);
        self.iter().filter(|(_, entry)| is_blob(entry.kind)).map(|(_, entry)| entry.key).collect()
    }

    /// The path of an entry.
    #[must_use]
    pub fn path(&self, number: u32) -> Vec<u8> {
        let mut chain = Vec::new();
        let mut at = number;
        while let Some(node) = at.checked_sub(1).and_then(|n| self.nodes.get(n as usize)) {
            chain.push(&self.names[node.name..][..usize::from(node.name_len)]);
            at = node.parent;
        }
        chain.reverse();
        chain.join(&b'/')
    }
}

/// `<mode> SP <type> SP <id> TAB <path>`. Modes are taken as git takes them (`canon_mode`): of a
/// file's permissions only the owner's right to execute counts.
fn parse(record: &[u8]) -> Result<(Kind, ObjectId, &[u8]), &'static str> {
    let tab = record.iter().position(|b| *b == b'\t').ok_or("there is no path")?;
    let (fields, path) = (&record[..tab], &record[tab + 1..]);
    let mut fields = fields.split(|b| *b == b' ');
    let (Some(mode), Some(kind), Some(id), None) =
        (fields.next(), fields.next(), fields.next(), fields.next())
    else {
        return Err("mode, type and id are not there");
    };
    let mode = std::str::from_utf8(mode).ok().and_then(|mode| u32::from_str_radix(mode, 8).ok());
    let mode = mode.ok_or("its mode is no number")?;
    let kind = match (mode & 0o170_000, kind) {
        (0o040_000, b"tree") => Kind::Directory,
        (0o100_000, b"blob") if mode & 0o100 != 0 => Kind::Executable,
        (0o100_000, b"blob") => Kind::File,
        (0o120_000, b"blob") => Kind::Symlink,
        (0o160_000, b"commit") => Kind::Gitlink,
        _ => return Err("a mode or type that git doesn't know"),
    };
    Ok((kind, ObjectId::from_hex(id).map_err(|_| "its id is none")?, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391";

    fn read(records: &[(&str, &[u8])]) -> Result<Listing, ListingError> {
        let mut bytes = Vec::new();
        for (head, path) in records {
            bytes.extend_from_slice(format!("{head} {ID}\t").as_bytes());
            bytes.extend_from_slice(path);
            bytes.push(0);
        }
        Listing::read(HashKind::Sha1, &bytes[..])
    }

    #[test]
    fn all_modes_and_odd_names() {
        let listing = read(&[
            ("100664 blob", b"a\tb\n c"),
            ("040000 tree", b"d"),
            ("100755 blob", b"d/x\xff"),
            ("040000 tree", b"d/e"),
            ("120000 blob", b"d/e/l"),
            ("160000 commit", b"dd"),
            ("100644 blob", b"d\xc3\xa9"),
        ])
        .unwrap();
        let all: Vec<_> = listing.iter().map(|(_, e)| (e.parent, e.name, e.kind)).collect();
        assert_eq!(
            all,
            [
                (0, &b"a\tb\n c"[..], Kind::File),
                (0, b"d", Kind::Directory),
                (2, b"x\xff", Kind::Executable),
                (2, b"e", Kind::Directory),
                (4, b"l", Kind::Symlink),
                (0, b"dd", Kind::Gitlink),
                (0, b"d\xc3\xa9", Kind::File),
            ]
        );
        assert_eq!(listing.path(5), b"d/e/l");
    }

    #[test]
    fn says_which_entry_is_wrong() {
        for (record, says) in [
            (("100644 blob", &b"a/b"[..]), "has not been listed"),
            (("100644 blob", b".."), "no file can have this name"),
            (("100644 blob", b".Git"), "git's own"),
            (("100644 blob", b""), "no file can have this name"),
            (("100644 blob", &[b'n'; 256]), "longer than 255"),
            (("100644 tree", b"a"), "doesn't know"),
            (("010644 blob", b"a"), "doesn't know"),
            (("x blob", b"a"), "no number"),
            (("100644", b"a"), "are not there"),
        ] {
            let error = read(&[("100644 blob", b"0"), record]).unwrap_err().to_string();
            assert!(error.contains(says) && error.starts_with("entry 2"), "{error}");
        }
        let error = Listing::read(HashKind::Sha1, &b"100644 blob e69de29"[..]).unwrap_err();
        assert!(error.to_string().contains("cut short"), "{error}");
    }
}
