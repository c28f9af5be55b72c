//! Reading events.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use tracing::error;

use super::parse::parse;
use super::{Error, Event};

/// How much is read at once, in bytes: 85 events with a range. Every event is an fd.
const BUFFER_LEN: usize = 4096;

/// Where the kernel writes events to. One serves any number of channels.
#[derive(Debug)]
pub struct EventBuffer(Box<[u8; BUFFER_LEN]>);

impl Default for EventBuffer {
    fn default() -> Self {
        Self(Box::new([0; BUFFER_LEN]))
    }
}

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

    /// Reads what there is, up to 85 events. Doesn't wait (groups are made nonblocking).
    pub fn read(&self, buffer: &mut EventBuffer) -> Result<Read, Error> {
        let length = loop {
            match nix::unistd::read(self, buffer.0.as_mut_slice()) {
                Ok(0) => return Ok(Read::Gone),
                Ok(length) => break length,
                Err(Errno::EAGAIN) => return Ok(Read::Empty),
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    return Err(Error::Read { fd: self.as_raw_fd(), source: errno.into() });
                }
            }
        };
        let batch = parse(buffer.0.get(..length).unwrap_or_default());
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

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// For tokio's `AsyncFd`.
impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
