//! The brokered queue's state: which event waits, which is with the worker, what becomes of it.
//!
//! A pure state machine: no I/O, no clock, no fds. The shard that owns it
//! reads the fanotify group, tells it what happened and does what it says. Each event is in exactly
//! one of two states until it is answered, and is answered exactly once:
//!
//! - *waiting*: for a worker. Waiting events go out in the order in which the kernel reported them.
//! - *in flight*: with the worker. When the worker dies they wait again, and since ids are given
//!   in the order of reading, "at the head, in order" is the order of the ids.
//!
//! An event that was in flight at [`MAX_STRIKES`] deaths that the worker brought about itself is
//! given up: it would kill the next one as well.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::fanotify::{DenyErrno, Verdict};
use crate::ids::{EventId, SegmentId};
use crate::range::ByteRange;

/// So many deaths of its workers end an event.
pub const MAX_STRIKES: u32 = 3;

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// By its own doing: a crash, an error exit, silence past the deadline.
    Fault,
    /// From outside: killed or told to stop. Says nothing about the events that it had.
    Outside,
}

/// One event that has not been answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    pub segment: SegmentId,
    /// What must be there before the reader may go on: whole blocks within the segment.
    pub range: ByteRange,
    /// The process that waits, as the kernel names it.
    pub pid: i32,
    /// When the event was read, by a clock that goes on when the supervisor is another one
    /// ([`inflight::now`](super::inflight::now)), as all times here.
    pub arrived: Duration,
    /// How often it was given to a worker.
    pub attempts: u32,
    /// Deaths by [`Death::Fault`] at which it was in flight.
    pub strikes: u32,
    /// When it was given to the present worker; `None` while it waits.
    pub dispatched: Option<Duration>,
    /// When it was heard of last: read, or taken over from another supervisor, given to a worker,
    /// named by one ([`Broker::keeps_waiting`]), or taken back from one that died.
    pub heard: Duration,
    /// What keeps it, as a worker said last.
    pub reason: Option<String>,
}

impl Pending {
    /// An event that was read just now and waits for a worker.
    #[must_use]
    pub fn new(segment: SegmentId, range: ByteRange, pid: i32, now: Duration) -> Self {
        Self {
            segment,
            range,
            pid,
            arrived: now,
            attempts: 0,
            strikes: 0,
            dispatched: None,
            heard: now,
            reason: None,
        }
    }

    /// What is wrong at `now`, if an event may be kept without a word for `patience`, and for
    /// `longest` at most.
    #[must_use]
    pub fn overdue(&self, now: Duration, patience: Duration, longest: Duration) -> Option<Overdue> {
        if now.saturating_sub(self.heard) > patience {
            Some(Overdue::Silent)
        } else if now.saturating_sub(self.arrived) > longest {
            Some(Overdue::Endless)
        } else {
            None
        }
    }
}

/// Why an event has waited long enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overdue {
    /// Nothing was heard of it. A worker that has it is stuck: it answers by the deadline, with
    /// an errno if need be.
    Silent,
    /// There was progress all the time, and no end.
    Endless,
}

/// An event that has come to its end: give the kernel this answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub event: EventId,
    pub verdict: Verdict,
    pub pending: Pending,
    pub reason: Option<String>,
}

/// See the module's documentation. Costs about 200 bytes and a logarithmic number of steps an event.
#[derive(Debug, Default)]
pub struct Broker {
    pending: BTreeMap<EventId, Pending>,
    /// The events without [`Pending::dispatched`].
    waiting: BTreeSet<EventId>,
}

impl Broker {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A reader waits for `range` of `segment`. `event` is above that of all events before it.
    pub fn arrived(
        &mut self,
        event: EventId,
        segment: SegmentId,
        range: ByteRange,
        pid: i32,
        now: Duration,
    ) {
        self.restored(event, Pending::new(segment, range, pid, now));
    }

    /// An event that a supervisor before this one has read, and nobody has answered.
    pub fn restored(&mut self, event: EventId, pending: Pending) {
        self.pending.insert(event, Pending { dispatched: None, ..pending });
        self.waiting.insert(event);
    }

