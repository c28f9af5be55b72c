//! The worker: takes events from its queue, fetches what they need, writes it into the segments and
//! answers. Has no privileges.

pub mod engine;
pub mod pool;
pub mod readahead;
pub mod sandbox;
pub mod schedule;
#[cfg(test)]
mod simulation;

/// The number of an object in its pool: counts the records of the pool's data segments, in the
/// order in which these were attached. Neighbours in the tree have neighbouring numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectNo(pub u32);
