//! One daemon for a state directory, and one for a run directory.

use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use fs_err as fs;
use hydrant_api::Directories;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;

/// The directories' lock files (two names, so that one directory can be both).
const STATE_LOCK: &str = "state.lock";
const RUN_LOCK: &str = "hydrantd.lock";

/// How long to wait for what a killed daemon has left, and how often to look.
const TAKE_OVER_PATIENCE: Duration = Duration::from_secs(5);
const TAKE_OVER_STEP: Duration = Duration::from_millis(1);

/// The right to use a state and a run directory: flock(2) on a file in each, which the kernel lets
/// go when the process ends, however it ends. The fds are close-on-exec.
///
/// Whoever keeps a supervisor's groups for the next one keeps [a copy](Self::keep) of the state directory's lock too. So
/// nobody else can have the directory between two supervisors, while it is unmounted by none and served by none.
#[derive(Debug)]
pub struct InstanceLock {
    state: Option<Flock<File>>,
    /// Somebody has a copy of the state directory's lock, for whom it is not to be undone.
    is_kept: bool,
    run: Option<Flock<File>>,
}

/// Why the directories can't be had.
#[derive(Debug, Error)]
pub enum LockError {
    #[error("another hydrantd{} uses the directory {}", by(.pid), .directory.display())]
    Held { directory: PathBuf, pid: Option<i32> },
    #[error("can't lock the directory {}", .directory.display())]
    Io { directory: PathBuf, source: io::Error },
}

impl InstanceLock {
    /// As [`take`](Self::take), where the daemon before has been killed, whoever has its pid by now. `kept`: its lock of
    /// the state directory, if that was kept.
    pub fn take_over(
        directories: &Directories,
        kept: Option<BorrowedFd<'_>>,
    ) -> Result<Self, LockError> {
        Self::take_when_free(directories, kept, |_| true)
    }

    /// Makes the directories where they are missing (the state directory so that others can pass
    /// but not list it, the run directory readable) and takes both.
    ///
    /// Waits a little for a daemon that has ended: its last thread, or a child that it was about to
    /// start, may hold the locks for a moment longer.
    pub fn take(directories: &Directories) -> Result<Self, LockError> {
        Self::take_when_free(directories, None, |holder| holder.is_some_and(has_ended))
    }

    /// What is to be kept for the next supervisor: as long as it is open, the state directory is taken, whatever
    /// becomes of this.
    #[must_use]
    pub fn keep(&mut self) -> Option<BorrowedFd<'_>> {
        self.is_kept = true;
        self.state.as_ref().map(|state| state.as_fd())
    }

    /// Lets the directories go, also for whoever has a copy.
    pub fn release(mut self) {
        self.is_kept = false;
    }

    fn take_when_free(
        directories: &Directories,
        kept: Option<BorrowedFd<'_>>,
        is_left_over: impl Fn(Option<i32>) -> bool,
    ) -> Result<Self, LockError> {
        let end = Instant::now() + TAKE_OVER_PATIENCE;
        loop {
            match Self::try_take(directories, kept) {
                Err(LockError::Held { pid, .. }) if is_left_over(pid) && Instant::now() < end => {
                    thread::sleep(TAKE_OVER_STEP);
                }
                result => return result,
            }
        }
    }

    fn try_take(
        directories: &Directories,
        kept: Option<BorrowedFd<'_>>,
    ) -> Result<Self, LockError> {
        let is_kept = kept.is_some();
        let state = Some(take(&directories.state, STATE_LOCK, 0o711, kept)?);
        let mut lock = Self { state, is_kept, run: None };
        lock.run = Some(take(&directories.run, RUN_LOCK, 0o755, None)?);
        Ok(lock)
    }
}

impl Drop for InstanceLock {
    fn drop(&mut self) {
        if self.is_kept {
            // it would be unlocked for all who have it, and goes with the last of them
            std::mem::forget(self.state.take());
        }
    }
}

/// Whether a process is gone, or a zombie: its threads may be on their way out.
fn has_ended(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_or(true, |stat| stat.rsplit(')').next().unwrap_or_default().starts_with(" Z"))
}

/// Whether a daemon uses this state directory.
#[must_use]
pub fn is_state_locked(state: &Path) -> bool {
    let Ok(file) = fs::File::open(state.join(STATE_LOCK)) else { return false };
    let lock = Flock::lock(file.into_parts().0, FlockArg::LockSharedNonblock);
    matches!(lock, Err((_, Errno::EWOULDBLOCK)))
}

