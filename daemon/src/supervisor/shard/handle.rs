//! The way to a shard.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::super::kept;
use super::demand::Demanded;
use super::poison::GivenUp;
use crate::fanotify::{self, Group};
use crate::ids::{EventId, PoolId, SegmentId, ShardId};
use crate::queue::broker::Pending;
use crate::queue::inflight::TableError;
use crate::queue::quarantine::Quarantined;
use crate::queue::wire::image::Repository;
use crate::queue::wire::{Counters as FetchCounters, Limits, OriginSpec, Run};
use crate::range::ByteRange;
use crate::supervisor::cgroups::Cgroups;

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
    /// As that, and from now on who reads its segments is denied, also what is there. Gives whether that is so with the shard's
    /// kind of queue.
    Close {
        pool: PoolId,
        reply: oneshot::Sender<bool>,
    },
    /// The segment was complete once, so its mark may not be needed.
    Unmark {
        segment: SegmentId,
    },
    /// Fetch records of a segment, in this order.
    Prefetch {
        segment: SegmentId,
        runs: Vec<Run>,
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// An image is being pulled from there, and the worker will soon be asked for its layers.
    Preconnect {
        repository: Repository,
        limits: Limits,
    },
    /// What readers have waited for, since it was asked last.
    Demand {
        reply: oneshot::Sender<Demanded>,
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
    /// Another worker, please. The reply comes when it has taken over.
    Recycle {
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// What is in quarantine from before.
    Quarantine {
        ranges: Vec<Quarantined>,
    },
    /// Nothing is in quarantine any more.
    ClearQuarantine {
        reply: oneshot::Sender<()>,
    },
    /// The daemon is to stop: deny who waits for too long.
    DenyLate,
    /// Every mount is gone: deny what is pending and end.
    Stop {
        reply: oneshot::Sender<()>,
    },
    /// Answers a shard that is not stuck, sooner or later.
    Ping {
        reply: oneshot::Sender<()>,
    },
    /// Leave those who wait to the next supervisor, and end. The reply's sender is dropped then.
    HandOver {
        reply: oneshot::Sender<()>,
    },
    /// From the shard's own tasks: a segment said to be complete was checked.
    Checked {
        segment: SegmentId,
        /// Which attach of the segment it was about.
        attachment: u64,
        said: Said,
        complete: io::Result<Completeness>,
    },
    /// From the shard's own tasks: that could not be told, and it is time to look again.
    CheckAgain {
        segment: SegmentId,
        attachment: u64,
        said: Said,
    },
}

/// Who says that a segment is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    Worker,
    /// What had to be proved was proved then.
    Catalog,
}

/// What was found where a segment was said to be complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Completeness {
    /// It has holes.
    No,
    Yes,
    /// It was filled by an index, and is the layer that this says it is.
    Proved,
    /// Or it is not, or that can't be proved: how it differs.
    Refuted(String),
    /// Who was to prove it died, or took too long. That may be because of what is in it.
    Undecided(String),
}

/// What a shard is doing.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub shard: ShardId,
    pub worker_pid: Option<i32>,
    pub worker: Option<WorkerSnapshot>,
    pub spare_pid: Option<i32>,
    pub worker_deaths: u64,
    pub last_death: Option<LastDeath>,
    pub counters: Counters,
    pub fetched: HashMap<PoolId, FetchCounters>,
    pub trouble: HashMap<PoolId, String>,
    /// In the order in which they were read.
    pub events: Vec<(EventId, PoolId, Pending)>,
    /// By the clock of [`Pending::arrived`].
    pub now: Duration,
}

/// A worker at this moment.
#[derive(Debug, Clone)]
pub struct WorkerSnapshot {
    pub pid: i32,
    pub age: Duration,
    /// As [`hydrant_api::Worker::state`].
    pub state: &'static str,
    pub cgroup: Option<PathBuf>,
}

/// How a worker ended.
#[derive(Debug, Clone)]
pub struct LastDeath {
    pub pid: i32,
    pub at: Instant,
    pub end: String,
}

/// Sums since the shard was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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

/// How workers are treated.
#[derive(Debug, Clone)]
pub struct Rules {
    /// How long after the readers' deadline a silent one is given up.
    pub patience: Duration,
    pub cgroups: Arc<Cgroups>,
    /// Whether another one is ready for when a worker ends.
    pub spare: bool,
}

/// Who is told what happens in a shard. They return at once.
#[derive(Clone)]
pub struct Hooks {
    /// A segment has become complete and durable; `true`: and was proved to be the layer that its index says.
    pub on_complete: Arc<dyn Fn(SegmentId, bool) + Send + Sync>,
    /// A layer is complete, and not what its index says.
    pub on_refuted: Arc<dyn Fn(SegmentId, String) + Send + Sync>,
    pub on_given_up: Arc<dyn Fn(GivenUp) + Send + Sync>,
    /// A range was in quarantine, and now its bytes are there.
    pub on_settled: Arc<dyn Fn(SegmentId, ByteRange) + Send + Sync>,
    /// Readers of a layer wanted these records of its segment.
    pub on_touched: Arc<dyn Fn(SegmentId, Vec<u32>) + Send + Sync>,
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks").finish_non_exhaustive()
    }
}

/// The way to a shard.
#[derive(Debug, Clone)]
pub struct ShardHandle {
    pub id: ShardId,
    pub(super) commands: mpsc::UnboundedSender<Command>,
    /// Whatever happens to the task: with the last fd of the group the kernel would let all readers
    /// go, and show them zeros.
    pub(super) group: Arc<Group>,
    pub(super) table: Arc<OwnedFd>,
}

impl ShardHandle {
    /// Sends a command; a shard that has ended drops it, and with it the reply's sender.
    pub fn send(&self, command: Command) {
        // the shard only ends when everything does
        self.commands.send(command).ok();
    }

    /// What the next supervisor needs of this shard, by the names that it knows: to be kept by somebody.
    pub fn estate(&self) -> io::Result<[(String, OwnedFd); 2]> {
        let group = self.group.as_fd().try_clone_to_owned()?;
        let table = self.table.try_clone()?;
        Ok([(kept::group_name(self.id), group), (kept::table_name(self.id), table)])
    }

    /// Has records of a segment fetched, or of a layer's chunks, in this order. Who drops the answer only does without it.
    pub fn prefetch(
        &self,
        segment: SegmentId,
        runs: Vec<Run>,
    ) -> oneshot::Receiver<Result<(), String>> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Prefetch { segment, runs, reply });
        answer
    }

    /// Sends a command and waits for its reply; `None` when the shard has ended.
    pub async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply));
        answer.await.ok()
    }
}
