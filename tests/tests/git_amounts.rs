//! What stock git fetches in a lazy tree, counted at the server: of each command exactly the blobs of the files that it
//! touches, as far as they are not here already.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use hydrant_tests::process::Run;
use hydrant_tests::repository::{MAIN, Repository, TOPIC, page_path, pages};
use hydrant_tests::world::World;

/// A tree, and what of it has been fetched.
struct Counted<'a> {
    world: &'a World,
    repository: &'a Repository,
    tree: PathBuf,
    here: BTreeSet<String>,
}

impl<'a> Counted<'a> {
    fn new(world: &'a World, repository: &'a Repository, arguments: &[&str]) -> Result<Self> {
        world.serve(repository, "repo")?;
        let tree = world.clone_lazy("repo", "tree", arguments)?;
        let here = BTreeSet::new();
        let mut counted = Self { world, repository, tree, here };
        counted.here.extend(counted.fetched()?);
        ensure!(counted.here.is_empty(), "{} blobs came with the clone", counted.here.len());
        Ok(counted)
    }

    fn fetched(&self) -> Result<BTreeSet<String>> {
        let old = [1, 2, 3].map(|n| format!("{MAIN}~{n}"));
        let revisions = [&[MAIN, TOPIC][..], &old.each_ref().map(String::as_str)].concat();
        Ok(self.world.fetched_blobs(self.repository, &revisions)?.into_iter().collect())
    }

    /// The ids of these files in the main branch.
    fn ids(&self, files: impl IntoIterator<Item = usize>) -> Result<BTreeSet<String>> {
        let blobs = self.repository.blobs(MAIN)?;
        let id = |n: usize| {
            let path = page_path(n).into_bytes();
            let found = blobs.iter().find(|(_, other)| *other == path);
            found.map(|(id, _)| id.clone()).context("no such file")
        };
        files.into_iter().map(id).collect()
    }

    /// The ids on either side of what differs between two revisions of the origin.
    fn sides(&self, old: &str, new: &str) -> Result<[BTreeSet<String>; 2]> {
        let raw = self.repository.git(&["diff-tree", "-r", "--raw", "--no-abbrev", old, new])?;
        let raw = String::from_utf8(raw)?;
        let word = |n: usize| {
            raw.lines().filter_map(|line| Some(line.split(' ').nth(n)?.to_owned())).collect()
        };
        Ok([word(2), word(3)])
    }

    /// Runs shell lines in the tree: they fetch these blobs, but for those that are here, and no others.
    fn fetches(&mut self, script: &str, touched: BTreeSet<String>) -> Result<()> {
        let output = Run::shell(script, &[])
            .current_dir(&self.tree)
            .env("HOME", self.world.path("home"))
            .env("GIT_PAGER", "cat")
            .env("GIT_EDITOR", "true")
            .check()?;
        let fetched = self.fetched()?;
        let expected: BTreeSet<_> = touched.difference(&self.here).cloned().collect();
        ensure!(
            fetched == expected,
            "{script}: {} blobs fetched, {} of {} expected\n{}",
            fetched.len(),
            fetched.intersection(&expected).count(),
            expected.len(),
            output.text()
        );
        println!("{:3} blobs: {script}", fetched.len());
        self.here.extend(fetched);
        Ok(())
    }
}

/// Edits are made without reading what was there.
#[test]
#[ignore = "needs root"]
fn root_commands_fetch_what_they_touch() -> Result<()> {
    let world = World::new("amounts")?;
    let repository = pages()?;
    let mut tree = Counted::new(&world, &repository, &["--history=full"])?;
    let none = BTreeSet::new;

    tree.fetches("git status; git diff; git log --oneline", none())?;
    let one = tree.ids([110])?;
    tree.fetches("echo edited > d1/f10; git diff", one)?;
    let one = tree.ids([220])?;
    tree.fetches("echo edited > d2/f20; git commit -am 'One of many'", one)?;
    // neighbours, and files far apart
    let some: Vec<usize> = [301, 302, 303, 304, 305, 12, 99, 400, 555, 799].to_vec();
    let paths: Vec<String> = some.iter().map(|n| page_path(*n)).collect();
    let edit = format!("for f in {}; do echo edited > $f; done", paths.join(" "));
    let some = tree.ids(some)?;
    tree.fetches(&format!("{edit}; git commit -am 'Several of many'"), some)?;
    tree.fetches("git diff --stat HEAD~1; git show --stat; git log -p -2", none())?;
    let one = tree.ids([330])?;
    tree.fetches(
        "echo edited > d3/f30; git stash; git stash show -p; git stash pop; git checkout -- d3/f30",
        one,
    )?;
    // what they take away they put back
    let two = tree.ids([440, 441])?;
    tree.fetches("git mv d4/f40 d4/moved; git rm d4/f41; git status; git reset --hard", two)?;
    let one = tree.ids([450])?;
    tree.fetches(
        "echo edited >> d4/f50; git commit -am Pushed; git push origin HEAD:pushed 2>&1",
        one,
    )?;
    let one = tree.ids([660])?;
    tree.fetches(
        "git switch -c side HEAD~1; echo edited > d6/f60; git commit -am Side; git rebase main;
         git switch main; git merge --no-ff --no-edit side; git cherry-pick --no-commit HEAD^2;
         git reset --hard",
        one,
    )?;
    tree.fetches("git fetch; git gc -q; git fsck --connectivity-only --no-dangling 2>&1", none())?;

    // what is only in older revisions is fetched by git itself
    let [before, after] = tree.sides("main~2", "main~1")?;
    tree.fetches("git show origin/main~1", &before | &after)?;
    let [before, after] = tree.sides("main~1", "main")?;
    tree.fetches("git log -p -1 origin/main", &before | &after)
}

