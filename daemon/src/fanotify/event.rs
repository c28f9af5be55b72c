//! Events, with what they own.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::stat::fstat;
use tracing::error;

use super::abi::METADATA_LEN;
use super::answer::{Answered, DenyErrno, Verdict, answer_number};
use super::channel::EVENT_LEN;
use super::parse::{EventFd, RawEvent};
use super::{Channel, Error};
use crate::range::ByteRange;

/// Which file: device and inode number, as fstat(2) gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    pub dev: u64,
    pub ino: u64,
}

impl FileId {
    /// The file that `fd` is open on.
    pub fn of(fd: impl AsFd) -> nix::Result<Self> {
        Ok(stat(fd)?.0)
    }
}

/// The file that `fd` is open on, and its size in bytes.
fn stat(fd: impl AsFd) -> nix::Result<(FileId, u64)> {
    let stat = fstat(fd)?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    Ok((FileId { dev: stat.st_dev, ino: stat.st_ino }, size))
}

/// What was read from a [`Channel`].
#[derive(Debug)]
pub enum Event {
    /// A reader waits.
    Permission(PermissionEvent),
    /// The kernel could not give us an fd and has denied the access. The errno, positive: `EMFILE`
    /// is a limit of this process.
    Refused { errno: i32, pid: i32 },
    /// Accesses were allowed without a question. Can't happen to a group with an unlimited queue.
    Overflow,
    /// Something that was not asked for and needs no answer.
    Other { mask: u64 },
}

impl Event {
    /// How much the kernel writes for it, in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        let length = match self {
            // what is refused had a range, as all have that are asked for
            Self::Permission(PermissionEvent { range: Some(_), .. }) | Self::Refused { .. } => {
                EVENT_LEN
            }
            Self::Permission(_) | Self::Overflow | Self::Other { .. } => METADATA_LEN,
        };
        length as u64
    }

    /// Takes the fds of an event over.
    ///
    /// # Safety
    /// `raw` was parsed from what a read of `channel` has just returned, and is taken only once: its
    /// fds are open, and nobody else's.
    pub(super) unsafe fn take(raw: RawEvent, channel: &Channel) -> Self {
        let is_permission = raw.is_permission();
        for pidfd in raw.pidfds {
            // SAFETY: the kernel has installed it for this event, as the caller promises.
            drop(unsafe { OwnedFd::from_raw_fd(pidfd) });
        }
        match raw.fd {
            EventFd::Open(number) => {
                // SAFETY: the kernel has installed it for this event, as the caller promises.
                let fd = unsafe { OwnedFd::from_raw_fd(number) };
                if is_permission {
                    Self::Permission(PermissionEvent {
                        fd,
                        channel: channel.clone(),
                        mask: raw.mask,
                        pid: raw.pid,
                        range: raw.range,
                        settled: false,
                    })
                } else {
                    Self::Other { mask: raw.mask }
                }
            }
            EventFd::Error(errno) => Self::Refused { errno, pid: raw.pid },
            EventFd::None if raw.mask & super::abi::FAN_Q_OVERFLOW != 0 => Self::Overflow,
            EventFd::None => Self::Other { mask: raw.mask },
        }
    }
}

/// A reader that waits until this is answered, with [`answer`](Self::answer) and exactly once.
///
/// Its fd is open for reading and writing, and accesses through it raise no events
/// (`FMODE_NONOTIFY`), except `ftruncate` and a new open through `/proc`: those would wait for this
/// very process. The fd is kept until the event is answered, because its number is the name of
/// the event. An event that is dropped without an answer is denied with `EIO`, and a bug.
#[derive(Debug)]
#[must_use = "a reader waits for the answer"]
pub struct PermissionEvent {
    fd: OwnedFd,
    channel: Channel,
    mask: u64,
    pid: i32,
    range: Option<ByteRange>,
    settled: bool,
}

impl PermissionEvent {
    /// The bytes that are accessed, rounded out to pages, neither clamped to the file nor necessarily
    /// any: `count == 0` and offsets past the end are real. `None`: the kernel did not say.
    #[must_use]
    pub fn range(&self) -> Option<ByteRange> {
        self.range
    }

    /// The process that waits; 0 if it is not in this pid namespace.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What it is about, as bits (fanotify(7)).
    #[must_use]
    pub fn mask(&self) -> u64 {
        self.mask
    }

    /// The number by which the kernel knows the event.
    #[must_use]
    pub fn number(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The file that is accessed.
    pub fn file_id(&self) -> nix::Result<FileId> {
        FileId::of(&self.fd)
    }

    /// The file that is accessed, and its size in bytes.
    pub fn file(&self) -> nix::Result<(FileId, u64)> {
        stat(&self.fd)
    }

    /// Lets the reader go on, or fail. Then the fd is closed.
    ///
    /// # Errors
    /// The kernel did not take it, and the reader stays blocked. Does not happen to an fd that is a
    /// fanotify group's.
    pub fn answer(self, verdict: Verdict) -> Result<Answered, Error> {
        self.answer_then(verdict, || ())
    }

    /// The same, and does something between the two: while the number can't belong to another event yet.
    pub fn answer_then(mut self, verdict: Verdict, then: impl FnOnce()) -> Result<Answered, Error> {
        self.settled = true;
        let answered = answer_number(self.channel.as_fd(), self.number(), verdict);
        then();
        answered
    }

    /// Closes the fd and leaves the reader waiting, for a process that comes after this one: the
    /// queue fd is about to be closed and the event returns to the queue, or the group goes to
    /// a successor that answers by [number](Self::number). Nothing may be read from the
    /// channel after that, since a new event could get the same number.
    pub fn leave(mut self) {
        self.settled = true;
    }
}

impl AsFd for PermissionEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for PermissionEvent {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let number = self.number();
        error!(number, pid = self.pid, range = ?self.range, "an event was dropped without an answer");
        let verdict = Verdict::Deny(DenyErrno::Eio);
        if let Err(error) = answer_number(self.channel.as_fd(), number, verdict) {
            error!(error = &error as &dyn std::error::Error, "a reader stays blocked");
        }
    }
}
