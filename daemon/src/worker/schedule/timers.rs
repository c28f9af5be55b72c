//! What is due when, and the pauses between tries.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;

use super::{BACK_OFF, Now, Wait, Waiter};
use crate::ids::EventId;
use crate::worker::ObjectNo;

/// What to look at again. A timer whose reason has gone is harmless.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    Deadline(EventId),
    Again(ObjectNo),
    Patience(ObjectNo),
}

/// So many timers may be there for nothing.
const STALE: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Timers(BinaryHeap<Reverse<(Now, Timer)>>);

impl Timers {
    pub(super) fn set(&mut self, at: Now, timer: Timer) {
        self.0.push(Reverse((at, timer)));
    }

    /// Forgets the deadlines of events that have ended, once they are many: thousands of events a
    /// second would otherwise be kept for the whole time that one may wait.
    pub(super) fn tidy(&mut self, waits: &HashMap<Waiter, Wait>) {
        if self.0.len() > 4 * waits.len() + STALE {
            self.0.retain(|Reverse((_, timer))| match timer {
                Timer::Deadline(event) => waits.contains_key(&Waiter::Event(*event)),
                Timer::Again(_) | Timer::Patience(_) => true,
            });
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn next(&self) -> Option<Now> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    /// The next timer that is due.
    pub(super) fn pop(&mut self, now: Now) -> Option<Timer> {
        if self.next()? > now {
            return None;
        }
        self.0.pop().map(|Reverse((_, timer))| timer)
    }
}

/// Pauses that differ from worker to worker, so that not all come back at the same moment; and are
/// the same for the same seed (SplitMix64).
#[derive(Debug)]
pub(super) struct Jitter(u64);

impl Jitter {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The pause before try number `tries + 1`: doubled each time, between half and all of it.
    pub(super) fn back_off(&mut self, tries: u32) -> Duration {
        let doubled = BACK_OFF.0.saturating_mul(1 << tries.saturating_sub(1).min(16));
        let half = doubled.min(BACK_OFF.1) / 2;
        half + half.mul_f64((self.next() >> 11) as f64 / (1u64 << 53) as f64)
    }
}
