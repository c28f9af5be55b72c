//! The kernel interface of fanotify(7), as far as pre-content events need it. The only place that
//! knows flags, layouts and ioctls.
//!
//! - [`Group`]: what events come from. It has [marks](mark) on segments. Its last close *allows*
//!   everything that is pending and drops the marks, so it lives as long as anything is mounted.
//! - [`Channel`]: an fd that events are read from and answers written to: the group's own, or the
//!   queue fd of a restartable group.
//! - [`PermissionEvent`]: a reader that waits. It is answered exactly once.

mod abi;
mod answer;
mod channel;
mod error;
mod event;
mod fdinfo;
mod group;
pub mod mark;
mod owed;
mod parse;
#[cfg(test)]
pub(crate) mod testing;

pub use answer::{Answered, DenyErrno, Verdict, answer_number};
pub use channel::{AsyncChannel, Channel, Read};
pub use error::Error;
pub use event::{Event, FileId, PermissionEvent};
pub use fdinfo::{GroupInfo, Mark};
pub use group::{Group, QueueKind, probe};
pub use owed::Owed;
pub use parse::{Batch, EventFd, Fault, RawEvent, parse};

#[cfg(test)]
mod guest_tests;
#[cfg(test)]
mod root_tests;
