//! A shard: a fanotify group, its queue, its worker.
//!
//! One task owns all of a shard and does one thing at a time: `loop { wait for something; apply it }`.
//! No locks. Whatever takes its time (starting git for a worker, checking a whole segment) runs in a
//! task of its own and comes back as a [`Command`]. A shard that is stuck with its origin holds
//! up no other.
//!
//! Whatever happens to this process, the kernel's side of the shard goes on: the group and the in-flight
//! table are in the service manager's keeping. An event is written into the table right after it was
//! read, before anything else is done, and out of it after it was answered. What a SIGKILL catches
//! in between gets `EAGAIN` from the next supervisor (see [`kept`]). Measured in a debug build, with 1,000
//! readers on 2 cores: 14 microseconds an event in the kernel's read, 8 until it is in the table,
//! at most 16 events at once.

mod commands;
mod handle;
mod poison;
mod recycle;
pub(crate) mod waiter;
mod workers;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tracing::{debug, error, info, warn};

use super::kept::{self, KeptShard};
use super::origins::Origins;
use super::store::Store;
use super::worker::{Event, Worker, cut};
use crate::fanotify::{self, AsyncChannel, DenyErrno, FileId, Group, PermissionEvent, Verdict};
use crate::ids::{EventId, PoolId, SegmentId, ShardId};
use crate::queue::broker::{Answer, Broker, Overdue, Pending};
use crate::queue::decide::{Decision, decide};
use crate::queue::inflight::{self, DEFAULT_CAPACITY, Slot, Table};
pub use crate::queue::quarantine::Quarantined;
use crate::queue::wire::{
    Counters as FetchCounters, FromQueue, LONGEST_WAIT, Limits, OriginSpec, ToQueue, ToWorker,
};
use crate::range::ByteRange;
use crate::segment::presence;
use crate::sys::fdstore;
pub use handle::{
    Command, Counters, Hooks, LastDeath, Rules, ShardHandle, Snapshot, StartError, WorkerSnapshot,
};
pub use poison::{GivenUp, epoch_ms, from_epoch};
use waiter::{Held, Waiter};

const GONE: &str = "its tree is not mounted any more";

/// How long to wait after events could not be read.
const READ_PAUSE: Duration = Duration::from_millis(100);

/// A worker that has not greeted us by then is stuck.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// A worker that lived for less ended as soon as it was started.
const QUICK_DEATH: Duration = Duration::from_secs(2);

/// So many quick deaths in a row, and nobody waits for the next worker.
const TOO_MANY_DEATHS: u32 = 5;

/// A segment that this shard serves.
#[derive(Debug)]
struct Segment {
    pool: PoolId,
    size: u64,
    marked: bool,
    /// Tells one service of the segment from the next: it may have been emptied in between, and what
    /// was found out before counts for nothing.
    attachment: u64,
    check: Check,
    /// The worker could not take it. The next one, or the next [`Command::Attach`], tries again.
    refused: bool,
    /// Told once the worker has the segment.
    waiting_for_worker: Vec<oneshot::Sender<Result<(), String>>>,
}

/// Whether a segment's completeness is being checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    No,
    UnderWay,
    /// It was said to be complete again meanwhile.
    Again,
}

#[derive(Debug)]
struct Prefetch {
    pool: PoolId,
    message: ToWorker,
    /// Workers that died of their own fault while they had it.
    strikes: u32,
    reply: oneshot::Sender<Result<(), String>>,
}

#[derive(Debug, PartialEq, Eq)]
struct Pool {
    origin: OriginSpec,
    limits: Limits,
}

