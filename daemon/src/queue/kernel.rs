//! The kernel's queue, as who reads it uses it: a worker, or the supervisor in its place.
//!
//! The worker reads the events of a restartable group itself and answers them itself. When it dies,
//! its queue fd closes and the kernel puts what it had back at the head of the queue, in order. What
//! the kernel does not keep is in the [in-flight table](super::inflight): since when the reader
//! waits, and how many workers have died with it. Who reads next finds it there, by segment, range
//! and process.

mod left;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tracing::{debug, error, warn};

use super::broker::MAX_STRIKES;
use super::decide::{Decision, decide};
use super::inflight::{End, Record, Slot, State, Table, now};
use super::quarantine::{Admission, Quarantine, Quarantined};
use crate::fanotify::{
    self, Answered, AsyncChannel, Channel, DenyErrno, Event, FileId, PermissionEvent, Read, Verdict,
};
use crate::ids::{EventId, SegmentId};
use crate::range::ByteRange;
use crate::segment::presence::present;
use left::Left;

/// What a queue has for its worker: [`ToQueue`](super::wire::ToQueue) without what only a
/// supervisor can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incoming {
    /// A reader waits for `range`, in whole blocks and not empty.
    Event { event: EventId, segment: SegmentId, range: ByteRange, pid: i32 },
    /// A reader was just given `range`, which was there.
    Touched { segment: SegmentId, range: ByteRange },
    /// The bytes of a range in quarantine have come: it is over.
    Settled { segment: SegmentId, range: ByteRange },
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
/// Dropped with events in hand, it leaves them to who opens the queue next.
#[derive(Debug)]
pub struct KernelQueue {
    state: Mutex<Inner<PermissionEvent>>,
    channel: AsyncChannel,
}

/// The time, as quarantines have it.
fn clock() -> Duration {
    Duration::from_nanos(now())
}

/// Who reads the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    /// This process, and it fetches.
    Worker { pid: u32 },
    /// The supervisor, as long as there is no worker: it gives what is there and holds the rest.
    StandIn,
}

/// A reader that waits, as the kernel reports it: [`PermissionEvent`], or one of a model.
pub(super) trait Waits {
    fn number(&self) -> RawFd;
    fn pid(&self) -> i32;
    fn range(&self) -> Option<ByteRange>;
    /// The file that is read, and its size.
    fn file(&self) -> nix::Result<(FileId, u64)>;
    /// Whether all of a range of that file is there.
    fn is_present(&self, range: ByteRange) -> nix::Result<bool>;
    fn answer(self, verdict: Verdict) -> Result<Answered, fanotify::Error>;
    /// Ends it without an answer: the kernel keeps it for who opens the queue next.
    fn leave(self);
}

impl Waits for PermissionEvent {
    fn number(&self) -> RawFd {
        self.number()
    }

    fn pid(&self) -> i32 {
        self.pid()
    }

    fn range(&self) -> Option<ByteRange> {
        self.range()
    }

    fn file(&self) -> nix::Result<(FileId, u64)> {
        self.file()
    }

    fn is_present(&self, range: ByteRange) -> nix::Result<bool> {
        present(self, range)
    }

    fn answer(self, verdict: Verdict) -> Result<Answered, fanotify::Error> {
        self.answer(verdict)
    }

    fn leave(self) {
        self.leave();
    }
}

/// What is done with events, whatever kernel they are from.
#[derive(Debug)]
pub(super) struct Inner<E: Waits> {
    reader: Reader,
    /// Read, but not taken by the worker yet.
    ready: VecDeque<Incoming>,
    held: HashMap<EventId, Held<E>>,
    segments: HashMap<FileId, SegmentId>,
    table: Table,
    /// What was in other hands before, and the kernel has not reported again yet.
    left: Left,
    quarantine: Quarantine,
}

#[derive(Debug)]
struct Held<E> {
    event: E,
    record: Record,
    slot: Option<Slot>,
}

