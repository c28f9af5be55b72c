//! Layers that are not what the index says that they were pulled by.
//!
//! Whoever mounts the image itself goes on to see what the image says. A snapshot of containerd's stands for all images with
//! that layer: nobody is to read one from then on.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::fcntl::{OFlag, PosixFadviseAdvice, openat, posix_fadvise};
use nix::sys::stat::Mode;
use tracing::{error, warn};

use super::super::shard::Command;
use super::super::{Supervisor, lock};
use super::is_claim;
use crate::admin::ApiError;
use crate::catalog::Tree;
use crate::ids::SegmentId;
use crate::segment::SegmentKind;

/// That a layer is not what its image says, as an error.
pub(in super::super) fn refusal(tree: &Tree) -> Option<ApiError> {
    let why = tree.refuted.as_ref()?;
    let message = format!("the layer sha256:{} is not what its image says: {why}", tree.commit);
    let hint = match is_claim(tree) {
        true => "remove the image, and the SOCI index beside it: that may be damaged, or forged",
        false => "remove the image: it may be damaged, or forged",
    };
    Some(ApiError::conflict(message).with_hint(hint))
}

impl Supervisor {
    /// All of a layer is here, and it is not what its index says.
    pub(in super::super) async fn refute_layer(&self, segment: SegmentId, why: String) {
        // nobody mounts it for containerd meanwhile
        let _alone = self.layers.lock().await;
        let tree = match self.catalog.set_refuted(segment, why.clone()).await {
            Ok(tree) => tree,
            Err(error) => {
                error!(%segment, %error, "can't note that a layer is not what its image says");
                // nobody is to read it all the same; the next daemon finds it out again
                let trees = self.catalog.trees().await.unwrap_or_default();
                trees.into_iter().find(|tree| tree.segments.contains(&segment))
            }
        };
        let Some(tree) = tree else { return };
        error!(layer = %tree.commit, why, "a layer is not what its image says");
        if lock(&self.live).layers.contains_key(&tree.id) {
            self.close_layer(&tree).await;
        }
    }

    /// From now on, who reads the layer gets an error. It stays marked, and where it is.
    pub(in super::super) async fn close_layer(&self, tree: &Tree) {
        let pool = tree.pool;
        let closed = match self.shard(pool) {
            Ok(shard) => shard.ask(|reply| Command::Close { pool, reply }).await,
            Err(error) => {
                error!(%pool, %error, "can't take a layer out of service");
                None
            }
        };
        self.origins.remove(pool);
        self.forget_fills(&HashSet::from([pool]));
        // a reader who has been let through would read zeros: only where there is no other way
        let open = if closed == Some(true) { &[][..] } else { &tree.segments };
        for segment in open {
            if let Err(error) = self.store.punch(pool, *segment, SegmentKind::Data) {
                error!(%pool, %segment, %error, "can't take away what is in a layer");
            }
        }
        let at = self.store.layer_dir(tree.id);
        let forgotten = tokio::task::spawn_blocking(move || forget(&at)).await;
        if let Ok(Err(error)) | Err(error) = forgotten.map_err(io::Error::other) {
            warn!(%error, "what is in memory of a layer may still be read");
        }
        error!(layer = %tree.commit, "its readers get errors: remove its images from containerd, and pull them again");
    }
}

/// Has the kernel forget what it has in memory of the files below a directory, but for what is mapped. Gives how many files
/// that were.
///
/// The image says how deep it is, and how long its paths are. What fails does not keep it from the rest.
fn forget(directory: &Path) -> io::Result<usize> {
    let (mut files, mut failed) = (0, Ok(()));
    let mut at = OwnedFd::from(fs::File::open(directory)?);
    // the directories that are left, at each level down to this one
    let mut left = vec![forget_files(&at, &mut files, &mut failed)];
    while let Some(level) = left.last_mut() {
        if let Some(name) = level.pop() {
            match open_in(&at, &name, OFlag::O_DIRECTORY) {
                Ok(below) => {
                    at = below;
                    left.push(forget_files(&at, &mut files, &mut failed));
                }
                Err(error) => failed = failed.and(Err(error)),
            }
        } else {
            left.pop();
            if !left.is_empty() {
                at = open_in(&at, c"..", OFlag::O_DIRECTORY)?;
            }
        }
    }
    failed.map(|()| files)
}

fn open_in(directory: &OwnedFd, name: &CStr, flags: OFlag) -> io::Result<OwnedFd> {
    let flags = flags | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    Ok(openat(directory, name, flags, Mode::empty())?)
}

/// Does that for the files of one directory; gives the names of the directories in it.
fn forget_files(at: &OwnedFd, files: &mut usize, failed: &mut io::Result<()>) -> Vec<CString> {
    let mut directories = Vec::new();
    let mut note = |error: io::Error| {
        if failed.is_ok() {
            *failed = Err(error);
        }
    };
    let entries = at.try_clone().and_then(|at| Ok(Dir::from_fd(at)?));
    let mut entries = match entries {
        Ok(entries) => entries,
        Err(error) => {
            note(error);
            return directories;
        }
    };
    for entry in entries.iter() {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                note(error.into());
                break;
            }
        };
        let name = entry.file_name();
        match entry.file_type() {
            Some(Type::Directory) if name != c"." && name != c".." => directories.push(name.into()),
            Some(Type::File) => {
                let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                let forgotten = open_in(at, name, OFlag::empty())
                    .and_then(|file| Ok(posix_fadvise(file, 0, 0, advice)?));
                match forgotten {
                    Ok(()) => *files += 1,
                    Err(error) => note(error),
                }
            }
            _ => {}
        }
    }
    directories
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::mkdirat;

    use super::*;

    #[test]
    fn a_tree_is_forgotten_however_deep_it_is() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("first"), b"1").unwrap();
        let mut at = OwnedFd::from(fs::File::open(root.path()).unwrap());
        // deeper than a path may be long
        let name = CString::new("d".repeat(100)).unwrap();
        for _ in 0..300 {
            mkdirat(&at, c"empty", Mode::S_IRWXU).unwrap();
            mkdirat(&at, name.as_c_str(), Mode::S_IRWXU).unwrap();
            at = open_in(&at, &name, OFlag::O_DIRECTORY).unwrap();
        }
        let flags = OFlag::O_CREAT | OFlag::O_WRONLY;
        openat(&at, c"last", flags, Mode::S_IRWXU).unwrap();
        assert_eq!(forget(root.path()).unwrap(), 2);
    }
}
