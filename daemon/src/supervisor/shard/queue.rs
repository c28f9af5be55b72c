//! Where readers wait: with us, or in the kernel. The rest of the shard is the same for both.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::brokered::Brokered;
use super::demand::Demand;
use super::kernel::{self, Kernel};
use super::poison::Poison;
use super::{Counters, Hooks, NEXT_GRACE, Pool, Segment, now};
use crate::fanotify::{self, DenyErrno, FileId, QueueKind};
use crate::ids::{EventId, PoolId, SegmentId, ShardId};
use crate::queue::broker::{Death, Overdue, Pending};
use crate::queue::wire::{FromQueue, LONGEST_WAIT, ToQueue, ToWorker};
use crate::supervisor::store::Store;
use crate::supervisor::worker::Worker;

/// Why a reader is denied that waits when the daemon stops, and with what.
pub(super) const STOPS: (DenyErrno, &str) = (DenyErrno::Eagain, "Hydrant stops");

/// What the log has, at the level debug, of answers that belong to no event: the target of these lines. A worker's answer
/// and the end of its event may cross, and a worker may send what it likes: so nobody need see them, but for tests.
pub const STRAY_ANSWERS: &str = "hydrant_daemon::stray_answers";

/// What a queue sees of its shard.
#[derive(Debug)]
pub struct Scope<'a> {
    pub shard: ShardId,
    pub store: &'a Store,
    pub files: &'a HashMap<FileId, SegmentId>,
    pub segments: &'a HashMap<SegmentId, Segment>,
    pub detached: &'a HashMap<SegmentId, u64>,
    pub pools: &'a HashMap<PoolId, Pool>,
    /// How long after the readers' deadline a silent worker is given up.
    pub patience: Duration,
    pub worker: Option<&'a mut Worker>,
    pub counters: &'a mut Counters,
    pub demand: &'a mut Demand,
    pub poison: &'a mut Poison,
    pub late: &'a HashSet<Option<PoolId>>,
    pub hooks: &'a Hooks,
}

impl Scope<'_> {
    pub fn pool_of(&self, segment: SegmentId) -> Option<PoolId> {
        self.segments.get(&segment).map(|segment| segment.pool)
    }

    /// The worker, if it has been told of all that it serves.
    pub fn running_worker(&mut self) -> Option<&mut Worker> {
        self.worker.as_deref_mut().filter(|worker| worker.is_running())
    }

    /// Says something of an event, or a hint. A worker that doesn't listen is better without.
    pub fn say(&mut self, message: &ToQueue) {
        if let Some(worker) = self.running_worker() {
            worker.try_send(message).ok();
        }
    }

    /// What is wrong with an event that still waits.
    pub fn overdue(&self, pending: &Pending, now: Duration) -> Option<Overdue> {
        let patience = self.patience(self.pool_of(pending.segment));
        let longest = LONGEST_WAIT.saturating_add(self.patience).max(patience);
        pending.overdue(now, patience, longest)
    }

    /// Whether nobody is to wait any more, as the daemon is to stop, for what was asked for then.
    pub fn is_late(&self, segment: SegmentId, arrived: Duration) -> bool {
        now().saturating_sub(arrived) > NEXT_GRACE && self.late.contains(&self.pool_of(segment))
    }

    /// How long a worker may be silent about what it has of a pool.
    fn patience(&self, pool: Option<PoolId>) -> Duration {
        let limits = pool.and_then(|pool| self.pools.get(&pool)).map(|pool| pool.limits);
        let deadline = Duration::from_secs(limits.unwrap_or_default().deadline_secs);
        deadline.saturating_add(self.patience)
    }

    /// How long a worker may be silent altogether.
    pub fn longest_patience(&self) -> Duration {
        let pools = self.pools.keys().map(|pool| self.patience(Some(*pool)));
        pools.max().unwrap_or_else(|| self.patience(None))
    }
}

/// One of the two.
#[derive(Debug)]
pub enum Queue {
    Brokered(Box<Brokered>),
    Kernel(Box<Kernel>),
}

/// What woke a queue.
#[derive(Debug)]
pub enum Wake {
    Brokered(Result<Option<Vec<fanotify::Event>>, fanotify::Error>),
    Kernel(kernel::Wake),
}

/// Does the same with whichever it is.
macro_rules! either {
    ($self:expr, $queue:ident => $action:expr) => {
        match $self {
            Self::Brokered($queue) => $action,
            Self::Kernel($queue) => $action,
        }
    };
}

impl Queue {
    pub fn kind(&self) -> QueueKind {
        match self {
            Self::Brokered(_) => QueueKind::Stock,
            Self::Kernel(_) => QueueKind::Kernel,
        }
    }

