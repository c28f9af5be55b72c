//! Leases (`F_SETLEASE`, fcntl(2)), as a way to ask whether anybody has a file open.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Whether the file that `fd` is open on is open anywhere else: by a process, or by a file system that
/// has it for a device. The kernel grants a write lease only to who is alone
/// (`fs/locks.c:check_conflicting_open`).
pub fn is_open_elsewhere(fd: impl AsFd) -> io::Result<bool> {
    survive_sigio()?;
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

/// Who opens the file while we have the lease makes the kernel send us SIGIO, which ends a process that
/// does not handle it. A handler, unlike `SIG_IGN`, is not inherited by the programs that we start.
fn survive_sigio() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    static DONE: OnceLock<()> = OnceLock::new();
    if DONE.get().is_some() {
        return Ok(());
    }
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does nothing, and nothing else here handles SIGIO.
    unsafe { sigaction(Signal::SIGIO, &action) }?;
    DONE.get_or_init(|| ());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opener_at_the_wrong_moment_does_not_end_us() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let fd = file.reopen().unwrap();
        let path = file.into_temp_path();
        assert!(!is_open_elsewhere(&fd).unwrap());
        // SAFETY: as in `is_open_elsewhere`.
        assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) }, 0);
        let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_NONBLOCK;
        let opened = nix::fcntl::open(&*path, flags, nix::sys::stat::Mode::empty());
        assert_eq!(opened.unwrap_err(), nix::Error::EAGAIN);
    }

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