    /// The event that goes to the worker next.
    #[must_use]
    pub fn next_to_dispatch(&self) -> Option<(EventId, &Pending)> {
        let event = self.waiting.first()?;
        Some((*event, self.pending.get(event)?))
    }

    /// The worker has been sent this event.
    pub fn dispatched(&mut self, event: EventId, now: Duration) {
        if self.waiting.remove(&event)
            && let Some(pending) = self.pending.get_mut(&event)
        {
            pending.attempts += 1;
            pending.dispatched = Some(now);
            pending.heard = now;
        }
    }

    /// The worker answers. `None` when nobody waits for that answer: the event is unknown or was
    /// not given to this worker.
    pub fn answered(
        &mut self,
        event: EventId,
        verdict: Verdict,
        reason: Option<String>,
    ) -> Option<Answer> {
        self.pending.get(&event)?.dispatched?;
        self.end(event, verdict, reason)
    }

    /// The worker says what keeps an event.
    pub fn keeps_waiting(&mut self, event: EventId, reason: String, now: Duration) {
        if let Some(pending) = self.pending.get_mut(&event)
            && pending.dispatched.is_some()
        {
            pending.reason = Some(reason);
            pending.heard = now;
        }
    }

    /// The worker is gone. What it had waits again, but for the events that are given up.
    pub fn worker_died(&mut self, death: Death, now: Duration) -> Vec<Answer> {
        let mut given_up = Vec::new();
        for (event, pending) in &mut self.pending {
            if pending.dispatched.take().is_none() {
                continue;
            }
            self.waiting.insert(*event);
            pending.heard = now;
            if death == Death::Fault {
                pending.strikes += 1;
                if pending.strikes >= MAX_STRIKES {
                    given_up.push(*event);
                }
            }
        }
        let reason = "its worker died three times while it had this event";
        given_up
            .into_iter()
            .filter_map(|event| {
                self.end(event, Verdict::Deny(DenyErrno::Eio), Some(reason.to_owned()))
            })
            .collect()
    }

    /// The administrator, or the deadline, ends an event. The caller tells the worker if the
    /// event was in flight ([`Pending::dispatched`] of the answer).
    pub fn deny(&mut self, event: EventId, errno: DenyErrno, reason: &str) -> Option<Answer> {
        self.end(event, Verdict::Deny(errno), Some(reason.to_owned()))
    }

    /// What it waited for is there, without any worker's doing.
    pub fn found_present(&mut self, event: EventId) -> Option<Answer> {
        self.end(event, Verdict::Allow, None)
    }

    /// The administrator wants it tried anew. True when the worker must be told to forget it.
    pub fn retry(&mut self, event: EventId) -> Option<bool> {
        let pending = self.pending.get_mut(&event)?;
        let was_in_flight = pending.dispatched.take().is_some();
        pending.reason = None;
        self.waiting.insert(event);
        Some(was_in_flight)
    }

    /// The events that have waited since before `before`, oldest first.
    pub fn older_than(&self, before: Duration) -> impl Iterator<Item = (EventId, &Pending)> {
        // ids are in the order of arrival
        self.pending
            .iter()
            .take_while(move |(_, pending)| pending.arrived < before)
            .map(|(event, pending)| (*event, pending))
    }

    /// All events, in the order in which they were read.
    pub fn iter(&self) -> impl Iterator<Item = (EventId, &Pending)> {
        self.pending.iter().map(|(event, pending)| (*event, pending))
    }

    #[must_use]
    pub fn get(&self, event: EventId) -> Option<&Pending> {
        self.pending.get(&event)
    }

