//! The kernel's queue: the worker reads and answers events itself, and what it had when it died is in the
//! kernel's queue again.
//!
//! What is known here of those who wait is in the in-flight table, which the worker writes. As long as
//! there is no worker we stand in for it: we read the queue, give readers what is there, and hold the
//! others, so that they can be seen and denied. What we hold goes back to the kernel when a worker is
//! ready. There is one queue fd at a time, and whoever opens it begins with what the one before had.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, error, warn};

use super::demand::{Demand, Read};
use super::queue::{STOPS, STRAY_ANSWERS, Scope};
use super::{Counters, now, waiter};
use crate::fanotify::{self, DenyErrno, FileId, Group, Verdict};
use crate::ids::{EventId, SegmentId};
use crate::queue::broker::{Death, MAX_STRIKES, Overdue, Pending};
use crate::queue::inflight::{Record, State, Table, Tally};
use crate::queue::kernel::{Incoming, KernelQueue, QueueError};
use crate::queue::wire::{FromQueue, ToQueue, ToWorker};
use crate::supervisor::worker::cut;

/// How long to wait before the queue is opened again. It is busy as long as a worker that was killed has
/// not quite ended, or a process that was forked meanwhile has not got to its exec.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
/// The same after any other error.
const ERROR_PAUSE: Duration = Duration::from_millis(100);
/// Somebody who has the queue for so long does not let go of it any more.
const BUSY_LONG: Duration = Duration::from_secs(10);
/// How long a worker may take to deny what it was told to.
const ORDER_PATIENCE: Duration = Duration::from_secs(10);

/// See the module's documentation.
#[derive(Debug)]
pub struct Kernel {
    group: Arc<Group>,
    /// To look at, and to write while nobody has the queue.
    table: Table,
    hands: Hands,
    /// What the worker said last of events.
    said: HashMap<EventId, Said>,
    /// Events that are to be denied, and are still in the table.
    orders: HashMap<EventId, Order>,
    /// When this supervisor took the queue over.
    begun: Duration,
    stop: Option<Stop>,
}

/// Who has the queue.
#[derive(Debug)]
enum Hands {
    /// Nobody, before the first segments are known.
    Nobody,
    /// Nobody: it is to be opened.
    Opening { reader: Reader, at: Instant, since: Instant },
    /// We, in place of a worker.
    StandIn(Box<KernelQueue>),
    /// The worker, since then.
    Worker { since: Duration },
}

/// For whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    StandIn,
    Worker,
}

#[derive(Debug)]
struct Said {
    reason: String,
    at: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Order {
    errno: DenyErrno,
    since: Instant,
}

/// The end of the queue.
#[derive(Debug, Clone, Copy)]
enum Stop {
    Asked { at: Instant },
    Done,
}

/// What woke it.
#[derive(Debug)]
pub enum Wake {
    Open,
    StandIn(Result<Option<Incoming>, QueueError>),
}

impl Kernel {
    pub fn new(group: Arc<Group>, table: Table) -> Self {
        table.reset_tally();
        Self {
            group,
            table,
            hands: Hands::Nobody,
            said: HashMap::new(),
            orders: HashMap::new(),
            begun: now(),
            stop: None,
        }
    }

    pub async fn next(&mut self) -> Wake {
        match &self.hands {
            Hands::Opening { at, .. } => {
                tokio::time::sleep_until(*at).await;
                Wake::Open
            }
            Hands::StandIn(queue) => Wake::StandIn(queue.next().await),
            Hands::Nobody | Hands::Worker { .. } => std::future::pending().await,
        }
    }

    /// `false`: the group is gone.
    pub fn apply(&mut self, wake: Wake, scope: &mut Scope<'_>) -> bool {
        match wake {
            Wake::Open => self.open(scope),
            Wake::StandIn(Ok(Some(Incoming::Event { event, segment, range, pid }))) => {
                debug!(shard = %scope.shard, %event, %segment, %range, pid, "waits");
                if let Some(Order { errno, .. }) = self.orders.get(&event) {
                    self.deny_with(event, *errno, scope);
                }
            }
            Wake::StandIn(Ok(Some(Incoming::Touched { .. }))) => {}
            Wake::StandIn(Ok(Some(Incoming::Settled { segment, range }))) => {
                scope.settle(segment, range);
            }
            Wake::StandIn(Ok(None)) => {
                error!(shard = %scope.shard, "the group is gone");
                return false;
            }
            Wake::StandIn(Err(error)) => {
                error!(shard = %scope.shard, %error, "can't read events");
                self.open_for(Reader::StandIn);
                self.try_again(ERROR_PAUSE);
            }
        }
        true
    }

