//! `hydrant clone URL DIR` puts a complete tree in place: every name, size, mode and link as a plain
//! `git clone` has them, with the same bytes, while nothing but metadata was fetched.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use hydrant_tests::guest;
use hydrant_tests::repository::{MAIN, OddOptions, Repository, generated, odd, u_boot_shape};
use hydrant_tests::server::Offers;
use hydrant_tests::tree;
use hydrant_tests::world::{Setting, World};

/// Blobs that a clone fetches at once: what git reads from the object database itself, links, and
/// files whose content on disk is not their blob.
fn is_eager(path: &[u8]) -> bool {
    let name = path.rsplit(|b| *b == b'/').next().unwrap_or(path);
    [b".gitattributes".as_slice(), b".gitignore", b".gitmodules"].contains(&name)
        || path.starts_with(b"links/")
        || path.starts_with(b"converted/")
}

/// Clones `repository` lazily and plainly. Right after the lazy clone, and after `git status`, nothing
/// but the eager set was fetched; then both trees are the same in every respect.
fn same_as_plain(world: &World, repository: &Repository) -> Result<(PathBuf, PathBuf)> {
    world.serve(repository, "repo")?;
    let lazy = world.clone_lazy("repo", "lazy", &["--history=none"])?;
    nothing_fetched(world, repository, &lazy)?;
    let plain = world.clone_plain("repo", "plain", &[])?;
    tree::same(&plain, &lazy)?;
    status_is_empty(world, &lazy)?;
    Ok((plain, lazy))
}

fn nothing_fetched(world: &World, repository: &Repository, tree: &Path) -> Result<()> {
    status_is_empty(world, tree)?;
    only_eager(world, repository)?;
    let counters = world.daemon.status()?.counters;
    ensure!(counters.content_bytes == 0, "content was fetched: {counters:?}");
    Ok(())
}

/// That since the last look nothing was fetched but what every clone needs at once.
fn only_eager(world: &World, repository: &Repository) -> Result<()> {
    let blobs = repository.blobs(MAIN)?;
    let fetched = world.fetched_blobs(repository, &[MAIN])?;
    for id in &fetched {
        // The same content may have two paths: one eager is enough.
        let eager = blobs.iter().any(|(other, path)| other == id && is_eager(path));
        ensure!(eager, "{id} was fetched: {:?}", blobs.iter().find(|(other, _)| other == id));
    }
    Ok(())
}

fn status_is_empty(world: &World, tree: &Path) -> Result<()> {
    let status = world.git(tree, &["status", "--porcelain"]).check()?;
    ensure!(status.stdout.is_empty(), "git status says:\n{}", status.text());
    Ok(())
}

/// Names with spaces, line breaks and bytes that are not UTF-8, links, executables, empty files, a file
/// of 200 MB, a gitlink, attributes and filters: `diff -r --no-dereference` and modes against a plain
/// clone show nothing.
#[test]
#[ignore = "needs root"]
fn root_odd_repository() -> Result<()> {
    let world = World::new("clone-odd")?;
    let options = OddOptions { large_bytes: 200 << 20, ..OddOptions::default() };
    same_as_plain(&world, &odd(options)?)?;
    Ok(())
}

/// The same with SHA-256 object names.
#[test]
#[ignore = "needs root"]
fn root_sha256_repository() -> Result<()> {
    let world = World::new("clone-sha256")?;
    same_as_plain(&world, &odd(OddOptions { format: "sha256", ..OddOptions::default() })?)?;
    Ok(())
}

/// 38,571 files in 2,400 directories.
#[test]
#[ignore = "needs root"]
fn root_u_boot_shape() -> Result<()> {
    let world = World::new("clone-u-boot")?;
    same_as_plain(&world, &u_boot_shape(guest::or(100, 15))?)?;
    Ok(())
}

/// 100,000 files, and not so many in the guest.
#[test]
#[ignore = "needs root"]
fn root_hundred_thousand_files() -> Result<()> {
    let world = World::new("clone-many")?;
    same_as_plain(&world, &generated(guest::or(100_000, 10_000))?)?;
    Ok(())
}

/// A local path, as a user has it: a bare repository, and a checkout.
#[test]
#[ignore = "needs root"]
fn root_local_paths() -> Result<()> {
    let world = World::new("clone-local")?;
    let repository = odd(OddOptions::default())?;
    let bare = world.server.add(&repository, "repo", Offers::default())?;
    let plain = world.clone_plain("repo", "plain", &[])?;
    for (n, origin) in [&bare, &plain].into_iter().enumerate() {
        let lazy = world.path(&format!("lazy {n}"));
        let origin = origin.to_str().unwrap_or_default();
        world.clone_url(origin, &lazy, &["--history=none"])?;
        tree::same(&plain, &lazy)?;
        status_is_empty(&world, &lazy)?;
    }
    Ok(())
}

