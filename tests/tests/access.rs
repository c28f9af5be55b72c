//! Every kind of access to a file that is not fetched sees its bytes: through system calls, mappings,
//! `exec`, io_uring and everyday tools, from other namespaces and through other mounts, with the state
//! directory on ext4, xfs and btrfs. Each file is read by one reader only, so each read is a first read.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use hydrant_tests::access::Kind;
use hydrant_tests::namespace::mount_idmapped;
use hydrant_tests::process::Run;
use hydrant_tests::reader::{End, access, end, expect_right, reader};
use hydrant_tests::repository::{Random, Repository, files};
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

/// A directory and a name of its own for each use, so that nothing is read ahead for another.
fn path(purpose: &str) -> String {
    format!("dir-{purpose}/file-{purpose}.bin")
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
    let places = ["user-bind", "user-bind-mmap", "idmapped", "idmapped-mmap", "read-only-bind"];
    let spaces = NAMESPACES.iter().flat_map(|(space, _)| {
        [Kind::Read, Kind::MmapShared].map(|kind| format!("{space}-{}", name(kind)))
    });
    for purpose in kinds.chain(tools).chain(spaces).chain(places.map(str::to_owned)) {
        // Some zeros in the middle: blocks that could be taken for holes.
        let mut content = random.bytes(400_123);
        content[100_000..200_000].fill(0);
        all.push((path(&purpose), "100644", content));
    }
    let programs = ["plain"].into_iter().chain(NAMESPACES.iter().map(|(space, _)| *space));
    for (n, program) in programs.enumerate() {
        // Different content, so that each is executed cold.
        let content = [&busybox[..], &[n as u8; 5_000]].concat();
        all.push((format!("programs-{program}/busybox-{program}"), "100755", content));
    }
    files("access-2", &all)
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

impl Setup {
    /// The file for a purpose, and its truth.
    fn file(&self, purpose: &str) -> Result<(PathBuf, PathBuf)> {
        let path = path(purpose);
        Ok((self.tree.join(&path), self.world.truth(&self.repository, &path)?))
    }
}

fn all_accesses(state_fs: StateFs) -> Result<()> {
    let setup = setup(state_fs)?;
    let mut wrong = Vec::new();
    for kind in Kind::READS.into_iter().chain(Kind::CHANGES) {
        let (file, truth) = setup.file(&name(kind))?;
        let got = access(kind, &file, &truth)?;
        if got != End::Right {
            wrong.push(format!("{kind:?}: {got:?}"));
        }
    }
    // As EROFS answers it, whatever is below.
    let (file, truth) = setup.file("direct")?;
    let got = access(Kind::Direct, &file, &truth)?;
    if got != End::Errno(libc::EINVAL) && got != End::Right {
        wrong.push(format!("O_DIRECT: {got:?}"));
    }
    let (file, truth) = setup.file("copy-file-range")?;
    let got = access(Kind::CopyFileRange, &file, &truth)?;
    if got != End::Errno(libc::EXDEV) {
        wrong.push(format!("copy_file_range to another file system: {got:?}"));
    }
    expect_right(Kind::Read, &file, &truth)?;
    for (tool, script) in TOOLS {
        let (file, truth) = setup.file(tool)?;
        let copy = setup.world.path(&format!("copy-{tool}"));
        let output = Run::shell(script, &[&file, &copy]).output()?;
        if !output.status.success() || fs_err::read(&copy)? != fs_err::read(&truth)? {
            wrong.push(format!("{tool}: {output:?}"));
        }
    }
    let program = setup.tree.join("programs-plain/busybox-plain");
    let output = execute(&[], &program)?;
    if output != (0, "ran".to_owned()) {
        wrong.push(format!("exec: {output:?}"));
    }
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
    for (space, prefix) in NAMESPACES {
        for kind in [Kind::Read, Kind::MmapShared] {
            let (file, truth) = setup.file(&format!("{space}-{}", name(kind)))?;
            let got = end(&reader(prefix, kind, &file, &truth)?.output()?)?;
            ensure!(got == End::Right, "{kind:?} in {prefix:?}: {got:?}");
        }
        let program = setup.tree.join(format!("programs-{space}/busybox-{space}"));
        let ran = execute(prefix, &program)?;
        ensure!(ran == (0, "ran".to_owned()), "exec in {prefix:?}: {ran:?}");
    }
    Ok(())
}

/// Through bind mounts, also read-only ones and ones of another user namespace.
#[test]
#[ignore = "needs root"]
fn root_bind_mounts() -> Result<()> {
    let setup = setup(StateFs::Host)?;
    let place = setup.world.scratch.make("bind")?;
    let (file, truth) = setup.file("read-only-bind")?;
    let directory = file.parent().context("a file in no directory")?;
    let script = r#"mount --bind "$1" "$2" && mount -o remount,bind,ro "$2""#;
    Run::shell(script, &[directory, &place]).check()?;
    let bound = place.join(file.file_name().context("a file without a name")?);
    expect_right(Kind::MmapShared, &bound, &truth)?;

    for (purpose, kind) in [("user-bind", "read"), ("user-bind-mmap", "mmap-shared")] {
        let (file, truth) = setup.file(purpose)?;
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

/// Through an overlay that a user namespace has mounted on the tree.
#[test]
#[ignore = "needs root"]
fn root_overlay_of_a_user_namespace() -> Result<()> {
    let setup = setup(StateFs::Host)?;
    let program = hydrant_tests::daemon::built("hydrant-access")?;
    for (purpose, kind) in [("user-bind", "read"), ("user-bind-mmap", "mmap-shared")] {
        let (_, truth) = setup.file(purpose)?;
        let place = setup.world.scratch.make(&format!("overlay-{purpose}"))?;
        let script = r#"unshare -Urm sh -euc '
            mount -t tmpfs tmpfs "$2"; mkdir "$2/upper" "$2/work" "$2/both"
            mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work,userxattr" overlay "$2/both"
            "$3" $5 "$2/both/$6" --truth "$4"' sh "$@""#;
        let inside = path(purpose);
        let arguments =
            [&setup.tree, &place, &program, &truth, Path::new(kind), Path::new(&inside)];
        let output = Run::shell(script, &arguments).output()?;
        ensure!(end(&output)? == End::Right, "{purpose}: {output:?}");
    }
    Ok(())
}

/// Through an idmapped mount, as root and as a mapped user, where the kernel makes one of the tree.
#[test]
#[ignore = "needs root"]
fn root_idmapped_mount() -> Result<()> {
    let setup = setup(StateFs::Host)?;
    let place = setup.world.scratch.make("idmapped")?;
    match mount_idmapped(&setup.tree, &place, 100_000) {
        Ok(()) => {}
        // overlayfs takes none as of Linux 7.3 (no FS_ALLOW_IDMAP): nothing that could be read wrong.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            println!("the kernel makes no idmapped mount of the tree");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    }
    let prefix: &[&[&str]] =
        &[&[], &["setpriv", "--reuid=100000", "--regid=100000", "--clear-groups"]];
    for ((purpose, kind), prefix) in
        [("idmapped", Kind::Read), ("idmapped-mmap", Kind::MmapShared)].into_iter().zip(prefix)
    {
        let (_, truth) = setup.file(purpose)?;
        let file = place.join(path(purpose));
        let got = end(&reader(prefix, kind, &file, &truth)?.output()?)?;
        ensure!(got == End::Right, "{kind:?}: {got:?}");
    }
    Ok(())
}
