//! The kernel's queue, as a worker uses it.
//!
//! The worker reads the events of a restartable group itself and answers them itself. When it dies,
//! its queue fd closes and the kernel puts what it had back at the head of the queue, in order. What
//! the kernel does not keep is in the [in-flight table](super::inflight): since when the reader
//! waits, and how many workers have died with it. The next worker finds it there, by segment, range and process.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use tracing::{error, warn};

use super::broker::MAX_STRIKES;
use super::decide::{Decision, decide};
use super::inflight::{Record, Slot, State, Table, now};
use crate::fanotify::{
    self, Answered, AsyncChannel, Channel, DenyErrno, Event, FileId, PermissionEvent, Verdict,
};
use crate::ids::{EventId, SegmentId};
use crate::range::ByteRange;
use crate::segment::presence::present;

/// What a queue has for its worker: [`ToQueue`](super::wire::ToQueue) without what only a
/// broker can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incoming {
    /// A reader waits for `range`, in whole blocks and not empty.
    Event { event: EventId, segment: SegmentId, range: ByteRange, pid: i32 },
    /// A reader was just given `range`, which was there.
    Touched { segment: SegmentId, range: ByteRange },
}

/// Why a queue can't go on, or an answer was not given.
#[derive(Debug, Error)]
pub enum QueueError {
    #[error(transparent)]
    Fanotify(#[from] fanotify::Error),
    #[error("event {event} is not with this worker")]
    Unknown { event: EventId },
}

/// The kernel's queue. One task takes what is [`next`](Self::next); any may answer.
///
/// Dropped with events in hand, it leaves them to the next worker.
#[derive(Debug)]
pub struct KernelQueue {
    state: Mutex<Inner>,
    channel: AsyncChannel,
}

#[derive(Debug)]
struct Inner {
    /// Read, but not taken by the worker yet.
    ready: VecDeque<Incoming>,
    held: HashMap<EventId, Held>,
    segments: HashMap<FileId, SegmentId>,
    table: Table,
    /// What the worker before had, and the kernel has not reported again yet.
    left: HashMap<Key, Vec<Record>>,
}

#[derive(Debug)]
struct Held {
    event: PermissionEvent,
    slot: Option<Slot>,
}

/// How an event is known again: its segment, range and process.
type Key = (SegmentId, ByteRange, i32);

impl KernelQueue {
    /// Takes events from a queue fd, which must be nonblocking. `table` may be the one that the
    /// worker before has written. Within a tokio runtime.
    pub fn new(queue: OwnedFd, mut table: Table) -> Result<Self, QueueError> {
        let channel = AsyncChannel::new(Channel::from_owned_fd(queue))?;
        let snapshot = table.take();
        if snapshot.corrupt > 0 {
            warn!(slots = snapshot.corrupt, "the in-flight table had slots that make no sense");
        }
        let mut left: HashMap<Key, Vec<Record>> = HashMap::new();
        for record in snapshot.records {
            left.entry((record.segment, record.range, record.pid)).or_default().push(record);
        }
        let state = Mutex::new(Inner {
            ready: VecDeque::new(),
            held: HashMap::new(),
            segments: HashMap::new(),
            table,
            left,
        });
        Ok(Self { state, channel })
    }

    /// Events of the file that `file` is open on are the segment's. Before the first event of
    /// it: events of unknown files are denied.
    pub fn know(&self, segment: SegmentId, file: impl AsFd) -> nix::Result<()> {
        let id = FileId::of(file)?;
        self.lock().segments.insert(id, segment);
        Ok(())
    }

    /// The segment is not served any more.
    pub fn forget(&self, segment: SegmentId) {
        self.lock().segments.retain(|_, known| *known != segment);
    }

    /// What comes next. `None`: the group is gone, nothing ever will. What asks for nothing to be
    /// fetched is answered here. May be dropped while it waits: nothing is lost.
    pub async fn next(&self) -> Result<Option<Incoming>, QueueError> {
        loop {
            if let Some(incoming) = self.lock().ready.pop_front() {
                return Ok(Some(incoming));
            }
            match self.channel.read().await? {
                Some(events) => self.lock().sort(events),
                None => return Ok(None),
            }
        }
    }

