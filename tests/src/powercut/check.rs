//! What must hold after a cut.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use hydrant_api::Mount;

use super::book::{Figures, Report, There, Tree, UserFile};
use super::guest::{Guest, PATIENCE};
use super::origins::{branch, is_converted, may_be_edited, truth};
use crate::process::{Run, until};
use crate::repository::Random;
use crate::tree::entries;

/// The bytes of a user's file.
#[must_use]
pub fn content(file: &UserFile) -> Vec<u8> {
    Random::new(file.seed).bytes(file.len)
}

/// Looks at everything and reports what it finds.
pub(super) fn check(guest: &Guest) -> Result<()> {
    let log = guest.daemon.log_tail(1000);
    for line in log.lines().filter(|line| line.contains("ERROR")) {
        guest.finding(format!("hydrantd says: {line}"))?;
    }
    let mounts = guest.daemon.admin().mounts()?;
    let of = |tree: &Tree| {
        let directory = guest.tree(&tree.name);
        mounts.iter().find(|mount| Path::new(&mount.directory) == directory)
    };
    leftovers(guest, mounts.len())?;
    let mut figures = Figures::default();
    let mut present = Vec::new();
    let mut pools = HashSet::new();
    for tree in &guest.plan.trees {
        match (tree.there, of(tree)) {
            (There::Surely, None) => guest.finding(format!("{}: the tree is lost", tree.name))?,
            (There::No, Some(_)) => guest.finding(format!("{}: removed, and back", tree.name))?,
            (_, None) => {}
            (there, Some(mount)) => {
                if !mount.mounted {
                    if there == There::Surely {
                        guest.finding(format!("{}: not mounted", tree.name))?;
                    }
                    guest.hydrant(&["mount", &mount.directory])?;
                }
                if pools.insert(mount.pool) {
                    figures.present_bytes += mount.present_bytes;
                    figures.segment_bytes += mount.segment_bytes;
                    figures.complete_segments += mount.complete_segments;
                }
                figures.trees += 1;
                present.push(tree.name.clone());
                let same = one(guest, tree, mount, &mut figures);
                same.with_context(|| format!("tree {}", tree.name))?;
            }
        }
    }
    for mount in &mounts {
        if !guest
            .plan
            .trees
            .iter()
            .any(|tree| guest.tree(&tree.name) == Path::new(&mount.directory))
        {
            guest.finding(format!("{}: a tree that nobody made", mount.directory))?;
        }
    }
    guest.tell(&Report::Checked { figures, present })
}

/// Nothing of what was cut short is left.
fn leftovers(guest: &Guest, mounts: usize) -> Result<()> {
    let state = &guest.daemon.directories().state;
    for (directory, most) in [("mounts", mounts), ("trees", mounts), ("pools", mounts)] {
        let entries = fs_err::read_dir(state.join(directory))?;
        let mut names: Vec<PathBuf> =
            entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        // the image of a tree's existence pack
        names.retain(|name| !name.to_string_lossy().ends_with(".pack.erofs"));
        if names.len() > most {
            guest.finding(format!("{mounts} trees, and in {directory} {names:?}"))?;
        }
    }
    Ok(())
}

