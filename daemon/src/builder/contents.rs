//! Content that came with the metadata: a stream of objects from the importer, written into the new
//! segments before anything is mounted. The builder checks each against its id again.
//!
//! For each object: the length of its id in one byte, the id, the length of the content in eight
//! little-endian bytes, the content. A zero byte ends the stream.

use std::io::{self, Read, Write};

use crate::object::{HashKind, Hasher, ObjectId};

/// Writes the stream.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
}

impl<W: Write> Writer<W> {
    /// `out` should be buffered.
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// Adds a blob: `len` bytes of content, all that `content` gives.
    pub fn object(&mut self, key: &ObjectId, len: u64, content: impl Read) -> io::Result<()> {
        let id = key.as_bytes();
        self.out.write_all(&[u8::try_from(id.len()).map_err(io::Error::other)?])?;
        self.out.write_all(id)?;
        self.out.write_all(&len.to_le_bytes())?;
        let copied = io::copy(&mut content.take(len), &mut self.out)?;
        if copied == len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Ends the stream, without which it counts as cut short.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0])?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Reads the stream.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    hash: HashKind,
}

impl<R: Read> Reader<R> {
    /// `input` should be buffered.
    pub fn new(input: R, hash: HashKind) -> Self {
        Self { input, hash }
    }

    /// The id and length of the next object; `None` at the end. [`content`](Self::content) has to
    /// be called before the next one.
    pub fn next_object(&mut self) -> io::Result<Option<(ObjectId, u64)>> {
        let mut id_len = [0];
        self.input.read_exact(&mut id_len)?;
        let id_len = usize::from(id_len[0]);
        if id_len == 0 {
            return Ok(None);
        }
        if id_len != self.hash.id_len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an id of another length"));
        }
        let mut id = [0; 32];
        let id = &mut id[..id_len];
        self.input.read_exact(id)?;
        let mut len = [0; 8];
        self.input.read_exact(&mut len)?;
        let key = ObjectId::from_bytes(id).map_err(io::Error::other)?;
        Ok(Some((key, u64::from_le_bytes(len))))
    }

    /// Gives the object's content to `sink` in pieces of at most `buffer`'s length, each with its
    /// offset, and checks that all of it hashes to `key`.
    pub fn content(
        &mut self,
        key: &ObjectId,
        len: u64,
        buffer: &mut [u8],
        mut sink: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut hasher: Hasher = self.hash.hasher();
        hasher.update(format!("blob {len}\0").as_bytes());
        let mut at = 0;
        while at < len {
            let most = usize::try_from(len - at).unwrap_or(usize::MAX).min(buffer.len());
            let piece = &mut buffer[..most];
            self.input.read_exact(piece)?;
            hasher.update(piece);
            sink(at, piece)?;
            at += piece.len() as u64;
        }
        if hasher.finish() == *key {
            Ok(())
        } else {
            let what = format!("what is given as object {key} is another one");
            Err(io::Error::new(io::ErrorKind::InvalidData, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(wrong: bool) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        for content in [&b"one"[..], b"", b"three and more"] {
            let key = ObjectId::of_blob(HashKind::Sha1, if wrong { b"x" } else { content });
            writer.object(&key, content.len() as u64, content).unwrap();
        }
        writer.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut reader = Reader::new(bytes, HashKind::Sha1);
        let mut all = Vec::new();
        while let Some((key, len)) = reader.next_object()? {
            let mut content = Vec::new();
            reader.content(&key, len, &mut [0; 4], |at, piece| {
                assert_eq!(at, content.len() as u64);
                content.extend_from_slice(piece);
                Ok(())
            })?;
            all.push(content);
        }
        Ok(all)
    }

    #[test]
    fn round_trip() {
        let bytes = stream(false);
        assert_eq!(read(&bytes).unwrap(), [&b"one"[..], b"", b"three and more"]);
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len]).is_err(), "{len} of {}", bytes.len());
        }
    }

    #[test]
    fn refuses_another_object() {
        assert_eq!(read(&stream(true)).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
