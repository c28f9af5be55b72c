//! The kernel's side of an event that waits.

use std::io;
use std::os::fd::RawFd;

use crate::fanotify::{self, Answered, Owed, PermissionEvent, Verdict};
use crate::ids::{EventId, PoolId};
use crate::queue::broker::Pending;
use crate::queue::inflight::{self, Record, Slot, State};
use crate::segment::presence;
use crate::supervisor::store::Store;

/// How an event is answered.
#[derive(Debug)]
pub enum Waiter {
    /// This process has read it.
    Event(PermissionEvent),
    /// A supervisor before this one has, and is gone.
    Owed(Owed),
}

/// An event and its place in the in-flight table.
#[derive(Debug)]
pub struct Held {
    pub waiter: Waiter,
    /// `None`: the table was full.
    pub slot: Option<Slot>,
    /// From the event's arrival to its answer.
    pub span: tracing::Span,
}

impl Held {
    pub fn new(event: EventId, waiter: Waiter, slot: Option<Slot>) -> Self {
        Self { waiter, slot, span: tracing::info_span!("event", id = event.0) }
    }
}

impl Waiter {
    pub fn number(&self) -> RawFd {
        match self {
            Self::Event(event) => event.number(),
            Self::Owed(owed) => owed.number(),
        }
    }

    /// Does something before another event can get the number.
    pub fn answer_then(
        self,
        verdict: Verdict,
        then: impl FnOnce(),
    ) -> Result<Answered, fanotify::Error> {
        match self {
            Self::Event(event) => event.answer_then(verdict, then),
            Self::Owed(owed) => owed.answer_then(verdict, then),
        }
    }

    /// Leaves the reader to a supervisor after this one. This process keeps the number to its end: another shard may go on
    /// for a moment, and an event of that must not get it.
    pub fn leave(self) {
        std::mem::forget(self);
    }

    /// All that the reader wants is there.
    pub fn is_present(
        &self,
        store: &Store,
        pool: Option<PoolId>,
        pending: &Pending,
    ) -> io::Result<bool> {
        match (self, pool) {
            (Self::Event(event), _) => Ok(presence::present(event, pending.range)?),
            (Self::Owed(_), Some(pool)) => store.is_present(pool, pending.segment, pending.range),
            (Self::Owed(_), None) => Err(io::Error::other("its segment is not served any more")),
        }
    }
}

/// What the table is to say of an event.
pub fn record(event: EventId, number: RawFd, pending: &Pending, worker: Option<i32>) -> Record {
    let nanos = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let in_flight = pending.dispatched.is_some();
    Record {
        event,
        number,
        segment: pending.segment,
        range: pending.range,
        pid: pending.pid,
        since: nanos(pending.arrived),
        dispatched: pending.dispatched.map_or(0, nanos),
        attempts: pending.attempts,
        strikes: pending.strikes,
        worker: worker.filter(|_| in_flight).map_or(0, i32::cast_unsigned),
        state: if in_flight { State::InFlight } else { State::Waiting },
    }
}

/// The event of a record that another supervisor wrote. It waits anew: its worker is gone.
pub fn pending(record: &Record) -> Pending {
    Pending {
        segment: record.segment,
        range: record.range,
        pid: record.pid,
        arrived: std::time::Duration::from_nanos(record.since),
        attempts: record.attempts,
        strikes: record.strikes,
        dispatched: None,
        heard: std::time::Duration::from_nanos(inflight::now()),
        reason: None,
    }
}