    /// Events that wait for a worker.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Events that are with the worker.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len() - self.waiting.len()
    }

    fn end(&mut self, event: EventId, verdict: Verdict, reason: Option<String>) -> Option<Answer> {
        let pending = self.pending.remove(&event)?;
        self.waiting.remove(&event);
        let reason = reason.or_else(|| pending.reason.clone());
        Some(Answer { event, verdict, pending, reason })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const T: Duration = Duration::from_secs(1);

    thread_local! {
        static LAST: Cell<u64> = const { Cell::new(0) };
    }

    fn arrive(broker: &mut Broker) -> EventId {
        let event = EventId(LAST.replace(LAST.get() + 1));
        broker.arrived(event, SegmentId(1), ByteRange::new(0, 4096), 1, T);
        event
    }

    #[test]
    fn the_events_of_a_supervisor_that_died_come_first() {
        let mut before = Broker::new();
        let old = [arrive(&mut before), arrive(&mut before)];
        dispatch(&mut before);
        let mut broker = Broker::new();
        let new = arrive(&mut broker);
        for (event, pending) in before.iter() {
            broker.restored(event, pending.clone());
        }
        assert_eq!((broker.waiting(), broker.in_flight()), (3, 0));
        let order: Vec<_> = std::iter::from_fn(|| dispatch(&mut broker)).collect();
        assert_eq!(order, [old[0], old[1], new]);
        assert_eq!(broker.get(old[0]).unwrap().attempts, 2);
    }

    fn dispatch(broker: &mut Broker) -> Option<EventId> {
        let (event, _) = broker.next_to_dispatch()?;
        broker.dispatched(event, T);
        Some(event)
    }

    #[test]
    fn a_dead_workers_events_come_first_and_in_order() {
        let mut broker = Broker::new();
        let events: Vec<_> = (0..4).map(|_| arrive(&mut broker)).collect();
        dispatch(&mut broker);
        dispatch(&mut broker);
        dispatch(&mut broker);
        broker.answered(events[1], Verdict::Allow, None).unwrap();
        assert!(broker.worker_died(Death::Outside, T).is_empty());
        let order: Vec<_> = std::iter::from_fn(|| dispatch(&mut broker)).collect();
        assert_eq!(order, [events[0], events[2], events[3]]);
        assert_eq!(broker.get(events[0]).unwrap().attempts, 2);
    }

    #[test]
    fn an_event_that_kills_its_workers_is_given_up() {
        let mut broker = Broker::new();
        let event = arrive(&mut broker);
        for _ in 0..10 {
            dispatch(&mut broker);
            assert!(
                broker.worker_died(Death::Outside, T).is_empty(),
                "kills from outside don't count"
            );
        }
        for death in 1..=MAX_STRIKES {
            dispatch(&mut broker);
            let given_up = broker.worker_died(Death::Fault, T);
            assert_eq!(given_up.len(), usize::from(death == MAX_STRIKES));
        }
        assert!(broker.get(event).is_none());
    }

    #[test]
    fn late_and_forged_answers_count_for_nothing() {
        let mut broker = Broker::new();
        let event = arrive(&mut broker);
        assert!(broker.answered(event, Verdict::Allow, None).is_none(), "was not given out");
        assert!(broker.answered(EventId(99), Verdict::Allow, None).is_none());
        dispatch(&mut broker);
        broker.worker_died(Death::Outside, T);
        assert!(broker.answered(event, Verdict::Allow, None).is_none(), "from the dead worker");
        dispatch(&mut broker);
        assert!(broker.answered(event, Verdict::Allow, None).is_some());
        assert!(broker.answered(event, Verdict::Allow, None).is_none(), "twice");
    }

    #[test]
    fn who_is_heard_of_is_not_overdue() {
        let (patience, longest) = (150 * T, 1800 * T);
        let mut broker = Broker::new();
        let event = arrive(&mut broker);
        let at =
            |broker: &Broker, n: u32| broker.get(event).unwrap().overdue(n * T, patience, longest);
        assert_eq!(at(&broker, 151), None);
        assert_eq!(at(&broker, 152), Some(Overdue::Silent), "no worker took it");
        broker.keeps_waiting(event, "not the worker's".into(), 100 * T);
        assert_eq!(at(&broker, 152), Some(Overdue::Silent));
        broker.dispatched(event, 140 * T);
        assert_eq!(at(&broker, 290), None);
        assert_eq!(at(&broker, 291), Some(Overdue::Silent));
        broker.keeps_waiting(event, "42 MB have come".into(), 290 * T);
        assert_eq!(at(&broker, 440), None);
        assert_eq!(at(&broker, 441), Some(Overdue::Silent));
        for n in 300..=1801 {
            broker.keeps_waiting(event, "more has come".into(), n * T);
            assert_eq!(at(&broker, n), None);
        }
        assert_eq!(at(&broker, 1802), Some(Overdue::Endless));
    }
}
