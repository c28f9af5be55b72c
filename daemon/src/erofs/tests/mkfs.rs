//! The same tree by `mkfs.erofs`: the kernel must see the same.

use std::collections::HashMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use fs_err as fs;

use super::kernel::{Mounted, listing};
use super::support::{Files, Model, Seen, assert_same, check_with_utils};
use super::zoo::BUILD_TIME;
use crate::erofs::{FileContent, Meta, Node, NodeId, Timestamp};

fn run(program: &str, arguments: &[&dyn AsRef<std::ffi::OsStr>]) {
    let output = Command::new(program).args(arguments.iter().map(|a| a.as_ref())).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A directory on the disk with something of every kind.
fn make(root: &Path) {
    let dir = |name: &str| {
        fs::create_dir_all(root.join(name)).unwrap();
        root.join(name)
    };
    for d in 0..20 {
        let dir = dir(&format!("many/dir {d}"));
        for f in 0..d * 10 {
            fs::write(dir.join(format!("{}{f}", "f".repeat(d))), vec![b'x'; f * 37]).unwrap();
        }
    }
    let odd = dir("odd");
    for name in ["!", "-", ".-", "..x", " a\nb", &"n".repeat(200)] {
        fs::write(odd.join(name), name).unwrap();
    }
    for len in [1, 500, 4000, 4095] {
        symlink("t".repeat(len), odd.join(format!("link {len}"))).unwrap();
    }
    fs::hard_link(odd.join("!"), odd.join("also !")).unwrap();
    fs::hard_link(odd.join("!"), root.join("and !")).unwrap();
    fs::write(odd.join("large"), vec![7; 100_000]).unwrap();
    run("mknod", &[&root.join("null"), &"c", &"1", &"3"]);
    run("mknod", &[&root.join("disk"), &"b", &"259", &"70000"]);
    run("mknod", &[&root.join("gone"), &"c", &"0", &"0"]);
    run("mkfifo", &[&root.join("pipe")]);
    fs::set_permissions(odd.join("-"), std::fs::Permissions::from_mode(0o4711)).unwrap();
    std::os::unix::fs::chown(odd.join("large"), Some(100_000), Some(70_000)).unwrap();
    let set = |path: &Path, name: &str, value: &str| {
        let script = "import os, sys; os.setxattr(sys.argv[1], sys.argv[2], sys.argv[3].encode())";
        run("python3", &[&"-c", &script, &path, &name, &value]);
    };
    set(&odd.join("large"), "user.one", "1");
    for name in ["!", "-", ".-", "..x"] {
        set(&odd.join(name), "user.shared", "the same");
        set(&odd.join(name), "trusted.x", name);
    }
    set(&odd, "trusted.overlay.opaque", "y");
    let mut paths: Vec<_> = listing(root).into_keys().collect();
    paths.reverse(); // what is in a directory before itself
    for (n, path) in paths.into_iter().enumerate() {
        let text = String::from_utf8(path).unwrap();
        let time = UNIX_EPOCH + Duration::new(1_600_000_000 + n as u64 % 3, n as u32 * 1000);
        let full = root.join(&text);
        if fs::symlink_metadata(&full).unwrap().is_file() || full.is_dir() && !full.is_symlink() {
            fs::File::open(&full).unwrap().file().set_modified(time).unwrap();
        }
    }
}

/// The directory's tree as ours.
fn model(root: &Path) -> Model {
    let mut m = Model::new(12, BUILD_TIME, &[]);
    let mut directories: HashMap<Vec<u8>, NodeId> = HashMap::from([(Vec::new(), m.root())]);
    let mut linked: HashMap<u64, NodeId> = HashMap::new();
    for (path, seen) in listing(root) {
        let Seen { mode, uid, gid, mtime, xattrs, .. } = seen;
        let mtime = Timestamp { secs: mtime.0, nanos: mtime.1 as u32 };
        let meta = Meta { mode: mode as u16 & 0o7777, uid, gid, mtime, ..Meta::default() };
        let xattrs: Vec<(&[u8], &[u8])> = xattrs.iter().map(|(n, v)| (&n[..], &v[..])).collect();
        if path.is_empty() {
            m.set_meta(m.root(), meta, &xattrs);
            continue;
        }
        let slash = path.iter().rposition(|byte| *byte == b'/');
        let (above, name) =
            slash.map_or((&b""[..], &path[..]), |at| (&path[..at], &path[at + 1..]));
        let parent = directories[above];
        if let Some(target) = linked.get(&seen.nid) {
            m.link(parent, name, *target);
            continue;
        }
        let (major, minor) = seen.device;
        let node = match mode & 0o170_000 {
            0o040_000 => Node::Directory,
            0o100_000 => Node::File(FileContent::Inline(seen.data.unwrap())),
            0o120_000 => Node::Symlink(seen.target.unwrap()),
            0o020_000 => Node::CharDevice { major, minor },
            0o060_000 => Node::BlockDevice { major, minor },
            0o010_000 => Node::Fifo,
            other => panic!("{other:o}"),
        };
        let is_directory = node == Node::Directory;
        let id = m.add(parent, name, meta, &xattrs, node);
        if is_directory {
            directories.insert(path.clone(), id);
        } else {
            linked.insert(seen.nid, id);
        }
    }
    m
}

#[test]
#[ignore = "needs root"]
fn root_same_as_mkfs() {
    let dir = tempfile::Builder::new().prefix("erofs").tempdir_in("/var/tmp").unwrap();
    let tree = dir.path().join("tree");
    make(&tree);
    let theirs = dir.path().join("theirs");
    run("mkfs.erofs", &[&"--preserve-mtime", &"--quiet", &theirs, &tree]);
    let (layout, expected, _) = model(&tree).finish().unwrap();
    let ours = Files::new(&layout, &[]);
    check_with_utils(&ours.image, &[]);

    let theirs_at = Mounted::new(&theirs, &dir.path().join("mnt"), "erofs", "");
    let ours_at = Mounted::erofs(&ours);
    let seen = listing(&ours_at.0);
    assert_same(&seen, &expected);
    let mut by_mkfs = listing(&theirs_at.0);
    for (path, other) in &mut by_mkfs {
        // a directory's size is not in the listing: it must be the same all the same
        if other.mode & 0o170_000 == 0o040_000 {
            let name = String::from_utf8(path.clone()).unwrap();
            let size = |root: &Path| fs::symlink_metadata(root.join(&name)).unwrap().size();
            assert_eq!(size(&ours_at.0), size(&theirs_at.0), "{name:?}");
        }
        // inode numbers are each writer's own, but the same file is the same for both
        other.nid = seen.get(path).map_or(0, |seen| seen.nid);
    }
    assert_same(&seen, &by_mkfs);
    let len = |path: &Path| fs::metadata(path).unwrap().len();
    let (our_len, their_len) = (len(&ours.image), len(&theirs));
    assert!(our_len <= their_len + their_len / 50, "{our_len} bytes, mkfs needs {their_len}");
}
