//! Answers to permission events.

use std::os::fd::{BorrowedFd, RawFd};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{Error, abi};

/// Why an access is denied: the errnos that the kernel takes in an answer (`FAN_DENY_ERRNO`,
/// `fs/notify/fanotify/fanotify_user.c:process_access_response`). With any other, the `write` fails
/// with `EINVAL` *and the reader stays blocked*.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum DenyErrno {
    Eperm,
    Eio,
    Ebusy,
    Etxtbsy,
    Eagain,
    Enospc,
    Edquot,
}

impl DenyErrno {
    /// All there are.
    pub const ALL: [Self; 7] = [
        Self::Eperm,
        Self::Eio,
        Self::Ebusy,
        Self::Etxtbsy,
        Self::Eagain,
        Self::Enospc,
        Self::Edquot,
    ];

    /// The number, as in errno(3).
    #[must_use]
    pub fn number(self) -> i32 {
        match self {
            Self::Eperm => libc::EPERM,
            Self::Eio => libc::EIO,
            Self::Ebusy => libc::EBUSY,
            Self::Etxtbsy => libc::ETXTBSY,
            Self::Eagain => libc::EAGAIN,
            Self::Enospc => libc::ENOSPC,
            Self::Edquot => libc::EDQUOT,
        }
    }
}

/// What becomes of the access that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Verdict {
    Allow,
    Deny(DenyErrno),
}

impl Verdict {
    /// The `response` field of struct fanotify_response.
    fn response(self) -> u32 {
        match self {
            Self::Allow => abi::FAN_ALLOW,
            Self::Deny(errno) => {
                abi::FAN_DENY | errno.number().unsigned_abs() << abi::FAN_ERRNO_SHIFT
            }
        }
    }
}

/// What became of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// The reader has it.
    Delivered,
    /// Nobody waits for it: the reader was killed, or the event was answered before or went back
    /// to the queue.
    ReaderGone,
}

/// Answers the event whose fd has, or had in a process that is gone, this number.
///
/// The kernel matches an answer by that number alone and takes the event that was read first
/// (`process_access_response`). So nothing may be read from a group as long as numbers of an
/// earlier process are owed an answer, unless those numbers are occupied in this process. For an
/// event of this process there is [`PermissionEvent::answer`](super::PermissionEvent::answer).
///
/// # Errors
/// The reader stays blocked, whatever they are.
pub fn answer_number(
    channel: BorrowedFd<'_>,
    number: RawFd,
    verdict: Verdict,
) -> Result<Answered, Error> {
    match (write_response(channel, number, verdict.response()), verdict) {
        // An errno that this kernel doesn't take. Better the wrong one than a reader that waits for ever.
        (Err(Errno::EINVAL), Verdict::Deny(errno)) => {
            warn!(number, ?errno, "the kernel does not take this errno, denied with EPERM");
            write_response(channel, number, abi::FAN_DENY)
        }
        (result, _) => result,
    }
    .map_err(|errno| Error::Answer { number, source: errno.into() })
}

/// One answer a `write`: what follows the first in a buffer is not looked at
/// (`fs/notify/fanotify/fanotify_user.c:fanotify_write`).
fn write_response(
    channel: BorrowedFd<'_>,
    number: RawFd,
    response: u32,
) -> Result<Answered, Errno> {
    let mut bytes = [0; abi::RESPONSE_LEN];
    bytes[..4].copy_from_slice(&number.to_ne_bytes());
    bytes[4..].copy_from_slice(&response.to_ne_bytes());
    loop {
        match nix::unistd::write(channel, &bytes) {
            Ok(_) => return Ok(Answered::Delivered),
            Err(Errno::ENOENT) => return Ok(Answered::ReaderGone),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses() {
        assert_eq!(Verdict::Allow.response(), 1);
        assert_eq!(Verdict::Deny(DenyErrno::Eio).response(), 0x0500_0002);
        assert_eq!(Verdict::Deny(DenyErrno::Edquot).response(), 122 << 24 | 2);
    }
}
