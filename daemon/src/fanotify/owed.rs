//! Answers that a process before this one has left owing.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use fs_err::File;
use nix::fcntl::{FcntlArg, fcntl};

use super::{Answered, Channel, Error, Verdict, answer_number};

/// An event that a process which is gone has read: its reader waits, its fd is closed, and only its
/// number is known. The number is kept occupied in this process, so that no new event gets the
/// same one: the kernel would take the answer to one for an answer to the other.
///
/// Dropped without an answer, it leaves the reader waiting and the number to the next event. So that is
/// for a process that ends.
#[derive(Debug)]
#[must_use = "a reader waits for the answer"]
pub struct Owed {
    channel: Channel,
    number: RawFd,
    place: Option<OwnedFd>,
}

impl Owed {
    /// Before anything is read from `channel`, and before this process opens much: a number that
    /// is in use already is as good as occupied only as long as what has it stays open, see
    /// [`is_occupied`](Self::is_occupied).
    pub fn new(channel: &Channel, number: RawFd) -> io::Result<Self> {
        let null = OwnedFd::from(File::open("/dev/null")?.into_parts().0);
        if null.as_raw_fd() == number {
            return Ok(Self { channel: channel.clone(), number, place: Some(null) });
        }
        // the lowest number from `number` on that is free
        let copy = fcntl(&null, FcntlArg::F_DUPFD_CLOEXEC(number))?;
        // SAFETY: fcntl has just opened it, and nobody else knows it.
        let copy = unsafe { OwnedFd::from_raw_fd(copy) };
        let place = (copy.as_raw_fd() == number).then_some(copy);
        Ok(Self { channel: channel.clone(), number, place })
    }

    /// The number is kept by this value alone. If not, something else has it, and the event must be
    /// answered before that is closed.
    #[must_use]
    pub fn is_occupied(&self) -> bool {
        self.place.is_some()
    }

    #[must_use]
    pub fn number(&self) -> RawFd {
        self.number
    }

    /// Lets the reader go on, or fail.
    pub fn answer(self, verdict: Verdict) -> Result<Answered, Error> {
        self.answer_then(verdict, || ())
    }

    /// The same, and does something while the number is not free yet.
    pub fn answer_then(self, verdict: Verdict, then: impl FnOnce()) -> Result<Answered, Error> {
        let answered = answer_number(self.channel.as_fd(), self.number, verdict);
        then();
        answered
    }
}
