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

pub(super) mod waiter;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tracing::{debug, error, info, warn};

use super::kept::{self, KeptShard};
use super::origins::Origins;
use super::store::Store;
use super::worker::{Control, Event, Exit, Upcall, Worker, cut};
use crate::fanotify::{self, AsyncChannel, DenyErrno, FileId, Group, PermissionEvent, Verdict};
use crate::ids::{EventId, PoolId, SegmentId, ShardId};
use crate::queue::broker::{Answer, Broker, Death, Overdue, Pending};
use crate::queue::decide::{Decision, decide};
use crate::queue::inflight::{self, DEFAULT_CAPACITY, Slot, Table, TableError};
use crate::queue::wire::{
    Counters as FetchCounters, FromQueue, FromWorker, LONGEST_WAIT, Limits, OriginSpec, ToQueue,
    ToWorker,
};
use crate::range::ByteRange;
use crate::segment::presence;
use crate::sys::fdstore;
use waiter::{Held, Waiter};

/// How long after the readers' deadline a silent worker is given up.
const GRACE: Duration = Duration::from_secs(30);

const GONE: &str = "its tree is not mounted any more";

/// How long to wait after events could not be read.
const READ_PAUSE: Duration = Duration::from_millis(100);

/// A worker that has not greeted us by then is stuck.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// A worker that lived for less ended as soon as it was started.
const QUICK_DEATH: Duration = Duration::from_secs(2);

/// So many quick deaths in a row, and nobody waits for the next worker.
const TOO_MANY_DEATHS: u32 = 5;

/// What others ask of a shard.
#[derive(Debug)]
pub enum Command {
    /// A pool that this shard serves from now on.
    Pool {
        pool: PoolId,
        origin: OriginSpec,
        limits: Limits,
    },
    /// A segment: it is marked, and the worker has it, when the reply comes.
    Attach {
        pool: PoolId,
        segment: SegmentId,
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// The pool's segments are not mounted any more.
    Detach {
        pool: PoolId,
        reply: oneshot::Sender<()>,
    },
    /// The segment was complete once, so its mark may not be needed.
    Unmark {
        segment: SegmentId,
    },
    /// Fetch records of a segment.
    Prefetch {
        segment: SegmentId,
        first: u32,
        count: u32,
        reply: oneshot::Sender<Result<(), String>>,
    },
    Snapshot {
        reply: oneshot::Sender<Snapshot>,
    },
    /// The segments of all trees that are mounted are attached: from now on events are read, and the
    /// worker gets some.
    Serve,
    Retry {
        event: EventId,
        reply: oneshot::Sender<bool>,
    },
    Deny {
        event: EventId,
        reply: oneshot::Sender<bool>,
    },
    /// Every mount is gone: deny what is pending and end.
    Stop {
        reply: oneshot::Sender<()>,
    },
    /// From the shard's own tasks: a segment said to be complete was checked.
    Checked {
        segment: SegmentId,
        /// See [`Segment::attachment`].
        attachment: u64,
        complete: io::Result<bool>,
    },
}

/// What a shard is doing.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub shard: ShardId,
    pub worker_pid: Option<i32>,
    pub worker_deaths: u64,
    pub counters: Counters,
    pub fetched: HashMap<PoolId, FetchCounters>,
    pub trouble: HashMap<PoolId, String>,
    /// In the order in which they were read.
    pub events: Vec<(EventId, PoolId, Pending)>,
    /// By the clock of [`Pending::arrived`].
    pub now: Duration,
}

/// Sums since the shard was started.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    pub events: u64,
    pub answered_present: u64,
    pub answered_fetched: u64,
    pub denied: u64,
    pub requeued: u64,
    pub longest_wait: Duration,
}

