//! What else git can do with a tree: submodules, sparse checkouts, filters, other owners, other names of
//! an origin.

use std::path::Path;

use anyhow::{Result, ensure};
use hydrant_tests::process::Run;
use hydrant_tests::repository::{MAIN, Repository, lonely, lonely_path};
use hydrant_tests::tree;
use hydrant_tests::world::World;

fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

/// A copy of [`lonely`] with one more commit, made by these shell lines in a work tree of it.
fn with_commit(world: &World, script: &str) -> Result<Repository> {
    let work = world.path("work");
    lonely(12, 3000)?.copy_to(&world.path("origin.git"))?;
    world.git(world.scratch.path(), &["clone", "-q", "origin.git", "work"]).check()?;
    let run = Run::shell("set -e; cd \"$1\"; eval \"$2\"", &[&work, Path::new(script)]);
    run.env("HOME", world.path("home")).check()?;
    world.git(&work, &["add", "-A"]).check()?;
    world.git(&work, &["commit", "-q", "-m", "more"]).check()?;
    world.git(&work, &["push", "-q", "origin", &format!("HEAD:{MAIN}")]).check()?;
    Ok(Repository::at(&world.path("origin.git")))
}

/// `git submodule update --init` fills a submodule as in a plain clone.
#[test]
#[ignore = "needs root"]
fn root_a_submodule() -> Result<()> {
    let world = World::new("git-submodule")?;
    let inner = world.serve(&lonely(3, 500)?, "inner")?;
    let script = format!("git submodule --quiet add {inner} sub");
    let repository = with_commit(&world, &script)?;
    world.serve(&repository, "repo")?;
    let tree = world.clone_lazy("repo", "tree", &["--history=none"])?;
    let plain = world.clone_plain("repo", "plain", &["--recurse-submodules"])?;
    ensure!(fs_err::read_dir(tree.join("sub"))?.next().is_none(), "it is empty at first");
    world.git(&tree, &["submodule", "update", "--init", "--quiet"]).check()?;
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.stdout.is_empty());
    let status = ["submodule", "status"];
    let (ours, theirs) = (world.git(&tree, &status).check()?, world.git(&plain, &status).check()?);
    ensure!(ours.text() == theirs.text(), "{} {}", ours.text(), theirs.text());
    tree::same(&plain, &tree)?;
    Ok(())
}

/// A sparse checkout takes files away and brings them back; what stays is not fetched for that.
#[test]
#[ignore = "needs root"]
fn root_a_sparse_checkout() -> Result<()> {
    let world = World::new("git-sparse")?;
    let repository = lonely(12, 3000)?;
    let tree = world.quick(&repository)?;
    world.git(&tree, &["sparse-checkout", "set", "dir-0001", "dir-0002"]).check()?;
    ensure!(tree.join(lonely_path(1)).exists() && !tree.join(lonely_path(3)).exists());
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.stdout.is_empty());
    ensure!(world.fetched_blobs(&repository, &[MAIN])?.is_empty(), "content was fetched");
    world.git(&tree, &["sparse-checkout", "disable"]).check()?;
    let plain = world.clone_plain("repo", "plain", &[])?;
    tree::same(&plain, &tree)?;
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.stdout.is_empty());
    Ok(())
}

/// A filter of the user's, as LFS is one: what it makes of a file is what is in the tree from the start.
#[test]
#[ignore = "needs root"]
fn root_a_filter() -> Result<()> {
    let world = World::new("git-filter")?;
    for (name, command) in [("smudge", "tr a-z A-Z"), ("clean", "tr A-Z a-z")] {
        let name = format!("filter.shout.{name}");
        world.git(&world.path("home"), &["config", "--global", &name, command]).check()?;
    }
    let script =
        "echo '*.shout filter=shout' > .gitattributes; echo hello > a.shout; echo b > b.txt";
    let repository = with_commit(&world, script)?;
    world.serve(&repository, "repo")?;
    let tree = world.clone_lazy("repo", "tree", &["--history=none"])?;
    ensure!(fs_err::read_to_string(tree.join("a.shout"))? == "HELLO\n");
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.stdout.is_empty());
    let stored = world.git(&tree, &["cat-file", "blob", "HEAD:a.shout"]).check()?.text();
    ensure!(stored == "hello", "{stored}");
    let plain = world.clone_plain("repo", "plain", &[])?;
    tree::same(&plain, &tree)?;
    Ok(())
}

