//! The image of a layer: blocks of 512 bytes, one device, which is the layer's segment.

use std::collections::HashMap;
use std::io::{self, BufReader, Read};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::builder::BuildError;
use crate::builder::files::{Made, sync_dir};
use crate::builder::segment::{self, SegmentJob};
use crate::erofs::{
    FileContent, ImageBuilder, ImageSpec, Layout, Meta, Node as ImageNode, NodeId, Timestamp,
    XattrSetId,
};
use crate::layer::digest::Hasher;
use crate::manifest::ManifestError;
use crate::manifest::layer::{Attributes, BLOCK, Content, Kind, Node, Reader, chunk_bits};

/// What to build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerJob {
    /// A [manifest of a layer](crate::manifest::layer).
    pub manifest: PathBuf,
    /// Where the image goes.
    pub image: PathBuf,
    /// The segment that is to be proved and indexed as well.
    pub segment: Option<SegmentJob>,
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerBuilt {
    /// The length of each segment in bytes, as the manifest has it: the image's devices.
    pub segments: Vec<u64>,
    /// Names, the root not among them.
    pub entries: u64,
    /// In bytes.
    pub image_size: u64,
}

/// Does a job. The image is durable when this returns.
pub fn build(job: &LayerJob) -> Result<LayerBuilt, BuildError> {
    let file = fs_err::File::open(&job.manifest);
    let file = file.map_err(BuildError::io("read what the importer wrote"))?;
    let (layout, segments, entries) = image(BufReader::with_capacity(256 << 10, file))?;
    let mut made = Made::default();
    if let Some(segment) = &job.segment {
        let len = segment::check(segment, &job.manifest, &mut made)?;
        if segments != [len] {
            return Err(BuildError::Tree("the manifest is of another segment".into()));
        }
    }
    let mut write = || {
        made.write(&job.image, 0o600, |out| layout.write(out))?;
        made.settle()?;
        job.image.parent().map_or(Ok(()), sync_dir)
    };
    write().map_err(BuildError::io("write the layer's image"))?;
    made.keep();
    Ok(LayerBuilt { segments, entries, image_size: layout.image_len() })
}

/// The image of a manifest, the lengths of its segments, and how many names there are.
pub fn image(manifest: impl Read) -> Result<(Layout, Vec<u64>, u64), BuildError> {
    let mut hashing = Hashing { input: manifest, hasher: Hasher::default() };
    hashing.hasher.update(b"hydrant layer\0");
    let mut reader = Reader::new(&mut hashing)?;
    let header = reader.header().clone();
    let mut image = ImageBuilder::new(ImageSpec {
        block_bits: BLOCK.trailing_zeros() as u8,
        // known once all is read
        uuid: [0; 16],
        build_time: Timestamp { secs: header.mtime, nanos: 0 },
        devices: header.segments.iter().map(|len| len.div_ceil(BLOCK)).collect(),
    })?;
    let mut sets = HashMap::new();
    let root = meta(&mut image, &mut sets, &header.root)?;
    image.set_meta(image.root(), &root)?;
    let mut nodes = vec![image.root()];
    while let Some((number, entry)) = reader.next_entry()? {
        let wrong = |what: &str| ManifestError::Entry { number: number.into(), what: what.into() };
        let known = |nodes: &[NodeId], n: u32| nodes.get(n as usize).copied();
        let parent = known(&nodes, entry.parent).ok_or_else(|| wrong("it is in nothing"))?;
        let id = match entry.node {
            Node::Link(target) => {
                let target = known(&nodes, target).ok_or_else(|| wrong("a link to nothing"))?;
                image.link(parent, &entry.name, target)?;
                target
            }
            Node::Inode(attributes, kind) => {
                let meta = meta(&mut image, &mut sets, &attributes)?;
                let node = node(kind).map_err(wrong)?;
                image.add(parent, &entry.name, &meta, node)?
            }
        };
        nodes.push(id);
    }
    drop(reader);
    image.set_uuid(uuid(hashing.hasher));
    Ok((image.layout()?, header.segments, nodes.len() as u64 - 1))
}

type Sets = HashMap<Vec<(Vec<u8>, Vec<u8>)>, XattrSetId>;

fn meta(
    image: &mut ImageBuilder,
    sets: &mut Sets,
    attributes: &Attributes,
) -> Result<Meta, BuildError> {
    let xattrs = match &attributes.xattrs {
        none if none.is_empty() => XattrSetId::default(),
        some => match sets.get(some) {
            Some(set) => *set,
            None => {
                let pairs: Vec<_> =
                    some.iter().map(|(n, v)| (n.as_slice(), v.as_slice())).collect();
                let set = image.xattr_set(&pairs)?;
                sets.insert(some.clone(), set);
                set
            }
        },
    };
    let Attributes { mode, uid, gid, mtime: (secs, nanos), .. } = *attributes;
    Ok(Meta { mode, uid, gid, mtime: Timestamp { secs, nanos }, xattrs })
}

fn node(kind: Kind) -> Result<ImageNode, &'static str> {
    Ok(match kind {
        Kind::Directory => ImageNode::Directory,
        Kind::Symlink(target) => ImageNode::Symlink(target),
        Kind::CharDevice { major, minor } => ImageNode::CharDevice { major, minor },
        Kind::BlockDevice { major, minor } => ImageNode::BlockDevice { major, minor },
        Kind::Fifo => ImageNode::Fifo,
        Kind::File(Content::Empty) => ImageNode::File(FileContent::Empty),
        Kind::File(Content::At { segment, offset, size }) => {
            let (device, block) = (device(segment)?, offset / BLOCK);
            ImageNode::File(FileContent::Contiguous { device, block, size })
        }
        Kind::File(Content::Sparse { segment, size, pieces }) => {
            let device = device(segment)?;
            let bits = chunk_bits(size, &pieces)?;
            let count = usize::try_from(size.div_ceil(1 << bits)).map_err(|_| "it is too large")?;
            let mut chunks = vec![None; count];
            for piece in &pieces {
                let first = piece.offset >> bits;
                for n in 0..piece.len.div_ceil(1 << bits) {
                    let chunk = chunks.get_mut((first + n) as usize);
                    let block = (piece.at + (n << bits)) / BLOCK;
                    *chunk.ok_or("a piece is behind its end")? = Some((device, block));
                }
            }
            ImageNode::File(FileContent::Chunks { chunk_bits: bits, size, chunks })
        }
    })
}

/// Devices count from 1.
fn device(segment: u16) -> Result<u16, &'static str> {
    segment.checked_add(1).ok_or("there is no such device")
}

/// The same for the same manifest: an overlay's upper directory refers to it.
fn uuid(hasher: Hasher) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hasher.finish().as_bytes()[..16]);
    // A version 8 UUID (RFC 9562): made by rules of our own.
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// Hashes what is read.
struct Hashing<R> {
    input: R,
    hasher: Hasher,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.input.read(buffer)?;
        self.hasher.update(&buffer[..len]);
        Ok(len)
    }
}
