//! The existence pack, read by git.

use std::collections::HashSet;
use std::fs::Permissions;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::project::Project;
use crate::importer::testing::{git, run, run_with};
use crate::object::{HashKind, ObjectId};
use crate::segment::frame::Frame;

/// A partial clone with the pack beside its index, an index of `HEAD`, and no way to fetch.
fn clone(project: &mut Project) -> PathBuf {
    let clone = project.build("clone", HashSet::new());
    project.install_pack(&clone);
    run(&clone, &["read-tree", "HEAD"]);
    fs_err::rename(&project.origin.dir, project.path("away")).unwrap();
    clone
}

/// What is in the repository's packs besides the existence pack.
fn others(project: &Project, clone: &Path) -> Vec<String> {
    let name = &project.builder().built.pack.as_ref().unwrap().name;
    let files = fs_err::read_dir(clone.join(".git/objects/pack")).unwrap();
    let files = files.map(|e| e.unwrap().file_name().into_string().unwrap());
    files.filter(|file| !file.starts_with(name)).collect()
}

/// Adds a file in `dir` and commits it, all without a working tree but for that file.
fn commit(clone: &Path, path: &str, content: &str) -> String {
    fs_err::create_dir_all(clone.join(path).parent().unwrap()).unwrap();
    fs_err::write(clone.join(path), content).unwrap();
    run(clone, &["add", path]);
    run(clone, &["commit", "-qm", path]);
    run(clone, &["rev-parse", "HEAD"])
}

#[test]
fn whether_objects_exist_is_asked_of_the_index_alone() {
    for hash in [HashKind::Sha1, HashKind::Sha256] {
        let mut project = Project::new(hash);
        let clone = clone(&mut project);
        let before = run(&clone, &["rev-parse", "HEAD"]);
        // each of these would fail if it read a hole of the pack, or had to fetch
        commit(&clone, "a/b.c", "int y;\n");
        commit(&clone, "bytes/new", "new\n");
        run(&clone, &["write-tree"]);
        run(&clone, &["fsck", "--connectivity-only", "--no-dangling"]);
        run(&clone, &["rev-list", "--objects", "HEAD"]);
        run(&clone, &["diff", "--name-only", &before, "HEAD"]);
        run(&clone, &["reset", "-q", "--soft", "HEAD~1"]);
        run(&clone, &["commit", "-qm", "again"]);
        run(&clone, &["commit", "-q", "--amend", "-m", "amended"]);
        // the origin is back, as somebody to push to
        fs_err::rename(project.path("away"), &project.origin.dir).unwrap();
        run(&clone, &["push", "-q", "--no-thin", "origin", "HEAD:refs/heads/other"]);
        run(&project.origin.dir, &["fsck", "--no-dangling"]);
        run(&clone, &["fetch", "-q", "origin"]);
        fs_err::rename(&project.origin.dir, project.path("away")).unwrap();

        let pack = project.builder().built.pack.clone().unwrap();
        let file = |end| clone.join(format!(".git/objects/pack/{}.{end}", pack.name));
        let index = fs_err::read(file("idx")).unwrap();
        run(&clone, &["gc", "-q", "--prune=now"]);
        run(&clone, &["repack", "-q", "-d"]);
        run(&clone, &["prune-packed"]);
        assert_eq!(fs_err::read(file("idx")).unwrap(), index, "gc leaves it alone");
        assert_eq!(fs_err::metadata(file("pack")).unwrap().len(), pack.size);
        run(&clone, &["fsck", "--connectivity-only", "--no-dangling"]);
        commit(&clone, "one/more", "more\n");
        assert!(!others(&project, &clone).is_empty());

        // to name what is dangling, it looks at the fillers: the last starts in a block that a
        // worker fills
        let segment = project.segments()[pack.device as usize].segment;
        let frame = Frame::of(&project.extents(segment)).unwrap();
        fs_err::set_permissions(file("pack"), Permissions::from_mode(0o600)).unwrap();
        let open = fs_err::OpenOptions::new().write(true).open(file("pack")).unwrap();
        open.file().write_all_at(&frame.tail, frame.tail_at).unwrap();
        let dangling = run(&clone, &["fsck", "--connectivity-only"]);
        let fillers = [1, 2].map(|n| format!("dangling blob {}", frame.objects[n].0));
        assert!(fillers.iter().all(|line| dangling.contains(line)), "{dangling}");
    }
}