    /// Waits until there is something to [`apply`](Self::apply). May be dropped while it waits.
    pub async fn next(&mut self) -> Wake {
        match self {
            Self::Brokered(queue) => Wake::Brokered(queue.next().await),
            Self::Kernel(queue) => Wake::Kernel(queue.next().await),
        }
    }

    /// `false`: the group is gone.
    pub fn apply(&mut self, wake: Wake, scope: &mut Scope<'_>) -> bool {
        match (self, wake) {
            (Self::Brokered(queue), Wake::Brokered(events)) => queue.apply(events, scope),
            (Self::Kernel(queue), Wake::Kernel(wake)) => queue.apply(wake, scope),
            _ => true,
        }
    }

    /// All segments of trees that are mounted are served: from now on readers are.
    pub fn serve(&mut self, scope: &mut Scope<'_>) {
        either!(self, queue => queue.serve(scope));
    }

    /// Events of a file are a segment's from now on.
    pub fn know(&self, segment: SegmentId, file: FileId) {
        if let Self::Kernel(queue) = self {
            queue.know(segment, file);
        }
    }

    pub fn forget(&self, segment: SegmentId) {
        if let Self::Kernel(queue) = self {
            queue.forget(segment);
        }
    }

    /// The worker knows all that it is to serve: it gets events.
    pub fn begin(&mut self, scope: &mut Scope<'_>) {
        match self {
            Self::Brokered(_) => {
                if let Some(worker) = &scope.worker {
                    let start = ToWorker::Start { quarantine: Vec::new() };
                    worker.control().send(start, Vec::new());
                }
            }
            Self::Kernel(queue) => queue.hand_over(scope),
        }
    }

    /// Gives the worker what waits for it.
    pub fn dispatch(&mut self, scope: &mut Scope<'_>) {
        if let Self::Brokered(queue) = self {
            queue.dispatch(scope);
        }
    }

    /// There is something to [`dispatch`](Self::dispatch).
    pub fn has_some_to_dispatch(&self) -> bool {
        matches!(self, Self::Brokered(queue) if queue.waiting() > 0)
    }

    /// What the worker says on the queue's socket.
    pub fn message(&mut self, message: FromQueue, scope: &mut Scope<'_>) {
        either!(self, queue => queue.message(message, scope));
    }

    /// `end`: how, for people. Gives the number of events that the worker had.
    pub fn worker_ended(&mut self, death: Death, end: &str, scope: &mut Scope<'_>) -> u64 {
        either!(self, queue => queue.worker_ended(death, end, scope))
    }

    /// Nothing is in quarantine any more.
    pub fn clear_quarantine(&mut self, scope: &mut Scope<'_>) {
        match self {
            Self::Brokered(_) => {}
            Self::Kernel(queue) => queue.clear_quarantine(scope),
        }
    }

    /// `false`: there is no such event.
    pub fn retry(&mut self, event: EventId, scope: &mut Scope<'_>) -> bool {
        either!(self, queue => queue.retry(event, scope))
    }

    /// Denies an event, as the administrator says. `false`: there is no such event.
    pub fn deny(&mut self, event: EventId, scope: &mut Scope<'_>) -> bool {
        either!(self, queue => queue.deny(event, scope))
    }

    /// Denies who is [late](Scope::is_late). Gives their number.
    pub fn deny_late(&mut self, scope: &mut Scope<'_>) -> usize {
        either!(self, queue => queue.deny_late(scope))
    }

    /// Looks for events that have waited too long. Says why the worker is to be killed, if it is.
    pub fn tick(&mut self, scope: &mut Scope<'_>) -> Option<&'static str> {
        either!(self, queue => queue.tick(scope))
    }

    /// Nobody is to wait any more. The worker is being killed.
    pub fn stop(&mut self, scope: &mut Scope<'_>) {
        either!(self, queue => queue.stop(scope));
    }

    /// After [`stop`](Self::stop): nobody waits.
    pub fn has_stopped(&self) -> bool {
        match self {
            Self::Brokered(_) => true,
            Self::Kernel(queue) => queue.has_stopped(),
        }
    }

    /// The events that wait, in the order in which they were read.
    pub fn events(&self) -> Vec<(EventId, Pending)> {
        either!(self, queue => queue.events())
    }

    /// Looks who waits at the moment.
    pub fn note_demand(&self, demand: &mut Demand) {
        either!(self, queue => queue.note_demand(demand));
    }

    /// The shard's counters with what the kernel's queue counts elsewhere.
    pub fn counters(&self, counters: Counters) -> Counters {
        match self {
            Self::Brokered(_) => counters,
            Self::Kernel(queue) => queue.counters(counters),
        }
    }

    /// Leaves those who wait to the next supervisor.
    pub fn leave(&mut self) {
        match self {
            Self::Brokered(queue) => queue.leave(),
            // the kernel has them
            Self::Kernel(_) => {}
        }
    }
}
