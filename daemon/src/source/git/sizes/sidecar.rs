//! Sizes in a blob of the repository itself, under a ref that names the tree.
//!
//! `refs/hydrant/sizes/<tree>` points to a blob: the sizes of all blobs that
//! `git ls-tree -r --full-tree <tree>` lists, in its order (repetitions and symbolic links included,
//! submodules not), each as a little-endian base 128 number, the whole compressed by zlib. Two bytes
//! a file; made by whoever pushes, read from any git server.

use std::collections::HashMap;
use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use thiserror::Error;

use crate::object::ObjectId;
use crate::source::git::pktline::{Packet, text};
use crate::source::git::transport::Command;
use crate::source::git::{Inner, fetch, wrong};
use crate::source::{Content, FetchError, Sink};

/// Why bytes are no list of the tree's sizes.
#[derive(Debug, Error)]
pub enum BadSidecar {
    #[error("it can't be inflated")]
    Inflate(#[source] std::io::Error),
    #[error("it has a number out of range")]
    Number,
    #[error("it has other than the {0} sizes that the tree has")]
    Count(usize),
}

/// The ref that has the sizes of this tree.
#[must_use]
pub fn name(tree: ObjectId) -> String {
    format!("refs/hydrant/sizes/{tree}")
}

/// The blob's content, for sizes in the order of `git ls-tree -r`.
pub fn encode(sizes: &[u64]) -> std::io::Result<Vec<u8>> {
    let mut numbers = Vec::with_capacity(sizes.len() * 2);
    for &size in sizes {
        let mut rest = size;
        while rest >= 0x80 {
            numbers.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        numbers.push(rest as u8);
    }
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&numbers)?;
    encoder.finish()
}

/// The sizes in a blob's content, of which there must be `count`.
pub fn decode(content: &[u8], count: usize) -> Result<Vec<u64>, BadSidecar> {
    // ten bytes a number at most, and one more byte to see that it ends
    let limit = count as u64 * 10 + 1;
    let mut numbers = Vec::new();
    ZlibDecoder::new(content).take(limit).read_to_end(&mut numbers).map_err(BadSidecar::Inflate)?;
    let mut sizes = Vec::with_capacity(count);
    let (mut size, mut shift) = (0u64, 0u32);
    for byte in numbers {
        let low = u64::from(byte & 0x7f);
        if shift > 63 || low << shift >> shift != low {
            return Err(BadSidecar::Number);
        }
        size |= low << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            sizes.push(size);
            (size, shift) = (0, 0);
        }
    }
    if shift != 0 || sizes.len() != count {
        return Err(BadSidecar::Count(count));
    }
    Ok(sizes)
}

/// The sizes of a tree's entries, if the repository has them.
pub(in crate::source::git) async fn fetch(
    inner: &Inner,
    tree: ObjectId,
    entries: &[ObjectId],
) -> Result<Option<HashMap<ObjectId, u64>>, FetchError> {
    let Some(blob) = find(inner, &name(tree)).await? else { return Ok(None) };
    let mut sink = One(None);
    fetch::fetch(&inner.transport, inner.hash, &[blob], false, &mut sink).await?;
    let content = sink.0.ok_or_else(|| wrong("no blob came"))?;
    let sizes = decode(&content, entries.len()).map_err(|e| wrong(e.to_string()))?;
    Ok(Some(entries.iter().copied().zip(sizes).collect()))
}

/// What a ref points to: the command `ls-refs`.
async fn find(inner: &Inner, name: &str) -> Result<Option<ObjectId>, FetchError> {
    let arguments = vec![format!("ref-prefix {name}")];
    let command = Command { name: "ls-refs", arguments, ids: ("", Vec::new()), last: None };
    let mut reply = inner.transport.command(inner.hash, &command, &mut 0).await?;
    let mut found = None;
    loop {
        match reply.packet().await? {
            Packet::Data(line) => {
                let line = text(&line);
                let mut words = line.split(' ');
                if let (Some(id), Some(of)) = (words.next(), words.next())
                    && of == name
                {
                    let id = ObjectId::from_hex(id.as_bytes()).map_err(|e| wrong(e.to_string()))?;
                    found = Some(id);
                }
            }
            Packet::Flush => break,
            other => return Err(wrong(format!("unexpected {other:?} in ls-refs"))),
        }
    }
    reply.end().await;
    Ok(found)
}

/// Keeps one object, which is not a large one.
struct One(Option<Vec<u8>>);

impl Sink for One {
    fn object(&mut self, _: ObjectId, content: Content) -> std::io::Result<()> {
        if let Content::Memory(bytes) = content {
            self.0 = Some(bytes);
        }
        Ok(())
    }

    fn spool(&mut self) -> std::io::Result<std::fs::File> {
        Err(std::io::Error::other("the sizes of a tree are too many bytes"))
    }

    fn received(&mut self, _: u64) {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn two_bytes_a_file() {
        let sizes: Vec<u64> = (0..38_571).map(|i| i * 7919 % 16_000).collect();
        let content = encode(&sizes).unwrap();
        assert!(content.len() < sizes.len() * 2 + 1000, "{}", content.len());
        assert!(matches!(decode(&content, sizes.len() - 1), Err(BadSidecar::Count(_))));
        assert!(matches!(decode(&content, sizes.len() + 1), Err(BadSidecar::Count(_))));
        assert!(matches!(decode(b"", 0), Err(BadSidecar::Inflate(_)) | Ok(_)));
    }

    proptest! {
        #[test]
        fn comes_back(sizes: Vec<u64>) {
            let content = encode(&sizes).unwrap();
            prop_assert_eq!(decode(&content, sizes.len()).unwrap(), sizes);
        }

        #[test]
        fn never_panics(bytes: Vec<u8>, count in 0usize..100) {
            let _ = decode(&bytes, count);
            let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(&bytes).unwrap();
            if let Ok(sizes) = decode(&encoder.finish().unwrap(), count) {
                prop_assert_eq!(sizes.len(), count);
            }
        }
    }
}
