//! The command line: what it refuses, what it prints, what it leaves behind.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_api::{Mount, QueueEvent, Status};
use hydrant_tests::access::Kind;
use hydrant_tests::process::{Output, until};
use hydrant_tests::proxy::Quality;
use hydrant_tests::reader::{End, end, start};
use hydrant_tests::repository::{MAIN, OddOptions, Repository, lonely, lonely_path, odd};
use hydrant_tests::scratch::mounts_below;
use hydrant_tests::tree;
use hydrant_tests::world::{Setting, World};

fn hydrant(world: &World, arguments: &[&str]) -> Result<Output> {
    world.daemon.hydrant(arguments)?.output()
}

/// That it fails, with an error that has `word` in it.
fn refused(world: &World, arguments: &[&str], word: &str) -> Result<String> {
    let output = hydrant(world, arguments)?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "hydrant {arguments:?} did not fail: {}", output.text());
    ensure!(error.to_lowercase().contains(word), "hydrant {arguments:?} says {error:?}");
    Ok(error)
}

fn path_of(tree: &Path) -> &str {
    tree.to_str().unwrap_or_default()
}

fn odd_world(name: &str) -> Result<(World, Repository, std::path::PathBuf)> {
    let world = World::new(name)?;
    let repository = odd(OddOptions::default())?;
    let tree = world.quick(&repository)?;
    Ok((world, repository, tree))
}

/// `hydrant clone` starts the daemon when none is running, makes DIR, and says in one line what is there.
#[test]
#[ignore = "needs root"]
fn root_clone_starts_the_daemon() -> Result<()> {
    let world = World::with("cli-start", Setting { start: false, ..Setting::default() })?;
    world.serve(&odd(OddOptions::default())?, "repo")?;
    let tree = world.path("deep/down/tree");
    let output = world.clone_url(&world.url("repo"), &tree, &[])?;
    ensure!(output.text().lines().count() == 1, "{}", output.text());
    ensure!(tree.join("README.md").exists());
    ensure!(world.daemon.status()?.mounts.len() == 1);
    Ok(())
}

/// DIR is only ever a mount point of ours: one with something in it is refused and stays as it is, and so is
/// a second clone onto a tree. A clone that fails leaves nothing behind.
#[test]
#[ignore = "needs root"]
fn root_clone_refuses() -> Result<()> {
    let (world, _, tree) = odd_world("cli-refuse")?;
    let url = world.url("repo");
    let full = world.scratch.make("full")?;
    fs_err::write(full.join("file"), "mine")?;
    refused(&world, &["clone", &url, path_of(&full)], "empty")?;
    ensure!(fs_err::read(full.join("file"))? == b"mine");
    refused(&world, &["clone", &url, path_of(&tree)], "")?;
    let file = world.path("file");
    fs_err::write(&file, "mine")?;
    refused(&world, &["clone", &url, path_of(&file)], "")?;

    let before = mounts_below(world.scratch.path())?;
    for wrong in [world.url("nothing"), "/nonexistent/repository".to_owned(), "no url".to_owned()] {
        let place = world.path("never");
        refused(&world, &["clone", &wrong, path_of(&place)], "")?;
        ensure!(!place.exists(), "{wrong} left a directory");
    }
    let place = world.path("never");
    refused(
        &world,
        &["clone", &url, path_of(&place), "--rev", "no-such-branch"],
        "no-such-branch",
    )?;
    ensure!(mounts_below(world.scratch.path())? == before, "a mount was left behind");
    ensure!(world.daemon.status()?.mounts.len() == 1);
    Ok(())
}

