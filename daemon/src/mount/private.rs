//! A mount of the segments' directories that nobody else can reach.
//!
//! Our own accesses to marked files raise events too, and nobody would answer them: the daemon would
//! wait for itself. Through this mount, once the fanotify layer has put its ignore mark on it
//! (`FAN_MARK_MOUNT` with `FAN_MARK_IGNORE_SURV`), they do not.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use crate::sys::mount::{FsError, clone_directory, make_private};

/// A detached clone of the mount of a directory, with that directory as its root.
#[derive(Debug)]
pub struct PrivateMount {
    fd: OwnedFd,
    directory: PathBuf,
}

/// Why a directory could not be cloned.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    #[error("open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Clone(#[from] FsError),
}

/// Why a file of the directory could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("open {} privately", path.display())]
pub struct OpenError {
    path: PathBuf,
    #[source]
    pub source: io::Error,
}

impl PrivateMount {
    /// Clones `directory`. Mounts below it do not come along.
    pub fn new(directory: &Path) -> Result<Self, PrivateError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = open(directory, flags, Mode::empty());
        let opened = opened.map_err(|errno| PrivateError::Open {
            path: directory.to_owned(),
            source: errno.into(),
        })?;
        let fd = clone_directory(opened.as_fd())?;
        make_private(fd.as_fd())?;
        Ok(Self { fd, directory: directory.to_owned() })
    }

    /// Opens a file by its path relative to the directory: nothing above it, no symlinks. With
    /// `O_CREAT`, its mode is 0600. `O_CLOEXEC` is implied.
    pub fn open(&self, path: &Path, flags: OFlag) -> Result<OwnedFd, OpenError> {
        let mode = if flags.contains(OFlag::O_CREAT) || flags.contains(OFlag::O_TMPFILE) {
            0o600
        } else {
            0
        };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .mode(Mode::from_bits_retain(mode))
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        openat2(&self.fd, path, how)
            .map_err(|errno| OpenError { path: self.directory.join(path), source: errno.into() })
    }
}

impl AsFd for PrivateMount {
    /// The root of the mount.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
