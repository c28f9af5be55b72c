//! The in-flight table: which readers wait, in shared memory.
//!
//! It outlives the process that writes it (as a memfd in the service manager's store), so after a crash it
//! says who is owed an answer, and it can be read while it is written (`hydrant queue`). One process
//! writes at a time; the others must be able to trust a record to be whole, and nothing else.
//!
//! Memory, in 64-bit words of the machine's byte order: a header of 16, then slots of as many.
//!
//! | word | header | slot |
//! |---|---|---|
//! | 0 | magic | sequence: odd while the slot is written |
//! | 1 | version | check of words 0 and 2 to 10 |
//! | 2 | capacity in slots | event |
//! | 3 | slots that were ever used | segment |
//! | 4 | events that found no slot | offset |
//! | 5 | last event id given | length |
//! | 6 | highest fd number an event ever had | fd number and pid (32 bits each, the first above) |
//! | 7 | events, each once however often it was read | attempts and strikes |
//! | 8 | answered: was there already | worker's pid and state |
//! | 9 | answered: was fetched | since |
//! | 10 | denied | dispatched |
//! | 11 | the longest wait of an event that was answered | |
//! | 12 | when the worker last gave a sign of life | |
//!
//! Words 7 to 12 of the header are a worker's with the kernel's queue; the brokered one keeps no such
//! account here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use thiserror::Error;

use super::broker::Death;
use crate::ids::{EventId, SegmentId};
use crate::range::ByteRange;
use crate::sys::shared::{SharedWords, sealed_memory};
use crate::version::{self, OtherVersion};

/// Slots of a table when there is no reason for another number: 2 MiB of memory when all have been used.
pub const DEFAULT_CAPACITY: u32 = 16384;

/// Whether [`Table::open`] takes a table of this version.
pub fn check_version(found: u64) -> Result<(), OtherVersion> {
    version::check("the table of those who wait", found, VERSION)
}

/// More than any process can have fds.
const MAX_CAPACITY: u64 = 1 << 24;
const MAGIC: u64 = u64::from_be_bytes(*b"HydraInF");
/// Of all that a supervisor leaves to the next: the layout of the table, and what is kept beside it
/// ([`Kept`](crate::supervisor::Kept)). The second has the lock of the state directory there, which a program
/// of the first would wait for; the tables of the two are the same.
pub const VERSION: u64 = 2;
/// 128 bytes: no two slots share a cache line.
const SLOT_WORDS: usize = 16;
/// A slot is written in well under a microsecond: who sees it odd so often sees a dead writer's.
const READ_TRIES: u32 = 1000;

/// The time of [`Record::since`] and [`Record::dispatched`]: `CLOCK_MONOTONIC` in nanoseconds, which
/// is the same in every process and stands still while the machine sleeps, as deadlines should.
#[must_use]
pub fn now() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    // it fails for clocks that don't exist only
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        seconds.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec().unsigned_abs())
    })
}

/// Why memory is not an in-flight table.
#[derive(Debug, Error)]
pub enum TableError {
    #[error("cannot make an in-flight table of {capacity} slots")]
    Create { capacity: u32, source: io::Error },
    #[error("cannot map an in-flight table")]
    Map { source: io::Error },
    #[error("this memory is not an in-flight table: {reason}")]
    Format { reason: &'static str },
    #[error(transparent)]
    Version(#[from] OtherVersion),
}

/// Where an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It waits for a worker.
    Waiting,
    /// A worker has it.
    InFlight,
}

/// A reader that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    pub event: EventId,
    /// The event fd's number in the process that read the event: what an answer names.
    pub number: RawFd,
    pub segment: SegmentId,
    /// What must be there before the reader may go on.
    pub range: ByteRange,
    /// The process that waits.
    pub pid: i32,
    /// When it was read first: [`now`], the same clock in every process.
    pub since: u64,
    /// When the present worker got it, by the same clock. While it waits: 0, or when the worker before
    /// died.
    pub dispatched: u64,
    /// How often a worker got it.
    pub attempts: u32,
    /// How many workers brought their death about while they had it.
    pub strikes: u32,
    /// The worker's process; 0 while it waits.
    pub worker: u32,
    pub state: State,
}

/// A place in the table that belongs to one event.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the slot stays taken until it is freed"]
pub struct Slot(u32);

