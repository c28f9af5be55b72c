//! The EROFS images of a tree: of its files, and of its existence pack.

use crate::builder::Owner;
use crate::builder::pack::Plan;
use crate::builder::place::Placed;
use crate::builder::tree::{Kind, Tree};
use crate::erofs::{
    ErofsError, FileContent, ImageBuilder, ImageSpec, Layout, Meta, Node, NodeId, Timestamp,
};
use crate::object::{HashKind, ObjectId};
use crate::range::BLOCK;
use crate::segment::SegmentKind;

/// An image that is ready to be written.
#[derive(Debug)]
pub struct Image {
    pub layout: Layout,
    /// The inode number of each node of the tree; 0 where the node is not in the image.
    pub nids: Vec<u64>,
}

/// Makes the image. All files have the owner and the tree's modification time. Directories in which
/// git would make no file are left out, as git leaves them out; converted files are left to git.
pub fn make(tree: &Tree, placed: &Placed, owner: Owner) -> Result<Image, ErofsError> {
    let mtime = Timestamp { secs: tree.header().mtime, nanos: 0 };
    let meta = |mode| Meta { mode, uid: owner.uid, gid: owner.gid, mtime, ..Meta::default() };
    let data = placed.segments.iter().filter(|segment| segment.kind == SegmentKind::Data);
    let mut image = ImageBuilder::new(ImageSpec {
        block_bits: BLOCK.trailing_zeros() as u8,
        uuid: uuid(b"hydrant tree\0", tree.header().tree, owner),
        build_time: mtime,
        devices: data.map(|segment| segment.size.div_ceil(BLOCK)).collect(),
    })?;
    image.set_meta(image.root(), &meta(0o755))?;

    let used = used(tree);
    let mut nodes: Vec<Option<NodeId>> = vec![None; tree.len() as usize];
    nodes[0] = Some(image.root());
    for number in tree.numbers() {
        let (mode, node) = match tree.kind(number) {
            Kind::Directory if !used[number as usize] => continue,
            Kind::Converted | Kind::ConvertedExecutable => continue,
            Kind::Directory | Kind::Gitlink => (0o755, Node::Directory),
            Kind::Symlink => (0o777, Node::Symlink(tree.target(number).to_vec())),
            Kind::File => (0o644, file(tree, placed, number)),
            Kind::Executable => (0o755, file(tree, placed, number)),
        };
        let Some(parent) = nodes[tree.parent(number) as usize] else { continue };
        nodes[number as usize] = Some(image.add(parent, tree.name(number), &meta(mode), node)?);
    }
    let layout = image.layout()?;
    let nids = nodes.iter().map(|node| node.and_then(|node| layout.nid(node)).unwrap_or(0));
    Ok(Image { nids: nids.collect(), layout })
}

/// Makes the image with nothing but the existence pack, where git looks for it.
pub fn make_pack(tree: &Tree, plan: &Plan, owner: Owner) -> Result<Layout, ErofsError> {
    let pack = &plan.pack;
    let mtime = Timestamp { secs: tree.header().mtime, nanos: 0 };
    let meta = |mode| Meta { mode, uid: owner.uid, gid: owner.gid, mtime, ..Meta::default() };
    let mut image = ImageBuilder::new(ImageSpec {
        block_bits: BLOCK.trailing_zeros() as u8,
        uuid: uuid(b"hydrant existence pack\0", plan.trailer(), owner),
        build_time: mtime,
        devices: vec![pack.size.div_ceil(BLOCK)],
    })?;
    let mut at = image.root();
    image.set_meta(at, &meta(0o755))?;
    for name in [&b".git"[..], b"objects", b"pack"] {
        at = image.add(at, name, &meta(0o755), Node::Directory)?;
    }
    let content = FileContent::Contiguous { device: device(0), block: 0, size: pack.size };
    let name = format!("{}.pack", pack.name);
    image.add(at, name.as_bytes(), &meta(0o444), Node::File(content))?;
    image.layout()
}

fn file(tree: &Tree, placed: &Placed, number: u32) -> Node {
    Node::File(match placed.place(number) {
        None => FileContent::Empty,
        Some(place) => FileContent::Contiguous {
            device: device(place.segment),
            block: place.offset / BLOCK,
            size: tree.size(number),
        },
    })
}

/// Devices count from 1. A number that no device has is refused by the image.
fn device(segment: u32) -> u16 {
    u16::try_from(segment + 1).unwrap_or(0)
}

/// For each node: is it, or is there in it, anything but directories?
fn used(tree: &Tree) -> Vec<bool> {
    let mut used = vec![false; tree.len() as usize];
    for number in tree.numbers().rev() {
        if used[number as usize] || tree.kind(number) != Kind::Directory {
            used[number as usize] = true;
            used[tree.parent(number) as usize] = true;
        }
    }
    used
}

/// The same for the same content and owner: an overlay's upper directory refers to it. Another one for
/// each image of a mount: with two of one UUID overlayfs would not find files by it.
fn uuid(kind: &[u8], id: ObjectId, owner: Owner) -> [u8; 16] {
    let mut hasher = HashKind::Sha256.hasher();
    hasher.update(kind);
    hasher.update(id.as_bytes());
    hasher.update(&owner.uid.to_be_bytes());
    hasher.update(&owner.gid.to_be_bytes());
    let hash = hasher.finish();
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hash.as_bytes()[..16]);
    // A version 8 UUID (RFC 9562): made by rules of our own.
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}
