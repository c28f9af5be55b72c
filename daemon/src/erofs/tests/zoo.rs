//! One tree with something of every kind.

use super::support::Model;
use crate::erofs::{FileContent, Meta, Node, OPAQUE_XATTR, Timestamp};

pub const BUILD_TIME: Timestamp = Timestamp { secs: 1_700_000_000, nanos: 123_456_789 };

/// Attributes, names and values.
type Set<'a> = &'a [(&'a [u8], &'a [u8])];

pub fn at(secs: i64, nanos: u32) -> Meta {
    Meta { mode: 0o644, mtime: Timestamp { secs, nanos }, ..Meta::default() }
}

/// Blocks of each of the three devices.
pub fn device_blocks(block_bits: u8) -> u64 {
    (256 << 10) >> block_bits
}

pub fn zoo(block_bits: u8) -> Model {
    let blocks = device_blocks(block_bits);
    let block = 1u64 << block_bits;
    let mut m = Model::new(block_bits, BUILD_TIME, &[blocks, blocks, blocks]);
    let root = m.root();
    let plain = Meta { mode: 0o644, mtime: BUILD_TIME, ..Meta::default() };
    let dir_meta = Meta { mode: 0o755, ..plain };
    m.set_meta(root, Meta { mode: 0o1777, uid: 5, ..plain }, &[(b"user.root", b"1")]);

    let content = m.add(root, b"content", dir_meta, &[], Node::Directory);
    let run = |device, block, size| Node::File(FileContent::Contiguous { device, block, size });
    m.add(content, b"empty", plain, &[], Node::File(FileContent::Empty));
    m.add(content, b"one byte", plain, &[], run(1, 3, 1));
    m.add(content, b"block", plain, &[], run(2, 1, block));
    m.add(content, b"block and more", plain, &[], run(3, 0, block + 1));
    m.add(content, b"all of a device", plain, &[], run(3, 0, blocks * block));
    m.add(content, b"end of a device", plain, &[], run(2, blocks - 2, 2 * block - 5));
    m.add(content, b"extended", at(5, 6), &[], run(1, 5, 3 * block + 7));
    let chunks = |chunk_bits, size, chunks| FileContent::Chunks { chunk_bits, size, chunks };
    let some = vec![Some((1, 0)), None, Some((3, 9)), Some((2, 4)), None];
    let mixed = chunks(block_bits + 1, 9 * block + 3, some);
    m.add(content, b"chunks", plain, &[], Node::File(mixed));
    let hole = chunks(block_bits + 4, 16 * block, vec![None]);
    m.add(content, b"hole", plain, &[(b"user.hole", b"")], Node::File(hole));
    let many = (0..300).map(|n| Some((1 + n % 3, u64::from(n) * 7 % blocks))).collect();
    m.add(
        content,
        b"many chunks",
        plain,
        &[],
        Node::File(chunks(block_bits, 300 * block - 1, many)),
    );
    for len in [1, 100, 511, 512, 513, 4000, 4064, 4095, 4096, 4097, 12_288, 20_000] {
        let bytes = (0..len).map(|n| (n % 251) as u8).collect();
        let name = format!("kept {len}");
        m.add(content, name.as_bytes(), plain, &[], Node::File(FileContent::Inline(bytes)));
    }

    let links = m.add(root, b"links", dir_meta, &[], Node::Directory);
    for len in [1, 59, 300, 479, 480, 511, 512, 600, 1024, 4000, 4064, 4095] {
        let target = b"../target/"[..].iter().cycle().take(len).copied().collect();
        m.add(links, format!("to {len}").as_bytes(), plain, &[], Node::Symlink(target));
    }
    let first = m.add(links, b"z first", plain, &[], run(1, 7, 100));
    m.link(links, b"a second", first);
    m.link(root, b"third", first);
    let pipe = m.add(root, b"pipe", plain, &[], Node::Fifo);
    m.link(links, b"pipe too", pipe);

    let special = m.add(root, b"special", dir_meta, &[], Node::Directory);
    m.add(special, b"null", plain, &[], Node::CharDevice { major: 1, minor: 3 });
    m.add(special, b"high", at(1, 1), &[], Node::CharDevice { major: 4095, minor: 1_048_575 });
    m.add(special, b"disk", plain, &[], Node::BlockDevice { major: 259, minor: 700 });
    m.add(special, b"gone", Meta::default(), &[], Node::WHITEOUT);
    m.add(special, b"socket", plain, &[], Node::Socket);
    m.add(special, b"opaque", dir_meta, &[OPAQUE_XATTR], Node::Directory);

    let names = m.add(root, b"names", dir_meta, &[], Node::Directory);
    let longest = [b'\xfe'; 255];
    let odd: [&[u8]; 15] = [
        b"!",
        b"-",
        b"+x",
        b".-",
        b"..x",
        b"...",
        b".0",
        b" ",
        b"a b\nc\t",
        b"\xff\xfe",
        b"\x01",
        b"A",
        b"a",
        b"\\*?\"'",
        &longest,
    ];
    for name in odd {
        m.add(names, name, plain, &[], Node::File(FileContent::Inline(name.to_vec())));
    }

    let metas = m.add(root, b"metas", dir_meta, &[], Node::Directory);
    for mode in [0, 0o7777, 0o4755, 0o2755, 0o1777, 0o600] {
        let meta = Meta { mode, ..plain };
        m.add(
            metas,
            format!("mode {mode:o}").as_bytes(),
            meta,
            &[],
            Node::File(FileContent::Empty),
        );
    }
    for (uid, gid) in [(65535, 65535), (65536, 0), (0, 65536), (u32::MAX - 1, 4_000_000_000)] {
        let meta = Meta { uid, gid, ..plain };
        m.add(metas, format!("owner {uid} {gid}").as_bytes(), meta, &[], run(1, 1, 10));
    }
    for (secs, nanos) in
        [(0, 0), (-1, 999_999_999), (-62_135_596_800, 1), (1 << 40, 5), (1_700_000_000, 0)]
    {
        m.add(metas, format!("time {secs}").as_bytes(), at(secs, nanos), &[], run(2, 1, 10));
    }

    let xattrs = m.add(root, b"xattrs", dir_meta, &[(b"user.dir", b"d")], Node::Directory);
    let large = vec![b'v'; 65_000];
    let acl =
        b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\x05\0\0\0\x04\0\x04\0\xff\xff\xff\xff\
        \x10\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let sets: [(&str, Set<'_>); 9] = [
        ("one", &[(b"user.one", b"1")]),
        ("shared 1", &[(b"user.same", b"same"), (b"trusted.t\xff", b"\0\x01")]),
        ("shared 2", &[(b"trusted.t\xff", b"\0\x01"), (b"user.same", b"same"), (b"user.own", b"")]),
        ("large", &[(b"user.large", &large), (b"user.z", b"z")]),
        ("large 2", &[(b"user.large", &large)]),
        (
            "security",
            &[(b"security.capability", b"\x01\0\0\x02\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0")],
        ),
        ("trusted 1", &[(b"trusted.large", &large[..5000])]),
        ("trusted 2", &[(b"trusted.large", &large[..5000]), (b"trusted.t\xff", b"\0\x01")]),
        ("acl", &[(b"system.posix_acl_access", acl)]),
    ];
    for (name, set) in sets {
        m.add(xattrs, name.as_bytes(), plain, set, run(1, 2, 20));
        // the kernel has no user attributes and no ACLs of symbolic links
        if name.starts_with("trusted") || name == "security" {
            let link = format!("{name} link");
            m.add(xattrs, link.as_bytes(), plain, set, Node::Symlink(b"x".to_vec()));
        }
    }
    let names: Vec<String> = (0..400).map(|n| format!("user.number {n}")).collect();
    let many: Vec<(&[u8], &[u8])> = names.iter().map(|n| (n.as_bytes(), &b"value"[..])).collect();
    m.add(xattrs, b"many", plain, &many, run(1, 2, 20));
    m.add(xattrs, b"many too", at(3, 4), &many, Node::File(FileContent::Inline(vec![7; 300])));
    let default_acl: Set<'_> = &[(b"system.posix_acl_default", acl)];
    m.add(xattrs, b"acl dir", dir_meta, default_acl, Node::Directory);

    m.add(root, b"empty directory", dir_meta, &[], Node::Directory);
    let mut deep = m.add(root, b"deep", dir_meta, &[], Node::Directory);
    for n in 0..60 {
        deep = m.add(deep, b"down", dir_meta, &[], Node::Directory);
        m.add(deep, b"file", plain, &[], run(1, n % blocks, 9));
    }
    let large = m.add(root, b"large directory", dir_meta, &[], Node::Directory);
    for n in 0..1000u64 {
        let name = format!("{:x}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        m.add(large, name.as_bytes(), plain, &[], run(1, n % blocks, 1 + n % block));
    }
    m
}
