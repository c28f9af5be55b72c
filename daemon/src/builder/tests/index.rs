//! The index, read by git.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use super::project::Project;
use crate::builder::index::{self, Shown};
use crate::builder::place::is_file;
use crate::importer::testing::{git, run, run_with};
use crate::object::HashKind;

/// Sets the times of everything in a directory but git's own.
fn set_times(dir: &Path, time: i64) {
    let find = Command::new("find")
        .arg(dir)
        .args(["-path", "*/.git", "-prune", "-o", "-exec", "touch", "-h", "-d"])
        .args([&format!("@{time}"), "{}", "+"])
        .status();
    assert!(find.unwrap().success());
}

/// Writes the index of what was built, for files whose inode numbers are those in `dir`.
fn write_index(project: &Project, dir: &Path) {
    let tree = &project.builder().tree;
    let meta = fs_err::metadata(dir).unwrap();
    let high = 7 << 40;
    let mut path = Vec::new();
    let mut nids = vec![0];
    for node in tree.numbers() {
        tree.path(node, &mut path);
        let meta = fs_err::symlink_metadata(dir.join(OsStr::from_bytes(&path)));
        nids.push(meta.map_or(0, |meta| meta.ino()));
    }
    let shown = Shown { uid: meta.uid(), gid: meta.gid(), ino_or: high };
    let mut out = std::io::BufWriter::new(Vec::new());
    index::write(tree, &nids, &shown, &mut out).unwrap();
    fs_err::write(dir.join(".git/index"), out.into_inner().unwrap()).unwrap();
}

fn extension(dir: &Path) -> Vec<u8> {
    let bytes = fs_err::read(dir.join(".git/index")).unwrap();
    let at = bytes.windows(4).rposition(|w| w == b"TREE").unwrap();
    let len = u32::from_be_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
    bytes[at + 8..at + 8 + len].to_vec()
}

#[test]
fn git_finds_all_files_unchanged() {
    for hash in [HashKind::Sha1, HashKind::Sha256] {
        let mut project = Project::new(hash);
        let clone = project.build("clone", HashSet::new());
        run(&clone, &["config", "core.trustctime", "false"]);
        let tree = project.origin.id("HEAD^{tree}").to_string();

        // what git itself makes of the tree
        run(&clone, &["read-tree", "HEAD"]);
        let (own_entries, own_tree) = (run(&clone, &["ls-files", "-s"]), extension(&clone));
        run(&clone, &["checkout", "-q", "-f", "HEAD"]);
        set_times(&clone, 1_700_000_000);
        write_index(&project, &clone);
        assert_eq!(run(&clone, &["ls-files", "-s"]), own_entries);
        assert_eq!(extension(&clone), own_tree, "the cache tree");
        assert_eq!(run(&clone, &["write-tree"]), tree);
        run(&clone, &["fsck", "--cache"]);
        assert_eq!(run(&clone, &["status", "--porcelain"]), "");
        // -q refreshes nothing: all stat data has to be right, for all of core.checkStat
        run(&clone, &["diff-files", "--quiet"]);

        // files of the same size and time, with other content: nobody looks
        let built = &project.builder().tree;
        let mut path = Vec::new();
        for node in built.numbers().filter(|n| is_file(built, *n)) {
            built.path(node, &mut path);
            if !path.ends_with(b".gitignore") {
                let path = clone.join(OsStr::from_bytes(&path));
                fs_err::write(path, vec![b'!'; built.size(node) as usize]).unwrap();
            }
        }
        set_times(&clone, 1_700_000_000);
        run(&clone, &["diff-files", "--quiet"]);
        assert_eq!(run(&clone, &["status", "--porcelain"]), "");
        // but it would be seen
        set_times(&clone, 1_700_000_001);
        write_index(&project, &clone);
        let changed = run(&clone, &["status", "--porcelain"]).lines().count() as u64;
        let empty = 2;
        assert_eq!(changed, project.builder().built.files - empty - 2);
    }
}

#[test]
fn git_looks_at_converted_files() {
    let mut project = Project::new(HashKind::Sha1);
    project.write(b".gitattributes", b"*.bat eol=crlf\n");
    project.write(b"run.bat", b"echo\n");
    project.origin.commit();
    let clone = project.build("clone", HashSet::from([b"run.bat".to_vec()]));
    assert_eq!(project.builder().built.converted, 1);
    run(&clone, &["config", "core.trustctime", "false"]);
    run(&clone, &["checkout", "-q", "-f", "HEAD"]);
    set_times(&clone, 1_700_000_000);
    assert_eq!(fs_err::read(clone.join("run.bat")).unwrap(), b"echo\r\n");
    write_index(&project, &clone);
    assert_eq!(run_with(git(&clone).args(["diff-files", "--name-only"]), b""), b"run.bat\n");
    assert_eq!(run(&clone, &["status", "--porcelain"]), "");
    // status has taken its stat data in
    run(&clone, &["diff-files", "--quiet"]);
}
