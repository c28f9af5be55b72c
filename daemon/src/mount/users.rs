//! Who uses a mount: a look through `/proc`, for messages.
//!
//! `cmdline`, `environ` and `maps` are left alone: a process that waits for content in a page fault
//! holds the lock that they need, and we may be the ones whom it waits for.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// A process that uses a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub pid: i32,
    /// Its name, as in `/proc/PID/comm`.
    pub comm: String,
    pub uses: Vec<Use>,
}

/// What a process has in a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Use {
    /// Its current directory.
    Directory,
    Root,
    /// What it runs.
    Program,
    OpenFile,
}

/// The processes that use the mount with this id, as far as can be seen.
pub fn find(mount_id: u64) -> Vec<User> {
    let Ok(processes) = fs_err::read_dir("/proc") else { return Vec::new() };
    let mut users = Vec::new();
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let uses = uses(&process.path(), mount_id);
        if !uses.is_empty() {
            let comm = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            users.push(User { pid, comm: comm.trim_end().to_owned(), uses });
        }
    }
    users
}

fn uses(process: &Path, mount_id: u64) -> Vec<Use> {
    let links = [("cwd", Use::Directory), ("root", Use::Root), ("exe", Use::Program)];
    let mut uses: Vec<_> = links
        .into_iter()
        .filter(|(link, _)| link_mount(&process.join(link)) == Some(mount_id))
        .map(|(_, kind)| kind)
        .collect();
    let Ok(files) = fs_err::read_dir(process.join("fdinfo")) else { return uses };
    if files.flatten().any(|file| info_mount(&file.path()) == Some(mount_id)) {
        uses.push(Use::OpenFile);
    }
    uses
}

/// The mount that a link of `/proc/PID` leads into. Nothing is looked up or read in that mount.
fn link_mount(link: &Path) -> Option<u64> {
    let fd: OwnedFd = open(link, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    info_mount(&PathBuf::from(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())))
}

/// `mnt_id` of `/proc/PID/fdinfo/FD`.
fn info_mount(path: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()
}
