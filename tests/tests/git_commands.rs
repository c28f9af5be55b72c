//! Stock git in a lazy tree: every command gives what it gives in a plain clone, and fetches nothing
//! but what it touches.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_tests::process::Run;
use hydrant_tests::proxy::{Proxy, Quality};
use hydrant_tests::repository::{MAIN, OddOptions, Repository, TOPIC, odd, u_boot_shape};
use hydrant_tests::server::{Offers, url_at};
use hydrant_tests::tree;
use hydrant_tests::world::World;

/// Shell lines, one after the other in the same tree.
const COMMANDS: &[&str] = &[
    "git status --porcelain",
    "git ls-files -s",
    "git ls-files -m",
    "git diff",
    "git diff-index HEAD",
    "git log --format='%h %s %an %ad'",
    "git log --stat",
    "git log -p -2",
    "git show HEAD~1",
    "git blame many/file-0250.txt",
    "git describe --always --dirty",
    "git check-attr -a converted/crlf.txt converted/ident.c",
    "git submodule status",
    "git grep -c 'file 17 of' -- many",
    "git clean -ndx",
    // An edit.
    "echo edited >> sizes/4096.txt; git status --porcelain; git diff --stat; git diff | sha1sum",
    "git stash -q; git status --porcelain; git stash list",
    "git stash pop -q; git status --porcelain",
    "git checkout -q -- sizes/4096.txt; git status --porcelain",
    "echo edited >> 'with space.txt'; git commit -qam 'One edited'; git log -1 --stat --format=%H",
    "chmod +x README.md; git status --porcelain; git diff; git reset -q --hard; git status --porcelain",
    "rm src/main.c; git status --porcelain; git restore src/main.c; cat src/main.c",
    // Names.
    "git mv many/file-0007.txt many/moved.txt; git status --porcelain; git commit -qm Moved",
    "mv deep elsewhere; git add -A; git status --porcelain; git commit -qm 'A directory moved'",
    "git rm -q sizes/513.txt; git commit -qm Removed; git show --stat --format=%H",
    "echo new > 'new file'; git add -A; git commit -qm Added; git status --porcelain",
    "touch ignored.o; git status --porcelain --ignored; rm ignored.o",
    // Branches.
    "git branch -q side HEAD~2; git switch -q side; git status --porcelain; git ls-files | sha1sum",
    "echo side > side.txt; git add side.txt; git commit -qm Side; git log -3 --format=%H",
    "git switch -q main; git merge -q --no-edit side; git log -1 --format='%H %P'",
    "git fetch -q origin topic:topic; git switch -q topic; git status --porcelain; git log -2 --format=%H",
    "git diff --stat main | tail -3",
    "git switch -q main; git status --porcelain",
    "git merge -q --no-edit topic; git status --porcelain; git log -1 --format='%H %P'; git diff --stat HEAD~1",
    "git reset -q --hard HEAD~1; git status --porcelain",
    "git switch -q -c rebased topic; echo r > rebased.txt; git add .; git commit -qm Rebased; git rebase -q main; git log -4 --format=%H",
    "git switch -q main; git cherry-pick rebased >/dev/null; git log -1 --format=%H; git status --porcelain",
    "git format-patch -1 --stdout > ../$NAME.patch; git reset -q --hard HEAD~1; git am -q ../$NAME.patch; git log -1 --format=%s",
    "git revert --no-edit HEAD >/dev/null; git log -1 --format='%s'; git status --porcelain",
    "git tag -a -m tagged v1; git describe",
    // Other places.
    "git push -q origin main:pushed 2>&1; git ls-remote origin refs/heads/pushed | cut -f1",
    "git fetch -q; git pull -q --ff-only origin main 2>&1; git status --porcelain -b | head -1",
    "git worktree add -q ../$NAME-worktree topic; git -C ../$NAME-worktree status --porcelain; ls ../$NAME-worktree | sha1sum",
    "git worktree remove ../$NAME-worktree; git worktree prune",
    "git archive HEAD | sha1sum",
    "git bundle create -q ../$NAME.bundle HEAD~1..HEAD; git bundle verify -q ../$NAME.bundle",
    "git checkout -q HEAD~3 -- src; git status --porcelain; git reset -q --hard",
    "git update-index --really-refresh; git status --porcelain",
    "git checkout -q -f HEAD; git status --porcelain",
    // Upkeep.
    "git fsck --connectivity-only --no-dangling --no-progress 2>&1",
    "git gc -q 2>&1; git status --porcelain; git log -3 --format=%H",
    "git -c gc.pruneExpire=now gc -q 2>&1; git fsck --connectivity-only --no-dangling --no-progress 2>&1",
    "git repack -qad; git status --porcelain; cat src/main.c",
];

