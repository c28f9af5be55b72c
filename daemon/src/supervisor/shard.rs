//! A shard: a fanotify group, its queue, its worker.
//!
//! One task owns all of a shard and does one thing at a time: `loop { wait for something; apply it }`.
//! No locks. Whatever takes its time (starting git for a worker, checking a whole segment) runs in a
//! task of its own and comes back as a [`Command`]. A shard that is stuck with its origin holds
//! up no other.
//!
//! Whatever happens to this process, the kernel's side of the shard goes on: the group and the in-flight
//! table are in the service manager's keeping. Where readers wait until then is the only thing in
//! which the two kinds of kernel differ, and all that knows of it is in `queue` and below.

mod brokered;
mod commands;
mod demand;
mod handle;
mod kernel;
mod poison;
mod queue;
mod recycle;
mod spare;
pub(crate) mod waiter;
mod workers;

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::Arc;

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tracing::{debug, error};

use super::kept::{self, KeptShard};
use super::origins::Origins;
use super::store::Store;
use super::worker::{Event, Worker};
use crate::fanotify::{FileId, Group, QueueKind};
use crate::ids::{PoolId, SegmentId, ShardId};
use crate::queue::inflight::{self, DEFAULT_CAPACITY, Table};
pub use crate::queue::quarantine::Quarantined;
use crate::queue::wire::{Counters as FetchCounters, Limits, OriginSpec, ToWorker};
use crate::source::git::Capabilities;
use crate::sys::fdstore;
use brokered::Brokered;
use demand::Demand;
pub use demand::{Demanded, Read};
pub use handle::{
    Command, Completeness, Counters, Hooks, LastDeath, Rules, ShardHandle, Snapshot, StartError,
    WorkerSnapshot,
};
use kernel::Kernel;
pub use poison::{GivenUp, epoch_ms, from_epoch};
pub use queue::STRAY_ANSWERS;
use queue::{Queue, Scope};
use spare::Spare;

pub(super) const GONE: &str = "its tree is not mounted any more";

/// When the daemon is to stop, who waits for longer is denied. `hydrant stop` waits for a minute, and systemd for two
/// (`TimeoutStopSec=`).
pub(super) const GRACE: Duration = Duration::from_secs(10);

/// The same once the pool's origin has let somebody wait for so long: a read or a page fault that is denied may
/// ask several times more before it fails.
const NEXT_GRACE: Duration = Duration::from_secs(1);

/// A worker that has not greeted us by then is stuck.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// A worker that lived for less ended as soon as it was started.
const QUICK_DEATH: Duration = Duration::from_secs(2);

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
    /// Checks that have failed, and of those who died.
    failed_checks: u32,
    deaths: u32,
    /// The worker could not take it. The next one, or the next [`Command::Attach`], tries again.
    refused: bool,
    /// What readers are known to have wanted of a layer, for its trace.
    touched: HashSet<u32>,
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
    queue: Queue,
    /// Since [`Command::Serve`].
    serving: bool,
    /// It has greeted us.
    worker_ready: bool,
    files: HashMap<FileId, SegmentId>,
    segments: HashMap<SegmentId, Segment>,
    /// Segments that are not served any more, but may be marked: their sizes in bytes.
    detached: HashMap<SegmentId, u64>,
    /// Of these: what readers are known to have wanted. The worker tells the rest when it lets go of them.
    touched: HashMap<SegmentId, HashSet<u32>>,
    attachments: u64,
    pools: HashMap<PoolId, Pool>,
    /// What workers have found out about the pools' servers.
    servers: HashMap<PoolId, Box<Capabilities>>,
    worker: Option<Worker>,
    spare: Spare,
    /// When to start the next worker.
    restart_at: Option<tokio::time::Instant>,
    backoff: workers::Backoff,
    pace: workers::Pace,
    worker_deaths: u64,
    last_death: Option<LastDeath>,
    recycle: Option<recycle::Recycle>,
    /// Why we killed the worker ourselves.
    killed: Option<String>,
    poison: poison::Poison,
    /// The pools that had readers wait for longer than [`GRACE`] when the daemon was to stop. `None`: any that is not
    /// served any more.
    late: HashSet<Option<PoolId>>,
    demand: Demand,
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
    /// Since [`Command::Stop`]: there are no new workers, and this is told when nobody waits.
    stop: Option<oneshot::Sender<()>>,
    /// There is nothing left to do.
    over: bool,
    /// Dropped last: the shard has let go of everything.
    handing_over: Option<oneshot::Sender<()>>,
}

/// Since some time before the start, by the clock of the in-flight tables.
pub(super) fn now() -> Duration {
    Duration::from_nanos(inflight::now())
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
            self.queue.leave();
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
    Queue(queue::Wake),
    Worker(Event),
    Spare(spare::Wake),
    Restart,
    Tick,
}

