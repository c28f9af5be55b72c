//! The queue of a stock kernel: we read the events and keep them.
//!
//! An event is written into the in-flight table right after it was read, before anything else is done,
//! and out of it after it was answered. What a SIGKILL catches in between gets `EAGAIN` from the next
//! supervisor (see [`kept`](crate::supervisor::kept)). Measured in a debug build, with 1,000 readers
//! on 2 cores: 14 microseconds an event in the kernel's read, 8 until it is in the table, at most 16
//! events at once.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use tracing::{debug, error, info, warn};

use super::demand::{Demand, Read};
use super::queue::{STOPS, STRAY_ANSWERS, Scope};
use super::waiter::{self, Held, Waiter};
use super::{GONE, now};
use crate::fanotify::{self, AsyncChannel, DenyErrno, Group, Owed, PermissionEvent, Verdict};
use crate::ids::EventId;
use crate::queue::broker::{Answer, Broker, Death, Overdue, Pending};
use crate::queue::decide::{Decision, decide};
use crate::queue::inflight::{Record, Slot, Table};
use crate::queue::wire::{FromQueue, ToQueue};
use crate::segment::presence;
use crate::supervisor::worker::{Worker, cut};

/// How long to wait after events could not be read.
const READ_PAUSE: Duration = Duration::from_millis(100);

/// See the module's documentation.
#[derive(Debug)]
pub struct Brokered {
    channel: AsyncChannel,
    broker: Broker,
    /// The kernel's side of the broker's events.
    events: HashMap<EventId, Held>,
    table: Table,
    serving: bool,
    /// After an error: it may be there to stay.
    read_again_at: Option<tokio::time::Instant>,
}

/// An event that is in the table, and about which nothing has been decided.
#[derive(Debug)]
struct Claimed {
    number: EventId,
    event: PermissionEvent,
    pending: Pending,
    /// Of its segment, in bytes.
    size: u64,
    slot: Option<Slot>,
}

impl Brokered {
    /// `owed`: the events that are in the table, of a supervisor before this one.
    pub fn new(
        group: &Group,
        table: Table,
        owed: Vec<(Slot, Record, Owed)>,
    ) -> Result<Self, fanotify::Error> {
        let channel = AsyncChannel::new(group.channel())?;
        let mut broker = Broker::new();
        let mut events = HashMap::new();
        for (slot, record, owed) in owed {
            info!(event = %record.event, segment = %record.segment, range = %record.range,
                pid = record.pid, "still waits");
            broker.restored(record.event, waiter::pending(&record));
            let held = Held::new(record.event, Waiter::Owed(owed), Some(slot));
            events.insert(record.event, held);
        }
        Ok(Self { channel, broker, events, table, serving: false, read_again_at: None })
    }

    /// Reads events, once they are to be [served](Self::serve).
    pub async fn next(&self) -> Result<Option<Vec<fanotify::Event>>, fanotify::Error> {
        if !self.serving {
            return std::future::pending().await;
        }
        if let Some(at) = self.read_again_at {
            tokio::time::sleep_until(at).await;
        }
        self.channel.read().await
    }

    /// What was read. `false`: the group is gone.
    pub fn apply(
        &mut self,
        events: Result<Option<Vec<fanotify::Event>>, fanotify::Error>,
        scope: &mut Scope<'_>,
    ) -> bool {
        self.read_again_at = None;
        match events {
            Ok(Some(events)) => {
                let claimed: Vec<_> =
                    events.into_iter().filter_map(|event| self.event(event, scope)).collect();
                claimed.into_iter().for_each(|claimed| self.permission_event(claimed, scope));
            }
            Ok(None) => {
                error!(shard = %scope.shard, "the group is gone");
                return false;
            }
            Err(error) => {
                error!(shard = %scope.shard, %error, "can't read events");
                self.read_again_at = Some(tokio::time::Instant::now() + READ_PAUSE);
            }
        }
        true
    }