fn take(
    directory: &Path,
    name: &str,
    mode: u32,
    kept: Option<BorrowedFd<'_>>,
) -> Result<Flock<File>, LockError> {
    let failed = |source| LockError::Io { directory: directory.to_owned(), source };
    let mut file = prepare(directory, name, mode).map_err(failed)?;
    if let Some(kept) = kept {
        let kept = File::from(kept.try_clone_to_owned().map_err(failed)?);
        let number = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino()));
        if number(&kept).map_err(failed)? == number(&file).map_err(failed)? {
            file = kept;
        }
    }
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            write_pid(&mut lock).map_err(failed)?;
            Ok(lock)
        }
        Err((mut file, Errno::EWOULDBLOCK)) => {
            Err(LockError::Held { directory: directory.to_owned(), pid: read_pid(&mut file) })
        }
        Err((_, errno)) => Err(failed(errno.into())),
    }
}

/// Makes the directory if need be and opens the lock file.
fn prepare(directory: &Path, name: &str, mode: u32) -> io::Result<File> {
    if !directory.exists() {
        fs::create_dir_all(directory)?;
        fs::set_permissions(directory, Permissions::from_mode(mode))?;
    }
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    Ok(options.open(directory.join(name))?.into_file())
}

/// The pid is only there to be shown; the lock is what counts.
fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

fn read_pid(file: &mut File) -> Option<i32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn by(pid: &Option<i32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directories(root: &Path, state: &str, run: &str) -> Directories {
        Directories { state: root.join(state), run: root.join(run) }
    }

    #[test]
    fn neither_directory_is_shared() {
        let root = tempfile::tempdir().unwrap();
        let first = InstanceLock::take(&directories(root.path(), "s", "r")).unwrap();
        for (state, run, shared) in [("s", "r2", "s"), ("s2", "r", "r")] {
            let error = InstanceLock::take(&directories(root.path(), state, run)).unwrap_err();
            let text = error.to_string();
            let LockError::Held { directory, pid } = error else { panic!("{text}") };
            assert_eq!(directory, root.path().join(shared));
            assert_eq!(pid, Some(std::process::id() as i32));
            assert!(text.contains("another hydrantd (pid "), "{text}");
        }
        let _other = InstanceLock::take(&directories(root.path(), "s3", "r3")).unwrap();
        drop(first);
        InstanceLock::take(&directories(root.path(), "s", "r")).unwrap();
    }

    #[test]
    fn what_a_killed_daemon_has_left_is_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let place = directories(root.path(), "s", "r");
        let first = InstanceLock::take(&place).unwrap();
        let begin = Instant::now();
        let letting_go = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(first);
        });
        InstanceLock::take_over(&place, None).unwrap();
        assert!(begin.elapsed() >= Duration::from_millis(50));
        letting_go.join().unwrap();
    }

    #[test]
    fn a_daemon_that_has_ended_is_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let place = directories(root.path(), "s", "r");
        let first = InstanceLock::take(&place).unwrap();
        // no pid can be that high (PID_MAX_LIMIT, linux/threads.h)
        for name in ["s/state.lock", "r/hydrantd.lock"] {
            fs::write(root.path().join(name), "2000000000\n").unwrap();
        }
        let letting_go = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(first);
        });
        InstanceLock::take(&place).unwrap();
        letting_go.join().unwrap();
    }

    #[test]
    fn a_lock_that_is_kept_is_for_the_next_supervisor_alone() {
        let root = tempfile::tempdir().unwrap();
        let place = directories(root.path(), "s", "r");
        let mut lock = InstanceLock::take(&place).unwrap();
        let kept = lock.keep().unwrap().try_clone_to_owned().unwrap();
        drop(lock);
        assert!(is_state_locked(&place.state));
        assert!(matches!(InstanceLock::take(&place), Err(LockError::Held { .. })));
        // of another directory it is of no use
        let other = directories(root.path(), "s2", "r2");
        drop(InstanceLock::take_over(&other, Some(kept.as_fd())).unwrap());
        assert!(is_state_locked(&place.state));

        let next = InstanceLock::take_over(&place, Some(kept.as_fd())).unwrap();
        assert!(is_state_locked(&place.state));
        drop(next);
        assert!(is_state_locked(&place.state), "who keeps it still has it");

        // who has the run directory does not undo it either
        let other = InstanceLock::take(&directories(root.path(), "s3", "r")).unwrap();
        InstanceLock::take_over(&place, Some(kept.as_fd())).unwrap_err();
        assert!(is_state_locked(&place.state));
        drop(other);
        InstanceLock::take_over(&place, Some(kept.as_fd())).unwrap().release();
        assert!(!is_state_locked(&place.state));
    }

    #[test]
    fn one_directory_can_be_both() {
        let root = tempfile::tempdir().unwrap();
        InstanceLock::take(&directories(root.path(), "both", "both")).unwrap();
    }
}
