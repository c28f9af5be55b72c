//! File descriptors that outlive this process, in the service manager's keeping: systemd's
//! (`FileDescriptorStoreMax=`, see systemd.service(5)) or that of our own parent
//! ([`standalone`](crate::standalone)). Without a manager, nothing here does anything.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use super::limits;
use super::notify;

/// The first fd that a manager passes (`SD_LISTEN_FDS_START`).
const FIRST_FD: RawFd = 3;

/// Where fds that were taken back go, if the limit is not in the way: far from the numbers that the
/// kernel gives to events, some of which are to be occupied.
const OUT_OF_THE_WAY: u64 = 1 << 14;

/// The variables of the protocol. Our children are not the manager's business.
const VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES", PASSED];

/// Between two programs that run in this process one after the other: `number:name`, with commas. Those of
/// the manager begin at 3, where the first program's threads may have others until its very end.
const PASSED: &str = "HYDRANT_PASSED_FDS";

/// `NOTIFY_SOCKET`, as it was at the start.
static MANAGER: OnceLock<Option<OsString>> = OnceLock::new();

/// The fds that the manager has kept for us, with their names, in its order. They are moved to high
/// numbers, so that the low ones are free. Also raises the limit of open files.
///
/// To be called once, at the very start of the process: before there are other threads, and before
/// anything else is opened.
pub fn take() -> io::Result<Vec<(String, OwnedFd)>> {
    let limit = limits::raise_open_files()?.soft;
    let variable = |name: &str| std::env::var(name).ok();
    let ours = match variable("LISTEN_PID").map(|pid| pid.parse::<u32>()) {
        // A parent that can't know our pid, like ours, passes none.
        None => true,
        Some(pid) => pid == Ok(std::process::id()),
    };
    let count = variable("LISTEN_FDS").and_then(|count| count.parse::<RawFd>().ok());
    let count = count.filter(|_| ours).unwrap_or(0).max(0);
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let passed_fds = variable(PASSED).unwrap_or_default();
    let manager = std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty());
    MANAGER.get_or_init(|| manager);
    for name in VARIABLES {
        // SAFETY: by this function's contract there is no other thread that could read them.
        unsafe { std::env::remove_var(name) };
    }
    let lowest = lowest(limit);
    let mut names = names.split(':');
    let mut kept = passed(&passed_fds)?;
    for number in (FIRST_FD..).take(usize::try_from(count).unwrap_or(0)) {
        let name = names.next().unwrap_or_default().to_owned();
        // SAFETY: fcntl(2) on a number; where that is no open fd it says so.
        let moved = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, lowest) };
        if moved < 0 {
            let error = io::Error::last_os_error();
            return Err(io::Error::new(error.kind(), format!("file descriptor {number}: {error}")));
        }
        // SAFETY: the manager has passed the one to us, so it is nobody else's, and fcntl has just
        // opened the other. The one is closed, the other kept.
        let (_, moved) = unsafe { (OwnedFd::from_raw_fd(number), OwnedFd::from_raw_fd(moved)) };
        kept.push((name, moved));
    }
    Ok(kept)
}

fn lowest(limit: u64) -> RawFd {
    RawFd::try_from(OUT_OF_THE_WAY.min(limit / 2)).unwrap_or(0)
}

/// What the program before us in this process has left: out of the way already.
fn passed(list: &str) -> io::Result<Vec<(String, OwnedFd)>> {
    let mut kept = Vec::new();
    for entry in list.split(',').filter(|entry| !entry.is_empty()) {
        let (number, name) = entry.split_once(':').unwrap_or((entry, ""));
        let number = number.parse::<RawFd>().map_err(io::Error::other)?;
        // SAFETY: fcntl(2) on a number; where that is no open fd it says so.
        if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            let error = io::Error::last_os_error();
            return Err(io::Error::new(error.kind(), format!("file descriptor {number}: {error}")));
        }
        // SAFETY: it is open, and was opened for us alone.
        kept.push((name.to_owned(), unsafe { OwnedFd::from_raw_fd(number) }));
    }
    Ok(kept)
}

/// What a program that takes our place has to find in its environment. The fds stay open from here on.
pub fn variables_for_successor(
    fds: Vec<(String, OwnedFd)>,
) -> io::Result<Vec<(OsString, OsString)>> {
    let lowest = lowest(limits::open_files()?.soft);
    let mut list = Vec::new();
    for (name, fd) in fds {
        // SAFETY: fcntl(2) on an open fd.
        let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD, lowest) };
        if copy < 0 {
            return Err(io::Error::last_os_error());
        }
        list.push(format!("{copy}:{name}"));
    }
    let mut variables = vec![(PASSED.into(), list.join(",").into())];
    if let Some(address) = manager() {
        variables.push(("NOTIFY_SOCKET".into(), address.clone()));
    }
    Ok(variables)
}

/// There is a manager that keeps fds.
#[must_use]
pub fn is_there() -> bool {
    manager().is_some()
}

fn manager() -> Option<&'static OsString> {
    MANAGER.get()?.as_ref()
}

/// The manager is systemd, not a parent of our own: it listens at a path.
#[must_use]
pub fn is_systemd() -> bool {
    manager().is_some_and(|address| address.as_encoded_bytes().starts_with(b"/"))
}

/// Tells the manager something, such as `READY=1`.
pub fn notify(message: &str) -> io::Result<()> {
    send(message, &[])
}

fn send(message: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    match manager() {
        Some(address) => notify::send(address, message, fds),
        None => Ok(()),
    }
}

/// Has the manager keep a copy of an fd until it is [removed](remove), whatever becomes of us.
/// `FDPOLL=0`: it is not to drop what epoll(7) calls hung up.
pub fn store(name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
    send(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), &[fd])
}

/// Has the manager close all that it keeps by this name.
pub fn remove(name: &str) -> io::Result<()> {
    send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
}