    fn event(&mut self, event: fanotify::Event, scope: &mut Scope<'_>) -> Option<Claimed> {
        match event {
            fanotify::Event::Permission(event) => return self.claim(event, scope),
            fanotify::Event::Refused { errno, pid } => {
                let error = io::Error::from_raw_os_error(errno);
                error!(shard = %scope.shard, pid, %error, "the kernel could not report an event and denied it");
                scope.counters.denied += 1;
            }
            fanotify::Event::Overflow | fanotify::Event::Other { .. } => {
                error!(shard = %scope.shard, ?event, "not an event that was asked for");
            }
        }
        None
    }

    /// Writes an event into the table. What can't be served is answered.
    fn claim(&mut self, event: PermissionEvent, scope: &mut Scope<'_>) -> Option<Claimed> {
        scope.counters.events += 1;
        let segment = event.file_id().ok().and_then(|file| scope.files.get(&file).copied());
        let known = segment.and_then(|segment| Some((segment, scope.segments.get(&segment)?)));
        let (Some((id, segment)), Some(range)) = (known, event.range()) else {
            let detached = segment.and_then(|segment| scope.detached.get(&segment).copied());
            not_served(event, detached, scope);
            return None;
        };
        let range = range.clamp(segment.size).to_blocks();
        let pending = Pending::new(id, range, event.pid(), now());
        let number = self.table.next_event();
        let slot = self.table.claim(&waiter::record(number, event.number(), &pending, None));
        Some(Claimed { number, event, pending, size: segment.size, slot })
    }

    fn permission_event(&mut self, claimed: Claimed, scope: &mut Scope<'_>) {
        let Claimed { number, event, pending, size, slot } = claimed;
        let id = pending.segment;
        let decision = decide(event.range(), size, |range| presence::present(&event, range));
        let (verdict, touched) = match decision {
            Ok(Decision::Fetch(range)) => match scope.admission(id, range) {
                Ok(strikes) => {
                    debug!(shard = %scope.shard, event = %number, segment = %id, %range, pid = event.pid(), "waits");
                    let (offset, at) = (range.offset(), pending.arrived);
                    scope.demand.reads(Read { segment: id, offset, at });
                    self.broker.restored(number, Pending { range, strikes, ..pending });
                    self.events.insert(number, Held::new(number, Waiter::Event(event), slot));
                    return;
                }
                Err((errno, reason)) => {
                    debug!(shard = %scope.shard, segment = %id, %range, pid = event.pid(), reason, "denied");
                    (Verdict::Deny(errno), None)
                }
            },
            Ok(Decision::Allow) => (Verdict::Allow, None),
            Ok(Decision::Touched(range)) => (Verdict::Allow, Some(range)),
            Ok(Decision::Deny(errno)) => {
                error!(shard = %scope.shard, segment = %id, "an event without a range");
                (Verdict::Deny(errno), None)
            }
            Err(error) => {
                error!(shard = %scope.shard, segment = %id, %error, "can't tell what is present");
                (Verdict::Deny(DenyErrno::Eio), None)
            }
        };
        if verdict == Verdict::Allow {
            scope.counters.answered_present += 1;
        }
        answer(Waiter::Event(event), verdict, scope, || self.free(slot));
        if let Some(range) = touched {
            scope.say(&ToQueue::Touched { segment: id, range });
        }
    }

    fn free(&mut self, slot: Option<Slot>) {
        if let Some(slot) = slot {
            self.table.free(slot);
        }
    }

    /// Writes down what has become of an event.
    fn note(&mut self, event: EventId, scope: &Scope<'_>) {
        let worker = scope.worker.as_deref().map(Worker::pid);
        let pending = self.broker.get(event);
        if let (Some(pending), Some(Held { waiter, slot: Some(slot), .. })) =
            (pending, self.events.get(&event))
        {
            self.table.update(slot, &waiter::record(event, waiter.number(), pending, worker));
        }
    }