fn run(world: &World, directory: &Path, name: &str, line: &str) -> Result<(i32, String)> {
    let run = Run::shell(&format!("set +e; {line}"), &[])
        .current_dir(directory)
        .env("HOME", world.path("home"))
        .env("NAME", name)
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_EDITOR", "true")
        .env("GIT_PAGER", "cat")
        .env("GIT_AUTHOR_DATE", "1750000000 +0000")
        .env("GIT_COMMITTER_DATE", "1750000000 +0000")
        .time_out(Duration::from_secs(120));
    let output = run.output()?;
    let text = format!("{}{}", output.text(), String::from_utf8_lossy(&output.stderr));
    Ok((output.code(), text.replace(name, "NAME")))
}

/// Each of [`COMMANDS`] says the same, with the same exit code, in a lazy tree and in a plain clone of
/// equal bare origins; at the end the trees are the same.
#[test]
#[ignore = "needs root"]
fn root_same_as_in_a_plain_clone() -> Result<()> {
    let world = World::new("git-commands")?;
    let repository = odd(OddOptions::default())?;
    for name in ["plain", "lazy"] {
        world.server.add(&repository, name, Offers::default())?;
    }
    let plain = world.clone_plain("plain", "plain", &[])?;
    let lazy = world.clone_lazy("lazy", "lazy", &["--history=full"])?;
    let mut differences = Vec::new();
    for line in COMMANDS {
        let expected = run(&world, &plain, "plain", line)?;
        let got = run(&world, &lazy, "lazy", line)?;
        if expected != got {
            differences.push(format!("$ {line}\nplain: {expected:?}\nlazy:  {got:?}\n"));
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    tree::same(&plain, &lazy)
}

/// `git commit` of one edited file fetches 0 blobs but that file's.
#[test]
#[ignore = "needs root"]
fn root_commit_fetches_only_the_edited_file() -> Result<()> {
    let world = World::new("git-commit")?;
    let repository = u_boot_shape(100)?;
    let tree = world.quick(&repository)?;
    let blobs = repository.blobs(MAIN)?;
    let (id, path) = blobs.iter().find(|(_, path)| path.ends_with(b".c")).context("no C file")?;
    let script = r#"echo edited >> "$1""#;
    let path = String::from_utf8_lossy(path).into_owned();
    Run::shell(script, &[Path::new(&path)]).current_dir(&tree).check()?;
    let committed = world.git(&tree, &["commit", "-am", "Edited"]).check()?;
    let fetched = world.fetched_blobs(&repository, &[MAIN])?;
    ensure!(fetched.iter().all(|other| other == id), "fetched {fetched:?} for {id}");
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.stdout.is_empty());
    println!("git commit: {:?}, {} blobs fetched", committed.elapsed, fetched.len());
    Ok(())
}

/// `git switch` to a branch that differs in k files fetches those k, and back what they were.
#[test]
#[ignore = "needs root"]
fn root_switch_fetches_what_differs() -> Result<()> {
    let world = World::new("git-switch")?;
    let repository = u_boot_shape(100)?;
    let tree = world.quick(&repository)?;
    let fetch = ["fetch", "-q", "--depth=1", "origin", "topic:topic"];
    world.git(&tree, &fetch).check()?;
    let ids = |revision| -> Result<BTreeSet<String>> {
        Ok(repository.blobs(revision)?.into_iter().map(|(id, _)| id).collect())
    };
    let (main, topic) = (ids(MAIN)?, ids(TOPIC)?);
    let differ: BTreeSet<String> = topic.difference(&main).cloned().collect();
    ensure!(world.fetched_blobs(&repository, &[MAIN, TOPIC])?.is_empty(), "fetch fetched blobs");
    world.git(&tree, &["switch", "-q", TOPIC]).check()?;
    let fetched = world.fetched_blobs(&repository, &[MAIN, TOPIC])?;
    let fetched: BTreeSet<String> = fetched.into_iter().collect();
    ensure!(
        fetched == differ,
        "{} fetched, {} differ; {} too many",
        fetched.len(),
        differ.len(),
        fetched.difference(&differ).count()
    );
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.stdout.is_empty());
    let plain = world.clone_plain("repo", "plain", &["-b", TOPIC])?;
    tree::same_metadata(&plain, &tree)?;
    world.git(&tree, &["switch", "-q", MAIN]).check()?;
    let back = world.fetched_blobs(&repository, &[MAIN])?;
    let back: BTreeSet<String> = back.into_iter().collect();
    let changed: BTreeSet<String> = main.difference(&topic).cloned().collect();
    ensure!(
        back == changed,
        "{} fetched to switch back, {} differ; {} too many",
        back.len(),
        changed.len(),
        back.difference(&changed).count()
    );
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.stdout.is_empty());
    Ok(())
}