/// `chown -R` to somebody else fetches nothing and is no change, for root and for the new owner.
#[test]
#[ignore = "needs root"]
fn root_another_owner() -> Result<()> {
    const OTHER: &str = "61873";
    let world = World::new("git-chown")?;
    let repository = lonely(12, 3000)?;
    let tree = world.quick(&repository)?;
    Run::program("chown", &["-R", &format!("{OTHER}:{OTHER}"), text(&tree)]).check()?;
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.stdout.is_empty());
    let script = r#"HOME="$2" exec setpriv --reuid="$3" --regid="$3" --clear-groups \
        git -C "$1" status --porcelain"#;
    let home = world.path("home");
    let status = Run::shell(script, &[&tree, &home, Path::new(OTHER)]).check()?;
    ensure!(status.stdout.is_empty(), "{}", status.text());
    ensure!(world.fetched_blobs(&repository, &[MAIN])?.is_empty(), "content was fetched");
    ensure!(fs_err::read(tree.join(lonely_path(5)))?.len() == 3000);
    Ok(())
}

/// Files of a commit that is dated in the future are not read to tell that they are as they were. One that is edited in
/// the second in which the index was written, and keeps its size, is seen as modified; so is one that is edited
/// again in the second in which it was added.
#[test]
#[ignore = "needs root"]
fn root_the_racy_second() -> Result<()> {
    let world = World::new("git-racy")?;
    let origin = world.path("origin.git");
    lonely(12, 3000)?.copy_to(&origin)?;
    let commit = ["commit-tree", "-m", "later", &format!("{MAIN}^{{tree}}")];
    let commit = world.git(&origin, &commit).env("GIT_COMMITTER_DATE", "4000000000 +0000");
    let commit = commit.check()?.text();
    world.git(&origin, &["update-ref", &format!("refs/heads/{MAIN}"), &commit]).check()?;
    let repository = Repository::at(&origin);
    let tree = world.quick(&repository)?;
    ensure!(world.git(&tree, &["status", "--porcelain"]).check()?.stdout.is_empty());
    ensure!(world.fetched_blobs(&repository, &[MAIN])?.is_empty(), "content was fetched");

    // all of it in the second of the index, whatever the clock says
    let script = r#"at=$(stat -c @%Y .git/index)
        write() { printf %3000s "" | tr " " "$1" > "$2"; touch -d "$at" "$2"; }
        write a "$1"; git status --porcelain
        git add "$1"; write b "$1"; touch -d "$at" .git/index; git status --porcelain
        git reset -q --hard; git status --porcelain"#;
    for n in 0..6 {
        let path = lonely_path(n);
        let run = Run::shell(script, &[Path::new(&path)]).current_dir(&tree);
        let said = run.env("HOME", world.path("home")).check()?.text();
        ensure!(said == format!(" M {path}\nMM {path}"), "{said}");
    }
    Ok(())
}

/// `du --apparent-size` tells what the files will have, and fetches nothing.
#[test]
#[ignore = "needs root"]
fn root_sizes_before_content() -> Result<()> {
    let world = World::new("git-sizes")?;
    let repository = lonely(12, 3000)?;
    let tree = world.quick(&repository)?;
    let script = r#"find "$1" -name .git -prune -o -type f -print0 |
        du --files0-from=- -c --apparent-size -B1 | tail -n 1"#;
    let said = Run::shell(script, &[&tree]).check()?.text();
    ensure!(said == "36000\ttotal", "{said}");
    ensure!(world.fetched_blobs(&repository, &[MAIN])?.is_empty(), "content was fetched");
    Ok(())
}

/// `url.<base>.insteadOf`: cloned, and later read, from where the user's configuration leads.
#[test]
#[ignore = "needs root"]
fn root_instead_of() -> Result<()> {
    let world = World::new("git-instead")?;
    let repository = lonely(12, 3000)?;
    let url = world.serve(&repository, "repo")?;
    let base = url.strip_suffix("repo.git").unwrap_or(&url);
    let name = format!("url.{base}.insteadOf");
    let home = world.path("home");
    world.git(&home, &["config", "--global", &name, "https://nowhere.invalid/"]).check()?;
    let tree = world.path("tree");
    world.clone_url("https://nowhere.invalid/repo.git", &tree, &["--history=none"])?;
    for n in [2, 7] {
        let truth = fs_err::read(world.truth(&repository, &lonely_path(n))?)?;
        ensure!(fs_err::read(tree.join(lonely_path(n)))? == truth);
    }
    let remote = world.git(&tree, &["config", "remote.origin.url"]).check()?.text();
    ensure!(remote == "https://nowhere.invalid/repo.git", "{remote}");
    Ok(())
}
