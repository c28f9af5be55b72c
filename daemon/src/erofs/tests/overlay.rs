//! Whiteouts and opaque directories do what overlayfs says.

use fs_err as fs;

use super::kernel::Mounted;
use super::support::{Files, Model};
use super::zoo::BUILD_TIME;
use crate::erofs::{FileContent, Meta, Node, OPAQUE_XATTR};

#[test]
#[ignore = "needs root"]
fn root_overlay_hides_what_an_image_deletes() {
    let mut m = Model::new(12, BUILD_TIME, &[]);
    let root = m.root();
    let meta = Meta { mode: 0o755, mtime: BUILD_TIME, ..Meta::default() };
    let file = |text: &[u8]| Node::File(FileContent::Inline(text.to_vec()));
    m.add(root, b"deleted", Meta::default(), &[], Node::WHITEOUT);
    m.add(root, b"changed", meta, &[], file(b"upper"));
    let opaque = m.add(root, b"opaque", meta, &[OPAQUE_XATTR], Node::Directory);
    m.add(opaque, b"new", meta, &[], file(b"new"));
    let merged = m.add(root, b"merged", meta, &[], Node::Directory);
    m.add(merged, b"new", meta, &[], file(b"new"));
    m.add(merged, b"deleted", Meta::default(), &[], Node::WHITEOUT);
    let (layout, _, devices) = m.finish().unwrap();
    let files = Files::new(&layout, &devices);

    let lower = files.dir.path().join("lower");
    for name in ["deleted", "changed", "opaque/old", "merged/old", "merged/deleted"] {
        let path = lower.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "lower").unwrap();
    }
    let image = Mounted::erofs(&files);
    let data = format!("lowerdir={}:{}", image.0.display(), lower.display());
    let overlay =
        Mounted::new("overlay".as_ref(), &files.dir.path().join("overlay"), "overlay", &data);

    let names = |dir: &str| {
        let entries = fs::read_dir(overlay.0.join(dir)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    };
    assert_eq!(names(""), ["changed", "merged", "opaque"]);
    assert_eq!(names("opaque"), ["new"]);
    assert_eq!(names("merged"), ["new", "old"]);
    assert_eq!(fs::read(overlay.0.join("changed")).unwrap(), b"upper");
    assert_eq!(fs::read(overlay.0.join("merged/old")).unwrap(), b"lower");
    assert!(!overlay.0.join("deleted").exists());
    drop(overlay);
}
