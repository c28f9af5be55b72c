//! The rest of a tree's history, fetched in the background by git.
//!
//! git runs in the tree, not in `upper`: overlayfs need not notice what is changed below it ("Changes to
//! underlying filesystems" in Documentation/filesystems/overlayfs.rst), and users would go on to see a shallow
//! repository. So it has to be stopped before the tree is unmounted. A read-only tree keeps the history that it has.
//!
//! When all commits are there git removes `.git/shallow`. A file system may remember that over a power cut
//! and have forgotten the pack. So a copy is kept until everything is durable, and put back at the next start.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::fchown;
use std::path::Path;
use std::time::Duration;

use hydrant_api::ErrorCode;
use nix::errno::Errno;
use nix::fcntl::{OFlag, renameat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::{error, warn};

use super::clone::beneath;
use super::durable::{self, Synced};
use super::git::{Fetched, Git, GitError};
use super::mounts::find;
use super::{Supervisor, lock};
use crate::admin::ApiError;
use crate::catalog::Mount;
use crate::ids::MountId;

/// In the catalog: goes on at the next start.
pub const FETCHING: &str = "fetching";
const COMPLETE: &str = "complete";
const FAILED: &str = "failed";

/// Names in `.git`, and of the copy in a mount's directory.
const SHALLOW: &str = "shallow";
const SHALLOW_LOCK: &str = "shallow.lock";

/// In bytes. A line is 41 or 65 bytes long, and there is one for each branch at most.
const MAX_SHALLOW: u64 = 64 << 20;

/// How long to wait before each further attempt: the origin may be away, or git in the tree be busy.
const PAUSES: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(30)];

/// What goes on at the moment.
pub type Fetches = HashMap<MountId, Fetch>;

