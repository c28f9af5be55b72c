//! The variable-length numbers and entry headers of a pack (gitformat-pack(5)).

use crate::object::{HashKind, ObjectId};
use crate::source::FetchError;
use crate::source::git::wrong;

/// What kind of object a pack holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectType {
    Commit,
    Tree,
    Blob,
    Tag,
}

impl ObjectType {
    /// The name that goes into the id.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Tree => "tree",
            Self::Blob => "blob",
            Self::Tag => "tag",
        }
    }
}

/// How an entry stores its object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    Whole(ObjectType),
    /// A delta; the base's entry starts so many bytes before this one's.
    OfsDelta(u64),
    RefDelta(ObjectId),
}

/// The header of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryHeader {
    pub kind: EntryKind,
    /// Bytes after inflating: of the object, or of the delta.
    pub size: u64,
}

/// A header of which the first bytes have been seen.
#[derive(Debug, Default)]
pub struct PartialHeader {
    state: State,
    kind: u8,
    size: u64,
    shift: u32,
    offset: u64,
    base: [u8; 32],
    base_len: usize,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    First,
    Size,
    OffsetFirst,
    Offset,
    Base,
}

impl PartialHeader {
    /// The next byte; gives the header after its last.
    pub fn byte(&mut self, byte: u8, hash: HashKind) -> Result<Option<EntryHeader>, FetchError> {
        let more = byte & 0x80 != 0;
        let low = u64::from(byte & 0x7f);
        match self.state {
            State::First => {
                self.kind = byte >> 4 & 7;
                self.size = u64::from(byte & 0x0f);
                self.shift = 4;
                if more {
                    self.state = State::Size;
                    return Ok(None);
                }
                self.after_size()
            }
            State::Size => {
                // the top bits must not fall off
                if self.shift > 63 || low << self.shift >> self.shift != low {
                    return Err(wrong("a pack entry's size is out of range"));
                }
                self.size |= low << self.shift;
                self.shift += 7;
                if more { Ok(None) } else { self.after_size() }
            }
            State::OffsetFirst | State::Offset => {
                if self.state == State::Offset {
                    // "the offset encoding": each further byte adds one, so that no number has two forms
                    let next = self.offset.checked_add(1).and_then(|n| n.checked_mul(128));
                    self.offset = next.ok_or_else(|| wrong("a delta's base is out of range"))?;
                }
                self.offset |= low;
                self.state = State::Offset;
                Ok((!more).then(|| self.header(EntryKind::OfsDelta(self.offset))))
            }
            State::Base => {
                if let Some(place) = self.base.get_mut(self.base_len) {
                    *place = byte;
                }
                self.base_len += 1;
                if self.base_len < hash.id_len() {
                    return Ok(None);
                }
                let base = self.base.get(..hash.id_len()).unwrap_or_default();
                let base = ObjectId::from_bytes(base).map_err(|e| wrong(e.to_string()))?;
                Ok(Some(self.header(EntryKind::RefDelta(base))))
            }
        }
    }

    fn after_size(&mut self) -> Result<Option<EntryHeader>, FetchError> {
        let kind = match self.kind {
            1 => ObjectType::Commit,
            2 => ObjectType::Tree,
            3 => ObjectType::Blob,
            4 => ObjectType::Tag,
            6 => {
                self.state = State::OffsetFirst;
                return Ok(None);
            }
            7 => {
                self.state = State::Base;
                return Ok(None);
            }
            other => return Err(wrong(format!("a pack entry has the unknown type {other}"))),
        };
        Ok(Some(self.header(EntryKind::Whole(kind))))
    }

    fn header(&self, kind: EntryKind) -> EntryHeader {
        EntryHeader { kind, size: self.size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Option<EntryHeader>, FetchError> {
        let mut partial = PartialHeader::default();
        for (i, &byte) in bytes.iter().enumerate() {
            if let Some(header) = partial.byte(byte, HashKind::Sha1)? {
                assert_eq!(i + 1, bytes.len(), "bytes left over");
                return Ok(Some(header));
            }
        }
        Ok(None)
    }

    #[test]
    fn sizes_and_offsets() {
        let whole = |size| Some(EntryHeader { kind: EntryKind::Whole(ObjectType::Blob), size });
        assert_eq!(parse(&[0x35]).unwrap(), whole(5));
        assert_eq!(parse(&[0xb5, 0x01]).unwrap(), whole(5 + 16));
        let largest = [0xbf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f];
        assert_eq!(parse(&largest).unwrap(), whole(u64::MAX));
        let ofs = |n| Some(EntryHeader { kind: EntryKind::OfsDelta(n), size: 0 });
        assert_eq!(parse(&[0x60, 0x7f]).unwrap(), ofs(127));
        assert_eq!(parse(&[0x60, 0x80, 0x00]).unwrap(), ofs(128));
        assert_eq!(parse(&[0x60, 0x80, 0x80, 0x00]).unwrap(), ofs(128 + 128 * 128));
        assert!(matches!(
            parse(&[&[0x70][..], &[7; 20]].concat()).unwrap(),
            Some(EntryHeader { kind: EntryKind::RefDelta(_), size: 0 })
        ));
        assert_eq!(parse(&[0xb5]).unwrap(), None);
    }

    #[test]
    fn out_of_range() {
        assert!(parse(&[0xbf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x1f]).is_err());
        assert!(parse(&[0xff; 32]).is_err());
        assert!(parse(&[&[0x60][..], &[0xff; 12]].concat()).is_err());
        assert!(parse(&[0x00]).is_err());
        assert!(parse(&[0x50]).is_err());
    }
}