/// The state of one shard; see the module's documentation. Owned by its task.
pub struct Shard {
    id: ShardId,
    group: Arc<Group>,
    channel: AsyncChannel,
    broker: Broker,
    /// The kernel's side of the broker's events.
    events: HashMap<EventId, Held>,
    table: Table,
    /// Since [`Command::Serve`].
    serving: bool,
    /// After an error: it may be there to stay.
    read_again_at: Option<tokio::time::Instant>,
    /// It has greeted us.
    worker_ready: bool,
    files: HashMap<FileId, SegmentId>,
    segments: HashMap<SegmentId, Segment>,
    /// Segments that are not served any more, but may be marked: their sizes in bytes.
    detached: HashMap<SegmentId, u64>,
    attachments: u64,
    pools: HashMap<PoolId, Pool>,
    worker: Option<Worker>,
    /// When to start the next worker, and how long to wait after the one after that.
    restart_at: Option<tokio::time::Instant>,
    backoff: Duration,
    /// Workers in a row that ended soon, or could not be started.
    quick_deaths: u32,
    pace: workers::Pace,
    worker_deaths: u64,
    last_death: Option<LastDeath>,
    recycle: Option<recycle::Recycle>,
    /// Why we killed the worker ourselves.
    killed: Option<String>,
    poison: poison::Poison,
    prefetches: HashMap<u64, Prefetch>,
    next_request: u64,
    counters: Counters,
    fetched: HashMap<PoolId, FetchCounters>,
    trouble: HashMap<PoolId, String>,
    commands: mpsc::UnboundedReceiver<Command>,
    own: mpsc::WeakUnboundedSender<Command>,
    origins: Arc<Origins>,
    store: Arc<Store>,
    rules: Rules,
    hooks: Hooks,
    stopping: bool,
    /// Dropped last: the shard has let go of everything.
    handing_over: Option<oneshot::Sender<()>>,
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

impl Segment {
    /// Tells who waits for the worker that it doesn't have the segment.
    fn refuse(&mut self, why: &str) {
        for reply in self.waiting_for_worker.drain(..) {
            // nobody else would ask a worker to take it
            self.refused = true;
            reply.send(Err(why.to_owned())).ok();
        }
    }
}

impl Drop for Shard {
    /// Leaves those who wait to the next supervisor, if there can be one.
    fn drop(&mut self) {
        if fdstore::is_there() || self.handing_over.is_some() {
            self.events.drain().for_each(|(_, held)| held.waiter.leave());
        }
    }
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What woke the shard.
enum Wake {
    Command(Option<Command>),
    Events(Result<Option<Vec<fanotify::Event>>, fanotify::Error>),
    Worker(Event),
    Restart,
    Tick,
}

impl Shard {
    /// Takes the group of the shard before this one over, or makes one, has it kept, and starts the
    /// shard's task. It does nothing about events before [`Command::Serve`].
    pub fn start(
        id: ShardId,
        kept: Option<KeptShard>,
        store: Arc<Store>,
        origins: Arc<Origins>,
        rules: Rules,
        hooks: Hooks,
    ) -> Result<ShardHandle, StartError> {
        let (group, table, owed) = match kept {
            Some(KeptShard { group, table, owed }) => (Some(group), table, owed),
            None => (None, None, Vec::new()),
        };
        let (new_group, new_table) = (group.is_none(), table.is_none());
        let group = Arc::new(match group {
            Some(group) => group,
            None => Group::stock()?,
        });
        let table = match table {
            Some(table) => table,
            None => Table::create(DEFAULT_CAPACITY)?,
        };
        // our own reads and writes of segments go through this mount and must not wait for ourselves
        store.ignore_for(&group)?;
        let channel = AsyncChannel::new(group.channel())?;
        if new_table {
            kept::keep(&kept::table_name(id), table.as_fd());
        }
        if new_group {
            kept::keep(&kept::group_name(id), group.as_fd());
        }
        let mut broker = Broker::new();
        let mut events = HashMap::new();
        for (slot, record, owed) in owed {
            info!(shard = %id, event = %record.event, segment = %record.segment, range = %record.range,
                pid = record.pid, "still waits");
            broker.restored(record.event, waiter::pending(&record));
            let held = Held::new(record.event, Waiter::Owed(owed), Some(slot));
            events.insert(record.event, held);
        }
        let (sender, commands) = mpsc::unbounded_channel();
        let for_handle = Arc::clone(&group);
        let table_for_handle = Arc::new(table.as_fd().try_clone_to_owned()?);
        let shard = Self {
            id,
            group,
            channel,
            broker,
            events,
            table,
            serving: false,
            read_again_at: None,
            worker_ready: false,
            files: HashMap::new(),
            segments: HashMap::new(),
            detached: HashMap::new(),
            attachments: 0,
            pools: HashMap::new(),
            worker: None,
            restart_at: Some(tokio::time::Instant::now()),
            backoff: Duration::ZERO,
            quick_deaths: 0,
            pace: workers::Pace::default(),
            worker_deaths: 0,
            last_death: None,
            recycle: None,
            killed: None,
            poison: poison::Poison::default(),
            prefetches: HashMap::new(),
            next_request: 0,
            counters: Counters::default(),
            fetched: HashMap::new(),
            trouble: HashMap::new(),
            commands,
            own: sender.downgrade(),
            origins,
            store,
            rules,
            hooks,
            stopping: false,
            handing_over: None,
        };
        tokio::spawn(async move {
            let end = tokio::spawn(shard.run()).await;
            if end.is_err_and(|error| error.is_panic()) {
                if fdstore::is_there() {
                    // the next supervisor takes over; without a manager that would let all readers go
                    error!(shard = %id, "a fault in the shard: ending the supervisor");
                    std::process::abort();
                }
                error!(shard = %id, "a fault in the shard: who reads what is missing waits from now on");
            }
        });
        Ok(ShardHandle { id, commands: sender, group: for_handle, table: table_for_handle })
    }