/// Commands that look at the tree but not into files read no content: `git status` also in the second
/// in which the tree was made, after `chown -R` to the same owner, after unmount and mount.
#[test]
#[ignore = "needs root"]
fn root_looking_fetches_nothing() -> Result<()> {
    let world = World::new("git-status")?;
    let repository = u_boot_shape(100)?;
    let tree = world.quick(&repository)?;
    for arguments in [
        &["status", "--porcelain"][..],
        &["diff"],
        &["ls-files", "-m"],
        &["diff-index", "HEAD"],
        &["describe", "--always", "--dirty"],
        &["update-index", "--really-refresh"],
        &["add", "-A"],
        &["reset", "-q", "--hard"],
        &["checkout", "-q", "-f", "HEAD"],
        &["stash", "-q"],
        &["clean", "-nd"],
        &["fsck", "--connectivity-only", "--no-dangling", "--no-progress"],
        &["write-tree"],
    ] {
        world.git(&tree, arguments).check()?;
        let fetched = world.fetched_blobs(&repository, &[MAIN])?;
        ensure!(fetched.is_empty(), "git {arguments:?} fetched {} blobs", fetched.len());
    }
    let path = tree.to_string_lossy().into_owned();
    world.daemon.check(&["umount", &path])?;
    world.daemon.mount_again(&tree)?;
    let status = world.git(&tree, &["status", "--porcelain"]).check()?;
    ensure!(status.stdout.is_empty(), "after unmount and mount:\n{}", status.text());
    let fetched = world.fetched_blobs(&repository, &[MAIN])?;
    ensure!(fetched.is_empty(), "after unmount and mount: {} blobs", fetched.len());
    Run::shell(r#"chown -R 0:0 "$1""#, &[&tree]).check()?;
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.stdout.is_empty());
    ensure!(world.fetched_blobs(&repository, &[MAIN])?.is_empty(), "after chown -R");
    Ok(())
}

/// So far away that a fetch takes seconds, and one can look before it is done.
const FAR: Quality = Quality {
    delay: Duration::from_millis(300),
    bytes_per_second: None,
    shared_bytes_per_second: None,
};

/// The commits of `HEAD`.
const LOG: [&str; 2] = ["log", "--format=%H %s"];

/// Waits for the history, and looks whether `git log` is as in a plain clone.
fn has_history(world: &World, repository: &Repository, tree: &Path) -> Result<()> {
    hydrant_tests::process::until("the history is complete", Duration::from_secs(60), || {
        let mount = world.daemon.mount_of(tree).ok()?;
        (mount.history == "complete").then_some(())
    })
    .with_context(|| world.daemon.log_tail(30))?;
    let expected = repository.git(&[&LOG[..], &[MAIN]].concat())?;
    let got = world.git(tree, &LOG).check()?;
    ensure!(got.stdout == expected, "{}: {}", tree.display(), got.text());
    let branches = world.git(tree, &["branch", "-r"]).check()?.text();
    ensure!(branches.contains(&format!("origin/{MAIN}")), "{branches}");
    let fsck = ["fsck", "--connectivity-only", "--no-dangling", "--no-progress"];
    world.git(tree, &fsck).check()?;
    Ok(())
}

/// The history that comes in the background is all there in the end, also for who has looked at what was
/// there before. A read-only tree has what it was cloned with.
#[test]
#[ignore = "needs root"]
fn root_history_in_the_background() -> Result<()> {
    let world = World::new("git-history")?;
    let repository = odd(OddOptions::default())?;
    world.serve(&repository, "repo")?;
    let proxy = Proxy::start(world.server.port(), FAR)?;
    let url = url_at(proxy.port(), "repo");
    let tree = world.path("tree");
    world.clone_url(&url, &tree, &[])?;
    world.git(&tree, &LOG).check()?;
    world.git(&tree, &["branch", "-r"]).check()?;
    world.git(&tree, &["status", "--porcelain"]).check()?;
    // as a rule it is still there
    let shallow = tree.join(".git/shallow");
    shallow.try_exists()?;
    has_history(&world, &repository, &tree)?;
    ensure!(!shallow.exists(), "git has removed it");

    let read_only = world.path("read-only");
    world.clone_url(&url, &read_only, &["--read-only"])?;
    let history = world.daemon.mount_of(&read_only)?.history;
    ensure!(history == "shallow", "{history}");
    world.git(&read_only, &LOG).check()?;
    Ok(())
}

/// A fetch of history ends with its mount and with the daemon, leaves nothing behind, and goes on.
#[test]
#[ignore = "needs root"]
fn root_history_goes_on() -> Result<()> {
    let mut world = World::new("git-history-on")?;
    let repository = odd(OddOptions::default())?;
    world.serve(&repository, "repo")?;
    let proxy = Proxy::start(world.server.port(), FAR)?;
    let tree = world.path("tree");
    world.clone_url(&url_at(proxy.port(), "repo"), &tree, &[])?;
    let path = tree.to_string_lossy().into_owned();
    for _ in 0..2 {
        world.daemon.check(&["umount", &path])?;
        world.daemon.mount_again(&tree)?;
    }
    world.daemon.stop()?;
    world.daemon.start()?;
    world.daemon.kill_supervisor()?;
    world.daemon.kill();
    world.daemon.start()?;
    has_history(&world, &repository, &tree)?;
    Ok(())
}
