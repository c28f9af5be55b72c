//! The tree, mounted.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::project::Project;
use crate::builder::IndexJob;
use crate::importer::testing::run;
use crate::object::HashKind;
use crate::segment::SegmentKind;

/// A mount that goes when this does.
struct Mounted(PathBuf);

impl Mounted {
    fn new(source: &Path, at: PathBuf, kind: &str, flags: MsFlags, options: &str) -> Self {
        fs_err::create_dir(&at).unwrap();
        let mounted = mount(Some(source), &at, Some(kind), flags, Some(options));
        mounted.unwrap_or_else(|error| panic!("mount {kind} ({options}): {error}"));
        Self(at)
    }

    /// What was built last, by itself.
    fn tree(project: &Project, name: &str) -> Self {
        Self::image(project, SegmentKind::Data, &project.path(&format!("{name}.erofs")))
    }

    /// The existence pack of what was built last.
    fn pack(project: &Project, name: &str) -> Self {
        let image = crate::builder::pack::image_path(&project.path(&format!("{name}.erofs")));
        Self::image(project, SegmentKind::Pack, &image)
    }

    fn image(project: &Project, kind: SegmentKind, image: &Path) -> Self {
        let segments = project.segments().iter().filter(|segment| segment.kind == kind);
        let devices = segments.map(|s| {
            let path = project.data_path(s.segment);
            format!("device={}", path.display())
        });
        let devices = devices.collect::<Vec<_>>().join(",");
        let at = image.with_extension("lower");
        Self::new(image, at, "erofs", MsFlags::MS_RDONLY, &devices)
    }

    /// The same under an overlay whose upper directory has the `.git` of `clone`.
    fn overlay(project: &Project, pack: &Self, lower: &Self, clone: &Path) -> Self {
        let (upper, work) = (clone.with_extension("upper"), clone.with_extension("work"));
        fs_err::create_dir(&upper).unwrap();
        fs_err::create_dir(&work).unwrap();
        fs_err::rename(clone.join(".git"), upper.join(".git")).unwrap();
        let options = format!(
            "lowerdir={}:{},upperdir={},workdir={},redirect_dir=on,metacopy=on",
            pack.0.display(),
            lower.0.display(),
            upper.display(),
            work.display()
        );
        let at = clone.with_extension("merged");
        let merged = Self::new(Path::new("overlay"), at, "overlay", MsFlags::empty(), &options);
        // what a file shows besides its number in the image
        let shown = fs_err::metadata(merged.0.join("a/b.c")).unwrap();
        let nid = fs_err::metadata(lower.0.join("a/b.c")).unwrap().ino();
        let job = IndexJob { index: project.path("index"), ino_or: shown.ino() & !nid };
        project.write_index(&job);
        fs_err::copy(job.index, merged.0.join(".git/index")).unwrap();
        merged
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("can't unmount {}: {error}", self.0.display());
        }
    }
}

/// Path, type, mode, owner, size of a file or target of a link, and time if asked for.
fn listing(dir: &Path, time: bool) -> Vec<Vec<u8>> {
    let sizes = if time { "%T@ " } else { "" };
    let find = Command::new("find")
        .arg(dir)
        .args(["-path", "*/.git", "-prune", "-o", "-type", "d"])
        .args(["-printf", &format!("d %m %u:%g {sizes}%P\\0"), "-o"])
        .args(["-printf", &format!("%y %m %u:%g %s {sizes}%l %P\\0")])
        .output()
        .unwrap();
    assert!(find.status.success());
    let mut lines: Vec<_> = find.stdout.split(|b| *b == 0).map(<[u8]>::to_vec).collect();
    lines.sort();
    lines
}