    /// Takes the queue from whom it is in hand: us, or a worker that has ended.
    fn open_for(&mut self, reader: Reader) {
        let now = Instant::now();
        // what we hold goes back into the queue
        self.hands = Hands::Opening { reader, at: now, since: now };
    }

    fn try_again(&mut self, pause: Duration) {
        if let Hands::Opening { at, .. } = &mut self.hands {
            *at = Instant::now() + pause;
        }
    }

    fn open(&mut self, scope: &mut Scope<'_>) {
        let Hands::Opening { reader, since, .. } = self.hands else { return };
        let fd = match self.group.open_queue() {
            Ok(fd) => fd,
            Err(fanotify::Error::QueueBusy { .. }) if since.elapsed() < BUSY_LONG => {
                return self.try_again(BUSY_PAUSE);
            }
            Err(error) => {
                error!(shard = %scope.shard, %error, "readers wait");
                return self.try_again(ERROR_PAUSE);
            }
        };
        // a supervisor before this one may have left it as its worker had it
        self.table.worker_died(Death::Outside);
        let opened = match reader {
            Reader::StandIn => self.stand_in(fd, scope),
            Reader::Worker => self.give(fd, scope),
        };
        if let Err(error) = opened {
            error!(shard = %scope.shard, error = &error as &dyn std::error::Error, "readers wait");
            self.open_for(reader);
            self.try_again(ERROR_PAUSE);
        }
    }

    fn stand_in(&mut self, fd: OwnedFd, scope: &Scope<'_>) -> io::Result<()> {
        let table = self.table.as_fd().try_clone_to_owned()?;
        let table = Table::open(table).map_err(io::Error::other)?;
        let queue = KernelQueue::stand_in(fd, table).map_err(io::Error::other)?;
        let served = scope.files.iter().filter(|(_, id)| scope.segments.contains_key(id));
        served.for_each(|(file, segment)| queue.know_file(*segment, *file));
        queue.quarantine(scope.poison.quarantined());
        if self.stop.is_some() {
            let denied = queue.deny_all(STOPS.0).map_err(io::Error::other)?;
            if denied > 0 {
                warn!(shard = %scope.shard, denied, "Hydrant stops: these readers get EAGAIN");
            }
            self.stop = Some(Stop::Done);
            self.hands = Hands::Nobody;
        } else {
            self.hands = Hands::StandIn(Box::new(queue));
        }
        Ok(())
    }

    fn give(&mut self, fd: OwnedFd, scope: &mut Scope<'_>) -> io::Result<()> {
        let table = self.table.as_fd().try_clone_to_owned()?;
        let Some(worker) = scope.running_worker() else {
            // it has ended, which we hear in a moment
            self.open_for(Reader::StandIn);
            return Ok(());
        };
        let control = worker.control();
        let quarantine = scope.poison.quarantined().to_vec();
        control.send(ToWorker::Start { quarantine }, vec![fd, table]);
        self.hands = Hands::Worker { since: now() };
        for (event, Order { errno, .. }) in &self.orders {
            scope.say(&ToQueue::Deny { event: *event, errno: *errno });
        }
        Ok(())
    }

    pub fn serve(&mut self, scope: &mut Scope<'_>) {
        self.open_for(Reader::StandIn);
        self.open(scope);
    }

    pub fn know(&self, segment: SegmentId, file: FileId) {
        if let Hands::StandIn(queue) = &self.hands {
            queue.know_file(segment, file);
        }
    }

    pub fn forget(&self, segment: SegmentId) {
        if let Hands::StandIn(queue) = &self.hands {
            queue.forget(segment);
        }
    }

