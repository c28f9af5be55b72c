//! Generated trees: what the reader sees is what was put in.

use proptest::collection::vec;
use proptest::prelude::*;

use super::reader::Reader;
use super::support::{Files, Model, assert_same, check_with_utils, image};
use super::zoo::BUILD_TIME;
use crate::erofs::{FileContent, Meta, Node, Timestamp};

/// Blocks of each of the two devices.
const BLOCKS: u64 = 64;

#[derive(Debug, Clone)]
enum Kind {
    Node(NodeShape),
    /// A hard link to an earlier node, by index.
    Link(usize),
}

/// A node, but for what depends on the block size.
#[derive(Debug, Clone)]
enum NodeShape {
    Fixed(Node),
    /// Device, start and length in 16ths of the device.
    Run(u16, u8, u8, u16),
    /// Chunk size in powers over a block, chunks as devices and starts.
    Chunks(u8, Vec<Option<(u16, u8)>>, u16),
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_filter("no slash, no NUL", |b| *b != b'/' && *b != 0);
    let few = prop::sample::select(b".!-a\xff".to_vec());
    prop_oneof![4 => vec(few, 1..5), 4 => vec(byte.clone(), 1..20), 1 => vec(byte, 1..=255)]
        .prop_filter("no dots", |name| name != b"." && name != b"..")
}

fn meta() -> impl Strategy<Value = Meta> {
    let time = prop_oneof![
        3 => Just(BUILD_TIME),
        1 => (any::<i64>(), 0..1_000_000_000u32).prop_map(|(secs, nanos)| Timestamp { secs, nanos }),
    ];
    let id = || prop_oneof![Just(0), 65_530..65_540u32, any::<u32>()];
    (0..=0o7777u16, id(), id(), time).prop_map(|(mode, uid, gid, mtime)| Meta {
        mode,
        uid,
        gid,
        mtime,
        ..Meta::default()
    })
}

fn xattrs() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
    let name = prop_oneof![
        "user\\.[a-c]{1,2}".prop_map(String::into_bytes),
        "(trusted|security)\\.[x-z]{1,200}".prop_map(String::into_bytes),
    ];
    let value = prop_oneof![4 => vec(0..3u8, 0..4), 1 => vec(any::<u8>(), 0..3000)];
    let set = prop::collection::btree_map(name, value, 0..5);
    prop_oneof![2 => Just(Vec::new()), 1 => set.prop_map(|set| set.into_iter().collect())]
}

fn shape() -> impl Strategy<Value = NodeShape> {
    let device = (0..4096u32, 0..1u32 << 20);
    let fixed = prop_oneof![
        6 => Just(Node::Directory),
        1 => vec(1..=255u8, 1..4096).prop_map(Node::Symlink),
        2 => vec(1..=255u8, 1..100).prop_map(Node::Symlink),
        2 => vec(any::<u8>(), 0..9000).prop_map(|bytes| Node::File(FileContent::Inline(bytes))),
        1 => device.clone().prop_map(|(major, minor)| Node::CharDevice { major, minor }),
        1 => device.prop_map(|(major, minor)| Node::BlockDevice { major, minor }),
        1 => Just(Node::Fifo),
        1 => Just(Node::Socket),
        1 => Just(Node::File(FileContent::Empty)),
    ];
    let chunk = prop::option::of((1..=2u16, 0..16u8));
    prop_oneof![
        4 => fixed.prop_map(NodeShape::Fixed),
        4 => (1..=2u16, 0..16u8, 0..16u8, any::<u16>()).prop_map(|(d, s, l, m)| NodeShape::Run(d, s, l, m)),
        1 => (0..3u8, vec(chunk, 1..40), any::<u16>()).prop_map(|(b, c, m)| NodeShape::Chunks(b, c, m)),
    ]
}

fn node(shape: NodeShape, block_bits: u8) -> Node {
    let block = 1u64 << block_bits;
    match shape {
        NodeShape::Fixed(node) => node,
        NodeShape::Run(device, start, len, more) => {
            let (start, len) = (u64::from(start), u64::from(len).min(15 - u64::from(start)));
            let size = len * BLOCKS / 16 * block + u64::from(more) % (4 * block);
            Node::File(FileContent::Contiguous { device, block: start * BLOCKS / 16, size })
        }
        NodeShape::Chunks(power, chunks, less) => {
            let chunk = block << power;
            let size = chunks.len() as u64 * chunk - u64::from(less) % chunk;
            let place = |(device, start)| (device, u64::from(start) * BLOCKS / 16);
            let chunks = chunks.into_iter().map(|chunk| chunk.map(place)).collect();
            Node::File(FileContent::Chunks { chunk_bits: block_bits + power, size, chunks })
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_reads_back(
        block_bits in prop::sample::select(vec![9u8, 12]),
        tree in vec((
            any::<prop::sample::Index>(),
            name(),
            meta(),
            xattrs(),
            prop_oneof![9 => shape().prop_map(Kind::Node), 1 => any::<usize>().prop_map(Kind::Link)],
        ), 0..150),
    ) {
        let mut model = Model::new(block_bits, BUILD_TIME, &[BLOCKS, BLOCKS]);
        let mut directories = vec![model.root()];
        let mut others = Vec::new();
        for (parent, name, meta, xattrs, kind) in tree {
            let parent = *parent.get(&directories);
            if model.has(parent, &name) {
                continue;
            }
            let xattrs: Vec<(&[u8], &[u8])> = xattrs.iter().map(|(n, v)| (&n[..], &v[..])).collect();
            match kind {
                Kind::Node(shape) => {
                    let node = node(shape, block_bits);
                    let list = if node == Node::Directory { &mut directories } else { &mut others };
                    list.push(model.add(parent, &name, meta, &xattrs, node));
                }
                Kind::Link(target) if !others.is_empty() => {
                    model.link(parent, &name, others[target % others.len()]);
                }
                Kind::Link(_) => {}
            }
        }
        let (layout, expected, devices) = model.finish().unwrap();
        let bytes = image(&layout);
        assert_same(&Reader::new(&bytes, &devices).listing(), &expected);
        if block_bits == 12 {
            let files = Files::new(&layout, &devices);
            check_with_utils(&files.image, &files.devices);
        }
    }
}