    /// Answers an event, once.
    ///
    /// # Errors
    /// [`QueueError::Unknown`]: it has been answered. Else the kernel did not take the answer.
    pub fn answer(&self, event: EventId, verdict: Verdict) -> Result<Answered, QueueError> {
        let mut inner = self.lock();
        let held = inner.held.remove(&event).ok_or(QueueError::Unknown { event })?;
        let answered = held.event.answer(verdict);
        if let Some(slot) = held.slot {
            inner.table.free(slot);
        }
        Ok(answered?)
    }

    /// The events that the worker has.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.lock().held.len()
    }

    /// Every use leaves it whole, also one that panics.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Does with events what needs no worker, and keeps the others.
    fn sort(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Permission(event) => self.arrived(event),
                Event::Refused { errno, pid } => {
                    let errno = io::Error::from_raw_os_error(errno);
                    error!(pid, %errno, "a reader was denied because its event could not be taken");
                }
                Event::Overflow => error!("the kernel has lost events, and allowed them"),
                Event::Other { mask } => warn!(mask, "an event that was not asked for"),
            }
        }
    }

    fn arrived(&mut self, event: PermissionEvent) {
        let (id, size) = match event.file() {
            Ok(file) => file,
            Err(errno) => {
                error!(%errno, "an event's file cannot be asked for its size");
                return settle(event, Verdict::Deny(DenyErrno::Eio));
            }
        };
        let Some(segment) = self.segments.get(&id).copied() else {
            error!(?id, pid = event.pid(), "an event of a file that is no segment of this worker");
            return settle(event, Verdict::Deny(DenyErrno::Eio));
        };
        match decide(event.range(), size, |range| present(&event, range)) {
            Ok(Decision::Allow) => settle(event, Verdict::Allow),
            Ok(Decision::Touched(range)) => {
                settle(event, Verdict::Allow);
                self.ready.push_back(Incoming::Touched { segment, range });
            }
            Ok(Decision::Fetch(range)) => self.hold(event, segment, range),
            Ok(Decision::Deny(errno)) => {
                error!(%segment, ?errno, "an event that does not say what is read");
                settle(event, Verdict::Deny(errno));
            }
            Err(errno) => {
                error!(%segment, %errno, "a segment cannot be asked for its holes");
                settle(event, Verdict::Deny(DenyErrno::Eio));
            }
        }
    }

    /// Keeps an event for the worker.
    fn hold(&mut self, event: PermissionEvent, segment: SegmentId, range: ByteRange) {
        let now = now();
        let mut record = Record {
            event: EventId(0),
            number: event.number(),
            segment,
            range,
            pid: event.pid(),
            since: now,
            dispatched: now,
            attempts: 1,
            strikes: 0,
            worker: std::process::id(),
            state: State::InFlight,
        };
        let before = self.left_by_the_worker_before((segment, range, event.pid()));
        record.event = match before {
            Some(before) if !self.held.contains_key(&before.event) => before.event,
            _ => self.table.next_event(),
        };
        if let Some(before) = before {
            record.since = before.since;
            record.attempts = before.attempts.saturating_add(1);
            record.strikes = before.strikes;
        }
        if record.strikes >= MAX_STRIKES {
            error!(event = %record.event, %segment, %range, pid = record.pid,
                strikes = record.strikes, "given up: its workers died while they had this event");
            return settle(event, Verdict::Deny(DenyErrno::Eio));
        }
        let slot = self.table.claim(&record);
        self.held.insert(record.event, Held { event, slot });
        self.ready.push_back(Incoming::Event {
            event: record.event,
            segment,
            range,
            pid: record.pid,
        });
    }

    /// Of several equal ones (threads of a process) the one that was read first.
    fn left_by_the_worker_before(&mut self, key: Key) -> Option<Record> {
        let records = self.left.get_mut(&key)?;
        let first = (0..records.len()).min_by_key(|n| records.get(*n).map(|r| r.event))?;
        let record = records.swap_remove(first);
        if records.is_empty() {
            self.left.remove(&key);
        }
        Some(record)
    }
}

/// Answers an event that needs no worker.
fn settle(event: PermissionEvent, verdict: Verdict) {
    if let Err(error) = event.answer(verdict) {
        error!(error = &error as &dyn std::error::Error, "a reader stays blocked");
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.held.drain().for_each(|(_, held)| held.event.leave());
    }
}

#[cfg(test)]
mod guest_tests;
#[cfg(test)]
mod root_tests;