/// `umount` and `mount`: what the user changed and what was fetched is there again; both may be repeated.
#[test]
#[ignore = "needs root"]
fn root_umount_and_mount() -> Result<()> {
    let (world, repository, tree) = odd_world("cli-umount")?;
    fs_err::write(tree.join("mine"), "mine")?;
    let before = fs_err::read(tree.join("sizes/65537.txt"))?;
    hydrant(&world, &["umount", path_of(&tree)])?;
    ensure!(fs_err::read_dir(&tree)?.next().is_none(), "still something in {}", tree.display());
    let mount: Vec<Mount> = world.daemon.admin().mounts()?;
    ensure!(!mount[0].mounted);
    world.daemon.mount_again(&tree)?;
    world.daemon.check(&["mount", path_of(&tree)])?;
    world.server.new_requests()?;
    ensure!(fs_err::read(tree.join("mine"))? == b"mine");
    ensure!(fs_err::read(tree.join("sizes/65537.txt"))? == before);
    ensure!(world.fetched_blobs(&repository, &[MAIN])?.is_empty(), "fetched again");
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.text() == "?? mine");
    world.daemon.check(&["umount", "--all"])?;
    ensure!(mounts_below(&tree)?.is_empty());
    Ok(())
}

/// After a restart of the daemon every tree is where it was, except those that the user unmounted.
#[test]
#[ignore = "needs root"]
fn root_restart_mounts_again() -> Result<()> {
    let (mut world, _, tree) = odd_world("cli-restart")?;
    let other = world.clone_lazy("repo", "other", &["--history=none"])?;
    world.daemon.check(&["umount", path_of(&other)])?;
    world.daemon.stop()?;
    ensure!(mounts_below(world.scratch.path())?.is_empty(), "still mounted after the stop");
    world.daemon.start()?;
    until("the tree is there", Duration::from_secs(10), || {
        tree.join("README.md").exists().then_some(())
    })?;
    ensure!(!other.join("README.md").exists(), "what was unmounted is mounted");
    ensure!(fs_err::read(tree.join("many/file-1000.txt"))?.starts_with(b"file 1000 of many"));
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.stdout.is_empty());
    Ok(())
}

/// `rm` refuses when there are changes and lists them; `--discard` throws them away; DIR, which was made for
/// the tree, and everything in the state directory that belonged to it are gone.
#[test]
#[ignore = "needs root"]
fn root_rm() -> Result<()> {
    let (world, _, tree) = odd_world("cli-rm")?;
    let clean = world.clone_lazy("repo", "clean", &["--history=none"])?;
    world.git(&clean, &["status"]).check()?;
    world.daemon.check(&["rm", path_of(&clean)])?;
    ensure!(!clean.join("README.md").exists());

    fs_err::write(tree.join("mine.txt"), "mine")?;
    fs_err::write(tree.join("README.md"), "changed")?;
    let error = refused(&world, &["rm", path_of(&tree)], "mine.txt")?;
    ensure!(error.contains("README.md") && error.contains("--discard"), "{error}");
    ensure!(fs_err::read(tree.join("mine.txt"))? == b"mine");
    world.daemon.check(&["rm", "--discard", path_of(&tree)])?;
    ensure!(!tree.join("mine.txt").exists());
    ensure!(world.daemon.status()?.mounts.is_empty());
    let state = world.daemon.directories().state.clone();
    for place in ["mounts", "trees"] {
        let left = fs_err::read_dir(state.join(place)).map(Iterator::count).unwrap_or(0);
        ensure!(left == 0, "{left} left in {place}");
    }
    Ok(())
}

