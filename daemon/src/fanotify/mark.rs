//! Marks: which files a group asks about, and what it leaves alone.
//!
//! A file that was opened before its mark was placed never raises events through that open file:
//! a segment is marked first and mounted after that, always.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use fanotify::low_level;

use super::{Error, Group, abi};

/// What removing a mark found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removed {
    /// The mark is gone.
    Removed,
    /// There was none.
    Identity,
}

/// Accesses to the content of the segment that `segment` is open on (`O_PATH` will do) raise events
/// from now on. The same again where there is a mark already. Only ext4, xfs and btrfs take such a
/// mark; others say `EOPNOTSUPP`.
pub fn add(group: &Group, segment: BorrowedFd<'_>) -> Result<(), Error> {
    let flags = abi::FAN_MARK_ADD | abi::FAN_MARK_INODE;
    change(group, flags, segment, "place a mark on")
}

/// Accesses to the segment raise no more events. What waits is not answered by that.
pub fn remove(group: &Group, segment: BorrowedFd<'_>) -> Result<Removed, Error> {
    let flags = abi::FAN_MARK_REMOVE | abi::FAN_MARK_INODE;
    match change(group, flags, segment, "remove the mark from") {
        Ok(()) => Ok(Removed::Removed),
        Err(Error::Mark { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => {
            Ok(Removed::Identity)
        }
        Err(error) => Err(error),
    }
}

/// Accesses through the mount that `mount` lies in raise no events, whatever is marked: the way in for
/// those who fill and evict. It must be a mount of its own (`open_tree(2)` with `OPEN_TREE_CLONE`)
/// that nobody else can reach.
pub fn ignore_mount(group: &Group, mount: BorrowedFd<'_>) -> Result<(), Error> {
    let flags = abi::FAN_MARK_ADD | abi::FAN_MARK_MOUNT | abi::FAN_MARK_IGNORE_SURV;
    change(group, flags, mount, "make a group ignore the mount of")
}

fn change(
    group: &Group,
    flags: u32,
    target: BorrowedFd<'_>,
    operation: &'static str,
) -> Result<(), Error> {
    // Through /proc, because fanotify_mark with no path takes no O_PATH fd, such as open_tree
    // returns, and because low_level has no way to give none.
    let target = target.as_raw_fd();
    let path = format!("/proc/self/fd/{target}");
    let mask = abi::FAN_PRE_ACCESS;
    let group = group.as_fd().as_raw_fd();
    low_level::fanotify_mark(group, flags, mask, low_level::AT_FDCWD, path.as_str())
        .map_err(|source| Error::Mark { operation, target, source })
}