impl KernelQueue {
    /// Takes events from a queue fd, which must be nonblocking, for this process to serve. `table` may
    /// be the one that the worker before has written. Within a tokio runtime.
    pub fn new(queue: OwnedFd, table: Table) -> Result<Self, QueueError> {
        Self::open(queue, table, Reader::Worker { pid: std::process::id() })
    }

    /// The same for a supervisor without a worker.
    pub fn stand_in(queue: OwnedFd, table: Table) -> Result<Self, QueueError> {
        Self::open(queue, table, Reader::StandIn)
    }

    fn open(queue: OwnedFd, table: Table, reader: Reader) -> Result<Self, QueueError> {
        let channel = AsyncChannel::new(Channel::from_owned_fd(queue))?;
        // what was in other hands comes first
        let again = channel.channel().queued().unwrap_or(u64::MAX);
        let state = Inner::new(table, reader, again);
        Ok(Self { state: Mutex::new(state), channel })
    }

    /// Events of the file that `file` is open on are the segment's. Before the first event of
    /// it: who reads another file is given what is there.
    pub fn know(&self, segment: SegmentId, file: impl AsFd) -> nix::Result<()> {
        self.know_file(segment, FileId::of(file)?);
        Ok(())
    }

    /// As [`know`](Self::know), of a file by its name.
    pub fn know_file(&self, segment: SegmentId, file: FileId) {
        self.lock().segments.insert(file, segment);
    }

    /// The segment is not served any more: who reads it is given what is there.
    pub fn forget(&self, segment: SegmentId) {
        self.lock().segments.retain(|_, known| *known != segment);
    }

    /// What is to be denied, or to be tried carefully.
    pub fn quarantine(&self, ranges: &[Quarantined]) {
        let mut inner = self.lock();
        ranges.iter().for_each(|range| inner.quarantine.restore(*range));
    }

    /// Everything may be tried.
    pub fn clear_quarantine(&self) {
        self.lock().quarantine.clear();
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

    /// Answers an event, once. Who is to be allowed what is not there is denied it.
    ///
    /// # Errors
    /// [`QueueError::Unknown`]: it has been answered. Else the kernel did not take the answer.
    pub fn answer(&self, event: EventId, verdict: Verdict) -> Result<Answered, QueueError> {
        self.lock().answer(event, verdict)
    }

    /// What an event is about: segment, range and process. `None`: it has been answered.
    #[must_use]
    pub fn waits_for(&self, event: EventId) -> Option<(SegmentId, ByteRange, i32)> {
        let inner = self.lock();
        let Record { segment, range, pid, .. } = inner.held.get(&event)?.record;
        Some((segment, range, pid))
    }

    /// Reads all that there is now, and denies what is not there. Gives the number of events denied.
    pub fn deny_all(&self, errno: DenyErrno) -> Result<usize, QueueError> {
        let mut inner = self.lock();
        while let Read::Events(events) = self.channel.channel().read()? {
            inner.sort(events);
        }
        let held: Vec<_> = inner.held.drain().map(|(_, held)| held).collect();
        let denied = held.len();
        for held in held {
            inner.finish(held, Verdict::Deny(errno))?;
        }
        Ok(denied)
    }

    /// The events that the reader of the queue has.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.lock().held.len()
    }

    /// Says in the table that who reads the queue goes on doing so.
    pub fn beat(&self) {
        self.lock().table.beat();
    }

    /// Every use leaves it whole, also one that panics.
    fn lock(&self) -> MutexGuard<'_, Inner<PermissionEvent>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner<PermissionEvent> {
    /// Does with events what needs no worker, and keeps the others.
    fn sort(&mut self, events: Vec<Event>) {
        for event in events {
            let length = event.length();
            match event {
                Event::Permission(event) => self.arrived(event),
                Event::Refused { errno, pid } => {
                    let errno = io::Error::from_raw_os_error(errno);
                    error!(pid, %errno, "a reader was denied because its event could not be taken");
                    self.table.count_event();
                    self.table.count_end(End::Denied, 0);
                }
                Event::Overflow => error!("the kernel has lost events, and allowed them"),
                Event::Other { mask } => warn!(mask, "an event that was not asked for"),
            }
            self.left.was_read(length);
        }
        self.tidy();
    }
}

