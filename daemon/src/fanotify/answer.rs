//! Answers to permission events.

use serde::{Deserialize, Serialize};

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
