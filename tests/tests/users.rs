//! Users without root: the socket's group, trees of their own and of nobody else, `sudo`'s caller.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_api::{RUN_DIR_ENV, STATE_DIR_ENV};
use hydrant_tests::daemon::built;
use hydrant_tests::process::{Output, Run, until};
use hydrant_tests::repository::{lonely, lonely_path};
use hydrant_tests::world::{GIT_ENVIRONMENT, Setting, World};

/// Two that no database knows, and a group that Debian has.
const ALICE: u32 = 61_871;
const BOB: u32 = 61_872;
const GROUP: (&str, u32) = ("users", 100);

fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

/// A daemon that Alice and Bob may use, a repository that it can reach, and `hydrant` where they can run it.
fn world(name: &str) -> Result<World> {
    let configuration = "socket_group = \"users\"\n"; // see GROUP
    let world = World::with(name, Setting { configuration, ..Setting::default() })?;
    let programs = world.scratch.make("bin")?;
    for program in ["hydrant", "hydrantd"] {
        fs_err::copy(built(program)?, programs.join(program))?;
    }
    world.serve(&lonely(6, 2000)?, "repo")?;
    Ok(world)
}

/// A directory of the user's own.
fn home(world: &World, uid: u32) -> Result<PathBuf> {
    let home = world.scratch.make(&format!("home-{uid}"))?;
    fs_err::os::unix::fs::chown(&home, Some(uid), Some(uid))?;
    Ok(home)
}

/// A program as a user, in the group or not.
fn as_user(
    world: &World,
    uid: u32,
    group: bool,
    program: &Path,
    arguments: &[&str],
) -> Result<Output> {
    let mut command = Command::new("setpriv");
    let groups = if group { format!("--groups={}", GROUP.1) } else { "--clear-groups".to_owned() };
    command.args([format!("--reuid={uid}"), format!("--regid={uid}"), groups]);
    command.arg(program).args(arguments).envs(GIT_ENVIRONMENT);
    command.env("HOME", home(world, uid)?);
    let directories = world.daemon.directories();
    command.env(STATE_DIR_ENV, &directories.state).env(RUN_DIR_ENV, &directories.run);
    Run::new(command).output()
}

fn hydrant(world: &World, uid: u32, arguments: &[&str]) -> Result<Output> {
    as_user(world, uid, true, &world.path("bin/hydrant"), arguments)
}

fn done(output: Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{}{}",
        output.text(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.text())
}

fn refused(output: &Output, words: &str) -> Result<()> {
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && error.contains(words), "not refused: {output:?}");
    Ok(())
}

/// The options of what is mounted on a directory.
fn mount_options(directory: &Path) -> Result<String> {
    let table = fs_err::read_to_string("/proc/self/mountinfo")?;
    let of = |line: &str| {
        let mut fields = line.split(' ');
        (fields.nth(4) == Some(text(directory))).then(|| fields.next().map(str::to_owned))
    };
    table.lines().rev().find_map(of).flatten().context("nothing is mounted there")
}

