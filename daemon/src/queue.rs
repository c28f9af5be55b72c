//! The queue: from a reader's page fault to the worker that fetches, and back.
//!
//! A worker sees *next event* and *answer*. Behind that is one of two queues: the brokered one,
//! where the supervisor reads the fanotify group and keeps every event until it is answered, and
//! the kernel's own, on kernels with restartable permission events.

pub mod broker;
#[cfg(test)]
mod conformance;
pub mod decide;
pub mod inflight;
pub mod kernel;
#[cfg(test)]
mod model;
pub mod quarantine;
pub mod wire;