fn assert_equal_trees(mounted: &Path, checked_out: &Path) {
    let output = Command::new("diff")
        .args(["-r", "--no-dereference", "--exclude=.git"])
        .args([mounted, checked_out])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let (left, right) = (listing(mounted, false), listing(checked_out, false));
    let text = |lines: &[Vec<u8>]| {
        lines.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect::<Vec<_>>()
    };
    assert_eq!(text(&left), text(&right));
}

#[test]
#[ignore = "needs root"]
fn root_the_mounted_tree_is_what_git_checks_out() {
    for hash in [HashKind::Sha1, HashKind::Sha256] {
        let mut project = Project::new(hash);
        project.build("one", HashSet::new());
        project.fill();
        let one = Mounted::tree(&project, "one");
        assert_equal_trees(&one.0, &project.origin.dir);
        let times = listing(&one.0, true);
        let time = b" 1700000000.0000000000 ".as_slice();
        assert!(times.iter().skip(1).all(|line| line.windows(time.len()).any(|w| w == time)));
        let before = fs_err::read(project.path("one.erofs")).unwrap();

        // a second tree of the same pool, with most objects where they are
        project.write(b"a/b.c", b"int changed;\n");
        project.write(b"another/place", b"read me\n");
        fs_err::remove_file(project.origin.dir.join("copy")).unwrap();
        fs_err::remove_dir_all(project.origin.dir.join("deep")).unwrap();
        project.origin.commit();
        fs_err::create_dir_all(project.origin.dir.join("a/module")).unwrap();
        project.build("two", HashSet::new());
        let new: Vec<_> = project.segments().iter().map(|s| (s.new, s.size)).collect();
        assert_eq!((new.len(), new[0].0, new[1]), (3, false, (true, 4096)));
        project.fill();
        let two = Mounted::tree(&project, "two");
        assert_equal_trees(&two.0, &project.origin.dir);
        assert_eq!(fs_err::read(project.path("one.erofs")).unwrap(), before);
    }
}

#[test]
#[ignore = "needs root"]
fn root_git_works_on_the_mounted_tree() {
    for (hash, filled) in
        [(HashKind::Sha1, false), (HashKind::Sha256, false), (HashKind::Sha1, true)]
    {
        let mut project = Project::new(hash);
        let tree = project.origin.id("HEAD^{tree}").to_string();
        let clone = project.build("clone", HashSet::new());
        if filled {
            project.fill();
        }
        let lower = Mounted::tree(&project, "clone");
        let pack = Mounted::pack(&project, "clone");
        let merged = Mounted::overlay(&project, &pack, &lower, &clone);
        let dir = &merged.0;
        fs_err::rename(&project.origin.dir, project.path("away")).unwrap();
        // all of the stat data is right, without core.trustctime or core.checkStat
        run(dir, &["diff-files", "--quiet"]);
        assert_eq!(run(dir, &["status", "--porcelain"]), "");
        assert_eq!(run(dir, &["write-tree"]), tree);
        fs_err::write(dir.join("a/b.c"), "int y;\n").unwrap();
        assert_eq!(run(dir, &["status", "--porcelain"]), " M a/b.c");
        run(dir, &["commit", "-qam", "an edit"]);
        run(dir, &["fsck", "--connectivity-only", "--no-dangling"]);
        fs_err::set_permissions(
            dir.join("README"),
            fs_err::metadata(dir.join("bin/tool")).unwrap().permissions(),
        )
        .unwrap();
        run(dir, &["commit", "-qam", "a mode"]);
        run(dir, &["mv", "many", "few"]);
        run(dir, &["commit", "-qm", "a name"]);
        assert_eq!(run(dir, &["status", "--porcelain"]), "");
        run(dir, &["gc", "-q", "--prune=now"]);
        assert_eq!(run(dir, &["status", "--porcelain"]), "");
        if filled {
            run(dir, &["switch", "-qd", "HEAD~3"]);
            assert_equal_trees(dir, &project.path("away"));
            run(dir, &["fsck", "--connectivity-only"]);
        }
        drop((merged, pack, lower));
    }
}
