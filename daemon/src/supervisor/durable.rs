//! What has to be on the disk before somebody is told that it is there, and what of an operation that
//! was cut short goes at the next start.
//!
//! A clone's files are synced one by one, not with syncfs(2), which would wait for whatever else is
//! being written to the same file system.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::OFlag;
#[cfg(test)]
use nix::sys::stat::Mode;
use tracing::{info, warn};

use super::clone::beneath;
use super::store::Store;
use crate::catalog::{Catalog, CatalogError};
use crate::ids::MountId;

/// In a mount's directory: nothing in there is of value yet, or any more. A clone that is not done, or
/// a removal that was begun.
const DISPOSABLE: &str = "disposable";

/// Says that a mount's directory goes at the next start, should we not get to the end.
pub fn mark_disposable(directory: &Path) -> io::Result<()> {
    File::create(directory.join(DISPOSABLE))?;
    sync(directory)
}

/// Whether a directory is marked as disposable.
pub(super) fn is_marked(directory: &Path) -> bool {
    directory.join(DISPOSABLE).symlink_metadata().is_ok()
}

/// What is in a mount's directory is whole, and stays.
pub fn keep(directory: &Path) -> io::Result<()> {
    match fs::remove_file(directory.join(DISPOSABLE)) {
        Ok(()) => sync(directory),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a file, or the names in a directory, durable.
pub fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes all of a file system durable.
pub fn sync_file_system(path: &Path) -> io::Result<()> {
    Ok(nix::unistd::syncfs(File::open(path)?)?)
}

/// Removes a directory that is marked as disposable with all that is in it, which may take its time. The mark goes last:
/// what a crash leaves is still known to be of no value.
pub async fn remove(directory: PathBuf) -> io::Result<()> {
    let removed = tokio::task::spawn_blocking(move || remove_marked(&directory)).await;
    match removed.map_err(io::Error::other)? {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn remove_marked(directory: &Path) -> io::Result<()> {
    remove_all_but_mark(directory)?;
    sync(directory)?;
    fs::remove_dir_all(directory)
}

fn remove_all_but_mark(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name() == DISPOSABLE {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// The numbers of the directories below `parent` that are marked as disposable. So is an empty one: it is not marked
/// yet, or not any more.
pub(super) fn disposable(parent: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(number) = number else { continue };
        let path = entry.path();
        if is_marked(&path) || fs::read_dir(&path)?.next().is_none() {
            found.push((number, path));
        }
    }
    Ok(found)
}

/// Ends what was begun before a crash or a power cut: clones that were not done, and removals. To be
/// called at start, when none can be under way.
pub async fn remove_disposable(catalog: &Catalog, store: &Store) -> Result<(), CatalogError> {
    for (number, directory) in disposable(&store.root().join("mounts"))? {
        let mount = MountId(number);
        catalog.remove_mount(mount).await?;
        match remove(directory.clone()).await {
            Ok(()) => {
                info!(%mount, "removed what a clone or a removal has left that was cut short")
            }
            Err(error) => warn!(%mount, directory = %directory.display(), %error,
                "can't remove what a clone or a removal has left that was cut short"),
        }
    }
    // of removals; their records, if they are there, stand for nothing any more
    let mut snapshots = disposable(&store.snapshots_dir())?;
    let mut records = catalog.snapshots().await?;
    // the highest first
    records.sort_by_key(|record| std::cmp::Reverse(record.id.0));
    for record in records {
        let Some(at) = snapshots.iter().position(|(number, _)| *number == record.id.0) else {
            continue;
        };
        if catalog.remove_snapshot(record.name).await?.is_err() {
            // others are on top of it: this was about to be refused
            keep(&snapshots.swap_remove(at).1)?;
        }
    }
    for (_, directory) in snapshots {
        if let Err(error) = remove(directory.clone()).await {
            warn!(directory = %directory.display(), %error, "can't remove what is left of a snapshot");
        }
    }
    Ok(())
}

/// So many files are synced at the same time: they share the file system's commits.
const SYNCS: usize = 8;

/// So many files are open at most.
const MAX_WAITING: usize = 64;

/// A directory that is made durable with all that is below it, little by little: what was synced and has
/// not changed since is not synced again, as each file costs a flush of the disk.
#[derive(Debug, Default)]
pub struct Synced {
    /// By inode number, when it was changed last (`st_ctime`; exact on a file that was looked at).
    seen: HashMap<u64, (i64, i64)>,
    waiting: Vec<File>,
}

impl Synced {
    /// Its owner may change the directory at any time, so links are not followed, and what goes meanwhile
    /// is no error.
    pub fn sync(&mut self, directory: &Path) -> io::Result<()> {
        self.sync_open(File::open(directory)?)
    }

    /// The same for a directory that is open.
    pub fn sync_open(&mut self, directory: File) -> io::Result<()> {
        self.walk(directory)?;
        self.settle()
    }

    fn walk(&mut self, directory: File) -> io::Result<()> {
        let names: Vec<_> =
            Dir::from_fd(directory.try_clone()?.into())?.iter().collect::<Result<_, _>>()?;
        for entry in names {
            let name = entry.file_name().to_bytes();
            let directories = match entry.file_type() {
                _ if matches!(name, b"." | b"..") => continue,
                Some(Type::Directory) => OFlag::O_DIRECTORY,
                Some(Type::File) => OFlag::empty(),
                _ => continue,
            };
            // a FIFO by now? it is not waited for
            let flags = directories | OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
            let opened = match beneath(&directory, OsStr::from_bytes(name), flags) {
                Ok(opened) => File::from(opened),
                Err(error) if has_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            if directories.is_empty() {
                self.wait(opened)?;
            } else {
                self.walk(opened)?;
            }
        }
        self.wait(directory)
    }

    fn wait(&mut self, file: File) -> io::Result<()> {
        let metadata = file.metadata()?;
        if !metadata.is_file() && !metadata.is_dir() {
            return Ok(());
        }
        // before the sync: what is changed during it is synced once more
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        if self.seen.insert(metadata.ino(), changed) != Some(changed) {
            self.waiting.push(file);
        }
        if self.waiting.len() < MAX_WAITING { Ok(()) } else { self.settle() }
    }

    fn settle(&mut self) -> io::Result<()> {
        let files = std::mem::take(&mut self.waiting);
        let share = files.len().div_ceil(SYNCS).max(1);
        let sync = |files: &[File]| files.iter().try_for_each(File::sync_all);
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                files.chunks(share).map(|files| scope.spawn(move || sync(files))).collect();
            threads.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread has panicked")))
            })
        })
    }
}

/// It was removed, or something else is in its place.
fn has_gone(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR | Errno::ENXIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_comes_and_goes() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        mark_disposable(directory.path()).unwrap();
        mark_disposable(directory.path()).unwrap();
        assert!(directory.path().join(DISPOSABLE).exists());
        keep(directory.path()).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_mark_goes_last() {
        let parent = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = |name: &str| parent.path().join(name);
        for name in ["1", "2", "3", "4", "other"] {
            fs::create_dir(path(name)).unwrap();
        }
        fs::create_dir_all(path("1/upper/a")).unwrap();
        for name in ["1/upper/a/b", "1/c", "3/d"] {
            fs::write(path(name), name).unwrap();
        }
        mark_disposable(&path("1")).unwrap();
        mark_disposable(&path("2")).unwrap();
        let mut found: Vec<_> =
            disposable(parent.path()).unwrap().into_iter().map(|(number, _)| number).collect();
        found.sort_unstable();
        assert_eq!(found, [1, 2, 4], "two that are marked and an empty one");

        remove_all_but_mark(&path("1")).unwrap();
        let left: Vec<_> = fs::read_dir(path("1")).unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].file_name(), DISPOSABLE);
        remove_marked(&path("1")).unwrap();
        assert!(!path("1").exists());
    }

    #[test]
    fn what_has_not_changed_is_synced_once() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir_all(path("a/b")).unwrap();
        fs::write(path("a/b/c"), "c").unwrap();
        fs::write(path("a/d"), "d").unwrap();
        nix::unistd::mkfifo(&path("a/fifo"), Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("/", path("a/link")).unwrap();
        let mut synced = Synced::default();
        synced.sync(directory.path()).unwrap();
        assert_eq!(synced.seen.len(), 5);
        let before = synced.seen.clone();
        synced.sync(directory.path()).unwrap();
        assert_eq!(synced.seen, before);
        fs::write(path("a/d"), "e").unwrap();
        fs::write(path("a/e"), "e").unwrap();
        synced.sync(directory.path()).unwrap();
        let changed = synced.seen.iter().filter(|(ino, at)| before.get(ino) != Some(at)).count();
        assert_eq!(changed, 3, "two files and their directory");
    }
}