    pub fn hand_over(&mut self, scope: &mut Scope<'_>) {
        if self.stop.is_none() {
            self.open_for(Reader::Worker);
            self.open(scope);
        }
    }

    pub fn message(&mut self, message: FromQueue, scope: &mut Scope<'_>) {
        match message {
            FromQueue::Waiting { event, reason } => {
                let said = Said { reason: cut(reason), at: now() };
                // no more than can wait, whatever a worker says
                if self.said.len() < self.table.capacity() as usize {
                    self.said.insert(event, said);
                }
            }
            FromQueue::Settled { segment, range } => {
                let pool = scope.pool_of(segment);
                let present = pool.map(|pool| scope.store.is_present(pool, segment, range));
                if let Some(Ok(true)) = present {
                    scope.settle(segment, range);
                }
            }
            FromQueue::Answer { event, .. } => {
                debug!(target: STRAY_ANSWERS, shard = %scope.shard, %event,
                    "an answer that is not ours to give");
            }
        }
    }

    pub fn worker_ended(&mut self, death: Death, end: &str, scope: &mut Scope<'_>) -> u64 {
        match self.hands {
            Hands::Worker { .. } | Hands::Opening { reader: Reader::Worker, .. } => {}
            // it had not got it yet
            _ => return 0,
        }
        let records = self.table.snapshot().records;
        let had = records.iter().filter(|record| record.state == State::InFlight);
        let had: HashSet<_> = had.map(|record| record.event).collect();
        scope.note_death(death, end, had.iter().copied());
        self.table.worker_died(death);
        for record in self.table.snapshot().records {
            // who reads it next denies it
            if had.contains(&record.event) && record.strikes >= MAX_STRIKES {
                scope.give_up(record.event, &self.pending(&record));
            }
        }
        self.open_for(Reader::StandIn);
        self.open(scope);
        had.len() as u64
    }

    pub fn clear_quarantine(&self, scope: &mut Scope<'_>) {
        match &self.hands {
            Hands::StandIn(queue) => queue.clear_quarantine(),
            _ => scope.say(&ToQueue::ClearQuarantine),
        }
    }

    fn record(&self, event: EventId) -> Option<Record> {
        self.table.snapshot().records.into_iter().find(|record| record.event == event)
    }

    pub fn retry(&mut self, event: EventId, scope: &mut Scope<'_>) -> bool {
        if self.record(event).is_none() {
            return false;
        }
        self.said.remove(&event);
        scope.say(&ToQueue::Retry { event });
        true
    }

    pub fn deny(&mut self, event: EventId, scope: &mut Scope<'_>) -> bool {
        let Some(record) = self.record(event) else { return false };
        self.order(&record, (DenyErrno::Eio, "denied by the administrator"), scope);
        true
    }

    pub fn deny_late(&mut self, scope: &mut Scope<'_>) -> usize {
        let mut denied = 0;
        for record in self.table.snapshot().records {
            if scope.is_late(record.segment, Duration::from_nanos(record.since))
                && self.order(&record, STOPS, scope)
            {
                denied += 1;
            }
        }
        denied
    }

    /// Has an event denied by whoever has it, now or later. `false`: that is under way.
    fn order(
        &mut self,
        record: &Record,
        (errno, reason): (DenyErrno, &str),
        scope: &mut Scope<'_>,
    ) -> bool {
        let Record { event, segment, range, pid, attempts, since, .. } = *record;
        if self.orders.contains_key(&event) {
            return false;
        }
        let waited = now().saturating_sub(Duration::from_nanos(since));
        warn!(shard = %scope.shard, %event, %segment, %range, pid, attempts, ?errno,
            waited_ms = waited.as_millis() as u64, reason, "denied");
        self.orders.insert(event, Order { errno, since: Instant::now() });
        self.deny_with(event, errno, scope);
        true
    }

    fn deny_with(&mut self, event: EventId, errno: DenyErrno, scope: &mut Scope<'_>) {
        match &self.hands {
            Hands::Worker { .. } => scope.say(&ToQueue::Deny { event, errno }),
            Hands::StandIn(queue) => match queue.answer(event, Verdict::Deny(errno)) {
                Ok(_) => {
                    self.orders.remove(&event);
                }
                // it has not been read yet
                Err(QueueError::Unknown { .. }) => {}
                Err(error) => error!(shard = %scope.shard, %event, %error, "can't answer an event"),
            },
            Hands::Nobody | Hands::Opening { .. } => {}
        }
    }

