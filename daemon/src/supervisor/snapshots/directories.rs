//! The directories of snapshots: `fs`, what it has on top of its parent, and for overlayfs `work`.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::fstatat;
use tracing::warn;

use super::super::clone::beneath;
use super::super::durable;

/// Whose a directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

impl Owner {
    pub fn of(directory: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(directory)?;
        Ok(Self { uid: found.uid(), gid: found.gid() })
    }
}

/// Makes the directories of a snapshot. Its root is `owner`'s, root's otherwise.
pub fn make(directory: &Path, active: bool, owner: Option<Owner>) -> io::Result<()> {
    let made = try_to_make(directory, active, owner);
    if made.is_err() {
        remove_empty(directory);
    }
    made
}

fn try_to_make(directory: &Path, active: bool, owner: Option<Owner>) -> io::Result<()> {
    let make = |path: &Path, mode| {
        fs::DirBuilder::new().mode(mode).create(path)?;
        // whatever the umask
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    };
    make(directory, 0o700)?;
    let root = directory.join("fs");
    make(&root, 0o755)?;
    if let Some(owner) = owner {
        std::os::unix::fs::lchown(&root, Some(owner.uid), Some(owner.gid))?;
    }
    if active {
        make(&directory.join("work"), 0o711)?;
    }
    // its record must not be on the disk before it
    durable::sync(directory)?;
    directory.parent().map_or(Ok(()), durable::sync)
}

/// Takes back [`make`]: removes what nobody has put anything into.
pub fn remove_empty(directory: &Path) {
    for path in [directory.join("fs"), directory.join("work"), directory.to_owned()] {
        match fs::remove_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!(%error, path = %path.display(), "can't remove a directory of a snapshot");
            }
            _ => {}
        }
    }
}

/// Says that it goes, at the latest at the next start. One that is missing has gone.
pub fn mark(directory: &Path) -> io::Result<()> {
    match durable::mark_disposable(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Takes back [`mark`].
pub fn unmark(directory: &Path) {
    if let Err(error) = durable::keep(directory)
        && error.kind() != io::ErrorKind::NotFound
    {
        warn!(%error, directory = %directory.display(), "a snapshot goes at the next start");
    }
}

/// Removes a snapshot's directories with all that is in them.
pub async fn remove(directory: PathBuf) {
    if let Err(error) = durable::remove(directory.clone()).await {
        warn!(%error, directory = %directory.display(), "can't remove a snapshot's files yet");
    }
}

/// How many bytes a tree has on the disk, and how many inodes, with its root. Others may change it meanwhile.
pub fn usage(directory: &Path) -> io::Result<(u64, u64)> {
    let mut seen = HashSet::new();
    let mut bytes = 0;
    let root = File::open(directory)?;
    let metadata = root.metadata()?;
    seen.insert((metadata.dev(), metadata.ino()));
    bytes += metadata.blocks() * 512;
    // not open ones: who writes there decides how many there are
    let mut stack = vec![PathBuf::from(".")];
    while let Some(at) = stack.pop() {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let directory = match beneath(&root, &at, flags) {
            Ok(directory) => File::from(directory),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                return Err(error);
            }
            Err(_) => continue, // it has gone, or is no directory any more
        };
        let listing =
            Dir::from_fd(directory.try_clone()?.into())?.iter().collect::<Result<Vec<_>, _>>()?;
        for entry in listing {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = fstatat(directory.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) else {
                continue;
            };
            if seen.insert((stat.st_dev, stat.st_ino)) {
                bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
            }
            if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
                stack.push(at.join(OsStr::from_bytes(name.to_bytes())));
            }
        }
    }
    Ok((bytes, seen.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_tree_uses() {
        let root = tempfile::tempdir_in("/var/tmp").unwrap();
        let own = root.path().join("1");
        make(&own, true, None).unwrap();
        let fs_dir = own.join("fs");
        let (empty, one) = usage(&fs_dir).unwrap();
        assert_eq!(one, 1);
        fs::create_dir(fs_dir.join("d")).unwrap();
        fs::write(fs_dir.join("d/a"), vec![1; 100_000]).unwrap();
        fs::hard_link(fs_dir.join("d/a"), fs_dir.join("b")).unwrap();
        std::os::unix::fs::symlink("/", fs_dir.join("link")).unwrap();
        File::open(fs_dir.join("b")).unwrap().sync_all().unwrap();
        let (bytes, inodes) = usage(&fs_dir).unwrap();
        assert_eq!(inodes, 4);
        assert!((100_000..120_000).contains(&(bytes - empty)), "{bytes}");
        assert_eq!(fs::metadata(&fs_dir).unwrap().mode() & 0o7777, 0o755);
        remove_empty(&own);
        assert!(fs_dir.join("b").exists(), "somebody has put something into it");
    }
}