    fn finish(&mut self, end: Answer, scope: &mut Scope<'_>) {
        scope.poison.forget(end.event);
        let Some(Held { waiter, slot, span }) = self.events.remove(&end.event) else { return };
        let _entered = span.enter();
        let now = now();
        scope.demand.waits(now);
        let waited = now.saturating_sub(end.pending.arrived);
        scope.counters.longest_wait = scope.counters.longest_wait.max(waited);
        let mut verdict = end.verdict;
        let mut reason = end.reason;
        if verdict == Verdict::Allow {
            // a worker's word is not enough to let a reader see what may be a hole
            let pool = scope.pool_of(end.pending.segment);
            match waiter.is_present(scope.store, pool, &end.pending) {
                Ok(true) => {
                    scope.counters.answered_fetched += 1;
                    scope.settle(end.pending.segment, end.pending.range);
                }
                Ok(false) => {
                    verdict = Verdict::Deny(DenyErrno::Eio);
                    reason = Some("its worker said that it is there, but it is not".into());
                }
                Err(error) => {
                    verdict = Verdict::Deny(DenyErrno::Eio);
                    reason = Some(format!("can't tell what is present: {error}"));
                }
            }
        }
        let Pending { segment, range, pid, attempts, .. } = end.pending;
        if let Verdict::Deny(errno) = verdict {
            let reason = reason.unwrap_or_default();
            warn!(shard = %scope.shard, event = %end.event, %segment, %range, pid, attempts, ?errno,
                waited_ms = waited.as_millis() as u64, reason, "denied");
        } else {
            debug!(shard = %scope.shard, event = %end.event, waited_ms = waited.as_millis() as u64, "allowed");
        }
        answer(waiter, verdict, scope, || self.free(slot));
    }

    /// Events that wait for a worker.
    pub fn waiting(&self) -> usize {
        self.broker.waiting()
    }

    pub fn dispatch(&mut self, scope: &mut Scope<'_>) {
        let now = now();
        while let Some((event, pending)) = self.broker.next_to_dispatch() {
            let message = ToQueue::Event {
                event,
                segment: pending.segment,
                range: pending.range,
                pid: pending.pid,
            };
            let Some(worker) = scope.running_worker() else { return };
            match worker.try_send(&message) {
                Ok(()) => {
                    self.broker.dispatched(event, now);
                    self.note(event, scope);
                }
                // full: goes on when it can be written to; broken: its end is on its way
                Err(_) => return,
            }
        }
    }

    pub fn message(&mut self, message: FromQueue, scope: &mut Scope<'_>) {
        match message {
            FromQueue::Answer { event, verdict, reason } => {
                match self.broker.answered(event, verdict, reason.map(cut)) {
                    Some(answer) => self.finish(answer, scope),
                    None => {
                        debug!(target: STRAY_ANSWERS, shard = %scope.shard, %event, ?verdict,
                            "an answer that nobody waits for");
                    }
                }
            }
            FromQueue::Waiting { event, reason } => {
                self.broker.keeps_waiting(event, cut(reason), now());
            }
            // we see that ourselves
            FromQueue::Settled { .. } => {}
        }
    }

    /// What a supervisor before this one has left is answered if it is there by now.
    pub fn serve(&mut self, scope: &mut Scope<'_>) {
        self.serving = true;
        let left: Vec<_> =
            self.broker.iter().map(|(event, pending)| (event, pending.segment)).collect();
        for (event, segment) in left {
            let pool = scope.pool_of(segment);
            let held = self.events.get(&event).zip(self.broker.get(event));
            // what its worker wrote before it ended counts
            let present = held.is_some_and(|(held, pending)| {
                held.waiter.is_present(scope.store, pool, pending).unwrap_or(false)
            });
            let answer = match (pool.is_some(), present) {
                (true, true) => self.broker.found_present(event),
                (true, false) => None,
                (false, _) => self.broker.deny(event, DenyErrno::Eagain, GONE),
            };
            answer.into_iter().for_each(|answer| self.finish(answer, scope));
        }
    }

    pub fn worker_ended(&mut self, death: Death, end: &str, scope: &mut Scope<'_>) -> u64 {
        let in_flight = self.broker.in_flight();
        let had = self.broker.iter().filter(|(_, pending)| pending.dispatched.is_some());
        scope.note_death(death, end, had.map(|(event, _)| event));
        for answer in self.broker.worker_died(death, now()) {
            scope.give_up(answer.event, &answer.pending);
            self.finish(answer, scope);
        }
        let left: Vec<_> = self.events.keys().copied().collect();
        left.into_iter().for_each(|event| self.note(event, scope));
        in_flight as u64
    }

