//! Archives of our own making, and what is read of them.

use std::process::{Command, Stdio};

use fs_err as fs;

use crate::layer::digest::Digest;
use crate::layer::index::{Index, Maker};
use crate::layer::indexer::{Compression, Indexer, IndexerError};
use crate::layer::span::Span;
use crate::layer::tar::{Data, Entry, Summary, TarError, TarReader};
use crate::layer::tree::{Tree, TreeBuilder, TreeError};

/// An archive, header by header.
#[derive(Debug, Clone, Default)]
pub struct Archive(pub Vec<u8>);

/// A header that can still be changed.
#[derive(Debug, Clone)]
pub struct Block(pub [u8; 512]);

impl Block {
    /// A `ustar` header.
    pub fn new(path: &[u8], kind: u8, size: u64) -> Self {
        let mut block = Self([0; 512]);
        block.set(0, path);
        block.set(100, b"0000644\0");
        block.set(108, b"0001750\0").set(116, b"0000144\0");
        block.set(124, format!("{size:011o}\0").as_bytes());
        block.set(136, b"14000000000\0");
        block.0[156] = kind;
        block.set(257, b"ustar\x0000");
        block.set(329, b"0000000\0").set(337, b"0000000\0");
        block
    }

    pub fn set(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub fn link(mut self, target: &[u8]) -> Self {
        self.set(157, target);
        self
    }

    pub fn gnu(mut self) -> Self {
        self.set(257, b"ustar  \0");
        self
    }

    /// With its checksum.
    pub fn done(mut self) -> [u8; 512] {
        self.set(148, b"        ");
        let sum: u32 = self.0.iter().map(|byte| u32::from(*byte)).sum();
        self.set(148, format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}

impl Archive {
    pub fn block(&mut self, block: Block, data: &[u8]) -> &mut Self {
        self.0.extend_from_slice(&block.done());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn add(&mut self, path: &str, kind: u8, data: &[u8]) -> &mut Self {
        self.block(Block::new(path.as_bytes(), kind, data.len() as u64), data)
    }

    pub fn file(&mut self, path: &str, data: &[u8]) -> &mut Self {
        self.add(path, b'0', data)
    }

    pub fn dir(&mut self, path: &str) -> &mut Self {
        self.add(path, b'5', b"")
    }

    pub fn link(&mut self, path: &str, kind: u8, target: &str) -> &mut Self {
        self.block(Block::new(path.as_bytes(), kind, 0).link(target.as_bytes()), b"")
    }

    pub fn pax(&mut self, kind: u8, records: &[(&str, &[u8])]) -> &mut Self {
        let mut data = Vec::new();
        for (key, value) in records {
            data.extend(record(key, value));
        }
        self.add("PaxHeaders/x", kind, &data)
    }

    pub fn end(&self) -> Vec<u8> {
        [&self.0[..], &[0; 1024]].concat()
    }
}

/// A PAX record, its own length included.
pub fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
}

/// Reads an archive that is pushed in pieces of `chunk` bytes.
pub fn read_by(
    mut reader: TarReader,
    archive: &[u8],
    chunk: usize,
) -> Result<(Vec<Entry>, Summary), TarError> {
    let mut entries = Vec::new();
    for piece in archive.chunks(chunk.max(1)) {
        reader.push(piece, &mut |entry| {
            entries.push(entry);
            Ok::<_, TarError>(())
        })?;
    }
    Ok((entries, reader.finish()?))
}

pub fn read(archive: &[u8]) -> Result<Vec<Entry>, TarError> {
    read_by(TarReader::default(), archive, archive.len()).map(|(entries, _)| entries)
}

/// What a file holds.
pub fn content(archive: &[u8], data: &Data) -> Vec<u8> {
    let mut bytes = vec![0; data.size as usize];
    for piece in &data.pieces {
        let from = &archive[piece.at as usize..][..piece.len as usize];
        bytes[piece.offset as usize..][..piece.len as usize].copy_from_slice(from);
    }
    bytes
}

pub fn tree(archive: &[u8]) -> Result<Tree, TreeError> {
    let mut builder = TreeBuilder::default();
    let mut reader = TarReader::default();
    reader.push(archive, &mut |entry| builder.add(entry))?;
    reader.finish()?;
    Ok(builder.finish())
}

/// Indexes a layer that comes in pieces of `chunk` bytes; its index and what came out.
pub fn index_by(
    mut indexer: Indexer,
    layer: &[u8],
    chunk: usize,
) -> Result<(Index, Vec<u8>), IndexerError> {
    let mut bytes = Vec::new();
    for piece in layer.chunks(chunk.max(1)) {
        indexer.push(piece, &mut |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok::<_, IndexerError>(())
        })?;
    }
    let index = indexer.finish(&mut |piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok::<_, IndexerError>(())
    })?;
    Ok((index, bytes))
}

/// Runs a program in `dir`, with `input`; what it writes.
pub fn run(dir: &std::path::Path, program: &str, arguments: &[&str]) -> Vec<u8> {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(dir).stdin(Stdio::null());
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// Runs a Python script in `dir`.
pub fn python(dir: &std::path::Path, script: &str, arguments: &[&str]) -> Vec<u8> {
    run(dir, "python3", &[&["-c", script], arguments].concat())
}

/// An index of parts of a gzip blob and their windows, as an image brings one along.
pub fn pinned_index(parts: Vec<(Span, Vec<u8>)>, blob: &[u8], segment: &[u8]) -> Index {
    let mut maker = Maker::default();
    for (span, window) in parts {
        maker.add(span, &window).unwrap();
    }
    let (digest, diff_id) = (Digest::of(blob), Digest::of(segment));
    maker.pinned(Compression::Gzip, blob.len() as u64, digest, diff_id)
}

/// Bytes that compress somewhat, the same for the same seed.
pub fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 64);
    while bytes.len() < len {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let word = (seed >> 40) as usize % 4096;
        bytes.extend_from_slice(format!("word{word} ").as_bytes());
        if seed >> 60 == 0 {
            bytes.extend((0..48).map(|n| (seed >> (n % 50)) as u8));
        }
    }
    bytes.truncate(len);
    bytes
}

pub fn scratch() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("layer").tempdir_in("/var/tmp").unwrap();
    fs::create_dir(dir.path().join("src")).unwrap();
    dir
}
