//! The worker: takes events from its queue, fetches what they need, writes it into the segments and
//! answers. Has no privileges.

pub mod compose;
pub mod control;
pub mod engine;
pub mod fill;
pub mod pool;
mod process;
pub mod queue;
pub mod readahead;
pub mod request;
pub mod run;
pub mod sandbox;
pub mod schedule;
#[cfg(test)]
mod simulation;
pub mod trace;

pub use process::main;

/// The number of an object in its pool: counts the records of the pool's data segments, in the
/// order in which these were attached. Neighbours in the tree have neighbouring numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectNo(pub u32);
