//! Reading events.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::error;

use super::parse::parse;
use super::{Error, Event, abi};

/// How much is read at once, in bytes: 16 events with a range. Every event is an fd, and from the
/// kernel's reading of the first until the last is written down nobody else knows of them.
const BUFFER_LEN: usize = 16 * EVENT_LEN;

/// An event with a range, in bytes.
pub(super) const EVENT_LEN: usize = abi::METADATA_LEN + abi::INFO_RANGE_LEN;

/// What one read gave.
#[derive(Debug)]
pub enum Read {
    /// At least one event, in the order in which the kernel reports them.
    Events(Vec<Event>),
    /// There is none now.
    Empty,
    /// There will never be one: the group is gone. Only a queue fd says that.
    Gone,
}

/// An fd for reading events and writing answers. Every event has a clone of it, which costs a
/// reference count; the last one closes the fd.
#[derive(Debug, Clone)]
pub struct Channel(Arc<OwnedFd>);

impl Channel {
    /// From a queue fd that [`Group::open_queue`](super::Group::open_queue) gave to another process.
    #[must_use]
    pub fn from_owned_fd(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    /// How much there is to read at this moment, in bytes: the [lengths](Event::length) of the events that
    /// wait (`fanotify_ioctl` in `fs/notify/fanotify/fanotify_user.c`). Not of a restartable group's own fd.
    pub fn queued(&self) -> Result<u64, Error> {
        let mut bytes = 0;
        // SAFETY: the request writes one int, which outlives the call.
        match unsafe { fionread(self.as_raw_fd(), &raw mut bytes) } {
            Ok(_) => Ok(u64::try_from(bytes).unwrap_or(0)),
            Err(errno) => Err(Error::Read { fd: self.as_raw_fd(), source: errno.into() }),
        }
    }

    /// Reads what there is, up to 16 events. Doesn't wait (groups are made nonblocking).
    pub fn read(&self) -> Result<Read, Error> {
        self.read_into(&mut [0; BUFFER_LEN])
    }

    /// Reads up to `count` events that have a range.
    #[cfg(test)]
    pub(crate) fn read_at_most(&self, count: usize) -> Result<Read, Error> {
        self.read_into(&mut vec![0; count * EVENT_LEN])
    }

    fn read_into(&self, buffer: &mut [u8]) -> Result<Read, Error> {
        let length = loop {
            match nix::unistd::read(self, buffer) {
                Ok(0) => return Ok(Read::Gone),
                Ok(length) => break length,
                Err(Errno::EAGAIN) => return Ok(Read::Empty),
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    return Err(Error::Read { fd: self.as_raw_fd(), source: errno.into() });
                }
            }
        };
        let batch = parse(buffer.get(..length).unwrap_or_default());
        if let Some(fault) = batch.fault {
            error!(%fault, good = batch.good, length, "the kernel's events are not understood");
        }
        let events = batch.events.into_iter().map(|raw| {
            // SAFETY: parsed from what the kernel has just written, and each event is taken once.
            unsafe { Event::take(raw, self) }
        });
        Ok(Read::Events(events.collect()))
    }
}

nix::ioctl_read_bad!(fionread, libc::FIONREAD, libc::c_int);

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A channel whose events a task waits for.
#[derive(Debug)]
pub struct AsyncChannel(AsyncFd<Channel>);

impl AsyncChannel {
    /// Within a tokio runtime.
    pub fn new(channel: Channel) -> Result<Self, Error> {
        let fd = channel.as_raw_fd();
        // SAFETY: a Channel owns its fd, which is the same and open until the last clone is dropped,
        // and the AsyncFd has one.
        unsafe { AsyncFd::register_with_interest(channel, Interest::READABLE) }
            .map(Self)
            .map_err(|error| Error::Wait { fd, source: error.into() })
    }

    /// Waits until there are events, and reads up to 16. `None`: there will never be one. May be
    /// dropped while it waits: no event is lost.
    pub async fn read(&self) -> Result<Option<Vec<Event>>, Error> {
        loop {
            let wait = self.0.readable().await;
            let mut ready =
                wait.map_err(|source| Error::Wait { fd: self.0.as_raw_fd(), source })?;
            match self.0.get_ref().read()? {
                Read::Events(events) => return Ok(Some(events)),
                Read::Empty => ready.clear_ready(),
                Read::Gone => return Ok(None),
            }
        }
    }

    #[must_use]
    pub fn channel(&self) -> &Channel {
        self.0.get_ref()
    }
}
