//! Every kind of access to a file that is not fetched sees its bytes: through system calls, mappings,
//! `exec`, io_uring and everyday tools, from other namespaces and through other mounts, with the state
//! directory on ext4, xfs and btrfs, in the tree and in a bare mount of its EROFS image. Each file is
//! read by one reader only, so each read is a first read.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use hydrant_tests::access::Kind;
use hydrant_tests::bare::{self, Mounted};
use hydrant_tests::namespace::mount_idmapped;
use hydrant_tests::process::Run;
use hydrant_tests::reader::{End, access, end, expect_right, reader};
use hydrant_tests::repository::{MAIN, Random, Repository, files};
use hydrant_tests::state_fs::StateFs;
use hydrant_tests::world::{Setting, World};

const TOOLS: [(&str, &str); 9] = [
    ("cat", r#"cat "$1" > "$2""#),
    ("cp", r#"cp "$1" "$2""#),
    ("cp-sparse", r#"cp --sparse=always "$1" "$2""#),
    ("cp-reflink", r#"cp --reflink=auto "$1" "$2""#),
    ("install", r#"install "$1" "$2""#),
    ("dd", r#"dd if="$1" of="$2" bs=64k status=none"#),
    ("tar", r#"tar -C "$(dirname "$1")" -cf - "$(basename "$1")" | tar -xOf - > "$2""#),
    ("tar-sparse", r#"tar -C "$(dirname "$1")" -Scf - "$(basename "$1")" | tar -xOf - > "$2""#),
    ("rsync", r#"rsync -a "$1" "$2""#),
];
const NAMESPACES: [(&str, &[&str]); 5] = [
    ("mount", &["unshare", "-m"]),
    ("mount-pid", &["unshare", "-mpf", "--mount-proc"]),
    ("user", &["unshare", "-Urm"]),
    ("user-pid", &["unshare", "-Urmpf"]),
    ("net-ipc-uts", &["unshare", "-nui"]),
];

/// Through idmapped mounts: of the bare image, of an overlay on that, and of the tree.
const IDMAPPED: [&str; 3] = ["idmapped", "idmapped-overlay", "idmapped-tree"];
/// Through an overlay of a user namespace's own.
const USER_OVERLAY: &str = "user-overlay";
/// For what is read in a bare mount of the image.
const BARE: &str = "bare-";

/// A directory and a name of its own for each use, so that nothing is read ahead for another.
fn path(purpose: &str) -> String {
    format!("dir-{purpose}/file-{purpose}.bin")
}

fn program_path(purpose: &str) -> String {
    format!("programs-{purpose}/busybox-{purpose}")
}

fn name(kind: Kind) -> String {
    kind.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

fn repository() -> Result<Repository> {
    let busybox = fs_err::read("/bin/busybox").context("no /bin/busybox (busybox-static)")?;
    let mut random = Random::new(11);
    let mut all = Vec::new();
    let kinds = Kind::value_variants().iter().map(|kind| name(*kind));
    let tools = TOOLS.iter().map(|(tool, _)| (*tool).to_owned());
    let spaces =
        || NAMESPACES.iter().map(|(space, _)| *space).chain(IDMAPPED).chain([USER_OVERLAY]);
    let of_spaces = spaces().flat_map(|space| {
        [Kind::Read, Kind::MmapShared].map(|kind| format!("{space}-{}", name(kind)))
    });
    let places = ["user-bind", "user-bind-mmap", "read-only-bind"].map(str::to_owned);
    let purposes: Vec<_> = kinds.chain(tools).chain(of_spaces).chain(places).collect();
    for purpose in purposes.iter().cloned().chain(purposes.iter().map(|p| format!("{BARE}{p}"))) {
        // Some zeros in the middle: blocks that could be taken for holes.
        let mut content = random.bytes(400_123);
        content[100_000..200_000].fill(0);
        all.push((path(&purpose), "100644", content));
    }
    let programs =
        ["plain"].into_iter().chain(spaces()).flat_map(|p| [p.to_owned(), format!("{BARE}{p}")]);
    for (n, program) in programs.enumerate() {
        // Different content, so that each is executed cold.
        let content = [&busybox[..], &[n as u8; 5_000]].concat();
        all.push((program_path(&program), "100755", content));
    }
    files("access-5", &all)
}

struct Setup {
    world: World,
    repository: Repository,
    tree: PathBuf,
}

fn setup(state_fs: StateFs) -> Result<Setup> {
    let name = format!("access-{state_fs}");
    // Nothing may be there before it is read.
    let configuration = "read_ahead = false\n";
    let world = World::with(&name, Setting { state_fs, configuration, ..Setting::default() })?;
    let repository = repository()?;
    let tree = world.quick(&repository)?;
    Ok(Setup { world, repository, tree })
}

/// Where the files of a tree are read: in the tree, or in another mount of its content.
struct Place<'a> {
    setup: &'a Setup,
    root: PathBuf,
    /// Before each purpose: what was read elsewhere is not cold any more.
    prefix: &'static str,
    _mounted: Option<Mounted>,
}

impl Setup {
    fn tree(&self) -> Place<'_> {
        Place { setup: self, root: self.tree.clone(), prefix: "", _mounted: None }
    }

    /// The tree's image, mounted without an overlay.
    fn bare(&self) -> Result<Place<'_>> {
        let root = self.world.scratch.make("bare")?;
        let mounted = bare::mount(&self.world.daemon.directories().state, &root)?;
        Ok(Place { setup: self, root, prefix: BARE, _mounted: Some(mounted) })
    }
}

impl Place<'_> {
    /// The file for a purpose, and its truth.
    fn file(&self, purpose: &str) -> Result<(PathBuf, PathBuf)> {
        let path = path(&format!("{}{purpose}", self.prefix));
        Ok((self.root.join(&path), self.setup.world.truth(&self.setup.repository, &path)?))
    }

    fn program(&self, purpose: &str) -> PathBuf {
        self.root.join(program_path(&format!("{}{purpose}", self.prefix)))
    }

    /// Reads a file, maps another and executes a third, below `prefix`, and all is right.
    fn expect_right(&self, purpose: &str, prefix: &[&str]) -> Result<()> {
        for kind in [Kind::Read, Kind::MmapShared] {
            let (file, truth) = self.file(&format!("{purpose}-{}", name(kind)))?;
            let got = end(&reader(prefix, kind, &file, &truth)?.output()?)?;
            ensure!(got == End::Right, "{kind:?} of {} in {prefix:?}: {got:?}", file.display());
        }
        let ran = execute(prefix, &self.program(purpose))?;
        ensure!(ran == (0, "ran".to_owned()), "exec of {purpose} in {prefix:?}: {ran:?}");
        Ok(())
    }

    /// Tries all that reads; adds to `wrong` what was not right.
    fn try_reads(&self, wrong: &mut Vec<String>) -> Result<()> {
        let mut note = |what: &str, got: &dyn std::fmt::Debug| {
            wrong.push(format!("{}{what}: {got:?}", self.prefix));
        };
        for kind in Kind::READS {
            let (file, truth) = self.file(&name(kind))?;
            let got = access(kind, &file, &truth)?;
            if got != End::Right {
                note(&name(kind), &got);
            }
        }
        // As EROFS answers it, whatever is below.
        let (file, truth) = self.file("direct")?;
        let got = access(Kind::Direct, &file, &truth)?;
        if got != End::Errno(libc::EINVAL) && got != End::Right {
            note("O_DIRECT", &got);
        }
        let (file, truth) = self.file("copy-file-range")?;
        let got = access(Kind::CopyFileRange, &file, &truth)?;
        if got != End::Errno(libc::EXDEV) {
            note("copy_file_range to another file system", &got);
        }
        expect_right(Kind::Read, &file, &truth)?;
        for (tool, script) in TOOLS {
            let (file, truth) = self.file(tool)?;
            let copy = self.setup.world.path(&format!("copy-{}{tool}", self.prefix));
            let output = Run::shell(script, &[&file, &copy]).output()?;
            if !output.status.success() || fs_err::read(&copy)? != fs_err::read(&truth)? {
                note(tool, &output);
            }
        }
        let output = execute(&[], &self.program("plain"))?;
        if output != (0, "ran".to_owned()) {
            note("exec", &output);
        }
        Ok(())
    }
}

fn all_accesses(state_fs: StateFs) -> Result<()> {
    let setup = setup(state_fs)?;
    let tree = setup.tree();
    let mut wrong = Vec::new();
    tree.try_reads(&mut wrong)?;
    for kind in Kind::CHANGES {
        let (file, truth) = tree.file(&name(kind))?;
        let got = access(kind, &file, &truth)?;
        if got != End::Right {
            wrong.push(format!("{kind:?}: {got:?}"));
        }
    }
    // Whose content goes at once is not fetched for it.
    let replaced = path(&name(Kind::Replace));
    let blobs = setup.repository.blobs(MAIN)?;
    let id = blobs.iter().find(|(_, path)| *path == replaced.as_bytes());
    let (id, _) = id.context("no file to replace")?;
    if setup.world.fetched_blobs(&setup.repository, &[MAIN])?.contains(id) {
        wrong.push("fetched for O_TRUNC".to_owned());
    }
    setup.bare()?.try_reads(&mut wrong)?;
    ensure!(wrong.is_empty(), "on {state_fs}:\n{}", wrong.join("\n"));
    Ok(())
}

fn execute(prefix: &[&str], program: &Path) -> Result<(i32, String)> {
    let program = program.to_string_lossy().into_owned();
    let words = [prefix, &[&program, "echo", "ran"]].concat();
    let output = Run::program(words[0], &words[1..]).time_out(Duration::from_secs(60)).output()?;
    Ok((output.code(), output.text()))
}

/// All kinds, with the state directory on ext4.
#[test]
#[ignore = "needs root"]
fn root_accesses_on_ext4() -> Result<()> {
    all_accesses(StateFs::Ext4)
}

/// All kinds, with the state directory on xfs.
#[test]
#[ignore = "needs root"]
fn root_accesses_on_xfs() -> Result<()> {
    all_accesses(StateFs::Xfs)
}

/// All kinds, with the state directory on btrfs.
#[test]
#[ignore = "needs root"]
fn root_accesses_on_btrfs() -> Result<()> {
    all_accesses(StateFs::Btrfs)
}

/// Reads, mappings and `exec` from other mount, pid, user and network namespaces.
#[test]
#[ignore = "needs root"]
fn root_namespaces() -> Result<()> {
    let setup = setup(StateFs::Host)?;
    for place in [setup.tree(), setup.bare()?] {
        for (space, prefix) in NAMESPACES {
            place.expect_right(space, prefix)?;
        }
    }
    Ok(())
}

/// Through bind mounts, also read-only ones and ones of another user namespace.
#[test]
#[ignore = "needs root"]
fn root_bind_mounts() -> Result<()> {
    let setup = setup(StateFs::Host)?;
    let place = setup.world.scratch.make("bind")?;
    let (file, truth) = setup.tree().file("read-only-bind")?;
    let directory = file.parent().context("a file in no directory")?;
    let script = r#"mount --bind "$1" "$2" && mount -o remount,bind,ro "$2""#;
    Run::shell(script, &[directory, &place]).check()?;
    let _bound = Mounted::at(&place);
    let bound = place.join(file.file_name().context("a file without a name")?);
    expect_right(Kind::MmapShared, &bound, &truth)?;

    for (purpose, kind) in [("user-bind", "read"), ("user-bind-mmap", "mmap-shared")] {
        let (file, truth) = setup.tree().file(purpose)?;
        let directory = file.parent().context("a file in no directory")?;
        let program = hydrant_tests::daemon::built("hydrant-access")?;
        let script = r#"unshare -Urm sh -euc 'mount --bind "$1" "$2"; "$3" $5 "$2/$6" --truth "$4"' sh "$@""#;
        let name = Path::new(file.file_name().context("a file without a name")?);
        let inside = setup.world.scratch.make("inside")?;
        let arguments = [directory, &inside, &program, &truth, Path::new(kind), name];
        let output = Run::shell(script, &arguments).output()?;
        ensure!(end(&output)? == End::Right, "{purpose}: {output:?}");
    }
    Ok(())
}

/// Reads, mappings and `exec` through an overlay that a user namespace has mounted on the tree, or on the image.
#[test]
#[ignore = "needs root"]
fn root_overlay_of_a_user_namespace() -> Result<()> {
    let setup = setup(StateFs::Host)?;
    let script = r#"mount -t tmpfs tmpfs "$2"; mkdir "$2/upper" "$2/work" "$2/both"
        mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work,userxattr" overlay "$2/both"
        shift 2; exec "$@""#;
    let inside = setup.world.scratch.make("inside")?;
    for place in [setup.tree(), setup.bare()?] {
        let (lower, inside) = (place.root.to_string_lossy(), inside.to_string_lossy());
        let prefix = ["unshare", "-Urm", "sh", "-euc", script, "sh", &lower, &inside];
        let root = Path::new(&*inside).join("both");
        Place { setup: &setup, root, prefix: place.prefix, _mounted: None }
            .expect_right(USER_OVERLAY, &prefix)?;
    }
    Ok(())
}

/// Through idmapped mounts of the image and of the tree, and an overlay on one, as root and as a mapped user.
#[test]
#[ignore = "needs root"]
fn root_idmapped_mounts() -> Result<()> {
    const FIRST: u32 = 100_000;
    let setup = setup(StateFs::Host)?;
    let bare = setup.bare()?;
    let make = |name: &str| setup.world.scratch.make(name);
    let idmapped = make("idmapped")?;
    mount_idmapped(&bare.root, &idmapped, FIRST)?;
    let _idmapped = Mounted::at(&idmapped);
    let overlay = make("idmapped-overlay")?;
    let script = r#"mount -t overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" overlay "$4""#;
    Run::shell(script, &[&idmapped, &make("upper")?, &make("work")?, &overlay]).check()?;
    let _overlay = Mounted::at(&overlay);

    let mut roots = vec![idmapped, overlay];
    let tree = make("idmapped-tree")?;
    // Overlayfs itself takes them by Linux 7.3, not yet by 6.18 (FS_ALLOW_IDMAP in fs/overlayfs/super.c).
    let _tree = match mount_idmapped(&setup.tree, &tree, FIRST) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
        result => {
            result?;
            roots.push(tree.clone());
            Some(Mounted::at(&tree))
        }
    };

    let user = ["setpriv", "--reuid=100000", "--regid=100000", "--clear-groups"];
    for (root, purpose) in roots.into_iter().zip(IDMAPPED) {
        for (prefix, user) in [("", &[][..]), (BARE, &user[..])] {
            let place = Place { setup: &setup, root: root.clone(), prefix, _mounted: None };
            let owner = fs_err::metadata(place.program(purpose))?.uid();
            ensure!(owner == FIRST, "files below {} belong to {owner}", root.display());
            place.expect_right(purpose, user)?;
        }
    }
    Ok(())
}