    async fn run(mut self) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !self.stopping {
            let wake = self.next(&mut tick).await;
            self.apply(wake);
            self.dispatch();
        }
        debug!(shard = %self.id, "stopped");
    }

    async fn next(&mut self, tick: &mut tokio::time::Interval) -> Wake {
        let waiting = self.broker.waiting() > 0;
        let restart_at = self.restart_at;
        let worker = self.worker.as_mut();
        let worker = async {
            match (worker, restart_at) {
                (Some(worker), _) => {
                    let want_write = waiting && worker.is_running();
                    Wake::Worker(worker.next(want_write).await)
                }
                (None, Some(at)) => {
                    tokio::time::sleep_until(at).await;
                    Wake::Restart
                }
                (None, None) => std::future::pending().await,
            }
        };
        let (channel, read_again_at) = (&self.channel, self.read_again_at);
        let events = async {
            if let Some(at) = read_again_at {
                tokio::time::sleep_until(at).await;
            }
            channel.read().await
        };
        tokio::select! {
            command = self.commands.recv() => Wake::Command(command),
            wake = worker => wake,
            events = events, if self.serving => Wake::Events(events),
            _ = tick.tick() => Wake::Tick,
        }
    }

    fn apply(&mut self, wake: Wake) {
        match wake {
            Wake::Command(Some(command)) => self.command(command),
            Wake::Command(None) => self.stopping = true,
            Wake::Events(events) => self.events(events),
            Wake::Worker(Event::Queue(message)) => self.queue_message(message),
            Wake::Worker(Event::Control(message)) => self.worker_message(message),
            Wake::Worker(Event::Writable | Event::HungUp) => {}
            Wake::Worker(Event::Broken(why)) => self.kill_worker(&why),
            Wake::Worker(Event::Ended(exit)) => self.worker_ended(exit),
            Wake::Restart => self.start_worker(),
            Wake::Tick => self.tick(),
        }
    }

    fn now() -> Duration {
        Duration::from_nanos(inflight::now())
    }

    // ---- events ----

    fn events(&mut self, events: Result<Option<Vec<fanotify::Event>>, fanotify::Error>) {
        self.read_again_at = None;
        match events {
            Ok(Some(events)) => {
                let claimed: Vec<_> =
                    events.into_iter().filter_map(|event| self.event(event)).collect();
                claimed.into_iter().for_each(|claimed| self.permission_event(claimed));
            }
            Ok(None) => {
                error!(shard = %self.id, "the group is gone");
                self.stopping = true;
            }
            Err(error) => {
                error!(shard = %self.id, %error, "can't read events");
                self.read_again_at = Some(tokio::time::Instant::now() + READ_PAUSE);
            }
        }
    }

    fn event(&mut self, event: fanotify::Event) -> Option<Claimed> {
        match event {
            fanotify::Event::Permission(event) => return self.claim(event),
            fanotify::Event::Refused { errno, pid } => {
                let error = io::Error::from_raw_os_error(errno);
                error!(shard = %self.id, pid, %error, "the kernel could not report an event and denied it");
                self.counters.denied += 1;
            }
            fanotify::Event::Overflow | fanotify::Event::Other { .. } => {
                error!(shard = %self.id, ?event, "not an event that was asked for");
            }
        }
        None
    }