/// Who is in the socket's group clones, reads, writes, unmounts and removes without root. The files are
/// theirs, the mount is `nosuid,nodev`. Who is not in the group is not let in.
#[test]
#[ignore = "needs root"]
fn root_a_user_of_the_group() -> Result<()> {
    let world = world("users-group")?;
    let (url, tree) = (world.url("repo"), home(&world, ALICE)?.join("tree"));
    let outside = as_user(&world, ALICE, false, &world.path("bin/hydrant"), &["ls"])?;
    refused(&outside, "not allowed to talk to the daemon")?;
    let doctor = done(hydrant(&world, ALICE, &["doctor"])?)?;
    ensure!(doctor.contains("serves you"), "{doctor}");
    ensure!(outside.code() == 3, "{outside:?}");

    done(hydrant(&world, ALICE, &["clone", "--history=none", &url, text(&tree)])?)?;
    let file = tree.join(lonely_path(1));
    for path in [&tree, &tree.join(".git"), &tree.join(".git/index"), &file] {
        let metadata = fs_err::metadata(path)?;
        let owner = (metadata.uid(), metadata.gid());
        ensure!(owner == (ALICE, ALICE), "{} belongs to {owner:?}", path.display());
    }
    let options = mount_options(&tree)?;
    ensure!(options.contains("nosuid") && options.contains("nodev"), "{options}");

    let git = |arguments: &[&str]| {
        let all = [&["-C", text(&tree)], arguments].concat();
        done(as_user(&world, ALICE, true, Path::new("git"), &all)?)
    };
    ensure!(git(&["status", "--porcelain"])?.is_empty());
    done(as_user(
        &world,
        ALICE,
        true,
        Path::new("sh"),
        &["-c", "cat \"$1\" && echo more >> \"$1\"", "sh", text(&file)],
    )?)?;
    ensure!(git(&["status", "--porcelain"])?.contains(&lonely_path(1)));
    git(&["checkout", "-q", "."])?;
    done(hydrant(&world, ALICE, &["prefetch", text(&tree)])?)?;
    done(hydrant(&world, ALICE, &["umount", text(&tree)])?)?;
    // as in Daemon::mount_again
    until("it is mounted again", Duration::from_secs(60), || {
        hydrant(&world, ALICE, &["mount", text(&tree)]).and_then(done).ok()
    })?;
    for arguments in [&["stop"][..], &["workers", "restart"], &["queue", "deny", "1"]] {
        refused(&hydrant(&world, ALICE, arguments)?, "only root may")?;
    }
    done(hydrant(&world, ALICE, &["rm", text(&tree)])?)?;
    ensure!(!file.exists());
    Ok(())
}

/// Nobody mounts on what is another's, or touches another's tree; root may.
#[test]
#[ignore = "needs root"]
fn root_what_is_of_others() -> Result<()> {
    let world = world("users-others")?;
    let (url, tree) = (world.url("repo"), home(&world, ALICE)?.join("tree"));
    done(hydrant(&world, ALICE, &["clone", "--history=none", &url, text(&tree)])?)?;
    // an empty directory of root's, one of Alice's, and one to be made where Bob may not
    let roots = world.scratch.make("roots")?;
    let alices = home(&world, ALICE)?.join("empty");
    fs_err::create_dir(&alices)?;
    fs_err::os::unix::fs::chown(&alices, Some(ALICE), Some(ALICE))?;
    for directory in [&roots, &alices] {
        let output = hydrant(&world, BOB, &["clone", &url, text(directory)])?;
        refused(&output, "belongs to another user")?;
    }
    let new = home(&world, ALICE)?.join("new");
    let output = hydrant(&world, BOB, &["clone", &url, text(&new)])?;
    ensure!(!output.status.success() && !new.exists(), "{output:?}");
    for arguments in
        [&["umount"][..], &["rm"], &["rm", "--discard"], &["rm", "--keep"], &["prefetch"]]
    {
        let output = hydrant(&world, BOB, &[arguments, &[text(&tree)]].concat())?;
        refused(&output, "belongs to another user")?;
    }
    ensure!(fs_err::read(tree.join(lonely_path(0)))?.len() == 2000, "it is there as before");
    // what Bob unmounts are Bob's trees
    hydrant(&world, BOB, &["umount", "--all"])?;
    ensure!(fs_err::read(tree.join(lonely_path(0)))?.len() == 2000, "it is there as before");
    world.daemon.check(&["umount", text(&tree)])?;
    refused(&hydrant(&world, BOB, &["mount", text(&tree)])?, "belongs to another user")?;
    Ok(())
}

/// Root on behalf of `sudo`'s caller: the tree is the caller's.
#[test]
#[ignore = "needs root"]
fn root_for_the_caller_of_sudo() -> Result<()> {
    let world = world("users-sudo")?;
    let tree = home(&world, ALICE)?.join("tree");
    let clone = ["clone", "--history=none", &world.url("repo"), text(&tree)];
    let run = world.daemon.hydrant(&clone)?;
    run.env("SUDO_UID", ALICE.to_string()).env("SUDO_GID", ALICE.to_string()).check()?;
    ensure!(world.daemon.mount_of(&tree)?.owner.uid == ALICE);
    ensure!(fs_err::metadata(tree.join(lonely_path(0)))?.uid() == ALICE);
    ensure!(mount_options(&tree)?.contains("nosuid"));
    done(hydrant(&world, ALICE, &["umount", text(&tree)])?)?;
    Ok(())
}