impl<E: Waits> Inner<E> {
    /// `again`: what was in the queue when it was opened, in bytes.
    pub(super) fn new(table: Table, reader: Reader, again: u64) -> Self {
        let (records, corrupt) = table.inherit();
        if corrupt > 0 {
            warn!(slots = corrupt, "the in-flight table has slots that make no sense");
        }
        let mut inner = Self {
            reader,
            ready: VecDeque::new(),
            held: HashMap::new(),
            segments: HashMap::new(),
            table,
            left: Left::new(records, again),
            quarantine: Quarantine::default(),
        };
        inner.tidy();
        inner.table.beat();
        inner
    }

    /// Frees the slots of events that ended while nobody had them: their readers were killed.
    fn tidy(&mut self) {
        for slot in self.left.take_if_over() {
            self.table.free(slot);
            self.table.count_end(End::Fetched, 0);
        }
    }

    fn arrived(&mut self, event: E) {
        let (id, size) = match event.file() {
            Ok(file) => file,
            Err(errno) => {
                error!(%errno, "an event's file cannot be asked for its size");
                return self.settle(event, None, Verdict::Deny(DenyErrno::Eio));
            }
        };
        let segment = self.segments.get(&id).copied();
        match (decide(event.range(), size, |range| event.is_present(range)), segment) {
            (Ok(Decision::Allow), _) => self.settle(event, None, Verdict::Allow),
            (Ok(Decision::Touched(range)), Some(segment)) => {
                let before = self.left.take(segment, range, event.pid());
                self.settle(event, before, Verdict::Allow);
                self.ready.push_back(Incoming::Touched { segment, range });
            }
            (Ok(Decision::Touched(_)), None) => self.settle(event, None, Verdict::Allow),
            (Ok(Decision::Fetch(range)), Some(segment)) => self.hold(event, segment, range),
            (Ok(Decision::Fetch(range)), None) => {
                error!(?id, %range, pid = event.pid(), "an event for what is not served");
                self.settle(event, None, Verdict::Deny(DenyErrno::Eio));
            }
            (Ok(Decision::Deny(errno)), _) => {
                error!(?id, ?errno, "an event that does not say what is read");
                self.settle(event, None, Verdict::Deny(errno));
            }
            (Err(errno), _) => {
                error!(?id, %errno, "a segment cannot be asked for its holes");
                self.settle(event, None, Verdict::Deny(DenyErrno::Eio));
            }
        }
    }

    /// Keeps an event for the worker.
    fn hold(&mut self, event: E, segment: SegmentId, range: ByteRange) {
        let (slot, before) = self.left.take(segment, range, event.pid()).unzip();
        let now = now();
        let mut record = Record {
            event: EventId(0),
            number: event.number(),
            segment,
            range,
            pid: event.pid(),
            since: now,
            dispatched: 0,
            attempts: 0,
            strikes: 0,
            worker: 0,
            state: State::Waiting,
        };
        match before {
            Some(before) if !self.held.contains_key(&before.event) => {
                let Record { event, since, dispatched, attempts, strikes, .. } = before;
                record = Record { event, since, dispatched, attempts, strikes, ..record };
            }
            _ => {
                record.strikes = match self.quarantine.admits(segment, range, clock()) {
                    Admission::Free => 0,
                    Admission::OnTrial => MAX_STRIKES - 1,
                    Admission::Refused => {
                        debug!(%segment, %range, pid = record.pid, "denied: in quarantine");
                        return self.settle(event, None, Verdict::Deny(DenyErrno::Eio));
                    }
                };
                record.event = self.table.next_event();
                self.table.count_event();
            }
        }
        if let Reader::Worker { pid } = self.reader {
            record.attempts = record.attempts.saturating_add(1);
            (record.dispatched, record.worker, record.state) = (now, pid, State::InFlight);
        }
        let id = record.event;
        let slot = match slot {
            Some(slot) => {
                self.table.update(&slot, &record);
                Some(slot)
            }
            None => self.table.claim(&record),
        };
        let held = Held { event, record, slot };
        if record.strikes >= MAX_STRIKES {
            error!(event = %id, %segment, %range, pid = record.pid, strikes = record.strikes,
                "given up: its workers died while they had this event");
            if let Err(error) = self.finish(held, Verdict::Deny(DenyErrno::Eio)) {
                error!(error = &error as &dyn std::error::Error, "a reader stays blocked");
            }
            return;
        }
        self.held.insert(id, held);
        let pid = record.pid;
        self.ready.push_back(Incoming::Event { event: id, segment, range, pid });
    }