/// There and back: what differs, and that once.
#[test]
#[ignore = "needs root"]
fn root_switch_there_and_back() -> Result<()> {
    let world = World::new("amounts-switch")?;
    let repository = pages()?;
    let mut tree = Counted::new(&world, &repository, &["--history=none"])?;
    let none = BTreeSet::new;
    tree.fetches("git fetch --depth=1 origin topic:topic 2>&1", none())?;
    let [main, topic] = tree.sides(MAIN, TOPIC)?;
    ensure!((main.len(), topic.len()) == (20, 20));
    tree.fetches("git switch topic 2>&1; git status", topic)?;
    tree.fetches("git switch main 2>&1; git status", main)?;
    tree.fetches("git switch topic 2>&1; git diff --stat main; git switch main 2>&1", none())
}

/// The parts of an object come with it, and nothing of the next one: also after unmount and mount, in another tree
/// of the same origin, and with what was made before.
#[test]
#[ignore = "needs root"]
fn root_old_content_again() -> Result<()> {
    let world = World::new("amounts-again")?;
    let repository = pages()?;
    let mut tree = Counted::new(&world, &repository, &["--history=none"])?;
    let path = tree.tree.to_string_lossy().into_owned();
    let inodes = r#"find . -path ./.git/objects -prune -o -type f -printf '%i %p\n' | sha1sum"#;
    let before = Run::shell(inodes, &[]).current_dir(&tree.tree).check()?.text();
    world.daemon.check(&["umount", &path])?;
    world.daemon.mount_again(&tree.tree)?;
    let after = Run::shell(inodes, &[]).current_dir(&tree.tree).check()?.text();
    ensure!(before == after, "the inode numbers are others after a mount");
    let some = tree.ids([150, 151])?;
    tree.fetches(
        "git status --porcelain; git cat-file blob HEAD:d1/f50 >/dev/null;
         git cat-file blob HEAD:d1/f51 > /dev/null",
        some,
    )?;
    let other = world.clone_lazy("repo", "other", &["--history=none"])?;
    tree.tree = other;
    tree.fetches(
        "git cat-file blob HEAD:d1/f51 > /dev/null; cat d1/f50 >/dev/null",
        BTreeSet::new(),
    )?;
    let one = tree.ids([152])?;
    tree.fetches("git cat-file blob HEAD:d1/f52 > /dev/null; git status --porcelain", one)
}

/// Without more history there are still the parents of the last commit: what it changed is all that is looked at.
#[test]
#[ignore = "needs root"]
fn root_the_last_commit_has_parents() -> Result<()> {
    let repository = pages()?;
    let id = String::from_utf8(repository.git(&["rev-parse", MAIN])?)?.trim().to_owned();
    for (n, revision) in [&[][..], &["--rev", TOPIC], &["--rev", &id]].into_iter().enumerate() {
        let world = World::new(&format!("amounts-parents-{n}"))?;
        let arguments = [&["--history=none"], revision].concat();
        let mut tree = Counted::new(&world, &repository, &arguments)?;
        let last = if n == 1 { TOPIC } else { MAIN };
        let [before, after] = tree.sides(&format!("{last}~1"), last)?;
        tree.fetches("git log -1 --stat; git show", &before | &after)?;
        tree.fetches("git log --stat -1 --format=%H; git status", BTreeSet::new())?;
    }
    Ok(())
}

/// Another implementation of git, which has an own way of reading packs: libgit2, through the Debian package
/// python3-pygit2. It takes the index and the existence pack as they are.
#[test]
#[ignore = "needs root"]
fn root_libgit2() -> Result<()> {
    const SCRIPT: &str = r#"/usr/bin/python3 - "$@" <<'END'
import hashlib, sys
import pygit2
repository = pygit2.Repository(".")
assert repository.status() == {}, repository.status()
for path in sys.argv[1:]:
    blob = repository.revparse_single("HEAD:" + path)
    assert blob.size == 4096, blob.size
    content = b"blob 4096\0" + blob.data
    assert hashlib.sha1(content).hexdigest() == str(blob.id), path
END"#;
    let world = World::new("amounts-libgit2")?;
    let repository = pages()?;
    let mut tree = Counted::new(&world, &repository, &["--history=none"])?;
    tree.fetches(&SCRIPT.replace("\"$@\"", ""), BTreeSet::new())?;
    let some = tree.ids([110, 111, 560])?;
    let paths = [110, 111, 560].map(page_path).join(" ");
    tree.fetches(&SCRIPT.replace("\"$@\"", &paths), some)
}