fn one(guest: &Guest, tree: &Tree, mount: &Mount, figures: &mut Figures) -> Result<()> {
    let place = guest.tree(&tree.name);
    let truth = truth(&guest.plan.origins, tree.origin, tree.revision);
    let wrong = |path: &Path, what: String| {
        guest.finding(format!("{}: {}: {what}", tree.name, path.display()))
    };
    let users: BTreeMap<&Path, &UserFile> =
        tree.files.iter().map(|file| (file.path.as_path(), file)).collect();
    // whatever a user has begun to write, or git to convert in a clone that was cut
    let unknown = |path: &Path| {
        (may_be_edited(path) && !users.contains_key(path)) || (is_converted(path) && !tree.whole)
    };
    let (is, should) = (entries(&place)?, entries(&truth)?);
    for (path, expected) in &should {
        let found = is.get(path);
        let same = found.is_some_and(|found| {
            let changed = unknown(path) || users.contains_key(path.as_path());
            (found.kind, &found.target) == (expected.kind, &expected.target)
                && (changed || (found.mode, found.size) == (expected.mode, expected.size))
        });
        if !same && (tree.whole || !is_converted(path)) {
            wrong(path, format!("is {found:?}, should be {expected:?}"))?;
            continue;
        }
        if expected.kind != "file" || unknown(path) || users.contains_key(path.as_path()) {
            continue;
        }
        let name = format!("{}: {}", tree.name, path.display());
        compare(guest, &place.join(path), &fs_err::read(truth.join(path))?, &name)?;
        figures.files += 1;
        figures.bytes += expected.size;
    }
    for path in is.keys().filter(|path| !should.contains_key(*path)) {
        if !path.starts_with("user") {
            wrong(path, "nobody made it".into())?;
        }
    }
    for (path, file) in &users {
        let name = format!("{}: {}: a user's", tree.name, path.display());
        compare(guest, &place.join(path), &content(file), &name)?;
        figures.user_files += 1;
        figures.bytes += file.len as u64;
    }
    git(guest, tree, mount, &wrong)
}

/// Reports where a file differs, and whether it looks like a hole.
fn compare(guest: &Guest, path: &Path, expected: &[u8], name: &str) -> Result<()> {
    let found = match fs_err::read(path) {
        Ok(found) => found,
        Err(error) => return guest.finding(format!("{name}: {error}")),
    };
    if found == expected {
        return Ok(());
    }
    let differ = found.iter().zip(expected).filter(|(a, b)| a != b).count();
    let zeros = found.iter().zip(expected).filter(|(a, b)| a != b && **a == 0).count();
    let lengths = (found.len(), expected.len());
    guest.wrong_bytes(format!(
        "{name}: {differ} bytes differ, {zeros} of them are zero; lengths {lengths:?}"
    ))
}

/// The repository is sound, and nothing has changed but what users change.
fn git(
    guest: &Guest,
    tree: &Tree,
    mount: &Mount,
    wrong: &impl Fn(&Path, String) -> Result<()>,
) -> Result<()> {
    let place = guest.tree(&tree.name);
    let git = |arguments: &[&str]| {
        let run = Run::program("git", arguments).current_dir(&place).time_out(PATIENCE);
        run.env("GIT_OPTIONAL_LOCKS", "0").output()
    };
    // git fsck takes what a fetch adds meanwhile for broken
    until("the history is fetched", PATIENCE, || {
        let mount = guest.daemon.mount_of(&place).ok()?;
        (mount.history != "fetching").then_some(())
    })?;
    let revision = branch(tree.revision);
    for arguments in [
        &["status", "--porcelain", "-z", "--untracked-files=all"][..],
        &["fsck", "--connectivity-only", "--no-dangling", "--no-progress"],
        &["rev-parse", "HEAD"],
    ] {
        let output = git(arguments)?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned() + &output.text();
            let status = output.status;
            wrong(Path::new(".git"), format!("git {arguments:?} in {revision}: {status}: {text}"))?;
            continue;
        }
        match arguments[0] {
            "status" => {
                let entries = output.stdout.split(|b| *b == 0).filter(|entry| entry.len() > 3);
                for entry in entries {
                    let path = Path::new(OsStr::from_bytes(&entry[3..]));
                    let expected = path.starts_with("user")
                        || may_be_edited(path)
                        || (is_converted(path) && !tree.whole);
                    if !expected {
                        let text = String::from_utf8_lossy(entry).into_owned();
                        wrong(path, format!("git status says {text}"))?;
                    }
                }
            }
            "rev-parse" if output.text() != mount.commit => {
                wrong(Path::new(".git"), format!("HEAD is {}", output.text()))?;
            }
            _ => {}
        }
    }
    Ok(())
}