/// What a table says at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// In no order; the ids say which event came first.
    pub records: Vec<Record>,
    /// Slots whose content makes no sense, or whose writer died while it wrote. An event may be
    /// owed an answer there, whose number is not known.
    pub corrupt: u32,
}

/// What became of events: sums that outlive the process that counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub events: u64,
    pub present: u64,
    pub fetched: u64,
    pub denied: u64,
    /// In nanoseconds.
    pub longest_wait: u64,
}

/// How an event ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All was there when it was read first.
    Present,
    /// All was there in the end.
    Fetched,
    Denied,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Table {
    memory: SharedWords,
    fd: OwnedFd,
    capacity: u32,
    /// Below the high-water mark. What is above it is free as well.
    free: Vec<u32>,
}

impl Table {
    /// An empty table.
    pub fn create(capacity: u32) -> Result<Self, TableError> {
        let create = |source| TableError::Create { capacity, source };
        let words = (u64::from(capacity) + 1) * SLOT_WORDS as u64;
        let fd = sealed_memory("hydrant-in-flight", words * 8).map_err(create)?;
        let memory = SharedWords::map(fd.as_fd()).map_err(create)?;
        let table = Self { memory, fd, capacity, free: Vec::new() };
        table.header(Header::Capacity).store(capacity.into(), Ordering::Relaxed);
        table.header(Header::Version).store(VERSION, Ordering::Relaxed);
        table.header(Header::Magic).store(MAGIC, Ordering::Release);
        Ok(table)
    }

    /// A table that another process made: to read it, or to write it on after that process's death.
    pub fn open(fd: OwnedFd) -> Result<Self, TableError> {
        let memory = SharedWords::map(fd.as_fd()).map_err(|source| TableError::Map { source })?;
        if memory.words().len() < SLOT_WORDS {
            return Err(TableError::Format { reason: "too small" });
        }
        let mut table = Self { memory, fd, capacity: 0, free: Vec::new() };
        if table.header(Header::Magic).load(Ordering::Acquire) != MAGIC {
            return Err(TableError::Format { reason: "wrong magic number" });
        }
        check_version(table.header(Header::Version).load(Ordering::Relaxed))?;
        let capacity = table.header(Header::Capacity).load(Ordering::Relaxed);
        let slots = (table.memory.words().len() / SLOT_WORDS - 1) as u64;
        if capacity > slots || capacity > MAX_CAPACITY {
            return Err(TableError::Format { reason: "more slots than memory" });
        }
        table.capacity = u32::try_from(capacity).unwrap_or(0);
        table.free = (0..table.used())
            .filter(|slot| !matches!(table.read(*slot), Content::Record(_)))
            .collect();
        Ok(table)
    }

    /// It is of this program's version from now on: to be called by who goes on writing it.
    pub fn adopt(&self) {
        self.header(Header::Version).store(VERSION, Ordering::Relaxed);
    }

    /// An id that no event has had since the table was made.
    #[must_use]
    pub fn next_event(&self) -> EventId {
        EventId(self.header(Header::LastEvent).fetch_add(1, Ordering::Relaxed).wrapping_add(1))
    }