/// A shard that can't be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Fanotify(#[from] fanotify::Error),
    #[error("can't except our own accesses from the watch")]
    Ignore(#[from] io::Error),
    #[error(transparent)]
    Table(#[from] TableError),
}

/// Told when a segment has become complete and durable.
pub type OnComplete = Arc<dyn Fn(SegmentId) + Send + Sync>;

/// The way to a shard.
#[derive(Debug, Clone)]
pub struct ShardHandle {
    pub id: ShardId,
    commands: mpsc::UnboundedSender<Command>,
    /// Whatever happens to the task: with the last fd of the group the kernel would let all readers
    /// go, and show them zeros.
    _group: Arc<Group>,
}

impl ShardHandle {
    /// Sends a command; a shard that has ended drops it, and with it the reply's sender.
    pub fn send(&self, command: Command) {
        // the shard only ends when everything does
        self.commands.send(command).ok();
    }

    /// Sends a command and waits for its reply; `None` when the shard has ended.
    pub async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply));
        answer.await.ok()
    }
}

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
    reply: oneshot::Sender<Result<(), String>>,
}

#[derive(Debug)]
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
    worker_deaths: u64,
    /// A worker that we killed ourselves, for its silence.
    killed: bool,
    prefetches: HashMap<u64, Prefetch>,
    next_request: u64,
    counters: Counters,
    fetched: HashMap<PoolId, FetchCounters>,
    trouble: HashMap<PoolId, String>,
    commands: mpsc::UnboundedReceiver<Command>,
    own: mpsc::WeakUnboundedSender<Command>,
    origins: Arc<Origins>,
    store: Arc<Store>,
    on_complete: OnComplete,
    stopping: bool,
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
        if fdstore::is_there() {
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
        on_complete: OnComplete,
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
            events.insert(record.event, Held { waiter: Waiter::Owed(owed), slot: Some(slot) });
        }
        let (sender, commands) = mpsc::unbounded_channel();
        let for_handle = Arc::clone(&group);
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
            worker_deaths: 0,
            killed: false,
            prefetches: HashMap::new(),
            next_request: 0,
            counters: Counters::default(),
            fetched: HashMap::new(),
            trouble: HashMap::new(),
            commands,
            own: sender.downgrade(),
            origins,
            store,
            on_complete,
            stopping: false,
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
        Ok(ShardHandle { id, commands: sender, _group: for_handle })
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
            Wake::Worker(Event::Ended(exit)) => self.worker_ended(&exit),
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
            Ok(Decision::Fetch(range)) => {
                debug!(shard = %self.id, event = %number, segment = %id, %range, pid = event.pid(), "waits");
                self.broker.arrived(number, id, range, event.pid(), pending.arrived);
                self.events.insert(number, Held { waiter: Waiter::Event(event), slot });
                return;
            }
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
        if let (Some(pending), Some(Held { waiter, slot: Some(slot) })) =
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
        let Some(Held { waiter, slot }) = self.events.remove(&answer.event) else { return };
        let waited = Self::now().saturating_sub(answer.pending.arrived);
        self.counters.longest_wait = self.counters.longest_wait.max(waited);
        let mut verdict = answer.verdict;
        let mut reason = answer.reason;
        if verdict == Verdict::Allow {
            // a worker's word is not enough to let a reader see what may be a hole
            let pool = self.segments.get(&answer.pending.segment).map(|segment| segment.pool);
            match waiter.is_present(&self.store, pool, &answer.pending) {
                Ok(true) => self.counters.answered_fetched += 1,
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
            let longest = LONGEST_WAIT.max(deadline).saturating_add(GRACE);
            pending.overdue(now, deadline.saturating_add(GRACE), longest)
        };
        let overdue: Vec<_> = self
            .broker
            .older_than(now.saturating_sub(GRACE))
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
        for (event, why, in_flight) in overdue {
            match (why, in_flight) {
                (Overdue::Silent, true) => self.kill_worker("it is silent past the deadline"),
                (Overdue::Endless, true) => self.cancel(event),
                (_, false) => {}
            }
            let answer = self.broker.deny(event, DenyErrno::Eio, "no answer by the deadline");
            answer.into_iter().for_each(|answer| self.finish(answer));
        }
    }

    // ---- the worker ----

    fn start_worker(&mut self) {
        self.restart_at = None;
        self.killed = false;
        self.worker_ready = false;
        match Worker::start(self.id, &self.store) {
            Ok(worker) => {
                info!(shard = %self.id, pid = worker.pid(), "worker started");
                self.worker = Some(worker);
            }
            Err(error) => {
                error!(shard = %self.id, %error, "can't start a worker");
                self.schedule_restart(Duration::ZERO);
            }
        }
    }

    /// The first restart is at once; one that fails soon waits longer and longer.
    fn schedule_restart(&mut self, lived: Duration) {
        if lived > QUICK_DEATH {
            self.quick_deaths = 0;
            self.backoff = Duration::ZERO;
        } else {
            self.quick_deaths = self.quick_deaths.saturating_add(1);
            self.backoff =
                (self.backoff * 2).clamp(Duration::from_millis(20), Duration::from_secs(5));
        }
        if self.quick_deaths >= TOO_MANY_DEATHS {
            let why = "the workers end as soon as they are started: see the log";
            self.segments.values_mut().for_each(|segment| segment.refuse(why));
        }
        self.restart_at = Some(tokio::time::Instant::now() + self.backoff);
    }

    fn kill_worker(&mut self, why: &str) {
        if let Some(worker) = self.worker.as_mut()
            && !self.killed
        {
            warn!(shard = %self.id, pid = worker.pid(), why, "killing the worker");
            self.killed = true;
            worker.kill();
        }
    }

    fn worker_ended(&mut self, exit: &Exit) {
        let Some(worker) = self.worker.take() else { return };
        self.worker_deaths += 1;
        let in_flight = self.broker.in_flight();
        let death = if exit.from_outside && !self.killed { Death::Outside } else { Death::Fault };
        warn!(shard = %self.id, pid = worker.pid(), end = %exit.description, in_flight, "worker ended");
        self.counters.requeued += in_flight as u64;
        for answer in self.broker.worker_died(death) {
            self.finish(answer);
        }
        let left: Vec<_> = self.events.keys().copied().collect();
        left.into_iter().for_each(|event| self.note(event));
        for (_, Prefetch { reply, .. }) in self.prefetches.drain() {
            reply.send(Err("the worker ended".into())).ok();
        }
        self.schedule_restart(worker.age());
    }

    fn worker_message(&mut self, message: FromWorker) {
        match message {
            FromWorker::Ready { version } if version == crate::queue::wire::VERSION => {
                self.worker_ready = true;
                self.introduce();
            }
            FromWorker::Ready { version } => {
                self.kill_worker(&format!("it speaks version {version} of the protocol"));
            }
            FromWorker::Attached { segment, result } => {
                self.attached(segment, result.map_err(cut));
            }
            FromWorker::NeedTransport { request, pool } => {
                let (control, permit) = match self.upcall(pool) {
                    Some((control, Ok(permit))) => (control, permit),
                    Some((control, Err(why))) => {
                        let result = Err(why);
                        control.send(ToWorker::Transport { request, result }, Vec::new());
                        return;
                    }
                    None => return,
                };
                let origins = Arc::clone(&self.origins);
                tokio::spawn(async move {
                    let (result, fds) = match origins.transport(pool) {
                        Ok(fd) => (Ok(()), vec![fd]),
                        Err(error) => (Err(error), Vec::new()),
                    };
                    control.answer(permit, ToWorker::Transport { request, result }, fds);
                });
            }
            FromWorker::NeedCredential { request, pool, url, rejected } => {
                let (control, permit) = match self.upcall(pool) {
                    Some((control, Ok(permit))) => (control, permit),
                    Some((control, Err(why))) => {
                        let result = Err(why);
                        control.send(ToWorker::Credential { request, result }, Vec::new());
                        return;
                    }
                    None => return,
                };
                let origins = Arc::clone(&self.origins);
                tokio::spawn(async move {
                    let result = origins.credential(pool, &url, rejected.as_ref()).await;
                    control.answer(permit, ToWorker::Credential { request, result }, Vec::new());
                });
            }
            FromWorker::Complete { segment } => self.check_complete(segment),
            FromWorker::PrefetchDone { request, result } => {
                if let Some(Prefetch { reply, .. }) = self.prefetches.remove(&request) {
                    reply.send(result.map_err(cut)).ok();
                }
            }
            FromWorker::Report { pool, .. } | FromWorker::Trouble { pool, .. }
                if !self.pools.contains_key(&pool) =>
            {
                debug!(shard = %self.id, %pool, "the worker speaks of a pool that it doesn't serve");
            }
            FromWorker::Report { pool, counters } => {
                add(self.fetched.entry(pool).or_default(), &counters)
            }
            FromWorker::Trouble { pool, message } => {
                let message = cut(message);
                if message.is_empty() {
                    self.trouble.remove(&pool);
                } else {
                    warn!(shard = %self.id, %pool, message, "trouble with the origin");
                    self.trouble.insert(pool, message);
                }
            }
        }
    }

    /// Whether the worker may have what it asks for.
    fn upcall(&mut self, pool: PoolId) -> Option<(Control, Result<OwnedSemaphorePermit, String>)> {
        let served = self.pools.contains_key(&pool);
        let worker = self.worker.as_mut()?;
        let control = worker.control();
        match worker.upcall(served) {
            Upcall::Granted(permit) => Some((control, Ok(permit))),
            Upcall::Refused(why) => Some((control, Err(why))),
            Upcall::OutOfOrder => {
                self.kill_worker("it asks for ever more transports and credentials");
                None
            }
        }
    }

    fn attached(&mut self, id: SegmentId, result: Result<(), String>) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        match result {
            Ok(()) => {
                segment.refused = false;
                for reply in segment.waiting_for_worker.drain(..) {
                    reply.send(Ok(())).ok();
                }
            }
            Err(why) => {
                error!(shard = %self.id, segment = %id, why, "the worker can't take a segment");
                segment.refused = true;
                segment.refuse(&why);
            }
        }
    }

    /// Tells a new worker all that it serves, then lets it take events.
    fn introduce(&mut self) {
        if !(self.serving && self.worker_ready) {
            return;
        }
        let Some(worker) = self.worker.as_mut() else { return };
        let control = worker.control();
        for (pool, Pool { origin, limits }) in &self.pools {
            let message = ToWorker::Pool { pool: *pool, origin: origin.clone(), limits: *limits };
            control.send(message, Vec::new());
        }
        let mut failed = Vec::new();
        for (id, segment) in &self.segments {
            match self.store.open_for_worker(segment.pool, *id) {
                Ok(fds) => {
                    control.send(ToWorker::Segment { pool: segment.pool, segment: *id }, fds)
                }
                Err(error) => failed.push((*id, error)),
            }
        }
        control.send(ToWorker::Start, Vec::new());
        worker.set_running();
        for (id, error) in failed {
            error!(shard = %self.id, segment = %id, %error, "can't open a segment for the worker");
            if let Some(segment) = self.segments.get_mut(&id) {
                segment.refused = true;
                segment.refuse(&format!("can't open segment {id} for the worker: {error}"));
            }
        }
    }

    // ---- commands ----

    fn command(&mut self, command: Command) {
        match command {
            Command::Pool { pool, origin, limits } => {
                let message = ToWorker::Pool { pool, origin: origin.clone(), limits };
                self.pools.insert(pool, Pool { origin, limits });
                self.to_running_worker(message, Vec::new());
            }
            Command::Attach { pool, segment, reply } => self.attach(pool, segment, reply),
            Command::Detach { pool, reply } => {
                self.detach(pool);
                reply.send(()).ok();
            }
            // the catalog may be wrong, and the file can't be
            Command::Unmark { segment } => self.check_complete(segment),
            Command::Prefetch { segment, first, count, reply } => {
                let pool = self.segments.get(&segment).map(|segment| segment.pool);
                let running = self.worker.as_ref().is_some_and(Worker::is_running);
                match (pool, running) {
                    (Some(pool), true) => {
                        self.next_request += 1;
                        let request = self.next_request;
                        self.prefetches.insert(request, Prefetch { pool, reply });
                        let message = ToWorker::Prefetch { request, segment, first, count };
                        self.to_running_worker(message, Vec::new());
                    }
                    (Some(_), false) => {
                        reply.send(Err("there is no worker at the moment".into())).ok();
                    }
                    (None, _) => {
                        reply.send(Err(GONE.into())).ok();
                    }
                }
            }
            Command::Snapshot { reply } => {
                reply.send(self.snapshot()).ok();
            }
            Command::Serve => self.serve(),
            Command::Retry { event, reply } => {
                let in_flight = self.broker.retry(event);
                if in_flight == Some(true) {
                    self.cancel(event);
                }
                reply.send(in_flight.is_some()).ok();
            }
            Command::Deny { event, reply } => {
                let answer = self.broker.deny(event, DenyErrno::Eio, "denied by the administrator");
                reply.send(answer.is_some()).ok();
                if let Some(answer) = answer {
                    if answer.pending.dispatched.is_some() {
                        self.cancel(event);
                    }
                    self.finish(answer);
                }
            }
            Command::Stop { reply } => {
                self.stop();
                reply.send(()).ok();
            }
            Command::Checked { segment, attachment, complete } => {
                self.checked(segment, attachment, complete);
            }
        }
    }

    fn serve(&mut self) {
        self.serving = true;
        let left: Vec<_> =
            self.broker.iter().map(|(event, pending)| (event, pending.segment)).collect();
        for (event, segment) in left {
            let served = self.segments.contains_key(&segment);
            let pool = self.segments.get(&segment).map(|segment| segment.pool);
            let held = self.events.get(&event).zip(self.broker.get(event));
            // what its worker wrote before it ended counts
            let present = held.is_some_and(|(held, pending)| {
                held.waiter.is_present(&self.store, pool, pending).unwrap_or(false)
            });
            let answer = match (served, present) {
                (true, true) => self.broker.found_present(event),
                (true, false) => None,
                (false, _) => self.broker.deny(event, DenyErrno::Eagain, GONE),
            };
            answer.into_iter().for_each(|answer| self.finish(answer));
        }
        self.introduce();
    }

    fn to_running_worker(&self, message: ToWorker, fds: Vec<OwnedFd>) {
        if let Some(worker) = self.worker.as_ref().filter(|worker| worker.is_running()) {
            worker.control().send(message, fds);
        }
    }

    fn cancel(&mut self, event: EventId) {
        if let Some(worker) = self.worker.as_mut().filter(|worker| worker.is_running()) {
            worker.try_send(&ToQueue::Cancelled { event }).ok();
        }
    }

    fn attach(&mut self, pool: PoolId, id: SegmentId, reply: oneshot::Sender<Result<(), String>>) {
        if let Some(segment) = self.segments.get_mut(&id) {
            // another tree of the pool has it; the mark may have gone with completeness
            if !segment.marked {
                match self.store.mark(&self.group, pool, id) {
                    Ok(_) => segment.marked = true,
                    Err(error) => {
                        reply.send(Err(format!("can't mark segment {id}: {error}"))).ok();
                        return;
                    }
                }
            }
            if segment.refused {
                // readers of another mount may wait for it, so it stays where it is
                match self.store.open_for_worker(pool, id) {
                    Ok(fds) => {
                        segment.refused = false;
                        segment.waiting_for_worker.push(reply);
                        self.to_running_worker(ToWorker::Segment { pool, segment: id }, fds);
                    }
                    Err(error) => {
                        reply.send(Err(format!("can't open segment {id}: {error}"))).ok();
                    }
                }
            } else if segment.waiting_for_worker.is_empty() {
                reply.send(Ok(())).ok();
            } else {
                segment.waiting_for_worker.push(reply);
            }
            return;
        }
        let marked = self.store.mark(&self.group, pool, id);
        let opened = self.store.open_for_worker(pool, id);
        match (marked, opened) {
            (Ok(file), Ok(fds)) => {
                self.files.insert(file.id, id);
                self.detached.remove(&id);
                let waiting_for_worker = vec![reply];
                self.attachments += 1;
                let segment = Segment {
                    pool,
                    size: file.size,
                    marked: true,
                    attachment: self.attachments,
                    check: Check::No,
                    refused: false,
                    waiting_for_worker,
                };
                self.segments.insert(id, segment);
                self.to_running_worker(ToWorker::Segment { pool, segment: id }, fds);
            }
            (Err(error), _) | (_, Err(error)) => {
                reply.send(Err(format!("can't take segment {id} into service: {error}"))).ok();
            }
        }
    }

    /// The worker lets go of the pool. The marks stay, and who still reaches a segment through a
    /// mount elsewhere is denied what is not there: a mark goes with its file.
    fn detach(&mut self, pool: PoolId) {
        self.pools.remove(&pool);
        self.trouble.remove(&pool);
        for (id, mut segment) in self.segments.extract_if(|_, segment| segment.pool == pool) {
            segment.refuse(GONE);
            self.detached.insert(id, segment.size);
        }
        for (_, prefetch) in self.prefetches.extract_if(|_, prefetch| prefetch.pool == pool) {
            prefetch.reply.send(Err(GONE.into())).ok();
        }
        self.to_running_worker(ToWorker::Detach { pool }, Vec::new());
    }

    fn unmark(&mut self, id: SegmentId) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        if segment.marked {
            match self.store.unmark(&self.group, segment.pool, id) {
                Ok(()) => segment.marked = false,
                Err(error) => {
                    error!(shard = %self.id, segment = %id, %error, "can't remove a mark")
                }
            }
        }
    }

    /// The worker or the catalog says that a segment is complete: look for ourselves, make it
    /// durable. Once at a time.
    fn check_complete(&mut self, id: SegmentId) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        if segment.check != Check::No {
            segment.check = Check::Again;
            return;
        }
        segment.check = Check::UnderWay;
        let (pool, size, attachment) = (segment.pool, segment.size, segment.attachment);
        let (store, own) = (Arc::clone(&self.store), self.own.clone());
        tokio::task::spawn_blocking(move || {
            let complete = store.sync_if_complete(pool, id, size);
            if let Some(own) = own.upgrade() {
                own.send(Command::Checked { segment: id, attachment, complete }).ok();
            }
        });
    }

    fn checked(&mut self, id: SegmentId, attachment: u64, complete: io::Result<bool>) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        if segment.attachment != attachment {
            return;
        }
        let again = std::mem::replace(&mut segment.check, Check::No) == Check::Again;
        match complete {
            Ok(true) => {
                self.unmark(id);
                (self.on_complete)(id);
                debug!(shard = %self.id, segment = %id, "complete");
            }
            Ok(false) if again => self.check_complete(id),
            Ok(false) => warn!(shard = %self.id, segment = %id, "said to be complete, but is not"),
            Err(error) => error!(shard = %self.id, segment = %id, %error, "can't make it durable"),
        }
    }

    fn stop(&mut self) {
        let events: Vec<_> = self.broker.iter().map(|(event, _)| event).collect();
        for event in events {
            let answer = self.broker.deny(event, DenyErrno::Eagain, "Hydrant stops");
            answer.into_iter().for_each(|answer| self.finish(answer));
        }
        if let Some(worker) = self.worker.as_mut() {
            worker.kill();
        }
        self.stopping = true;
    }

    fn snapshot(&self) -> Snapshot {
        let pool_of = |pending: &Pending| {
            self.segments.get(&pending.segment).map_or(PoolId(0), |segment| segment.pool)
        };
        Snapshot {
            shard: self.id,
            worker_pid: self.worker.as_ref().map(Worker::pid),
            worker_deaths: self.worker_deaths,
            counters: self.counters,
            fetched: self.fetched.clone(),
            trouble: self.trouble.clone(),
            events: self
                .broker
                .iter()
                .map(|(event, pending)| (event, pool_of(pending), pending.clone()))
                .collect(),
            now: Self::now(),
        }
    }
}

fn add(sum: &mut FetchCounters, more: &FetchCounters) {
    sum.requests = sum.requests.saturating_add(more.requests);
    sum.retries = sum.retries.saturating_add(more.retries);
    sum.objects = sum.objects.saturating_add(more.objects);
    sum.read_ahead_objects = sum.read_ahead_objects.saturating_add(more.read_ahead_objects);
    sum.content_bytes = sum.content_bytes.saturating_add(more.content_bytes);
    sum.received_bytes = sum.received_bytes.saturating_add(more.received_bytes);
    sum.sent_bytes = sum.sent_bytes.saturating_add(more.sent_bytes);
    sum.rejected_objects = sum.rejected_objects.saturating_add(more.rejected_objects);
}
