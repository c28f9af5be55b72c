//! A process that was started here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::sys::wait::WaitPidFlag;

use crate::sys::readable::Readable;

fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this fd for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A pidfd of the process that is our parent by now: readable once that has ended.
pub fn parent() -> io::Result<OwnedFd> {
    open(nix::unistd::getppid().as_raw())
}

/// A child, held by a pidfd (pidfd_open(2)): nobody else can be meant. It is killed when this is
/// dropped.
#[derive(Debug)]
pub struct Child {
    pid: i32,
    pidfd: OwnedFd,
    /// Since the first [`Child::wait`]: registered once, because who waits may be woken often by
    /// something else.
    watch: Option<Readable>,
    status: Option<ExitStatus>,
}

impl Child {
    /// Takes charge of a child that has not been waited for; kills it where that fails.
    pub(super) fn new(pid: i32) -> io::Result<Self> {
        let pidfd = open(pid).inspect_err(|_| {
            // SAFETY: a child of ours that has not been waited for, so its number is still its own.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, std::ptr::null_mut(), 0);
            }
        })?;
        Ok(Self { pid, pidfd, watch: None, status: None })
    }

    /// Its process id; still its own until it has been waited for.
    #[must_use]
    pub fn id(&self) -> i32 {
        self.pid
    }

    /// Waits for its end. Must run in a tokio runtime; can be cancelled and called again.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        if self.status.is_none() {
            let watch = match &mut self.watch {
                Some(watch) => watch,
                none => none.insert(Readable::new(self.pidfd.try_clone()?)?),
            };
            // A pidfd is readable from the end of the process on.
            watch.read(|| Ok(())).await?;
        }
        self.collect(WaitPidFlag::empty())?.ok_or_else(|| io::Error::other("no status of a child"))
    }

    /// Waits for its end, blocking this thread.
    pub fn wait_blocking(&mut self) -> io::Result<ExitStatus> {
        self.collect(WaitPidFlag::empty())?.ok_or_else(|| io::Error::other("no status of a child"))
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.collect(WaitPidFlag::WNOHANG)
    }

    /// Sends a signal (pidfd_send_signal(2)). That it has ended already is no error.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> io::Result<()> {
        if self.status.is_some() {
            return Ok(());
        }
        self::signal(&self.pidfd, signal)
    }

    /// Lets it be nobody's: it goes on when we end. It is for init to wait for it then.
    pub fn let_go(mut self) {
        // as if it had ended: nothing is done about it when this is dropped
        self.status.get_or_insert_default();
    }

    /// Sends SIGKILL.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(nix::sys::signal::Signal::SIGKILL)
    }

    fn collect(&mut self, flags: WaitPidFlag) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            let mut status = 0;
            let flags = flags.bits();
            let pid = loop {
                // SAFETY: a child of ours that has not been waited for; `status` outlives the call.
                let pid = unsafe { libc::waitpid(self.pid, &raw mut status, flags) };
                if pid >= 0 {
                    break pid;
                }
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            };
            if pid == self.pid {
                self.status = Some(ExitStatus::from_raw(status));
            }
        }
        Ok(self.status)
    }
}

/// Sends a signal to the process of a pidfd (pidfd_send_signal(2)). That it has ended is no error.
pub fn signal(pidfd: &OwnedFd, signal: nix::sys::signal::Signal) -> io::Result<()> {
    // SAFETY: the pidfd is open; no siginfo, no flags.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as libc::c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        },
    }
}

impl AsFd for Child {
    /// The pidfd.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if matches!(self.try_wait(), Ok(Some(_)) | Err(_)) {
            return;
        }
        let _ = self.kill();
        if matches!(self.try_wait(), Ok(None)) {
            // It is on its way; do not hold up who drops us, and do not leave a zombie either.
            let pid = self.pid;
            let _ = std::thread::Builder::new()
                .name("reaper".to_owned())
                .spawn(move || nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None));
        }
    }
}
