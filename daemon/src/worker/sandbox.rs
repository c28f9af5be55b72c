//! The sandbox of the processes that parse what comes from the network: worker and importer.
//!
//! [`enter`] gives up everything that these do not need: user, groups and capabilities, the file system
//! but for what name resolution and TLS read (`files`, by Landlock), and system calls
//! (`syscalls`, by seccomp). What they work on comes as open file descriptors.

mod files;
mod syscalls;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use nix::unistd::{Group, Uid, User};

use crate::sys::privileges::{self, PrivilegeError};

/// What is left of a process's rights.
#[derive(Debug, Clone)]
pub struct SandboxSpec<'a> {
    pub uid: u32,
    pub gid: u32,
    /// A directory in which files may be made, without a name too (`O_TMPFILE`), written and removed.
    pub spool_dir: Option<BorrowedFd<'a>>,
    /// Files and directories that may be read besides the usual ones, such as a CA bundle.
    pub readable: Vec<PathBuf>,
    /// A directory with files whose fanotify events are read here: the kernel opens each for reading
    /// and writing on our behalf, and asks Landlock whether we may. It doesn't ask for the permissions
    /// of the file, which are what keeps us from opening it ourselves.
    pub event_files: Option<BorrowedFd<'a>>,
    /// Go on where the kernel has no Landlock. The administrator's choice.
    pub without_landlock: bool,
}

/// Why the sandbox could not be entered. The process must end then: it is half in.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("the sandbox must be entered before there are threads, there are {0}")]
    Threads(usize),
    #[error("count the threads")]
    CountThreads(#[source] std::io::Error),
    #[error("give up privileges")]
    Privileges(#[from] PrivilegeError),
    #[error("restrict file access with Landlock")]
    Landlock(#[from] landlock::RulesetError),
    #[error("this kernel has no Landlock, or it is not switched on (lsm=landlock,...)")]
    NoLandlock,
    #[error("make the filter of system calls")]
    Filter(#[from] seccompiler::BackendError),
    #[error("filter system calls with seccomp")]
    Seccomp(#[from] seccompiler::Error),
}

/// Enters the sandbox, for good, as root, before any thread is started and before anything remote is
/// parsed. Afterwards a forbidden system call fails with `EPERM`; one that nothing of ours could mean
/// (exec, ptrace, mount, …) ends the process with `SIGSYS`.
pub fn enter(spec: &SandboxSpec<'_>) -> Result<(), SandboxError> {
    let threads = privileges::threads().map_err(SandboxError::CountThreads)?;
    if threads != 1 {
        return Err(SandboxError::Threads(threads));
    }
    // Opens what is allowed, some of which only root can reach.
    let ruleset = files::ruleset(spec)?;
    let filters = syscalls::filters()?;
    privileges::drop_all(spec.uid, spec.gid)?;
    let status = ruleset.restrict_self()?;
    if status.ruleset == landlock::RulesetStatus::NotEnforced && !spec.without_landlock {
        return Err(SandboxError::NoLandlock);
    }
    for filter in &filters {
        seccompiler::apply_filter_all_threads(filter)?;
    }
    Ok(())
}

/// The user for whom there are the sandboxed processes, if an administrator has made one.
const USER: &str = "hydrant";

/// Where Debian policy (9.2.2) and systemd keep out of each other's way and nobody logs in.
const UNUSED: std::ops::Range<u32> = 64_993..65_400;

/// User and group for the sandbox: those of the user `hydrant`, or else numbers that no user and no
/// group has. None if all are taken.
#[must_use]
pub fn unused_uid() -> Option<(u32, u32)> {
    if let Ok(Some(user)) = User::from_name(USER)
        && !user.uid.is_root()
    {
        return Some((user.uid.as_raw(), user.gid.as_raw()));
    }
    unused_id()
}

/// A number for a user and a group that no user and no group has.
#[must_use]
pub fn unused_id() -> Option<(u32, u32)> {
    UNUSED
        .into_iter()
        .find(|id| {
            matches!(User::from_uid(Uid::from_raw(*id)), Ok(None))
                && matches!(Group::from_gid((*id).into()), Ok(None))
        })
        .map(|id| (id, id))
}

#[cfg(test)]
mod tests;
