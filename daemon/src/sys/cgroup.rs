//! Control groups, version 2 (`Documentation/admin-guide/cgroup-v2.rst` of the kernel's): a group of its
//! own for a process, with limits, removed when this side lets go of it.
//!
//! The files are opened, read and closed each time: as long as one of them is open somewhere, the kernel tells
//! nobody of the end of its group ([`watch`](crate::watch)).

use std::ffi::CString;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fs_err as fs;

/// Where the service manager starts the daemon itself in the group that it hands over (`DelegateSubgroup=`):
/// processes and groups with limits can't be side by side.
const OWN: &str = "supervisor";

/// What the names of groups begin with that are made here. Others below a delegated one are not ours.
const KINDS: [&str; 2] = ["worker-", "importer-"];

/// How long an ended process may take to leave its group.
const PATIENCE: Duration = Duration::from_secs(5);

const RETRY: Duration = Duration::from_millis(10);

/// Why there are no groups.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("no cgroup v2 is mounted")]
    NotMounted,
    #[error("{} is not ours: the service manager has not delegated it", .0.display())]
    NotDelegated(PathBuf),
    #[error("can't {what} {}", .path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

/// What processes in a group may use. `None`: as much as there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes, with the page cache of what is read and written. Above, the kernel kills.
    pub memory_max: Option<u64>,
    /// Bytes. Above, the kernel takes memory back and slows the group down.
    pub memory_high: Option<u64>,
    /// Threads.
    pub pids_max: Option<u64>,
    /// A share of the processors: 1 to 10,000; others have 100.
    pub cpu_weight: Option<u64>,
}

/// `memory.events`: how often what has happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryEvents {
    /// The group's own limit could not be kept by taking memory back.
    pub oom: u64,
    /// Processes that were killed, for that or because the machine had no memory left.
    pub oom_kill: u64,
}

impl MemoryEvents {
    /// Reads the file of the group at `directory`.
    pub fn read(directory: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(directory.join("memory.events"))?;
        Ok(Self { oom: value(&text, "oom"), oom_kill: value(&text, "oom_kill") })
    }
}

/// Whether there is a process in the group at `directory` or below it (`cgroup.events`).
pub fn is_populated(directory: &Path) -> io::Result<bool> {
    let text = fs::read_to_string(directory.join("cgroup.events"))?;
    Ok(value(&text, "populated") != 0)
}

/// The number after `key` in lines of a key and a number; 0 where it is missing.
fn value(text: &str, key: &str) -> u64 {
    let values = text.lines().filter_map(|line| line.split_once(' '));
    let mut found = values.filter(|(name, _)| *name == key);
    found.next().and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
}

/// The group in which the groups of this daemon's processes are made.
#[derive(Debug)]
pub struct Parent {
    directory: PathBuf,
    /// Made by us, so it goes at the end.
    ours: bool,
    next: AtomicU64,
}

impl Parent {
    /// The place for this daemon's groups. `configured`: the path of a group from the root of the hierarchy, in
    /// which one named `name` is made; otherwise what the service manager has delegated, or, where nobody
    /// manages groups, one named `name` at the root. Groups that a daemon of before left there are removed.
    pub fn find(configured: Option<&Path>, name: &str) -> Result<Self, CgroupError> {
        let hierarchy = Hierarchy::find()?;
        let (directory, ours) = match configured {
            Some(path) => {
                let path = path.strip_prefix("/").unwrap_or(path);
                (hierarchy.root.join(path).join(name), true)
            }
            None => match hierarchy.delegated()? {
                Some(directory) => (directory, false),
                None => (hierarchy.root.join(name), true),
            },
        };
        fs::create_dir_all(&directory).map_err(failed("make", &directory))?;
        if ours {
            // from the root down: what is handed on must have been handed on above
            let above = directory.ancestors().take_while(|path| path.starts_with(&hierarchy.root));
            let mut above: Vec<_> = above.collect();
            above.reverse();
            above.iter().for_each(|directory| hand_controllers_on(directory));
        } else if hierarchy.own != directory {
            // not beside processes, the daemon's or the next one's: an older systemd could not start that
            hand_controllers_on(&directory);
        }
        let parent = Self { directory, ours, next: AtomicU64::new(1) };
        parent.sweep();
        Ok(parent)
    }

    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether processes can be limited in what they use of `controller`, such as `memory`.
    #[must_use]
    pub fn has(&self, controller: &str) -> bool {
        let handed_on = fs::read_to_string(self.directory.join("cgroup.subtree_control"));
        handed_on.is_ok_and(|list| list.split_whitespace().any(|name| name == controller))
    }

    /// A new group, its name beginning with `name` (one of `KINDS`). A limit that can't be set because its controller is
    /// missing is left out: [`has`](Self::has) tells.
    pub fn make(&self, name: &str, limits: Limits) -> Result<Cgroup, CgroupError> {
        let directory = loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let directory = self.directory.join(format!("{name}-{number}"));
            match fs::create_dir(&directory) {
                // left by a daemon of before, and still in use
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made.map_err(failed("make", &directory))?,
            }
            break directory;
        };
        let group = Cgroup { directory };
        for (file, limit) in [
            ("memory.max", limits.memory_max),
            ("memory.high", limits.memory_high),
            ("pids.max", limits.pids_max),
            ("cpu.weight", limits.cpu_weight),
        ] {
            let path = group.directory.join(file);
            if let Some(limit) = limit
                && let Err(error) = put(&path, &limit.to_string())
                && error.kind() != io::ErrorKind::NotFound
            {
                return Err(failed("set the limit", &path)(error));
            }
        }
        Ok(group)
    }

    /// Removes all of it, at the end.
    pub fn close(&self) {
        self.sweep();
        if self.ours {
            remove_soon(&self.directory, Duration::from_millis(200));
        }
    }

    /// Removes the groups that are below, and kills what is in them: processes of a daemon that is gone. Those
    /// that take their time are left.
    pub fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        let groups = entries.flatten().map(|entry| entry.path());
        let groups = groups.filter(|path| {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            path.is_dir() && KINDS.iter().any(|kind| name.starts_with(kind.as_bytes()))
        });
        for directory in groups {
            if remove(&directory).is_err() {
                put(&directory.join("cgroup.kill"), "1").ok();
                remove_soon(&directory, Duration::from_millis(200));
            }
        }
    }
}

