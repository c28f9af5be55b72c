//! What is cloned: repositories with a few revisions each, and what their files hold.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::process::Run;
use crate::repository::{Change, Import, Random};

pub const ORIGINS: usize = 3;
pub const REVISIONS: usize = 3;
const FILES: usize = 90;

/// Where origin `n` is.
#[must_use]
pub fn origin(directory: &Path, origin: usize) -> PathBuf {
    directory.join(format!("origin-{origin}.git"))
}

/// The branch of a revision.
#[must_use]
pub fn branch(revision: usize) -> String {
    format!("rev-{revision}")
}

/// An ordinary checkout, without `.git`.
#[must_use]
pub fn truth(directory: &Path, origin: usize, revision: usize) -> PathBuf {
    directory.join(format!("truth-{origin}-{revision}"))
}

/// Users change only these.
#[must_use]
pub fn may_be_edited(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "edit")
}

/// Git itself writes these, at the end of a clone.
#[must_use]
pub fn is_converted(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "crlf")
}

/// Makes all of them.
pub fn make(directory: &Path, seed: u64) -> Result<()> {
    for number in 0..ORIGINS {
        let path = origin(directory, number);
        let mut init = Command::new("git");
        init.args(["init", "-q", "--bare", "-b", "rev-0"]).arg(&path);
        Run::new(init).check()?;
        let mut random = Random::new(seed ^ (number as u64) << 32);
        let mut import = Import::start(&path)?;
        let mut before = None;
        for revision in 0..REVISIONS {
            // each revision changes one file in three
            let mut changes = Vec::new();
            for file in (0..FILES).filter(|file| revision == 0 || file % 3 == revision) {
                let content = content(&mut random, file);
                let (path, mode) = name(file);
                let blob = import.blob(&content)?;
                changes.push(Change::File { path: path.into_bytes(), mode, blob });
            }
            if revision == 0 {
                let blob = import.blob(b"*.crlf text eol=crlf\n")?;
                changes.push(Change::file(".gitattributes", blob));
                let blob = import.blob(b"dir-0/file-0.bin")?;
                let path = b"dir-1/link".to_vec();
                changes.push(Change::File { path, mode: "120000", blob });
            }
            before = Some(import.commit(&branch(revision), before, &changes)?);
        }
        import.finish()?;
        Run::shell("git -C \"$1\" repack -qad", &[&path]).check()?;
        for revision in 0..REVISIONS {
            let truth = truth(directory, number, revision);
            let mut clone = Command::new("git");
            clone.args(["clone", "-q", "--no-local", "-b", &branch(revision)]);
            Run::new(clone_to(clone, &path, &truth)).check()?;
            fs_err::remove_dir_all(truth.join(".git"))?;
        }
    }
    Ok(())
}

fn clone_to(mut command: Command, from: &Path, to: &Path) -> Command {
    command.arg(from).arg(to);
    command
}

fn name(file: usize) -> (String, &'static str) {
    let directory = file / 10;
    match file % 10 {
        7 => (format!("dir-{directory}/file-{file}.crlf"), "100644"),
        8 | 9 => (format!("dir-{directory}/file-{file}.edit"), "100644"),
        5 => (format!("dir-{directory}/deep/er/file-{file}.sh"), "100755"),
        _ => (format!("dir-{directory}/file-{file}.bin"), "100644"),
    }
}

fn content(random: &mut Random, file: usize) -> Vec<u8> {
    if file % 10 == 7 {
        let lines = (0..20 + random.below(200)).map(|_| format!("{:x}\n", random.number()));
        return lines.collect::<String>().into_bytes();
    }
    let size = match random.below(12) {
        0 => 0,
        1 => 100_000 + random.below(500_000),
        2..5 => 4096 * (1 + random.below(8)),
        _ => 1 + random.below(20_000),
    };
    // never a zero byte: what was never written can't pass for it
    let mut bytes = random.bytes(size);
    bytes.iter_mut().filter(|byte| **byte == 0).for_each(|byte| *byte = 1);
    bytes
}