    /// Writes an event into the table. What can't be served is answered.
    fn claim(&mut self, event: PermissionEvent) -> Option<Claimed> {
        self.counters.events += 1;
        let segment = event.file_id().ok().and_then(|file| self.files.get(&file).copied());
        let known = segment.and_then(|segment| Some((segment, self.segments.get(&segment)?)));
        let (Some((id, segment)), Some(range)) = (known, event.range()) else {
            let detached = segment.and_then(|segment| self.detached.get(&segment).copied());
            self.not_served(event, detached);
            return None;
        };
        let now = Self::now();
        let pending = Pending {
            segment: id,
            range: range.clamp(segment.size).to_blocks(),
            pid: event.pid(),
            arrived: now,
            attempts: 0,
            strikes: 0,
            dispatched: None,
            heard: now,
            reason: None,
        };
        let number = self.table.next_event();
        let slot = self.table.claim(&waiter::record(number, event.number(), &pending, None));
        Some(Claimed { number, event, pending, size: segment.size, slot })
    }

    /// Somebody reads a segment that no worker fills: they get what is there. `size`: of a segment
    /// that was served.
    fn not_served(&mut self, event: PermissionEvent, size: Option<u64>) {
        let decision =
            size.map(|size| decide(event.range(), size, |range| presence::present(&event, range)));
        if let Some(Ok(Decision::Allow | Decision::Touched(_))) = decision {
            self.counters.answered_present += 1;
            self.answer(Waiter::Event(event), Verdict::Allow);
            return;
        }
        let range = event.range().map(|range| range.to_string());
        let detached = size.is_some();
        error!(shard = %self.id, pid = event.pid(), detached, range, "an event for what is not served");
        self.answer(Waiter::Event(event), Verdict::Deny(DenyErrno::Eio));
    }

    fn permission_event(&mut self, claimed: Claimed) {
        let Claimed { number, event, pending, size, slot } = claimed;
        let id = pending.segment;
        let decision = decide(event.range(), size, |range| presence::present(&event, range));
        let (verdict, touched) = match decision {
            Ok(Decision::Fetch(range)) => match self.admission(id, range) {
                Ok(strikes) => {
                    debug!(shard = %self.id, event = %number, segment = %id, %range, pid = event.pid(), "waits");
                    self.broker.restored(number, Pending { range, strikes, ..pending });
                    self.events.insert(number, Held::new(number, Waiter::Event(event), slot));
                    return;
                }
                Err((errno, reason)) => {
                    debug!(shard = %self.id, segment = %id, %range, pid = event.pid(), reason, "denied");
                    (Verdict::Deny(errno), None)
                }
            },
            Ok(Decision::Allow) => (Verdict::Allow, None),
            Ok(Decision::Touched(range)) => (Verdict::Allow, Some(range)),
            Ok(Decision::Deny(errno)) => {
                error!(shard = %self.id, segment = %id, "an event without a range");
                (Verdict::Deny(errno), None)
            }
            Err(error) => {
                error!(shard = %self.id, segment = %id, %error, "can't tell what is present");
                (Verdict::Deny(DenyErrno::Eio), None)
            }
        };
        if verdict == Verdict::Allow {
            self.counters.answered_present += 1;
        }
        self.answer(Waiter::Event(event), verdict);
        self.free(slot);
        if let Some(range) = touched {
            self.touched(id, range);
        }
    }

    fn free(&mut self, slot: Option<Slot>) {
        if let Some(slot) = slot {
            self.table.free(slot);
        }
    }

    /// Writes down what has become of an event.
    fn note(&mut self, event: EventId) {
        let worker = self.worker.as_ref().map(Worker::pid);
        let pending = self.broker.get(event);
        if let (Some(pending), Some(Held { waiter, slot: Some(slot), .. })) =
            (pending, self.events.get(&event))
        {
            self.table.update(slot, &waiter::record(event, waiter.number(), pending, worker));
        }
    }

    fn touched(&mut self, segment: SegmentId, range: ByteRange) {
        if let Some(worker) = self.worker.as_mut().filter(|worker| worker.is_running()) {
            // a hint: when the worker is busy it is better without
            worker.try_send(&ToQueue::Touched { segment, range }).ok();
        }
    }

