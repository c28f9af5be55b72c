//! Chaos: readers that check every byte of lazy trees while the daemon's processes are killed all the
//! time and its origin breaks now and then. `hydrant-chaos` runs it; [`report`] says what is counted.
//!
//! - [`content`]: files whose bytes follow from their numbers. No byte is zero.
//! - [`board`]: shared memory in which readers announce each access before they begin, and write down
//!   what came of it.
//! - [`reader`], [`crew`]: the readers, long-lived processes of their own, and who starts and watches
//!   them.
//! - [`origin`], [`weather`]: a fast git server, and the faults in front of it.
//! - [`trees`]: trees that are cloned, read once, removed and cloned again, so that there is always
//!   something that was never read.
//! - [`killer`]: SIGKILL for workers and supervisors.
//! - [`witness`]: compares `hydrant queue` and the counters with what the readers announce.
//! - [`verdict`]: what of all that should not have been.
//! - [`guard`]: cleans up when the program is killed.
//! - [`peers`]: the same readers and kills for designs with a single process.

pub mod board;
pub mod content;
pub mod crew;
pub mod guard;
pub mod killer;
pub mod origin;
pub mod peers;
pub mod reader;
pub mod report;
pub mod run;
pub mod trees;
pub mod verdict;
pub mod weather;
pub mod witness;

/// Nanoseconds of `CLOCK_MONOTONIC`: the same clock in all processes.
#[must_use]
pub fn now() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    time.map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// Milliseconds in nanoseconds.
pub const MS: u64 = 1_000_000;
