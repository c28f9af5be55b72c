//! What the command line says: of what it can't do, why and what would help; and no more than is true.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use hydrant_tests::process::{Output, Run};
use hydrant_tests::repository::{MAIN, lonely, lonely_path};
use hydrant_tests::world::{Setting, World};

fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

/// What a command says that fails.
fn refusal(world: &World, arguments: &[&str]) -> Result<String> {
    let output: Output = world.daemon.hydrant(arguments)?.output()?;
    ensure!(!output.status.success(), "hydrant {arguments:?} did not fail: {}", output.text());
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A state directory on a file system without pre-content events: one clear error, and nothing is left.
#[test]
#[ignore = "needs root"]
fn root_a_state_directory_on_tmpfs() -> Result<()> {
    let world = World::with("messages-tmpfs", Setting { start: false, ..Setting::default() })?;
    let memory = world.scratch.make("memory")?;
    Run::program("mount", &["-t", "tmpfs", "tmpfs", text(&memory)]).check()?;
    let (state, tree) = (memory.join("state"), world.path("tree"));
    let error =
        refusal(&world, &["--state-dir", text(&state), "clone", "https://h/x", text(&tree)])?;
    let expected = format!(
        "{} is on tmpfs, which has no pre-content events: it needs ext4, xfs or btrfs; use --state-dir",
        state.display()
    );
    ensure!(error.contains(&expected) && !error.contains("INFO"), "{error}");
    ensure!(error.lines().count() == 2, "an error and a hint, no more: {error}");
    let cgroup = hydrant_api::cgroup_name(&state);
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        ensure!(!Path::new(root).join(&cgroup).exists(), "the cgroup {cgroup} is left");
    }
    Ok(())
}

/// `--rev` takes a branch, a tag or a full id, also by their whole names; of anything else it says so.
#[test]
#[ignore = "needs root"]
fn root_names_of_revisions() -> Result<()> {
    let world = World::new("messages-rev")?;
    let repository = lonely(2, 1000)?;
    let own = world.path("own.git");
    repository.copy_to(&own)?;
    world.git(&own, &["tag", "v1", MAIN]).check()?;
    world.git(&own, &["tag", "-a", "-m", "x", "both", MAIN]).check()?;
    world.git(&own, &["branch", "both", MAIN]).check()?;
    let id = world.git(&own, &["rev-parse", MAIN]).check()?.text();
    let branch = format!("refs/heads/{MAIN}");
    for (n, rev) in ["HEAD", &branch, "refs/tags/v1", &id].into_iter().enumerate() {
        let tree = world.path(&format!("tree-{n}"));
        world.clone_url(text(&own), &tree, &["--history=none", "--rev", rev])?;
        let head = world.git(&tree, &["rev-parse", "HEAD"]).check()?.text();
        ensure!(head == id, "{rev}: {head}");
    }
    let missing = "0123456789012345678901234567890123456789";
    for (rev, words) in [
        (&id[..7], "name a branch, a tag or a full commit id"),
        ("HEAD~1", "name a branch, a tag or a full commit id"),
        ("refs/tags/none", "the origin has no refs/tags/none"),
        ("refs/tags/both", "a branch of the same name"),
        (missing, "the origin has no commit 0123"),
    ] {
        let tree = world.path("refused");
        let error = refusal(&world, &["clone", "--rev", rev, text(&own), text(&tree)])?;
        ensure!(error.contains(words) && error.lines().count() <= 2, "{rev}: {error}");
        ensure!(!tree.exists());
    }
    Ok(())
}

/// The daemon of one state directory is not taken for that of another one.
#[test]
#[ignore = "needs root"]
fn root_another_state_directory() -> Result<()> {
    let world = World::new("messages-state")?;
    let state = world.daemon.directories().state.clone();
    let (other, link) = (world.path("other"), world.path("link"));
    for arguments in
        [&["status"][..], &["umount", "--all"], &["clone", "https://h/x", "/nowhere/x"]]
    {
        let error = refusal(&world, &[&["--state-dir", text(&other)], arguments].concat())?;
        let words = format!("has the state directory {}, not {}", state.display(), other.display());
        ensure!(error.contains(&words), "{error}");
        ensure!(error.contains(&format!("--state-dir {}", state.display())), "{error}");
    }
    fs_err::os::unix::fs::symlink(&state, &link)?;
    world.daemon.check(&["--state-dir", text(&link), "status"])?;
    Ok(())
}

/// Nothing is there before it is fetched, `prefetch` speaks of what it was asked for, and a tree in use is
/// named once.
#[test]
#[ignore = "needs root"]
fn root_true_numbers() -> Result<()> {
    let world = World::new("messages-numbers")?;
    let tree = world.quick(&lonely(8, 5000)?)?;
    let before = world.daemon.mount_of(&tree)?;
    ensure!(before.present_bytes == 0 && before.segment_bytes > 0, "{before:?}");
    let file = tree.join(lonely_path(3));
    for _ in 0..2 {
        let said = world.daemon.check(&["prefetch", text(&file)])?.text();
        ensure!(said.contains("1 files, 4.9 KiB, 8.0 KiB fetched so far"), "{said}");
    }
    ensure!(world.daemon.mount_of(&tree)?.present_bytes == 8192);
    let said = world.daemon.check(&["prefetch", text(&tree)])?.text();
    ensure!(said.contains("8 files, 39.1 KiB"), "{said}");

    let sleep = Run::program("sleep", &["300"]).current_dir(&tree).start()?;
    let error = refusal(&world, &["umount", text(&tree)])?;
    let first = error.lines().next().context("an error")?;
    ensure!(
        first.matches(text(&tree)).count() == 1 && first.contains("in use by sleep"),
        "{error}"
    );
    nix::sys::signal::kill(sleep.pid(), nix::sys::signal::Signal::SIGKILL)?;
    sleep.wait()?;
    Ok(())
}

/// What `rm --keep` leaves of a clone from this machine is configured as git would have it.
#[test]
#[ignore = "needs root"]
fn root_kept_from_a_local_origin() -> Result<()> {
    let world = World::new("messages-keep")?;
    let own = world.path("own.git");
    lonely(4, 1000)?.copy_to(&own)?;
    let tree = world.path("tree");
    world.clone_url(text(&own), &tree, &["--history=full"])?;
    world.daemon.check(&["rm", "--keep", text(&tree)])?;
    let configuration = world.git(&tree, &["config", "--local", "--list"]).check()?.text();
    for ours in ["uploadpack", "checkstat", "packedgitwindowsize", "maintenance"] {
        ensure!(!configuration.to_lowercase().contains(ours), "{configuration}");
    }
    world.git(&tree, &["fetch"]).check()?;
    Ok(())
}