    /// Writes an event down. `None`: the table is full, which is counted; the event must be handled all
    /// the same.
    pub fn claim(&mut self, record: &Record) -> Option<Slot> {
        let number = u64::try_from(record.number).unwrap_or(0);
        self.header(Header::Highest).fetch_max(number, Ordering::Relaxed);
        let used = self.used();
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if used < self.capacity => {
                // The mark after the slot: a mark that counts a slot never written shows a free one.
                self.header(Header::Used).store(u64::from(used) + 1, Ordering::Release);
                used
            }
            None => {
                self.header(Header::Untracked).fetch_add(1, Ordering::Relaxed);
                return None;
            }
        };
        self.write(slot, Some(record));
        Some(Slot(slot))
    }

    /// Writes down what has changed.
    pub fn update(&mut self, slot: &Slot, record: &Record) {
        self.write(slot.0, Some(record));
    }

    /// The event has been answered.
    pub fn free(&mut self, slot: Slot) {
        self.write(slot.0, None);
        self.free.push(slot.0);
    }

    /// What a writer that is gone has left, each in its slot: for the process that writes from now on,
    /// and nothing else may have been claimed here. What is corrupt is only counted.
    #[must_use]
    pub fn inherit(&self) -> (Vec<(Slot, Record)>, u32) {
        let mut corrupt = 0;
        let mut records = Vec::new();
        for slot in 0..self.used() {
            match self.read(slot) {
                Content::Free => {}
                Content::Record(record) => records.push((Slot(slot), record)),
                Content::Corrupt => corrupt += 1,
            }
        }
        (records, corrupt)
    }

    /// The highest fd number that any event in this table ever had.
    #[must_use]
    pub fn highest_number(&self) -> RawFd {
        let highest = self.header(Header::Highest).load(Ordering::Relaxed);
        RawFd::try_from(highest).unwrap_or(RawFd::MAX)
    }

    /// The worker that wrote this table is dead: what it had waits again. Gives the number of those
    /// events. A death by its own fault is counted against each. Only while nobody writes.
    pub fn worker_died(&mut self, death: Death) -> u64 {
        let mut released = 0;
        for slot in 0..self.used() {
            if let Content::Record(mut record) = self.read(slot)
                && record.state == State::InFlight
            {
                released += 1;
                record.state = State::Waiting;
                record.worker = 0;
                // when it was heard of last
                record.dispatched = now();
                if death == Death::Fault {
                    record.strikes = record.strikes.saturating_add(1);
                }
                self.write(slot, Some(&record));
            }
        }
        released
    }

    /// A new event.
    pub fn count_event(&self) {
        self.header(Header::Events).fetch_add(1, Ordering::Relaxed);
    }

    /// An event has been answered after `waited` nanoseconds.
    pub fn count_end(&self, end: End, waited: u64) {
        let sum = match end {
            End::Present => Header::Present,
            End::Fetched => Header::Fetched,
            End::Denied => Header::Denied,
        };
        self.header(sum).fetch_add(1, Ordering::Relaxed);
        self.header(Header::LongestWait).fetch_max(waited, Ordering::Relaxed);
    }

    /// What was counted since the table was made, or since [`reset_tally`](Self::reset_tally).
    #[must_use]
    pub fn tally(&self) -> Tally {
        let read = |word| self.header(word).load(Ordering::Relaxed);
        Tally {
            events: read(Header::Events),
            present: read(Header::Present),
            fetched: read(Header::Fetched),
            denied: read(Header::Denied),
            longest_wait: read(Header::LongestWait),
        }
    }

    pub fn reset_tally(&self) {
        use Header::{Denied, Events, Fetched, LongestWait, Present};
        for word in [Events, Present, Fetched, Denied, LongestWait] {
            self.header(word).store(0, Ordering::Relaxed);
        }
    }

    /// The writer lives.
    pub fn beat(&self) {
        self.header(Header::Beat).store(now(), Ordering::Relaxed);
    }

    /// When the writer said last that it lives: [`now`], then. 0: never.
    #[must_use]
    pub fn last_beat(&self) -> u64 {
        self.header(Header::Beat).load(Ordering::Relaxed)
    }

    /// What is in the table now. Each record is whole; together they are of no single time.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for slot in 0..self.used() {
            match self.read(slot) {
                Content::Free => {}
                Content::Record(record) => snapshot.records.push(record),
                Content::Corrupt => snapshot.corrupt += 1,
            }
        }
        snapshot
    }

    /// How many events found no slot.
    #[must_use]
    pub fn untracked(&self) -> u64 {
        self.header(Header::Untracked).load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    fn header(&self, word: Header) -> &AtomicU64 {
        // `create` and `open` have seen to it that there is a header
        &self.memory.words()[word as usize]
    }

    /// The high-water mark: no slot from here on was ever used.
    fn used(&self) -> u32 {
        let used = self.header(Header::Used).load(Ordering::Acquire);
        u32::try_from(used).unwrap_or(u32::MAX).min(self.capacity)
    }

    fn slot(&self, slot: u32) -> Option<&[AtomicU64]> {
        let start = (slot as usize).checked_add(1)?.checked_mul(SLOT_WORDS)?;
        self.memory.words().get(start..start.checked_add(SLOT_WORDS)?)
    }

    /// One writer: a sequence lock. What is in the slot while it is written has an odd sequence, also
    /// for ever if we die here.
    fn write(&self, slot: u32, record: Option<&Record>) {
        let Some([sequence, check, rest @ ..]) = self.slot(slot) else {
            return;
        };
        let payload = record.map_or([0; PAYLOAD_WORDS], pack);
        let odd = sequence.load(Ordering::Relaxed) | 1;
        sequence.store(odd, Ordering::Relaxed);
        fence(Ordering::Release);
        let even = odd.wrapping_add(1);
        check.store(check_of(even, &payload), Ordering::Relaxed);
        for (word, value) in rest.iter().zip(payload) {
            word.store(value, Ordering::Relaxed);
        }
        sequence.store(even, Ordering::Release);
    }

    fn read(&self, slot: u32) -> Content {
        let Some([sequence, check, rest @ ..]) = self.slot(slot) else {
            return Content::Corrupt;
        };
        for _ in 0..READ_TRIES {
            let before = sequence.load(Ordering::Acquire);
            if before & 1 == 1 {
                std::hint::spin_loop();
                continue;
            }
            let seen = check.load(Ordering::Relaxed);
            let mut payload = [0; PAYLOAD_WORDS];
            for (value, word) in payload.iter_mut().zip(rest) {
                *value = word.load(Ordering::Relaxed);
            }
            fence(Ordering::Acquire);
            if sequence.load(Ordering::Relaxed) == before {
                return match seen == check_of(before, &payload) {
                    true => unpack(&payload),
                    // never written: memory as the kernel gave it
                    false if before == 0 && seen == 0 && payload == [0; PAYLOAD_WORDS] => {
                        Content::Free
                    }
                    false => Content::Corrupt,
                };
            }
        }
        Content::Corrupt
    }
}

