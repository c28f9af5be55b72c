//! Bytes that may be too many for memory: unpacked objects, deltas, and the pack itself.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::object::{Hasher, ObjectId};
use crate::source::git::wrong;
use crate::source::{Content, FetchError, SPOOL_FROM, Sink};

/// An unpacked object or delta.
#[derive(Debug)]
pub enum Blob {
    Memory(Vec<u8>),
    Spooled { file: File, len: u64 },
}

impl Blob {
    pub fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::Spooled { len, .. } => *len,
        }
    }

    /// Fills `buffer` from `offset` on; the range must be inside.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), FetchError> {
        match self {
            Self::Memory(bytes) => {
                let range = usize::try_from(offset).ok().and_then(|at| {
                    let end = at.checked_add(buffer.len())?;
                    bytes.get(at..end)
                });
                match range {
                    Some(range) => buffer.copy_from_slice(range),
                    None => return Err(wrong("a delta reads past its base")),
                }
            }
            Self::Spooled { file, .. } => {
                file.read_exact_at(buffer, offset).map_err(FetchError::Sink)?;
            }
        }
        Ok(())
    }

    /// The same bytes once more. A spooled blob shares its file.
    pub fn duplicate(&self) -> Result<Self, FetchError> {
        Ok(match self {
            Self::Memory(bytes) => Self::Memory(bytes.clone()),
            Self::Spooled { file, len } => {
                Self::Spooled { file: file.try_clone().map_err(FetchError::Sink)?, len: *len }
            }
        })
    }
}

impl From<Blob> for Content {
    fn from(blob: Blob) -> Self {
        match blob {
            Blob::Memory(bytes) => Self::Memory(bytes),
            Blob::Spooled { file, len } => Self::Spooled { file, len },
        }
    }
}

/// Where an object or delta of a known size is unpacked to, hashed on the way.
#[derive(Debug)]
pub struct Target {
    blob: Blob,
    size: u64,
    hasher: Option<Hasher>,
}

impl Target {
    /// For `size` bytes. With a `hasher`, which has seen the object's header already, the id is worked out.
    pub fn new(size: u64, hasher: Option<Hasher>, sink: &mut dyn Sink) -> Result<Self, FetchError> {
        let blob = if size > SPOOL_FROM {
            Blob::Spooled { file: sink.spool().map_err(FetchError::Sink)?, len: 0 }
        } else {
            Blob::Memory(Vec::with_capacity(usize::try_from(size).unwrap_or(0)))
        };
        Ok(Self { blob, size, hasher })
    }

    /// How many bytes are still to come.
    pub fn missing(&self) -> u64 {
        self.size - self.blob.len()
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FetchError> {
        if bytes.len() as u64 > self.missing() {
            return Err(wrong("an object is longer than the pack says"));
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
        match &mut self.blob {
            Blob::Memory(vec) => vec.extend_from_slice(bytes),
            Blob::Spooled { file, len } => {
                file.write_all_at(bytes, *len).map_err(FetchError::Sink)?;
                *len += bytes.len() as u64;
            }
        }
        Ok(())
    }

    /// All that was written, and its id if it was hashed.
    pub fn finish(self) -> Result<(Blob, Option<ObjectId>), FetchError> {
        if self.missing() > 0 {
            return Err(wrong("an object is shorter than the pack says"));
        }
        Ok((self.blob, self.hasher.map(Hasher::finish)))
    }
}

/// Up to so many bytes of a pack stay in memory.
const MEMORY: usize = 4 << 20;

/// A pack larger than [`MEMORY`] is written to its file in pieces of about this size.
const PIECE: usize = 256 << 10;

/// The raw bytes of a pack, from which bases are unpacked again.
#[derive(Debug, Default)]
pub struct RawPack {
    /// What is in the file; `tail` goes on from there.
    file: Option<(File, u64)>,
    tail: Vec<u8>,
}

impl RawPack {
    pub fn append(&mut self, bytes: &[u8], sink: &mut dyn Sink) -> Result<(), FetchError> {
        self.tail.extend_from_slice(bytes);
        match &mut self.file {
            Some((file, written)) if self.tail.len() >= PIECE => {
                file.write_all_at(&self.tail, *written).map_err(FetchError::Sink)?;
                *written += self.tail.len() as u64;
                self.tail.clear();
            }
            None if self.tail.len() > MEMORY => {
                let file = sink.spool().map_err(FetchError::Sink)?;
                file.write_all_at(&self.tail, 0).map_err(FetchError::Sink)?;
                self.file = Some((file, self.tail.len() as u64));
                self.tail = Vec::with_capacity(2 * PIECE);
            }
            _ => {}
        }
        Ok(())
    }

    /// Some bytes from `offset` on, into `buffer`; 0 at the end.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, FetchError> {
        let written = self.file.as_ref().map_or(0, |(_, written)| *written);
        match &self.file {
            Some((file, _)) if offset < written => {
                let most = usize::try_from(written - offset).unwrap_or(usize::MAX);
                let most = most.min(buffer.len());
                let buffer = buffer.get_mut(..most).unwrap_or_default();
                match file.read_at(buffer, offset).map_err(FetchError::Sink)? {
                    0 => Err(FetchError::Sink(io::ErrorKind::UnexpectedEof.into())),
                    n => Ok(n),
                }
            }
            _ => {
                let from = usize::try_from(offset - written).unwrap_or(usize::MAX);
                let bytes = self.tail.get(from..).unwrap_or_default();
                let n = bytes.len().min(buffer.len());
                if let (Some(to), Some(from)) = (buffer.get_mut(..n), bytes.get(..n)) {
                    to.copy_from_slice(from);
                }
                Ok(n)
            }
        }
    }

    pub fn into_content(self) -> Result<Content, FetchError> {
        Ok(match self.file {
            None => Content::Memory(self.tail),
            Some((file, written)) => {
                file.write_all_at(&self.tail, written).map_err(FetchError::Sink)?;
                Content::Spooled { file, len: written + self.tail.len() as u64 }
            }
        })
    }
}
