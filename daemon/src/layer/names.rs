//! Which file of a layer has which bytes of its segment. The builder keeps that beside the segment, for people: a magic,
//! then [`Names`] by postcard.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use crate::manifest::ManifestError;
use crate::manifest::layer::{Content, Kind, Node, Reader};
use crate::range::ByteRange;

const MAGIC: &[u8] = b"hydrnam1";

/// The names of a layer, and where its files are.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Names {
    /// Of each entry, counted from 1: the number of the directory that it is in, and its name.
    entries: Vec<(u32, Box<[u8]>)>,
    /// In the order of the segment: the bytes, and the number of the entry.
    files: Vec<(ByteRange, u32)>,
}

impl Names {
    /// Reads a manifest, whose order is believed as far as the reader checks it.
    pub fn read(manifest: impl Read) -> Result<Self, ManifestError> {
        let mut names = Self::default();
        let mut reader = Reader::new(manifest)?;
        while let Some((number, entry)) = reader.next_entry()? {
            let content = match &entry.node {
                Node::Inode(_, Kind::File(content)) => Some(content),
                _ => None,
            };
            match content {
                Some(Content::At { offset, size, .. }) => {
                    names.files.push((ByteRange::new(*offset, *size), number));
                }
                Some(Content::Sparse { pieces, .. }) => {
                    let pieces = pieces.iter().map(|p| (ByteRange::new(p.at, p.len), number));
                    names.files.extend(pieces);
                }
                Some(Content::Empty) | None => {}
            }
            names.entries.push((entry.parent, entry.name.into()));
        }
        names.files.sort_unstable_by_key(|(range, number)| (range.offset(), *number));
        Ok(names)
    }

    /// Writes them down.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        out.write_all(MAGIC)?;
        postcard::to_io(self, out).map(drop).map_err(io::Error::other)
    }

    /// Reads what [`write`](Self::write) has written; `None` if it is something else.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        postcard::from_bytes(bytes.strip_prefix(MAGIC)?).ok()
    }

    /// The path of the file that has most of `range`; empty if none has any.
    #[must_use]
    pub fn path(&self, range: ByteRange) -> Vec<u8> {
        let first = self.files.partition_point(|(file, _)| file.end() <= range.offset());
        let of_range = self.files.iter().skip(first).take_while(|(file, _)| file.overlaps(range));
        let share =
            |file: &ByteRange| file.end().min(range.end()) - file.offset().max(range.offset());
        let mut most = (0, 0);
        for (file, number) in of_range {
            if share(file) > most.0 {
                most = (share(file), *number);
            }
        }
        let (_, mut number) = most;
        let mut parts: Vec<&[u8]> = Vec::new();
        while let Some((parent, name)) =
            number.checked_sub(1).and_then(|at| self.entries.get(at as usize))
        {
            parts.push(name);
            // directories come before what is in them
            number = if *parent < number { *parent } else { 0 };
        }
        parts.reverse();
        parts.join(&b'/')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_a_range() {
        let entries = [(0, &b"usr"[..]), (1, b"a"), (1, b"b"), (0, b"c")];
        let names = Names {
            entries: entries.map(|(parent, name)| (parent, name.into())).into(),
            files: vec![
                (ByteRange::new(512, 1000), 2),
                (ByteRange::new(2048, 5000), 3),
                (ByteRange::new(9216, 10), 4),
            ],
        };
        let at = |offset, len| String::from_utf8(names.path(ByteRange::new(offset, len))).unwrap();
        assert_eq!(at(0, 512), "");
        assert_eq!(at(0, 3072), "usr/b", "the more of both");
        assert_eq!(at(0, 3000), "usr/a");
        assert_eq!(at(600, 1), "usr/a");
        assert_eq!(at(1512, 536), "", "between two files");
        assert_eq!(at(4096, 4096), "usr/b");
        assert_eq!(at(8192, 4096), "c");
        assert_eq!(at(12288, 4096), "");
        let mut written = Vec::new();
        names.write(&mut written).unwrap();
        let read = Names::parse(&written).unwrap();
        assert_eq!(read.path(ByteRange::new(600, 1)), b"usr/a");
        assert!(Names::parse(&written[1..]).is_none() && Names::parse(b"hydrnam1").is_none());
    }
}