/// What `git status` and `git log` are made to keep quiet about is a change all the same, and so is
/// what was written while the tree was not mounted; a tree that was not mounted is not afterwards.
#[test]
#[ignore = "needs root"]
fn root_rm_finds_what_git_hides() -> Result<()> {
    let (world, _, tree) = odd_world("cli-rm-hidden")?;
    let rm = ["rm", path_of(&tree)];
    world.git(&tree, &["config", "status.showUntrackedFiles", "no"]).check()?;
    fs_err::write(tree.join("mine.txt"), "mine")?;
    refused(&world, &rm, "mine.txt")?;
    world.daemon.check(&["umount", path_of(&tree)])?;
    refused(&world, &rm, "mine.txt")?;
    ensure!(mounts_below(world.scratch.path())?.is_empty(), "it is mounted again");
    world.daemon.mount_again(&tree)?;
    fs_err::remove_file(tree.join("mine.txt"))?;

    for (hide, show) in
        [("--skip-worktree", "--no-skip-worktree"), ("--assume-unchanged", "--no-assume-unchanged")]
    {
        world.git(&tree, &["update-index", hide, "README.md"]).check()?;
        fs_err::write(tree.join("README.md"), "changed")?;
        refused(&world, &rm, "readme.md")?;
        world.git(&tree, &["update-index", show, "README.md"]).check()?;
        world.git(&tree, &["checkout", "README.md"]).check()?;
    }

    fs_err::write(tree.join("README.md"), "changed")?;
    world.git(&tree, &["commit", "-qam", "only here"]).check()?;
    world.git(&tree, &["tag", "release"]).check()?;
    refused(&world, &rm, "only here")?;
    world.git(&tree, &["reset", "-q", "--hard", "HEAD^"]).check()?;
    refused(&world, &rm, "only here")?;
    world.git(&tree, &["tag", "--delete", "release"]).check()?;
    world.daemon.check(&rm)?;
    Ok(())
}

/// `rm --keep` leaves an ordinary repository: nothing mounted, everything there, `git fsck` content.
#[test]
#[ignore = "needs root"]
fn root_rm_keep() -> Result<()> {
    let (mut world, _, tree) = odd_world("cli-keep")?;
    let plain = world.clone_plain("repo", "plain", &[])?;
    for place in [&plain, &tree] {
        fs_err::write(place.join("mine.txt"), "mine")?;
        fs_err::write(place.join("README.md"), "changed")?;
    }
    world.daemon.check(&["rm", "--keep", path_of(&tree)])?;
    world.daemon.stop()?;
    ensure!(mounts_below(world.scratch.path())?.is_empty(), "something is mounted");
    tree::same(&plain, &tree)?;
    world.git(&tree, &["fsck", "--full"]).check()?;
    let status = world.git(&tree, &["status", "--porcelain"]).check()?.text();
    ensure!(status == " M README.md\n?? mine.txt", "{status}");
    Ok(())
}

/// `prefetch` of a directory fetches all of it, and of the tree everything: reading is silent from then on.
#[test]
#[ignore = "needs root"]
fn root_prefetch() -> Result<()> {
    let (world, repository, tree) = odd_world("cli-prefetch")?;
    world.daemon.check(&["prefetch", path_of(&tree.join("many"))])?;
    world.server.new_requests()?;
    for n in (0..3000).step_by(100) {
        fs_err::read(tree.join(format!("many/file-{n:04}.txt")))?;
    }
    ensure!(world.fetched_blobs(&repository, &[MAIN])?.is_empty(), "not all was fetched");
    world.daemon.check(&["prefetch", path_of(&tree)])?;
    until("the mark of the segment is gone", Duration::from_secs(10), || {
        (world.daemon.mount_of(&tree).ok()?.complete_segments > 0).then_some(())
    })?;
    let events = world.daemon.status()?.counters.events;
    let plain = world.clone_plain("repo", "plain", &[])?;
    world.server.new_requests()?;
    tree::same(&plain, &tree)?;
    ensure!(world.fetched_blobs(&repository, &[MAIN])?.is_empty(), "not all was fetched");
    ensure!(world.daemon.status()?.counters.events == events, "complete files raise events");
    Ok(())
}

/// Every command that reads has `--json`, in the shape of the API.
#[test]
#[ignore = "needs root"]
fn root_json() -> Result<()> {
    let (world, _, tree) = odd_world("cli-json")?;
    let status: Status =
        serde_json::from_slice(&world.daemon.check(&["status", "--json"])?.stdout)?;
    ensure!(status.mounts.len() == 1 && !status.shards.is_empty());
    ensure!(Path::new(&status.mounts[0].directory) == tree);
    let mounts: Vec<Mount> =
        serde_json::from_slice(&world.daemon.check(&["ls", "--json"])?.stdout)?;
    ensure!(mounts == status.mounts);
    let queue = world.daemon.check(&["queue", "--json"])?;
    ensure!(serde_json::from_slice::<Vec<QueueEvent>>(&queue.stdout)?.is_empty());
    let doctor = world.daemon.check(&["doctor", "--json"])?;
    serde_json::from_slice::<serde_json::Value>(&doctor.stdout).context("doctor")?;
    for shell in ["bash", "zsh", "fish"] {
        ensure!(!world.daemon.check(&["completions", shell])?.stdout.is_empty());
    }
    for plain in ["status", "ls", "queue", "doctor"] {
        world.daemon.check(&[plain])?;
    }
    Ok(())
}

