//! System calls that no crate wraps safely enough: the new mount interface, packets that carry file
//! descriptors, starting processes, and giving up privileges. With `fanotify/` the only place that
//! has `unsafe` code; what it offers is safe.

pub mod cgroup;
pub mod fdstore;
pub mod inflate;
pub mod lease;
pub mod limits;
pub mod mount;
pub mod notify;
pub mod privileges;
pub mod readable;
pub mod replace;
pub mod seqpacket;
pub mod shared;
pub mod spawn;
#[cfg(test)]
pub(crate) mod test_support;
pub mod user;
pub mod user_namespace;

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd};

/// A path by which the kernel finds what `fd` is open on, however long its own path is. Valid as long
/// as `fd` is open, within this process.
#[must_use]
pub fn fd_path(fd: impl AsFd) -> CString {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    // A number has no NUL byte.
    CString::new(path).unwrap_or_default()
}