    pub fn retry(&mut self, event: EventId, scope: &mut Scope<'_>) -> bool {
        let in_flight = self.broker.retry(event);
        if in_flight == Some(true) {
            scope.say(&ToQueue::Cancelled { event });
        }
        in_flight.is_some()
    }

    pub fn deny(&mut self, event: EventId, scope: &mut Scope<'_>) -> bool {
        self.end(event, (DenyErrno::Eio, "denied by the administrator"), scope)
    }

    pub fn deny_late(&mut self, scope: &mut Scope<'_>) -> usize {
        let late = self.broker.iter().filter(|(_, one)| scope.is_late(one.segment, one.arrived));
        let late: Vec<_> = late.map(|(event, _)| event).collect();
        late.into_iter().filter(|event| self.end(*event, STOPS, scope)).count()
    }

    /// Denies an event. `false`: there is no such event.
    fn end(&mut self, event: EventId, how: (DenyErrno, &str), scope: &mut Scope<'_>) -> bool {
        let Some(answer) = self.broker.deny(event, how.0, how.1) else { return false };
        if answer.pending.dispatched.is_some() {
            scope.say(&ToQueue::Cancelled { event });
        }
        self.finish(answer, scope);
        true
    }

    pub fn tick(&mut self, scope: &mut Scope<'_>) -> Option<&'static str> {
        let now = now();
        let overdue: Vec<_> = self
            .broker
            .older_than(now.saturating_sub(scope.patience))
            .filter_map(|(event, pending)| {
                Some((event, scope.overdue(pending, now)?, pending.dispatched.is_some()))
            })
            .collect();
        let mut kill = None;
        for (event, why, in_flight) in overdue {
            match (why, in_flight) {
                (Overdue::Silent, true) => {
                    // the next worker may do better; an event that silences three is given up
                    kill = Some("it is silent past the deadline");
                    continue;
                }
                (Overdue::Endless, true) => scope.say(&ToQueue::Cancelled { event }),
                (_, false) => {}
            }
            let answer = self.broker.deny(event, DenyErrno::Eio, "no answer by the deadline");
            answer.into_iter().for_each(|answer| self.finish(answer, scope));
        }
        kill
    }

    pub fn stop(&mut self, scope: &mut Scope<'_>) {
        let events: Vec<_> = self.broker.iter().map(|(event, _)| event).collect();
        for event in events {
            let answer = self.broker.deny(event, STOPS.0, STOPS.1);
            answer.into_iter().for_each(|answer| self.finish(answer, scope));
        }
    }

    pub fn events(&self) -> Vec<(EventId, Pending)> {
        self.broker.iter().map(|(event, pending)| (event, pending.clone())).collect()
    }

    pub fn note_demand(&self, demand: &mut Demand) {
        if self.broker.iter().next().is_some() {
            demand.waits(now());
        }
    }

    pub fn leave(&mut self) {
        self.events.drain().for_each(|(_, held)| held.waiter.leave());
    }
}

/// Somebody reads a segment that no worker fills: they get what is there. `size`: of a segment
/// that was served.
fn not_served(event: PermissionEvent, size: Option<u64>, scope: &mut Scope<'_>) {
    let decision =
        size.map(|size| decide(event.range(), size, |range| presence::present(&event, range)));
    if let Some(Ok(Decision::Allow | Decision::Touched(_))) = decision {
        scope.counters.answered_present += 1;
        answer(Waiter::Event(event), Verdict::Allow, scope, || ());
        return;
    }
    let range = event.range().map(|range| range.to_string());
    let detached = size.is_some();
    error!(shard = %scope.shard, pid = event.pid(), detached, range, "an event for what is not served");
    answer(Waiter::Event(event), Verdict::Deny(DenyErrno::Eio), scope, || ());
}

/// `free`: takes it out of the table. Then its number may be another shard's at once: in two tables it would be, for the
/// next supervisor, the number of two readers.
fn answer(event: Waiter, verdict: Verdict, scope: &mut Scope<'_>, free: impl FnOnce()) {
    if let Verdict::Deny(_) = verdict {
        scope.counters.denied += 1;
    }
    if let Err(error) = event.answer_then(verdict, free) {
        error!(shard = %scope.shard, %error, ?verdict, "can't answer an event");
    }
}