/// `hydrant queue` says who waits for what, where and why; `retry` and `deny` do what they say.
#[test]
#[ignore = "needs root"]
fn root_queue() -> Result<()> {
    let setting = Setting { proxy: Some(Quality::default()), ..Setting::default() };
    let world = World::with("cli-queue", setting)?;
    let repository = lonely(3, 50_000)?;
    let tree = world.quick(&repository)?;
    let files = world.lonely_files(&repository, &tree, 0..2)?;
    world.proxy()?.hold();
    let reader = start(Kind::Pread, &files[0].0, &files[0].1)?;
    let event = until("the event is with a worker", Duration::from_secs(20), || {
        let output = world.daemon.check(&["queue", "--json"]).ok()?;
        let queue: Vec<QueueEvent> = serde_json::from_slice(&output.stdout).ok()?;
        queue.into_iter().find(|event| event.state == "in_flight")
    })?;
    ensure!(event.process.pid == reader.pid().as_raw(), "{event:?}");
    ensure!(event.process.comm.as_deref() == Some("hydrant-access"), "{event:?}");
    ensure!(event.process.uid == Some(0), "{event:?}");
    ensure!(event.path.as_deref() == Some(&lonely_path(0)), "{event:?}");
    ensure!(event.directory.as_deref() == Some(path_of(&tree)), "{event:?}");
    ensure!(event.attempts >= 1 && event.worker_pid.is_some(), "{event:?}");
    ensure!(event.origin.as_deref() == Some(&world.url("repo")), "{event:?}");
    let id = event.id.to_string();
    let shown = world.daemon.check(&["queue", "show", &id])?.text();
    ensure!(shown.contains("file-0000.bin"), "{shown}");
    world.daemon.check(&["queue", "deny", &id])?;
    // The kernel tries again, page by page, what its read-ahead did not get.
    while reader.still_runs_after(Duration::from_millis(200)) {
        for event in world.daemon.admin().queue()? {
            hydrant(&world, &["queue", "deny", &event.id.to_string()])?;
        }
    }
    let denied = end(&reader.wait()?)?;
    ensure!(matches!(denied, End::Errno(_)), "{denied:?}");

    world.proxy()?.refuse();
    let reader = start(Kind::Pread, &files[1].0, &files[1].1)?;
    let id = until("the event is in the queue", Duration::from_secs(20), || {
        world.daemon.admin().queue().ok()?.first().map(|event| event.id.to_string())
    })?;
    world.proxy()?.heal();
    // It may have tried again by itself just before.
    let retried = hydrant(&world, &["queue", "retry", &id])?;
    let gone = String::from_utf8_lossy(&retried.stderr).contains("nobody waits");
    ensure!(retried.status.success() || gone, "{retried:?}");
    ensure!(end(&reader.wait()?)? == End::Right);
    refused(&world, &["queue", "show", "999999"], "")?;
    Ok(())
}

/// Two daemons with other directories don't disturb each other.
#[test]
#[ignore = "needs root"]
fn root_two_daemons() -> Result<()> {
    let (one, _, tree_one) = odd_world("cli-daemon-one")?;
    let (mut two, _, tree_two) = odd_world("cli-daemon-two")?;
    two.daemon.stop()?;
    ensure!(!tree_two.join("README.md").exists());
    ensure!(fs_err::read(tree_one.join("sizes/8192.txt"))?.len() == 8192);
    drop(two);
    ensure!(fs_err::read(tree_one.join("sizes/4097.txt"))?.len() == 4097);
    ensure!(one.daemon.status()?.mounts.len() == 1);
    Ok(())
}
