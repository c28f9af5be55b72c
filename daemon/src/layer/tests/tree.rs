//! What entries become in the tree.

use super::support::{Archive, Block, tree};
use crate::builder;
use crate::layer::tree::{Summary, Tree, TreeError, Why};
use crate::manifest::layer::{Attributes, Content, Entry, Kind, Node, Reader};

/// All names of a tree by path, through the manifest.
pub fn names(tree: &Tree, len: u64) -> Vec<(String, Node)> {
    let manifest = tree.write(Vec::new(), len).unwrap();
    let mut reader = Reader::new(&manifest[..]).unwrap();
    let mut paths = vec![String::new()];
    let mut names = Vec::new();
    while let Some((number, Entry { parent, name, node })) = reader.next_entry().unwrap() {
        assert_eq!(number as usize, paths.len());
        let above = &paths[parent as usize];
        let slash = if above.is_empty() { "" } else { "/" };
        let path = format!("{above}{slash}{}", String::from_utf8_lossy(&name));
        paths.push(path.clone());
        names.push((path, node));
    }
    // and the builder takes it
    builder::layer::image(&manifest[..]).unwrap();
    names
}

fn of(archive: &Archive) -> Vec<(String, Node)> {
    let bytes = archive.end();
    names(&tree(&bytes).unwrap(), bytes.len() as u64)
}

fn why(archive: &Archive) -> Why {
    match tree(&archive.end()) {
        Err(TreeError::Refused(refused)) => refused.why,
        other => panic!("{other:?}"),
    }
}

/// One letter a name: directory, opaque one, file, link, symlink, whiteout, other.
fn shape(names: &[(String, Node)]) -> String {
    let letter = |node: &Node| match node {
        Node::Link(_) => 'h',
        Node::Inode(a, Kind::Directory) if !a.xattrs.is_empty() => 'o',
        Node::Inode(_, Kind::Directory) => 'd',
        Node::Inode(_, Kind::File(_)) => 'f',
        Node::Inode(_, Kind::Symlink(_)) => 's',
        Node::Inode(_, kind) if *kind == Kind::WHITEOUT => 'w',
        Node::Inode(..) => '?',
    };
    let words: Vec<_> =
        names.iter().map(|(path, node)| format!("{}:{path}", letter(node))).collect();
    words.join(" ")
}