    pub fn tick(&mut self, scope: &mut Scope<'_>) -> Option<&'static str> {
        if let Some(Stop::Asked { at }) = self.stop
            && at.elapsed() > BUSY_LONG
        {
            error!(shard = %scope.shard, "somebody keeps the queue: whoever waits in it is let go");
            self.stop = Some(Stop::Done);
        }
        let now = now();
        let records = self.table.snapshot().records;
        let there: HashSet<_> = records.iter().map(|record| record.event).collect();
        self.said.retain(|event, _| there.contains(event));
        self.orders.retain(|event, _| there.contains(event));
        scope.poison.retain(&there);
        let mut kill = None;
        for record in &records {
            let pending = self.pending(record);
            match (scope.overdue(&pending, now), pending.dispatched) {
                (None, _) => continue,
                (Some(Overdue::Silent), Some(_)) => {
                    // the next worker may do better; an event that silences three is given up
                    kill = Some("it is silent past the deadline");
                    continue;
                }
                _ => {}
            }
            self.order(record, (DenyErrno::Eio, "no answer by the deadline"), scope);
        }
        if let Hands::Worker { since } = self.hands {
            let heard = since.max(Duration::from_nanos(self.table.last_beat()));
            if now.saturating_sub(heard) > scope.longest_patience() {
                kill = Some("it gives no sign of life");
            }
            if self.orders.values().any(|order| order.since.elapsed() > ORDER_PATIENCE) {
                kill = Some("it does not deny what it is told to");
            }
        }
        kill
    }

    pub fn stop(&mut self, scope: &mut Scope<'_>) {
        self.stop = Some(Stop::Asked { at: Instant::now() });
        // else the worker has it, and is being killed
        if scope.worker.is_none() || !matches!(self.hands, Hands::Worker { .. }) {
            self.open_for(Reader::StandIn);
            self.open(scope);
        }
    }

    pub fn has_stopped(&self) -> bool {
        matches!(self.stop, Some(Stop::Done))
    }

    pub fn events(&self) -> Vec<(EventId, Pending)> {
        let records = self.table.snapshot().records;
        let mut events: Vec<_> =
            records.iter().map(|record| (record.event, self.pending(record))).collect();
        events.sort_unstable_by_key(|(event, _)| *event);
        events
    }

    fn pending(&self, record: &Record) -> Pending {
        let dispatched = Duration::from_nanos(record.dispatched);
        // what the table says of a worker before this supervisor's is put right when the queue is opened
        let in_flight =
            record.state == State::InFlight && matches!(self.hands, Hands::Worker { .. });
        let said = self.said.get(&record.event);
        let arrived = Duration::from_nanos(record.since);
        let heard = said.map_or(Duration::ZERO, |said| said.at).max(dispatched).max(arrived);
        Pending {
            dispatched: in_flight.then_some(dispatched),
            heard: heard.max(self.begun),
            reason: said.map(|said| said.reason.clone()),
            ..waiter::pending(record)
        }
    }

    /// The worker answers by itself: what ends between two looks is only counted.
    pub fn note_demand(&self, demand: &mut Demand) {
        let now = now();
        for Record { segment, range, since, .. } in self.table.snapshot().records {
            let (offset, at) = (range.offset(), Duration::from_nanos(since).min(now));
            demand.reads(Read { segment, offset, at });
            demand.waits(now);
        }
        let Tally { fetched, denied, .. } = self.table.tally();
        demand.have_ended(now, fetched.saturating_add(denied));
    }

    pub fn counters(&self, counters: Counters) -> Counters {
        let Tally { events, present, fetched, denied, longest_wait } = self.table.tally();
        Counters {
            events,
            answered_present: present,
            answered_fetched: fetched,
            denied,
            longest_wait: Duration::from_nanos(longest_wait),
            ..counters
        }
    }
}
