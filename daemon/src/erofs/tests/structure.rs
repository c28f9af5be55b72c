//! What is refused, and what the image's structure must be.

use super::reader::Reader;
use super::support::{Files, Model, assert_same, check_with_utils, image};
use super::zoo::{BUILD_TIME, at, zoo};
use crate::erofs::ondisk::crc32c;
use crate::erofs::{
    ErofsError, FileContent, ImageBuilder, ImageSpec, Meta, Node, NodeId, Timestamp,
};

fn spec(block_bits: u8, devices: Vec<u64>) -> ImageSpec {
    ImageSpec { block_bits, uuid: [7; 16], build_time: BUILD_TIME, devices }
}

fn builder() -> ImageBuilder {
    ImageBuilder::new(spec(12, vec![100])).unwrap()
}

fn add(b: &mut ImageBuilder, name: &[u8], node: Node) -> Result<NodeId, ErofsError> {
    b.add(b.root(), name, &Meta::default(), node)
}

#[test]
fn checksum_is_crc32c() {
    // RFC 3720, B.4, without the final inversion
    assert_eq!(!crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(!crc32c(&[0xff; 32]), 0x62a8_ab43);
    assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn everything_reads_back() {
    for block_bits in 9..=12 {
        let (layout, expected, devices) = zoo(block_bits).finish().unwrap();
        let bytes = image(&layout);
        let mut reader = Reader::new(&bytes, &devices);
        assert_eq!(reader.root, layout.nid(NodeId(0)).unwrap());
        assert_same(&reader.listing(), &expected);
    }
}

#[test]
fn utils_find_nothing_wrong() {
    let (layout, _, devices) = zoo(12).finish().unwrap();
    let files = Files::new(&layout, &devices);
    check_with_utils(&files.image, &files.devices);
}

#[test]
fn same_tree_same_bytes() {
    for block_bits in [9, 12] {
        let layouts = [0; 2].map(|_| zoo(block_bits).finish().unwrap().0);
        let images = layouts.each_ref().map(image);
        assert!(images[0] == images[1] && images[0] == image(&layouts[0]));
    }
}

#[test]
fn names_may_come_in_any_order() {
    for names in [[&b"a"[..], b"b", b"-"], [b"b", b"-", b"a"], [b"-", b"a", b"b"]] {
        let mut m = Model::new(12, BUILD_TIME, &[]);
        for name in names {
            m.add(m.root(), name, at(1, 1), &[], Node::Fifo);
        }
        let (layout, expected, devices) = m.finish().unwrap();
        assert_same(&Reader::new(&image(&layout), &devices).listing(), &expected);
    }
}

#[test]
fn one_time_for_all_makes_inodes_compact() {
    let len = |mtime: Timestamp| {
        let mut b = builder();
        for n in 0..10_000 {
            let meta = Meta { mode: 0o644, mtime, ..Meta::default() };
            let run = FileContent::Contiguous { device: 1, block: n % 100, size: 4096 };
            b.add(b.root(), format!("{n:08}").as_bytes(), &meta, Node::File(run)).unwrap();
        }
        b.layout().unwrap().image_len()
    };
    let (compact, extended) = (len(BUILD_TIME), len(Timestamp::default()));
    // 20 bytes of directory, and 64 or 96 of inode with one chunk index
    assert!((840_000..860_000).contains(&compact), "{compact}");
    assert!((1_160_000..1_180_000).contains(&extended), "{extended}");
}

#[test]
fn attributes_of_several_are_in_the_image_once() {
    let value = b"a value like no other, of some length".repeat(20);
    let build = |files: usize| {
        let mut m = Model::new(12, BUILD_TIME, &[]);
        let set: &[(&[u8], &[u8])] = &[(b"user.x", &value)];
        for n in 0..files {
            m.add(m.root(), format!("{n}").as_bytes(), at(1, 1), set, Node::Fifo);
        }
        let (layout, expected, devices) = m.finish().unwrap();
        let bytes = image(&layout);
        assert_same(&Reader::new(&bytes, &devices).listing(), &expected);
        let copies = bytes.windows(value.len()).filter(|window| *window == value).count();
        assert_eq!(copies, 1, "{files} files");
    };
    [1, 2, 200].into_iter().for_each(build);
}

#[test]
fn tails_leave_little_unused() {
    let mut m = Model::new(12, BUILD_TIME, &[100]);
    for d in 0..300 {
        let dir =
            m.add(m.root(), format!("dir {d}").as_bytes(), Meta::default(), &[], Node::Directory);
        for f in 0..d % 120 {
            let run = FileContent::Contiguous { device: 1, block: f % 100, size: 4096 };
            m.add(dir, format!("name {f}").as_bytes(), at(1, 1), &[], Node::File(run));
        }
    }
    let (layout, expected, devices) = m.finish().unwrap();
    let bytes = image(&layout);
    assert_same(&Reader::new(&bytes, &devices).listing(), &expected);
    let inodes = bytes[4096..].chunks(32).filter(|slot| slot.iter().all(|byte| *byte == 0)).count();
    assert!(inodes * 32 * 50 < bytes.len(), "{inodes} of {} unused", bytes.len() / 32);
}

#[test]
fn device_table_holds_as_many_as_it_can() {
    for block_bits in [9, 12] {
        let devices: Vec<u64> = (0..65_535).map(|n| n + 1).collect();
        let mut b = ImageBuilder::new(spec(block_bits, devices)).unwrap();
        let last = FileContent::Contiguous { device: 65_535, block: 65_534, size: 1 };
        add(&mut b, b"last", Node::File(last)).unwrap();
        let layout = b.layout().unwrap();
        let bytes = image(&layout);
        let reader = Reader::new(&bytes, &[]);
        assert_eq!(reader.inodes, 2);
        assert_eq!(bytes[1152 + 128 * 65_534 + 64..][..4], 65_535u32.to_le_bytes());
    }
    let too_many = ImageBuilder::new(spec(12, vec![1; 65_536]));
    assert_eq!(too_many.unwrap_err(), ErofsError::TooManyDevices(65_536));
}

#[test]
fn contiguous_file_has_one_index_where_possible() {
    // (size, expected chunk bits, indexes), devices of the largest size
    let max = u64::from(u32::MAX) * 4096;
    for (size, bits, indexes) in [
        (1, 12, 1),
        (4096, 12, 1),
        (4097, 13, 1),
        (1 << 30, 30, 1),
        ((1 << 30) + 1, 31, 1),
        (1 << 43, 43, 1),
        ((1 << 43) + 1, 43, 2),
        (max, 43, 2),
    ] {
        let mut b = ImageBuilder::new(spec(12, vec![u32::MAX.into()])).unwrap();
        let run = FileContent::Contiguous { device: 1, block: 0, size };
        let id = add(&mut b, b"f", Node::File(run)).unwrap();
        let layout = b.layout().unwrap();
        let bytes = image(&layout);
        let at = layout.nid(id).unwrap() as usize * 32;
        assert_eq!(bytes[at] & 0xe, 4 << 1, "chunk-based");
        let extended = bytes[at] & 1 == 1;
        assert_eq!(bytes[at + 16..][..2], [0x20 | (bits - 12), 0], "{size}");
        let index = at + if extended { 64 } else { 32 };
        for n in 0..indexes {
            let block = (n as u32) << 31;
            assert_eq!(bytes[index + 8 * n..][..4], [0, 0, 1, 0]);
            assert_eq!(bytes[index + 8 * n + 4..][..4], block.to_le_bytes());
        }
    }
}

#[test]
fn refuses_bad_names() {
    let mut b = builder();
    for name in [&b""[..], b".", b"..", b"a/b", b"/", b"a\0", b"\0", &[b'n'; 256]] {
        assert!(matches!(add(&mut b, name, Node::Fifo), Err(ErofsError::Name { .. })), "{name:?}");
        let file = NodeId(0);
        assert!(matches!(b.link(b.root(), name, file), Err(ErofsError::Name { .. })));
    }
    add(&mut b, &[b'n'; 255], Node::Fifo).unwrap();
}

#[test]
fn refuses_duplicate_names_with_their_path() {
    let mut b = builder();
    let a = add(&mut b, b"a", Node::Directory).unwrap();
    let deep = b.add(a, b"deep", &Meta::default(), Node::Directory).unwrap();
    let x = b.add(deep, b"x", &Meta::default(), Node::Fifo).unwrap();
    b.add(a, b"x", &Meta::default(), Node::Fifo).unwrap();
    b.link(deep, b"x", x).unwrap();
    assert_eq!(b.layout().unwrap_err(), ErofsError::DuplicateName("a/deep/x".into()));
}

#[test]
fn refuses_what_would_not_be_a_tree() {
    let mut b = builder();
    let file = add(&mut b, b"file", Node::Fifo).unwrap();
    let dir = add(&mut b, b"dir", Node::Directory).unwrap();
    let elsewhere = NodeId(99);
    let meta = Meta::default();
    assert!(matches!(b.add(file, b"x", &meta, Node::Fifo), Err(ErofsError::Parent { .. })));
    assert!(matches!(b.add(elsewhere, b"x", &meta, Node::Fifo), Err(ErofsError::Parent { .. })));
    for target in [dir, b.root()] {
        let linked = b.link(dir, b"loop", target);
        assert!(matches!(linked, Err(ErofsError::LinkToDirectory { .. })));
    }
    assert!(matches!(b.link(dir, b"x", elsewhere), Err(ErofsError::LinkTarget { .. })));
    assert_eq!(b.set_meta(elsewhere, &meta), Err(ErofsError::Node));
    assert_eq!(b.layout().unwrap().nid(elsewhere), None);
}

#[test]
fn refuses_values_that_do_not_fit() {
    assert_eq!(ImageBuilder::new(spec(8, vec![])).unwrap_err(), ErofsError::BlockBits(8));
    assert_eq!(ImageBuilder::new(spec(13, vec![])).unwrap_err(), ErofsError::BlockBits(13));
    let device = ErofsError::DeviceTooLarge { device: 2, blocks: 1 << 32 };
    assert_eq!(ImageBuilder::new(spec(12, vec![1, 1 << 32])).unwrap_err(), device);
    let mut b = builder();
    let root = b.root();
    let mode = Meta { mode: 0o10_000, ..Meta::default() };
    assert_eq!(b.add(root, b"x", &mode, Node::Fifo), Err(ErofsError::Mode(0o10_000)));
    assert_eq!(
        b.set_meta(root, &at(0, 1_000_000_000)),
        Err(ErofsError::Nanoseconds(1_000_000_000))
    );
    for target in [vec![], vec![b'x'; 4096], b"a\0b".to_vec()] {
        assert!(matches!(
            add(&mut b, b"x", Node::Symlink(target)),
            Err(ErofsError::Symlink { .. })
        ));
    }
    for (major, minor) in [(4096, 0), (0, 1 << 20)] {
        let device = add(&mut b, b"x", Node::CharDevice { major, minor });
        assert!(matches!(device, Err(ErofsError::DeviceNumber { .. })));
    }
    // nothing that was refused is in the image
    assert_eq!(Reader::new(&image(&b.layout().unwrap()), &[]).listing().len(), 1);
}

#[test]
fn refuses_content_that_is_nowhere() {
    let mut b = builder();
    let run = |device, block, size| Node::File(FileContent::Contiguous { device, block, size });
    for node in [
        run(0, 0, 1),
        run(2, 0, 1),
        run(1, 100, 1),
        run(1, 99, 4097),
        run(1, 0, 100 * 4096 + 1),
        run(1, u64::MAX, 1),
        run(1, u64::from(u32::MAX), 1),
        run(1, 0, u64::MAX),
    ] {
        let shown = format!("{node:?}");
        assert!(matches!(add(&mut b, b"x", node), Err(ErofsError::Outside { .. })), "{shown}");
    }
    add(&mut b, b"fits", run(1, 99, 4096)).unwrap();
    let chunks =
        |chunk_bits, size, chunks| Node::File(FileContent::Chunks { chunk_bits, size, chunks });
    for node in [
        chunks(11, 1, vec![None]),
        chunks(44, 1, vec![None]),
        chunks(255, 1, vec![None]),
        chunks(12, 4096, vec![]),
        chunks(12, 4096, vec![None, None]),
        chunks(12, 0, vec![None]),
        chunks(43, 1 << 63, vec![None; 1 << 20]),
    ] {
        assert!(matches!(add(&mut b, b"x", node), Err(ErofsError::Chunks { .. })));
    }
    let outside = add(&mut b, b"x", chunks(13, 16_384, vec![Some((1, 0)), Some((1, 99))]));
    assert!(matches!(outside, Err(ErofsError::Outside { .. })));
    add(&mut b, b"last in part", chunks(13, 8193, vec![Some((1, 0)), Some((1, 99))])).unwrap();
}

#[test]
fn refuses_attributes_that_can_not_be() {
    let mut b = builder();
    let long = [&b"user."[..], &[b'n'; 251]].concat();
    let large = vec![0; 65_536];
    for (name, value) in [
        (&b"user."[..], &b""[..]),
        (b"system.posix_acl_access.", b""),
        (b"system.other", b""),
        (b"nothing", b""),
        (b"user.a\0b", b""),
        (&long, b""),
        (b"user.large", &large),
    ] {
        let set = b.xattr_set(&[(name, value)]);
        assert!(matches!(set, Err(ErofsError::Xattr { .. })), "{name:?}");
    }
    let twice = b.xattr_set(&[(b"user.a", b"1"), (b"user.b", b"1"), (b"user.a", b"2")]);
    assert!(matches!(twice, Err(ErofsError::Xattr { .. })));
    let values =
        [vec![1; 65_535], vec![2; 65_535], vec![3; 65_535], vec![4; 65_535], vec![5; 65_535]];
    let names: Vec<String> = (0..5).map(|n| format!("user.{n}")).collect();
    let set: Vec<(&[u8], &[u8])> =
        names.iter().zip(&values).map(|(n, v)| (n.as_bytes(), &v[..])).collect();
    assert!(matches!(b.xattr_set(&set), Err(ErofsError::Xattr { .. })));
    let id = b.xattr_set(&set[..3]).unwrap();
    assert_eq!(b.xattr_set(&[set[2], set[0], set[1]]), Ok(id), "order does not matter");
    let foreign = Meta { xattrs: id, ..Meta::default() };
    let mut other = builder();
    assert_eq!(other.set_meta(other.root(), &foreign), Err(ErofsError::XattrSet));
}
