//! Leases (`F_SETLEASE`, fcntl(2)), as a way to ask whether anybody has a file open.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Whether the file that `fd` is open on is open anywhere else: by a process, or by a file system that
/// has it for a device. The kernel grants a write lease only to who is alone
/// (`fs/locks.c:check_conflicting_open`).
pub fn is_open_elsewhere(fd: impl AsFd) -> io::Result<bool> {
    let lease = |kind: libc::c_int| {
        // SAFETY: fcntl(2) on an open fd with a plain number.
        match unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETLEASE, kind) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    match lease(libc::F_WRLCK) {
        Ok(()) => lease(libc::F_UNLCK).map(|()| false),
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(true),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_other_openers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let fd = file.reopen().unwrap();
        assert!(is_open_elsewhere(&fd).unwrap());
        let path = file.into_temp_path();
        assert!(!is_open_elsewhere(&fd).unwrap());
        let reader = std::fs::File::open(&path).unwrap();
        assert!(is_open_elsewhere(&fd).unwrap());
        drop(reader);
        assert!(!is_open_elsewhere(&fd).unwrap());
    }
}