impl Shard {
    /// Takes the group of the shard before this one over, or makes one of this kind, has it kept, and
    /// starts the shard's task. It does nothing about events before [`Command::Serve`].
    pub fn start(
        id: ShardId,
        kind: QueueKind,
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
            None => Group::new(kind)?,
        });
        let table = match table {
            Some(table) => table,
            None => Table::create(DEFAULT_CAPACITY)?,
        };
        table.adopt();
        // our own reads and writes of segments go through this mount and must not wait for ourselves
        store.ignore_for(&group)?;
        if new_table {
            kept::keep(&kept::table_name(id), table.as_fd());
        }
        if new_group {
            kept::keep(&kept::group_name(id), group.as_fd());
        }
        let table_for_handle = Arc::new(table.as_fd().try_clone_to_owned()?);
        let queue = match group.kind() {
            QueueKind::Stock => Queue::Brokered(Box::new(Brokered::new(&group, table, owed)?)),
            QueueKind::Kernel => Queue::Kernel(Box::new(Kernel::new(Arc::clone(&group), table))),
        };
        let (sender, commands) = mpsc::unbounded_channel();
        let for_handle = Arc::clone(&group);
        let shard = Self {
            id,
            group,
            queue,
            serving: false,
            worker_ready: false,
            files: HashMap::new(),
            segments: HashMap::new(),
            detached: HashMap::new(),
            touched: HashMap::new(),
            attachments: 0,
            pools: HashMap::new(),
            servers: HashMap::new(),
            worker: None,
            spare: Spare::new(),
            restart_at: Some(tokio::time::Instant::now()),
            backoff: workers::Backoff::default(),
            pace: workers::Pace::default(),
            worker_deaths: 0,
            last_death: None,
            recycle: None,
            killed: None,
            poison: poison::Poison::default(),
            late: HashSet::new(),
            demand: Demand::default(),
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
            stop: None,
            over: false,
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
        while !self.over {
            let wake = self.next(&mut tick).await;
            self.apply(wake);
            let (queue, mut scope) = self.queue();
            queue.dispatch(&mut scope);
            if self.queue.has_stopped()
                && let Some(stop) = self.stop.take()
            {
                self.over = true;
                stop.send(()).ok();
            }
        }
        debug!(shard = %self.id, "stopped");
    }

    async fn next(&mut self, tick: &mut tokio::time::Interval) -> Wake {
        let waiting = self.queue.has_some_to_dispatch();
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
        tokio::select! {
            command = self.commands.recv() => Wake::Command(command),
            wake = worker => wake,
            wake = self.spare.next() => Wake::Spare(wake),
            wake = self.queue.next() => Wake::Queue(wake),
            _ = tick.tick() => Wake::Tick,
        }
    }

    fn apply(&mut self, wake: Wake) {
        match wake {
            Wake::Command(Some(command)) => self.command(command),
            Wake::Command(None) => self.over = true,
            Wake::Queue(wake) => {
                let (queue, mut scope) = self.queue();
                self.over = !queue.apply(wake, &mut scope);
            }
            Wake::Worker(Event::Queue(message)) => {
                let (queue, mut scope) = self.queue();
                queue.message(message, &mut scope);
            }
            Wake::Worker(Event::Control(message)) => self.worker_message(message),
            Wake::Worker(Event::Writable | Event::HungUp) => {}
            Wake::Worker(Event::Broken(why)) => self.kill_worker(&why),
            Wake::Worker(Event::Ended(exit)) => self.worker_ended(exit),
            Wake::Spare(wake) => self.spare(wake),
            Wake::Restart => self.start_worker(),
            Wake::Tick => self.tick(),
        }
    }

    /// The queue, and what it may see of the rest.
    fn queue(&mut self) -> (&mut Queue, Scope<'_>) {
        let scope = Scope {
            shard: self.id,
            store: &self.store,
            files: &self.files,
            segments: &self.segments,
            detached: &self.detached,
            pools: &self.pools,
            patience: self.rules.patience,
            worker: self.worker.as_mut(),
            counters: &mut self.counters,
            demand: &mut self.demand,
            poison: &mut self.poison,
            late: &self.late,
            hooks: &self.hooks,
        };
        (&mut self.queue, scope)
    }

    fn tick(&mut self) {
        if let Some(worker) = self.worker.as_ref()
            && !self.worker_ready
            && worker.age() > START_PATIENCE
        {
            self.kill_worker("it is stuck at its start");
        }
        self.watch_spare();
        self.watch_recycle();
        let (queue, mut scope) = self.queue();
        if let Some(why) = queue.tick(&mut scope) {
            self.kill_worker(why);
        }
    }
}