    fn answer(&mut self, event: Waiter, verdict: Verdict) {
        if let Verdict::Deny(_) = verdict {
            self.counters.denied += 1;
        }
        if let Err(error) = event.answer(verdict) {
            error!(shard = %self.id, %error, ?verdict, "can't answer an event");
        }
    }

    fn finish(&mut self, answer: Answer) {
        self.poison.forget(answer.event);
        let Some(Held { waiter, slot, span }) = self.events.remove(&answer.event) else { return };
        let _entered = span.enter();
        let waited = Self::now().saturating_sub(answer.pending.arrived);
        self.counters.longest_wait = self.counters.longest_wait.max(waited);
        let mut verdict = answer.verdict;
        let mut reason = answer.reason;
        if verdict == Verdict::Allow {
            // a worker's word is not enough to let a reader see what may be a hole
            let pool = self.segments.get(&answer.pending.segment).map(|segment| segment.pool);
            match waiter.is_present(&self.store, pool, &answer.pending) {
                Ok(true) => {
                    self.counters.answered_fetched += 1;
                    self.settle(answer.pending.segment, answer.pending.range);
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
        let Pending { segment, range, pid, attempts, .. } = answer.pending;
        if let Verdict::Deny(errno) = verdict {
            let reason = reason.unwrap_or_default();
            warn!(shard = %self.id, event = %answer.event, %segment, %range, pid, attempts, ?errno,
                waited_ms = waited.as_millis() as u64, reason, "denied");
        } else {
            debug!(shard = %self.id, event = %answer.event, waited_ms = waited.as_millis() as u64, "allowed");
        }
        self.answer(waiter, verdict);
        self.free(slot);
    }

    fn dispatch(&mut self) {
        let now = Self::now();
        while let Some((event, pending)) = self.broker.next_to_dispatch() {
            let message = ToQueue::Event {
                event,
                segment: pending.segment,
                range: pending.range,
                pid: pending.pid,
            };
            let worker = self.worker.as_mut().filter(|worker| worker.is_running());
            let Some(worker) = worker else { return };
            match worker.try_send(&message) {
                Ok(()) => {
                    self.broker.dispatched(event, now);
                    self.note(event);
                }
                // full: goes on when it can be written to; broken: its end is on its way
                Err(_) => return,
            }
        }
    }

    fn queue_message(&mut self, message: FromQueue) {
        match message {
            FromQueue::Answer { event, verdict, reason } => {
                match self.broker.answered(event, verdict, reason.map(cut)) {
                    Some(answer) => self.finish(answer),
                    None => debug!(shard = %self.id, %event, "an answer that nobody waits for"),
                }
            }
            FromQueue::Waiting { event, reason } => {
                self.broker.keeps_waiting(event, cut(reason), Self::now());
            }
        }
    }

    fn tick(&mut self) {
        let now = Self::now();
        let overdue = |pending: &Pending| {
            let pool = self.segments.get(&pending.segment).map(|segment| segment.pool);
            let limits = pool.and_then(|pool| self.pools.get(&pool)).map(|pool| pool.limits);
            let deadline = Duration::from_secs(limits.unwrap_or_default().deadline_secs);
            let longest = LONGEST_WAIT.max(deadline).saturating_add(self.rules.patience);
            pending.overdue(now, deadline.saturating_add(self.rules.patience), longest)
        };
        let overdue: Vec<_> = self
            .broker
            .older_than(now.saturating_sub(self.rules.patience))
            .filter_map(|(event, pending)| {
                Some((event, overdue(pending)?, pending.dispatched.is_some()))
            })
            .collect();
        if let Some(worker) = self.worker.as_ref()
            && !self.worker_ready
            && worker.age() > START_PATIENCE
        {
            self.kill_worker("it is stuck at its start");
        }
        self.watch_recycle();
        for (event, why, in_flight) in overdue {
            match (why, in_flight) {
                (Overdue::Silent, true) => {
                    // the next worker may do better; an event that silences three is given up
                    self.kill_worker("it is silent past the deadline");
                    continue;
                }
                (Overdue::Endless, true) => self.cancel(event),
                (_, false) => {}
            }
            let answer = self.broker.deny(event, DenyErrno::Eio, "no answer by the deadline");
            answer.into_iter().for_each(|answer| self.finish(answer));
        }
    }
}