fn attributes(names: &[(String, Node)], path: &str) -> Attributes {
    match names.iter().find(|(name, _)| name == path) {
        Some((_, Node::Inode(attributes, _))) => attributes.clone(),
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn later_entries_replace_earlier_ones() {
    let mut archive = Archive::default();
    archive.file("a", b"1").file("a", b"22").dir("b").file("b/x", b"").file("b", b"now a file");
    archive.file("c", b"").dir("c").file("c/y", b"");
    archive.dir("d").file("d/z", b"").block(
        {
            let mut block = Block::new(b"d", b'5', 0);
            block.set(100, b"0001700\0");
            block
        },
        b"",
    );
    let names = of(&archive);
    assert_eq!(shape(&names), "f:a f:b d:c f:c/y d:d f:d/z");
    let Node::Inode(_, Kind::File(Content::At { size: 2, offset, .. })) = &names[0].1 else {
        panic!("{names:?}")
    };
    assert_eq!(*offset, 512 + 512 + 512);
    assert_eq!(attributes(&names, "d").mode, 0o1700);
}

#[test]
fn directories_without_an_entry_are_made() {
    let mut archive = Archive::default();
    archive.file("a/b/c", b"").dir("e").dir("a/d");
    let bytes = archive.end();
    let mut made = tree(&bytes).unwrap();
    assert_eq!(made.implicit(), [&b"a"[..], b"a/b"]);
    let attributes = Attributes { mode: 0o1777, uid: 5, ..Attributes::default() };
    assert!(made.set(b"a/b", attributes.clone()) && !made.set(b"a/b/c", attributes.clone()));
    let names = names(&made, bytes.len() as u64);
    assert_eq!(shape(&names), "d:a d:a/b f:a/b/c d:a/d d:e");
    let plain = Attributes { mode: 0o755, ..Attributes::default() };
    assert_eq!(super::tree::attributes(&names, "a"), plain);
    assert_eq!(super::tree::attributes(&names, "a/b"), attributes);
    assert_eq!(made.directory(b"a/b"), Some(&attributes));
    let mut archive = Archive::default();
    archive.file("f", b"").file("f/x", b"");
    assert_eq!(why(&archive), Why::NotInDirectory);
}

#[test]
fn symbolic_links_on_the_way_stay_in_the_tree() {
    let mut archive = Archive::default();
    archive.dir("usr/lib").link("lib", b'2', "usr/lib").file("lib/x", b"");
    archive.link("usr/up", b'2', "../../../..").file("usr/up/y", b"");
    archive.link("abs", b'2', "/usr/./lib").file("abs/z", b"");
    archive.link("dangling", b'2', "new/dir").file("dangling/n", b"");
    archive.link("lib2", b'2', "lib").dir("lib2");
    let shown = shape(&of(&archive));
    let expected = "s:abs s:dangling s:lib d:lib2 d:new d:new/dir f:new/dir/n d:usr d:usr/lib \
                    f:usr/lib/x f:usr/lib/z s:usr/up f:y";
    assert_eq!(shown, expected);
    let mut archive = Archive::default();
    archive.link("a", b'2', "b").link("b", b'2', "a").file("a/x", b"");
    assert_eq!(why(&archive), Why::TooManyLinks);
    // each turn makes the path longer
    let mut archive = Archive::default();
    archive.link("a", b'2', &format!("{}/a", "d/".repeat(40))).file("a/x", b"");
    tree(&archive.end()).unwrap();
}

#[test]
fn hard_links_lead_to_inodes() {
    let mut archive = Archive::default();
    archive.file("z", b"data").link("a", b'1', "z").link("b", b'1', "./a").file("z", b"other");
    archive.link("s", b'2', "nowhere").link("t", b'1', "s");
    let names = of(&archive);
    assert_eq!(shape(&names), "f:a h:b s:s h:t f:z");
    assert_eq!(names[1].1, Node::Link(1));
    // the link's own header is the last word
    let mut link = Block::new(b"l", b'1', 0).link(b"f");
    link.set(100, b"0004711\0").set(108, b"0000007\0");
    let mut archive = Archive::default();
    archive.file("f", b"").block(link, b"");
    let attributes = attributes(&of(&archive), "f");
    assert_eq!((attributes.mode, attributes.uid), (0o4711, 7));

    let refused: [(&[&str], Why); 4] = [
        (&["later"], Why::LinkToNothing("later".into())),
        (&["l"], Why::LinkToNothing("l".into())),
        (&["d"], Why::LinkToDirectory),
        (&["d/x/y"], Why::LinkToNothing("d/x/y".into())),
    ];
    for (target, expected) in refused {
        let mut archive = Archive::default();
        archive.dir("d").link("l", b'1', target[0]).file("later", b"");
        assert_eq!(why(&archive), expected, "{target:?}");
    }
}

#[test]
fn whiteouts_become_overlayfs_own() {
    let mut archive = Archive::default();
    archive.file("gone/.wh.file", b"").file("gone/.wh..wh.plnk", b"");
    archive.dir("opaque").file("opaque/kept", b"").file("opaque/.wh..wh..opq", b"");
    archive.file("a/.wh.d", b"").dir("a/d").file("a/d/x", b""); // whiteout, then a new directory
    archive.dir("b/d").file("b/.wh.d", b""); // the other way round
    archive.file("c/.wh.f", b"").file("c/f", b"").file("d/f", b"").file("d/.wh.f", b"");
    archive.file("e/.wh.d", b"").file("e/d/x", b"");
    let names = of(&archive);
    let expected = "d:a o:a/d f:a/d/x d:b o:b/d d:c f:c/f d:d f:d/f d:e o:e/d f:e/d/x \
                    d:gone w:gone/file o:opaque f:opaque/kept";
    assert_eq!(shape(&names), expected);
    let whiteout = attributes(&names, "gone/file");
    assert_eq!((whiteout.mode, whiteout.uid), (0, 1000));
    for name in [".wh.", ".wh..", ".wh..."] {
        let mut archive = Archive::default();
        archive.file(name, b"");
        assert_eq!(why(&archive), Why::Whiteout, "{name}");
    }
    let mut archive = Archive::default();
    archive.file(".wh..wh..opq", b"");
    assert!(tree(&archive.end()).unwrap().is_opaque());
}

#[test]
fn a_layer_tells_overlayfs_nothing_by_attributes() {
    let names = [
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "trusted.overlay.metacopy",
        "trusted.other",
        "user.overlay.opaque",
        "user.overlay.redirect",
        "system.other",
        "com.apple.x",
        "user.",
        "security.capability",
        "system.posix_acl_access",
        "user.kept",
    ];
    let records: Vec<_> = names.iter().map(|name| format!("SCHILY.xattr.{name}")).collect();
    let records: Vec<_> = records.iter().map(|name| (&name[..], &b"y"[..])).collect();
    let mut archive = Archive::default();
    archive.pax(b'x', &records).dir("d").pax(b'x', &records).file("f", b"");
    archive.pax(b'x', &records).link("s", b'2', "t").pax(b'x', &records).link("h", b'1', "f");
    let bytes = archive.end();
    let made = tree(&bytes).unwrap();
    let all = super::tree::names(&made, bytes.len() as u64);
    for path in ["d", "f", "s"] {
        let kept = attributes(&all, path).xattrs;
        let kept: Vec<_> =
            kept.iter().map(|(name, _)| std::str::from_utf8(name).unwrap()).collect();
        let expected = ["security.capability", "system.posix_acl_access", "user.kept"];
        assert_eq!(kept, expected[..if path == "s" { 2 } else { 3 }], "{path}");
    }
    assert_eq!(made.summary().dropped_xattrs, 9 * 4 + 1);
}

#[test]
fn what_an_image_can_t_hold_is_refused() {
    let mut device = Block::new(b"c", b'3', 0);
    device.set(329, b"0010000\0");
    let mut archive = Archive::default();
    archive.block(device, b"");
    assert_eq!(why(&archive), Why::DeviceNumber);
    let value = vec![b'v'; 70_000];
    let mut archive = Archive::default();
    archive.pax(b'x', &[("SCHILY.xattr.user.large", &value)]).file("f", b"");
    assert_eq!(why(&archive), Why::Xattrs);
    // a sparse file whose parts are not whole blocks
    let map = |map: &[u8], stored: usize| {
        let mut archive = Archive::default();
        let records: [(&str, &[u8]); 3] = [
            ("GNU.sparse.map", map),
            ("GNU.sparse.size", b"549755814400"),
            ("GNU.sparse.name", b"s"),
        ];
        archive.pax(b'x', &records).file("GNUSparseFile.0/s", &vec![1; stored]);
        archive
    };
    assert!(matches!(why(&map(b"100,512", 512)), Why::Sparse(_)));
    assert!(matches!(why(&map(b"0,100,4096,512", 612)), Why::Sparse(_)));
    assert!(matches!(why(&map(b"512,512", 512)), Why::Sparse(_)), "2^30 chunks");
    assert_eq!(shape(&of(&map(b"549755813888,512", 512))).as_str(), "f:s");
}

#[test]
fn times_are_as_files_have_them() {
    let times: [(&[u8], (i64, u32)); 4] = [
        (b"-1.5", (0, 0)),
        (b"1.000000001", (1, 1)),
        (b"9223372036.854775807", (9_223_372_036, 854_775_807)),
        (b"9223372036.854775808", (0, 0)),
    ];
    for (text, expected) in times {
        let mut archive = Archive::default();
        archive.pax(b'x', &[("mtime", text)]).file("f", b"");
        assert_eq!(attributes(&of(&archive), "f").mtime, expected);
    }
}

#[test]
fn it_is_counted() {
    let mut archive = Archive::default();
    archive.dir("d").file("d/f", b"12345").link("h", b'1', "d/f").link("s", b'2', "t");
    archive.file(".wh.w", b"").file("d/.wh..wh..opq", b"").add("p", b'6', b"").file("e", b"");
    let expected = Summary {
        files: 2,
        bytes: 5,
        directories: 2,
        hard_links: 1,
        symlinks: 1,
        whiteouts: 1,
        opaque: 1,
        special: 1,
        dropped_xattrs: 0,
    };
    assert_eq!(tree(&archive.end()).unwrap().summary(), expected);
}
