//! The directory that a tree is mounted on. It is only ever a mount point: nothing is put into it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use hydrant_api::Owner;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

use super::blocking;
use crate::admin::{ApiError, Caller};
use crate::sys::user::{self, User};

/// An empty directory of the user's, held open.
#[derive(Debug)]
pub struct Target {
    /// Without symbolic links.
    pub path: PathBuf,
    pub fd: OwnedFd,
    created: bool,
}

impl Target {
    /// Takes an existing empty directory, or makes one: with the caller's own rights, so that it can
    /// be nowhere where the caller could not have made it.
    pub async fn prepare(path: &Path, caller: &Caller, user: &User) -> Result<Self, ApiError> {
        let created = !exists(path).await?;
        if created {
            make(path, caller, user).await?;
        }
        let (path, caller) = (path.to_owned(), *caller);
        blocking(move || {
            let target = Self::open(canonical(&path)?, created)?;
            target.check(&caller)?;
            Ok(target)
        })
        .await
    }

    /// The same for a tree that comes back to its place.
    pub async fn existing(path: &Path, owner: Owner) -> Result<Self, ApiError> {
        let user = User::lookup(owner.uid, owner.gid).map_err(|e| cant(path, "be used", &e))?;
        let caller = Caller { uid: owner.uid, gid: owner.gid, pid: None };
        if !exists(path).await? {
            make(path, &caller, &user).await?;
        }
        let path = path.to_owned();
        blocking(move || {
            let target = Self::open(path, false)?;
            target.check(&caller)?;
            Ok(target)
        })
        .await
    }

    fn open(path: PathBuf, created: bool) -> Result<Self, ApiError> {
        let fd = open_directory(&path).map_err(|error| cant(&path, "be opened", &error))?;
        Ok(Self { path, fd, created })
    }

    fn check(&self, caller: &Caller) -> Result<(), ApiError> {
        let path = self.path.display();
        let metadata = std::fs::File::from(
            self.fd.try_clone().map_err(|error| cant(&self.path, "be opened", &error))?,
        )
        .metadata()
        .map_err(|error| cant(&self.path, "be looked at", &error))?;
        if !caller.is_root() && metadata.uid() != caller.uid {
            return Err(ApiError::forbidden(format!("{path} belongs to another user"))
                .with_hint("clone into a directory of your own"));
        }
        let mut entries =
            std::fs::read_dir(&self.path).map_err(|error| cant(&self.path, "be listed", &error))?;
        if entries.next().is_some() {
            return Err(ApiError::conflict(format!("{path} is not empty")).with_hint(
                "a tree is only mounted on an empty directory; name another, or none to be made",
            ));
        }
        Ok(())
    }

    /// Removes the directory if it was made for this.
    pub fn undo(self) {
        if self.created {
            // it is empty, or it is not ours to remove
            std::fs::remove_dir(&self.path).ok();
        }
    }
}

/// Without symbolic links.
pub(super) fn canonical(path: &Path) -> Result<PathBuf, ApiError> {
    std::fs::canonicalize(path).map_err(|error| cant(path, "be used", &error))
}

async fn exists(path: &Path) -> Result<bool, ApiError> {
    let path = path.to_owned();
    blocking(move || match std::fs::symlink_metadata(&path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(cant(&path, "be used", &error)),
    })
    .await
}

/// Opens a directory by a path that was made canonical: a link that turns up now is somebody's trick.
pub(super) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(nix::fcntl::AT_FDCWD, path, how)?)
}

/// As the user if the user can: a path through their directories may lead elsewhere at any time.
async fn make(path: &Path, caller: &Caller, user: &User) -> Result<(), ApiError> {
    let made = if user.uid == 0 { Ok(false) } else { make_as(path, user).await.map(|()| true) };
    match made {
        Ok(true) => Ok(()),
        Err(error) if !caller.is_root() => Err(error),
        Ok(false) | Err(_) => {
            std::fs::create_dir_all(path).map_err(|error| cant(path, "be made", &error))?;
            std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid))
                .map_err(|error| cant(path, "be given to its owner", &error))
        }
    }
}

async fn make_as(path: &Path, user: &User) -> Result<(), ApiError> {
    let root = std::fs::File::open("/").map_err(|error| cant(path, "be made", &error))?;
    let output = user::command("mkdir", user, &[], root.into())
        .map_err(|error| cant(path, "be made", &error))?
        .args(["-p", "--"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(|error| cant(path, "be made", &error))?;
    if output.status.success() {
        return Ok(());
    }
    Err(ApiError::forbidden(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

fn cant(path: &Path, what: &str, error: &io::Error) -> ApiError {
    ApiError::invalid(format!("{} can't {what}: {error}", path.display()))
}