#[test]
fn all_objects_are_read_from_a_pack_that_is_filled() {
    for hash in [HashKind::Sha1, HashKind::Sha256] {
        let mut project = Project::new(hash);
        project.build("clone", HashSet::new());
        project.fill();
        let clone = project.path("clone");
        project.install_pack(&clone);
        run(&clone, &["read-tree", "HEAD"]);
        fs_err::rename(&project.origin.dir, project.path("away")).unwrap();

        let id_of = |path: &str| run(&clone, &["rev-parse", &format!("HEAD:{path}")]);
        run(&clone, &["checkout", "-q", "-f", "HEAD"]);
        let different = std::process::Command::new("diff")
            .args(["-r", "--no-dereference", "--exclude=.git"])
            .args([&clone, &project.path("away")])
            .output()
            .unwrap();
        assert!(different.status.success(), "{}", String::from_utf8_lossy(&different.stdout));

        // every object of every pack, hashed here
        let all = ["cat-file", "--batch-all-objects", "--unordered", "--buffer", "--batch"];
        let all = run_with(git(&clone).args(all), b"");
        let (mut rest, mut blobs) = (&all[..], 0);
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            let head = String::from_utf8_lossy(&rest[..end]).into_owned();
            let fields: Vec<_> = head.split(' ').collect();
            let len: usize = fields[2].parse().unwrap();
            let content = &rest[end + 1..][..len];
            if fields[1] == "blob" {
                assert_eq!(ObjectId::of_blob(hash, content).to_string(), fields[0]);
                blobs += 1;
            }
            rest = &rest[end + len + 2..];
        }
        // those in the pack, its frame, and four that are in the repository
        let objects = project.builder().built.pack.as_ref().unwrap().objects;
        assert_eq!(blobs, objects + 3 + 4);

        // reads through the pack: what was there before, in all the ways of a working day
        let main = run(&clone, &["rev-parse", "HEAD"]);
        run(&clone, &["switch", "-qc", "topic"]);
        commit(&clone, "a/b.c", "int changed;\n");
        assert!(run(&clone, &["diff", &main, "HEAD"]).contains("-int x;"));
        run(&clone, &["switch", "-q", "main"]);
        assert_eq!(fs_err::read(clone.join("a/b.c")).unwrap(), b"int x;\n");
        commit(&clone, "README", "read me too\n");
        run(&clone, &["switch", "-q", "topic"]);
        fs_err::write(clone.join("empty"), "no more\n").unwrap();
        run(&clone, &["stash", "-q"]);
        run(&clone, &["rebase", "-q", "main"]);
        run(&clone, &["stash", "pop", "-q"]);
        assert_eq!(fs_err::read(clone.join("empty")).unwrap(), b"no more\n");
        run(&clone, &["archive", "-o", "/dev/null", "--format=tar", "HEAD"]);

        // into other repositories: one that has nothing, and a copy of its own
        let other = project.path("other");
        run(
            &clone,
            &[
                "init",
                "-q",
                "--bare",
                &format!("--object-format={}", hash.name()),
                other.to_str().unwrap(),
            ],
        );
        // a shallow history can't be pushed whole, its tree can
        let tree = run(&clone, &["commit-tree", "-m", "all", &format!("{main}^{{tree}}")]);
        run(&clone, &["push", "-q", other.to_str().unwrap(), &format!("{tree}:refs/heads/all")]);
        run(&other, &["fsck", "--strict"]);
        assert_eq!(run(&other, &["cat-file", "-s", &id_of("large")]), "3000000");
    }
}

/// Without `.keep` and with all its objects wanted, git packs them anew, and complains of nothing.
#[test]
fn entries_can_be_copied() {
    let mut project = Project::new(HashKind::Sha1);
    project.build("clone", HashSet::new());
    project.fill();
    let clone = project.path("clone");
    project.install_pack(&clone);
    fs_err::rename(&project.origin.dir, project.path("away")).unwrap();
    let mut repack = git(&clone);
    repack.args(["repack", "-a", "-d", "-f", "--pack-kept-objects"]);
    let mut repack_copies = git(&clone);
    repack_copies.args(["repack", "-a", "-d", "--pack-kept-objects"]);
    for mut command in [repack_copies, repack] {
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !stderr.contains("error"), "{stderr}");
    }
    run(&clone, &["fsck", "--connectivity-only"]);
    run(&clone, &["checkout", "-q", "-f", "HEAD"]);
}
