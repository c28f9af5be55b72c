//! Waiting until there is something to be read.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// An fd in the present tokio runtime.
#[derive(Debug)]
pub struct Readable(AsyncFd<OwnedFd>);

impl Readable {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: the fd is owned by the AsyncFd, which never gives it away.
        Ok(Self(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?))
    }

    /// Calls `read` whenever something may be there, until it gives something else than `WouldBlock`.
    pub async fn read<T>(&self, mut read: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        self.0.async_io(Interest::READABLE, |_| read()).await
    }
}