/// Ends when this is dropped.
#[derive(Debug)]
pub struct Fetch {
    git: Git,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// Why there is not all of the history.
#[derive(Debug, thiserror::Error)]
enum HistoryError {
    #[error(transparent)]
    Git(#[from] GitError),
    #[error("it is not mounted")]
    NotMounted,
    #[error("{what}")]
    Io { what: &'static str, source: io::Error },
}

/// Whether the history of a tree is to be fetched.
#[must_use]
pub fn is_wanted(mount: &Mount) -> bool {
    !mount.read_only && (mount.history == FETCHING || mount.history.starts_with(FAILED))
}

impl Supervisor {
    /// Fetches the rest of the history of a tree that is mounted, unless that goes on already.
    pub(super) fn fetch_history(&self, mount: MountId, git: Git) {
        let mut fetches = lock(&self.histories);
        if fetches.get(&mount).is_some_and(|fetch| !fetch.task.is_finished()) {
            return;
        }
        let (stop, mut stopped) = oneshot::channel();
        let again = git.clone();
        let catalog = self.catalog.clone();
        let directory = self.store.mount_dir(mount);
        let task = tokio::spawn(async move {
            let state = match persist(&directory, git, &mut stopped).await {
                Ok(Fetched::All) => COMPLETE.to_owned(),
                Ok(Fetched::Stopped) => return,
                Err(error) => {
                    let reason = ApiError::from_error(ErrorCode::Origin, &error).message;
                    warn!(%mount, reason, "can't fetch the history");
                    format!("{FAILED}: {reason}")
                }
            };
            if let Err(error) = catalog.set_history(mount, state).await {
                error!(%mount, %error, "can't note the state of the history");
            }
        });
        fetches.insert(mount, Fetch { git: again, stop, task });
    }

    /// Ends the fetch of a tree's history, which goes on when the tree is mounted again. Gives what it needs to
    /// go on before that.
    pub(super) async fn stop_history(&self, mount: MountId) -> Option<Git> {
        let Fetch { git, stop, task } = lock(&self.histories).remove(&mount)?;
        let has_ended = task.is_finished();
        drop(stop);
        task.await.ok();
        (!has_ended).then_some(git)
    }

    /// Waits until the history of a tree is there, or can't be had.
    pub(super) async fn finish_history(&self, mount: MountId) {
        let fetch = lock(&self.histories).remove(&mount);
        if let Some(Fetch { task, stop: _stop, .. }) = fetch {
            task.await.ok();
        }
    }

    /// Ends all of them.
    pub(super) async fn stop_histories(&self) {
        let mounts: Vec<_> = lock(&self.histories).keys().copied().collect();
        for mount in mounts {
            self.stop_history(mount).await;
        }
    }
}

/// Tries more than once.
async fn persist(
    directory: &Path,
    git: Git,
    stopped: &mut oneshot::Receiver<()>,
) -> Result<Fetched, HistoryError> {
    for pause in PAUSES {
        match fetch(directory, git.clone(), stopped).await {
            Err(HistoryError::Git(error)) => warn!(%error, "can't fetch the history yet"),
            end => return end,
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = &mut *stopped => return Ok(Fetched::Stopped),
        }
    }
    fetch(directory, git, stopped).await
}

/// `directory`: of the mount. `git` is in its `upper`.
async fn fetch(
    directory: &Path,
    git: Git,
    stopped: &mut oneshot::Receiver<()>,
) -> Result<Fetched, HistoryError> {
    let (copy, upper) = (directory.join(SHALLOW), git.directory.clone());
    let begin = tokio::task::spawn_blocking(move || {
        let kept = keep_copy(&upper, &copy);
        kept.map_err(|source| HistoryError::Io { what: "can't copy .git/shallow", source })?;
        find(&upper).ok_or(HistoryError::NotMounted)
    });
    let tree = joined(begin).await?;
    let upper = git.directory.clone();
    let inside = Git { directory: tree, ..git };
    let fetched = inside.fetch_history(stopped).await?;
    if fetched == Fetched::All {
        let copy = directory.join(SHALLOW);
        let settle = tokio::task::spawn_blocking(move || {
            let settled = settle(&upper, &copy);
            settled.map_err(|source| HistoryError::Io { what: "can't make it durable", source })
        });
        joined(settle).await?;
    }
    Ok(fetched)
}

async fn joined<T>(task: JoinHandle<Result<T, HistoryError>>) -> Result<T, HistoryError> {
    let failed = |error| HistoryError::Io { what: "a task ended", source: io::Error::other(error) };
    task.await.map_err(failed)?
}

/// The tree's `.git`, which is its owner's.
fn git_directory(upper: &Path) -> io::Result<OwnedFd> {
    beneath(File::open(upper)?, ".git", OFlag::O_DIRECTORY)
}

/// Copies `.git/shallow`, durably, unless there is a copy.
fn keep_copy(upper: &Path, copy: &Path) -> io::Result<()> {
    if copy.try_exists()? {
        return Ok(());
    }
    let git = git_directory(upper)?;
    let shallow = match beneath(&git, SHALLOW, OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
        Ok(shallow) => File::from(shallow),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    if shallow.take(MAX_SHALLOW).read_to_end(&mut text)? as u64 == MAX_SHALLOW {
        return Err(io::Error::other("it is larger than any that git writes"));
    }
    write_durably(copy, &text)
}

fn write_durably(file: &Path, text: &[u8]) -> io::Result<()> {
    let part = file.with_extension("part");
    fs::write(&part, text)?;
    durable::sync(&part)?;
    fs::rename(&part, file)?;
    file.parent().map_or(Ok(()), durable::sync)
}

/// All that git has written is durable; the copy is of no use any more.
fn settle(upper: &Path, copy: &Path) -> io::Result<()> {
    Synced::default().sync_open(git_directory(upper)?.into())?;
    match fs::remove_file(copy) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => copy.parent().map_or(Ok(()), durable::sync),
    }
}

/// For a tree that is about to be mounted: puts `.git/shallow` back where the fetch of its history did not
/// come to its end, and removes the lock of a git that was killed. `directory`: of the mount.
pub fn restore(directory: &Path, upper: &Path) -> io::Result<()> {
    let copy = directory.join(SHALLOW);
    let git = git_directory(upper)?;
    match unlinkat(&git, SHALLOW_LOCK, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    let is_there = beneath(&git, SHALLOW, OFlag::O_PATH).is_ok();
    if is_there || !copy.try_exists()? {
        return Ok(());
    }
    let owner = nix::sys::stat::fstat(&git).map_err(io::Error::from)?;
    let again = directory.join("shallow.again");
    write_durably(&again, &fs::read(&copy)?)?;
    fchown(&File::open(&again)?, Some(owner.st_uid), Some(owner.st_gid))?;
    renameat(&File::open(directory)?, "shallow.again", &git, SHALLOW)?;
    File::from(git.as_fd().try_clone_to_owned()?).sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fetch_that_a_power_cut_ended_begins_anew() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let (upper, copy) = (directory.path().join("upper"), directory.path().join(SHALLOW));
        let git = upper.join(".git");
        fs::create_dir_all(&git).unwrap();
        keep_copy(&upper, &copy).unwrap();
        assert!(!copy.exists(), "it is not shallow");
        restore(directory.path(), &upper).unwrap();

        fs::write(git.join(SHALLOW), "a commit\n").unwrap();
        keep_copy(&upper, &copy).unwrap();
        fs::write(git.join(SHALLOW), "another\n").unwrap();
        keep_copy(&upper, &copy).unwrap();
        restore(directory.path(), &upper).unwrap();
        assert_eq!(fs::read_to_string(git.join(SHALLOW)).unwrap(), "another\n");

        fs::remove_file(git.join(SHALLOW)).unwrap();
        fs::write(git.join(SHALLOW_LOCK), "").unwrap();
        restore(directory.path(), &upper).unwrap();
        assert_eq!(fs::read_to_string(git.join(SHALLOW)).unwrap(), "a commit\n");
        assert!(!git.join(SHALLOW_LOCK).exists());

        fs::remove_file(git.join(SHALLOW)).unwrap();
        settle(&upper, &copy).unwrap();
        restore(directory.path(), &upper).unwrap();
        assert!(!git.join(SHALLOW).exists(), "all is there");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn links_are_not_followed() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let (upper, copy) = (directory.path().join("upper"), directory.path().join(SHALLOW));
        fs::create_dir_all(upper.join(".git")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", upper.join(".git").join(SHALLOW)).unwrap();
        assert!(keep_copy(&upper, &copy).is_err());
        assert!(!copy.exists());
    }
}