    /// Answers an event by its id, once.
    pub(super) fn answer(
        &mut self,
        event: EventId,
        verdict: Verdict,
    ) -> Result<Answered, QueueError> {
        let held = self.held.remove(&event).ok_or(QueueError::Unknown { event })?;
        Ok(self.finish(held, verdict)?)
    }

    /// Answers an event that was held.
    fn finish(&mut self, held: Held<E>, verdict: Verdict) -> Result<Answered, fanotify::Error> {
        let Held { event, record, slot } = held;
        // a bug elsewhere must not let a reader see a hole
        let verdict = match verdict {
            Verdict::Allow if !event.is_present(record.range).unwrap_or(false) => {
                let Record { event, segment, range, .. } = record;
                error!(%event, %segment, %range, "was to be allowed, but is not there: denied");
                Verdict::Deny(DenyErrno::Eio)
            }
            verdict => verdict,
        };
        let end = if verdict == Verdict::Allow { End::Fetched } else { End::Denied };
        if end == End::Fetched && self.quarantine.end(record.segment, record.range) {
            let Record { segment, range, .. } = record;
            self.ready.push_back(Incoming::Settled { segment, range });
        }
        // Before the answer: who is killed between the two leaves no entry of a reader that has gone on. The kernel
        // reports the event again, and then it counts as another one.
        if let Some(slot) = slot {
            self.table.free(slot);
        }
        self.table.count_end(end, now().saturating_sub(record.since));
        event.answer(verdict)
    }

    /// Answers an event that needs no worker. `before`: what the table had of it.
    fn settle(&mut self, event: E, before: Option<(Slot, Record)>, verdict: Verdict) {
        let (allowed, waited) = match before {
            Some((slot, record)) => {
                self.table.free(slot);
                (End::Fetched, now().saturating_sub(record.since))
            }
            None => {
                self.table.count_event();
                (End::Present, 0)
            }
        };
        let end = if verdict == Verdict::Allow { allowed } else { End::Denied };
        self.table.count_end(end, waited);
        // last, as in `finish`
        if let Err(error) = event.answer(verdict) {
            error!(error = &error as &dyn std::error::Error, "a reader stays blocked");
        }
    }
}

impl<E: Waits> Drop for Inner<E> {
    fn drop(&mut self) {
        self.held.drain().for_each(|(_, held)| held.event.leave());
    }
}

#[cfg(test)]
impl<E: Waits> Inner<E> {
    /// Does with an event of a segment what is done with one that was read, of 1 byte. Its id, if it is held.
    pub(super) fn take(&mut self, segment: SegmentId, file: FileId, event: E) -> Option<EventId> {
        self.segments.insert(file, segment);
        self.arrived(event);
        self.left.was_read(1);
        self.tidy();
        match self.ready.pop_front()? {
            Incoming::Event { event, .. } => Some(event),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn held(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod guest_tests;
#[cfg(test)]
mod root_tests;