/// Over ssh: one kept-open `ssh host git-upload-pack`, here with a program in its place.
#[test]
#[ignore = "needs root"]
fn root_ssh() -> Result<()> {
    let mut world = World::with("clone-ssh", Setting { start: false, ..Setting::default() })?;
    let bare = world.server.add(&odd(OddOptions::default())?, "repo", Offers::default())?;
    // Called as `ssh [-o SendEnv=GIT_PROTOCOL] host "git-upload-pack '/path'"`.
    let ssh = world.path("ssh");
    let script = "#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\nexec sh -c \"$1\"\n";
    fs_err::write(&ssh, script)?;
    fs_err::set_permissions(&ssh, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    world.daemon.set_env("GIT_SSH_COMMAND", &ssh.to_string_lossy());
    world.daemon.set_env("GIT_SSH_VARIANT", "ssh");
    world.daemon.start()?;
    let plain = world.clone_plain("repo", "plain", &[])?;
    let lazy = world.path("lazy");
    world.clone_url(&format!("ssh://host{}", bare.display()), &lazy, &["--history=none"])?;
    tree::same(&plain, &lazy)
}

/// A server that tells no sizes, and one that filters nothing, take longer but are served all the same,
/// with a note about what to switch on.
#[test]
#[ignore = "needs root"]
fn root_servers_that_offer_less() -> Result<()> {
    let world = World::new("clone-less")?;
    let repository = odd(OddOptions::default())?;
    let less = [("no-sizes", true, false), ("no-filter", false, true), ("nothing", false, false)];
    for (name, filter, object_info) in less {
        let offers = Offers { filter, object_info, push: false };
        world.server.add(&repository, name, offers)?;
        let plain = world.clone_plain(name, &format!("plain-{name}"), &[])?;
        let lazy = world.path(&format!("lazy-{name}"));
        world.clone_url(&world.url(name), &lazy, &["--history=none"])?;
        tree::same(&plain, &lazy)?;
        status_is_empty(&world, &lazy)?;
        if name == "no-sizes" {
            lazy_from_the_second_time_on(&world, &repository, name, &plain)?;
        }
    }
    Ok(())
}

/// What had to be fetched for its size is not fetched again, neither to clone nor to read.
fn lazy_from_the_second_time_on(
    world: &World,
    repository: &Repository,
    name: &str,
    plain: &Path,
) -> Result<()> {
    ensure!(only_eager(world, repository).is_err(), "the server has told sizes");
    let again = world.path(&format!("again-{name}"));
    world.clone_url(&world.url(name), &again, &["--history=none"])?;
    only_eager(world, repository)?;
    tree::same(plain, &again)?;
    status_is_empty(world, &again)?;
    let fetched = world.fetched_blobs(repository, &[MAIN])?;
    ensure!(fetched.is_empty(), "fetched again: {fetched:?}");
    Ok(())
}

/// A name and a password that only the user's git knows, and that change while the tree is mounted.
#[test]
#[ignore = "needs root"]
fn root_credentials_of_the_user() -> Result<()> {
    let world = World::with("clone-password", Setting { password: true, ..Setting::default() })?;
    let repository = odd(OddOptions::default())?;
    world.serve(&repository, "repo")?;
    let helper = world.path("password");
    fs_err::write(&helper, "secret")?;
    let configuration = world.path("home").join(".gitconfig");
    let old = fs_err::read_to_string(&configuration)?;
    let line = format!(
        "[credential]\n\thelper = \"!f() {{ echo username=user; echo password=$(cat {}); }}; f\"\n",
        helper.display()
    );
    fs_err::write(&configuration, old + &line)?;
    let lazy = world.clone_lazy("repo", "lazy", &["--history=none"])?;
    let read = |path: &str| fs_err::read(lazy.join(path));
    ensure!(read("many/file-0001.txt")?.starts_with(b"file 1 of many"), "wrong content");
    world.server.set_password("user", "another")?;
    fs_err::write(&helper, "another")?;
    ensure!(read("sizes/1500000.txt")?.len() == 1_500_000, "wrong size");
    Ok(())
}

/// `--rev` names a branch, a tag or a commit; `--read-only` a tree that nobody can write to.
#[test]
#[ignore = "needs root"]
fn root_revision_and_read_only() -> Result<()> {
    let world = World::new("clone-revision")?;
    let repository = odd(OddOptions::default())?;
    world.serve(&repository, "repo")?;
    let plain = world.clone_plain("repo", "plain", &["-b", "topic"])?;
    let lazy = world.clone_lazy("repo", "lazy", &["--history=none", "--rev", "topic"])?;
    tree::same(&plain, &lazy)?;
    let commit = world.git(&plain, &["rev-parse", "topic"]).check()?.text();
    let fixed = world.clone_lazy("repo", "fixed", &["--read-only", "--rev", &commit])?;
    tree::same(&plain, &fixed)?;
    let error = std::fs::write(fixed.join("README.md"), "x").unwrap_err();
    ensure!(error.raw_os_error() == Some(libc::EROFS), "{error}");
    Ok(())
}

/// A second clone of the same repository fetches no content that the first one has.
#[test]
#[ignore = "needs root"]
fn root_two_trees_of_one_origin_share() -> Result<()> {
    let world = World::new("clone-twice")?;
    let repository = odd(OddOptions::default())?;
    world.serve(&repository, "repo")?;
    let first = world.clone_lazy("repo", "first", &["--history=none"])?;
    for n in 0..100 {
        fs_err::read(first.join(format!("many/file-{n:04}.txt")))?;
    }
    let second = world.clone_lazy("repo", "second", &["--history=none"])?;
    world.server.new_requests()?;
    for n in 0..100 {
        let path = format!("many/file-{n:04}.txt");
        ensure!(fs_err::read(first.join(&path))? == fs_err::read(second.join(&path))?, "{path}");
    }
    let fetched = world.fetched_blobs(&repository, &[MAIN])?;
    ensure!(fetched.is_empty(), "fetched again: {fetched:?}");
    Ok(())
}