/// A group for one process. Removed when dropped, as soon as the process has ended.
#[derive(Debug)]
pub struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// For [`Spawn::cgroup`](super::spawn::Spawn::cgroup).
    pub fn open(&self) -> io::Result<OwnedFd> {
        Ok(OwnedFd::from(std::fs::File::open(&self.directory)?))
    }

    /// `None` where the group has no memory controller.
    #[must_use]
    pub fn memory_events(&self) -> Option<MemoryEvents> {
        MemoryEvents::read(&self.directory).ok()
    }

    /// In bytes; `None` where there is no limit.
    #[must_use]
    pub fn memory_max(&self) -> Option<u64> {
        number(&self.directory, "memory.max")
    }
}

/// The number in a file of the group at `directory`, such as `memory.current`; `None` also where it says `max`.
#[must_use]
pub fn number(directory: &Path, file: &str) -> Option<u64> {
    std::fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok()
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if remove(&self.directory).is_ok() {
            return;
        }
        let directory = self.directory.clone();
        let _ = std::thread::Builder::new()
            .name("cgroup".to_owned())
            .spawn(move || remove_soon(&directory, PATIENCE));
    }
}

/// Writes to a file that is there.
fn put(path: &Path, text: &str) -> io::Result<()> {
    std::fs::File::options().write(true).open(path)?.write_all(text.as_bytes())
}

/// Removes a group. That it is gone is no error.
fn remove(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes a group once it is empty, or gives up.
fn remove_soon(directory: &Path, patience: Duration) {
    let begun = std::time::Instant::now();
    while let Err(error) = remove(directory) {
        if begun.elapsed() > patience {
            tracing::debug!(cgroup = %directory.display(), %error, "can't remove a cgroup");
            return;
        }
        std::thread::sleep(RETRY);
    }
}

/// Lets the groups below be limited. What the kernel lacks, or somebody else keeps, is missing then.
fn hand_controllers_on(directory: &Path) {
    for controller in ["memory", "pids", "cpu"] {
        put(&directory.join("cgroup.subtree_control"), &format!("+{controller}")).ok();
    }
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> CgroupError + 'a {
    move |source| CgroupError::Io { what, path: path.to_owned(), source }
}

/// Where the groups are, and which one is ours.
#[derive(Debug)]
struct Hierarchy {
    /// Where the hierarchy is mounted, at its root as far as we see it.
    root: PathBuf,
    /// The group that we are in.
    own: PathBuf,
}

impl Hierarchy {
    fn find() -> Result<Self, CgroupError> {
        let read = |path: &Path| fs::read_to_string(path).map_err(failed("read", path));
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        let (root, above) = mounts.lines().find_map(mount_point).ok_or(CgroupError::NotMounted)?;
        let groups = read(Path::new("/proc/self/cgroup"))?;
        let own = groups.lines().find_map(|line| line.strip_prefix("0::"));
        let own = Path::new(own.ok_or(CgroupError::NotMounted)?);
        // what is mounted may be a part of the hierarchy in which we are not
        let own = own.strip_prefix(above).map_err(|_| CgroupError::NotDelegated(own.to_owned()))?;
        Ok(Self { own: root.join(own), root })
    }

    /// The group that was handed over to us; `None` where nobody hands any over.
    fn delegated(&self) -> Result<Option<PathBuf>, CgroupError> {
        if self.own == self.root && !Path::new("/run/systemd/system").exists() {
            return Ok(None);
        }
        if self.own.ends_with(OWN)
            && let Some(above) = self.own.parent().filter(|above| is_delegated(above))
        {
            return Ok(Some(above.to_owned()));
        }
        if !is_delegated(&self.own) {
            return Err(CgroupError::NotDelegated(self.own.clone()));
        }
        Ok(Some(self.own.clone()))
    }
}

/// Where `line` of mountinfo has the hierarchy, and which part of it.
fn mount_point(line: &str) -> Option<(PathBuf, &Path)> {
    let (place, kind) = line.split_once(" - ")?;
    let mut place = place.split(' ').skip(3);
    let (root, path) = (place.next()?, place.next()?);
    kind.starts_with("cgroup2 ").then(|| (PathBuf::from(path), Path::new(root)))
}

/// The service manager marks what it hands over (systemd's "Control Group APIs and Delegation").
fn is_delegated(directory: &Path) -> bool {
    let Ok(path) = CString::new(directory.as_os_str().as_bytes()) else { return false };
    [c"trusted.delegate", c"user.delegate"].iter().any(|name| {
        let mut value = [0u8; 1];
        // SAFETY: both texts end with a NUL byte, and the kernel writes one byte at most into `value`.
        let length = unsafe {
            libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        length == 1 && value == *b"1"
    })
}

#[cfg(test)]
mod tests;
