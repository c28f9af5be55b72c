//! A server whose settings are against asking for objects by their ids, as those of Gerrit and other servers with
//! JGit can be: it filters, so there are clones without content, whose content can't be had.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::process::until;
use hydrant_tests::proxy::{Fault, Quality};
use hydrant_tests::reader::{End, access, expect_right};
use hydrant_tests::repository::{MAIN, OddOptions, Repository, lonely, lonely_path, odd};
use hydrant_tests::server::OLD;
use hydrant_tests::tree;
use hydrant_tests::world::{Setting, World};

fn world(name: &str) -> Result<World> {
    let configuration = "deadline_secs = 20\nstall_secs = 4\n";
    World::with(
        name,
        Setting { proxy: Some(Quality::default()), configuration, ..Setting::default() },
    )
}

/// From now on the server gives no blob of `repository` by its id.
fn withhold(world: &World, repository: &Repository) -> Result<()> {
    let blobs: HashSet<_> = repository.blobs(MAIN)?.into_iter().map(|(id, _)| id).collect();
    world.proxy()?.fail_always(Fault::Withhold(Arc::new(blobs)));
    Ok(())
}

/// Clones what is served as `name`, which says that it had to fetch everything, and why.
fn clone_whole(
    world: &World,
    name: &str,
    directory: &str,
    arguments: &[&str],
    why: &[&str],
) -> Result<PathBuf> {
    let path = world.path(directory);
    let output = world.clone_url(&world.url(name), &path, arguments)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    for words in [&["note: all content is fetched at once"], why].concat() {
        ensure!(said.contains(words), "{words:?} is not in {said}");
    }
    Ok(path)
}

/// The same of a server that withholds files, which is found out by one request.
fn clone(world: &World, name: &str, directory: &str, arguments: &[&str]) -> Result<PathBuf> {
    let asked = world.proxy()?.withheld();
    let why = ["allowAnySHA1InWant", "not our ref"];
    let path = clone_whole(world, name, directory, arguments, &why)?;
    let asked = world.proxy()?.withheld() - asked;
    ensure!(asked == 1, "it has asked {asked} times");
    Ok(path)
}

/// Stock git finds everything in the tree; nobody is asked for anything.
fn is_whole(world: &World, plain: &Path, lazy: &Path) -> Result<()> {
    tree::same(plain, lazy)?;
    for arguments in [&["status", "--porcelain"][..], &["config", "remote.origin.promisor"]] {
        let output = world.git(lazy, arguments).output()?;
        ensure!(output.stdout.is_empty(), "git {arguments:?} says:\n{}", output.text());
    }
    world.git(lazy, &["fsck", "--full"]).check()?;
    Ok(())
}

/// The files with the content of trees.
fn segments(world: &World) -> Result<usize> {
    let mut count = 0;
    for pool in fs_err::read_dir(world.path("state/pools"))? {
        for file in fs_err::read_dir(pool?.path())? {
            count += usize::from(file?.path().extension().is_some_and(|end| end == "data"));
        }
    }
    Ok(count)
}

/// The clone has everything at once, says why, and needs the server no more; a second one shares its content.
#[test]
#[ignore = "needs root"]
fn root_a_server_that_gives_nothing_by_id() -> Result<()> {
    let world = world("withheld")?;
    // files that every clone fetches at once, and none
    let repositories = [
        ("odd", odd(OddOptions::default())?, "README.md".to_owned()),
        ("lonely", lonely(20, 50_000)?, lonely_path(0)),
    ];
    for (name, repository, file) in repositories {
        world.serve(&repository, name)?;
        let plain = world.clone_plain(name, &format!("plain {name}"), &[])?;
        withhold(&world, &repository)?;
        let lazy = clone(&world, name, &format!("lazy {name}"), &["--history=none"])?;
        world.proxy()?.refuse();
        is_whole(&world, &plain, &lazy)?;
        let text = lazy.to_str().unwrap_or_default();
        world.daemon.check(&["umount", text])?;
        world.daemon.mount_again(&lazy)?;
        is_whole(&world, &plain, &lazy)?;
        fs_err::write(lazy.join(file), "changed")?;
        world.git(&lazy, &["commit", "-am", "a change"]).check()?;
        world.git(&lazy, &["show", "--stat"]).check()?;
        world.proxy()?.heal();

        withhold(&world, &repository)?;
        let before = segments(&world)?;
        let again = clone(&world, name, &format!("again {name}"), &["--history=background"])?;
        ensure!(segments(&world)? == before, "its content is there twice");
        until("the history is there", Duration::from_secs(60), || {
            (world.daemon.mount_of(&again).ok()?.history == "complete").then_some(())
        })?;
        is_whole(&world, &plain, &again)?;
        let log = ["log", "--format=%H"];
        let [left, right] = [&plain, &again].map(|tree| world.git(tree, &log).check());
        ensure!(left?.stdout == right?.stdout, "the history is another one");
        world.proxy()?.heal();
    }
    Ok(())
}

/// A server that speaks version 0 of the protocol alone.
#[test]
#[ignore = "needs root"]
fn root_a_server_of_old() -> Result<()> {
    let world = world("withheld-old")?;
    let repository = odd(OddOptions::default())?;
    let name = &format!("{OLD}repo");
    world.serve(&repository, name)?;
    let plain = world.clone_plain(name, "plain", &[])?;
    let lazy = clone_whole(&world, name, "lazy", &["--history=none"], &["version 0"])?;
    world.proxy()?.refuse();
    is_whole(&world, &plain, &lazy)
}

/// Settings that change after the clone: readers are told so, and a new clone works.
#[test]
#[ignore = "needs root"]
fn root_a_server_that_gives_nothing_by_id_any_more() -> Result<()> {
    let world = world("withheld-later")?;
    let repository = lonely(20, 50_000)?;
    let tree = world.quick(&repository)?;
    let plain = world.clone_plain("repo", "plain", &[])?;
    let mut files = world.lonely_files(&repository, &tree, 0..2)?.into_iter();
    let (file, truth) = files.next().context("the first file")?;
    expect_right(Kind::Read, &file, &truth)?;
    withhold(&world, &repository)?;
    let (file, truth) = files.next().context("the second file")?;
    for attempt in 0..2 {
        let got = access(Kind::Read, &file, &truth)?;
        ensure!(got == End::Errno(libc::EIO), "{got:?}");
        let log = world.daemon.log_tail(20);
        let words = "its settings are against asking for objects by their ids";
        ensure!(log.contains(words), "the log does not say why:\n{log}");
        if attempt == 0 {
            let new = clone(&world, "repo", "new", &["--history=none"])?;
            is_whole(&world, &plain, &new)?;
        }
    }
    world.proxy()?.heal();
    expect_right(Kind::Read, &file, &truth)
}
