//! What can go wrong between this program and the kernel's fanotify.

use std::io;
use std::os::fd::RawFd;

use thiserror::Error;

/// An operation on a fanotify group that the kernel refused.
#[derive(Debug, Error)]
pub enum Error {
    #[error("cannot make a fanotify group (fanotify_init flags {flags:#x})")]
    Init { flags: u32, source: io::Error },
    #[error("fd {fd} is not a fanotify group")]
    NotAGroup { fd: RawFd },
    #[error("cannot read what the kernel says of fanotify fd {fd}")]
    Info { fd: RawFd, source: io::Error },
    /// Somebody has a queue fd of the group still open: a worker that has not quite died.
    #[error("the queue of fanotify group {fd} is open already")]
    QueueBusy { fd: RawFd },
    #[error("cannot open the queue of fanotify group {fd}")]
    OpenQueue { fd: RawFd, source: io::Error },
    #[error("cannot read events from fanotify fd {fd}")]
    Read { fd: RawFd, source: io::Error },
    #[error("cannot wait for events of fanotify fd {fd}")]
    Wait { fd: RawFd, source: io::Error },
    #[error("cannot {operation} fd {target}")]
    Mark { operation: &'static str, target: RawFd, source: io::Error },
    /// The reader stays blocked.
    #[error("cannot answer the event with fd number {number}")]
    Answer { number: RawFd, source: io::Error },
}