impl AsFd for Table {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[derive(Debug, Clone, Copy)]
enum Header {
    Magic = 0,
    Version = 1,
    Capacity = 2,
    Used = 3,
    Untracked = 4,
    LastEvent = 5,
    Highest = 6,
    Events = 7,
    Present = 8,
    Fetched = 9,
    Denied = 10,
    LongestWait = 11,
    Beat = 12,
}

#[derive(Debug, PartialEq, Eq)]
enum Content {
    Free,
    Record(Record),
    Corrupt,
}

/// Words 2 to 10 of a slot.
const PAYLOAD_WORDS: usize = 9;

/// The state's number in memory; 0 is a free slot.
const WAITING: u32 = 1;
const IN_FLIGHT: u32 = 2;

fn pack(record: &Record) -> [u64; PAYLOAD_WORDS] {
    let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
    let state = match record.state {
        State::Waiting => WAITING,
        State::InFlight => IN_FLIGHT,
    };
    [
        record.event.0,
        record.segment.0,
        record.range.offset(),
        record.range.len(),
        pair(record.number.cast_unsigned(), record.pid.cast_unsigned()),
        pair(record.attempts, record.strikes),
        pair(record.worker, state),
        record.since,
        record.dispatched,
    ]
}

fn unpack(payload: &[u64; PAYLOAD_WORDS]) -> Content {
    // truncation is the point: the two halves of a word
    let pair = |word: u64| ((word >> 32) as u32, word as u32);
    let [event, segment, offset, len, fd_pid, tries, worker_state, since, dispatched] = *payload;
    let (number, pid) = pair(fd_pid);
    let (attempts, strikes) = pair(tries);
    let (worker, state) = pair(worker_state);
    let state = match state {
        0 => return Content::Free,
        WAITING => State::Waiting,
        IN_FLIGHT => State::InFlight,
        _ => return Content::Corrupt,
    };
    Content::Record(Record {
        event: EventId(event),
        number: number.cast_signed(),
        segment: SegmentId(segment),
        range: ByteRange::new(offset, len),
        pid: pid.cast_signed(),
        since,
        dispatched,
        attempts,
        strikes,
        worker,
        state,
    })
}

/// Against accidents, not against malice: a worker that writes its own table can write what it likes.
fn check_of(sequence: u64, payload: &[u64; PAYLOAD_WORDS]) -> u64 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&sequence.to_ne_bytes());
    for word in payload {
        hasher.update(&word.to_ne_bytes());
    }
    // never 0, which is what memory has that was not written
    u64::from(hasher.finalize()) | 1 << 32
}

#[cfg(test)]
mod tests;
