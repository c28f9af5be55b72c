//! Compares what the daemon says with what the readers announce, during all of the chaos.
//!
//! - Every event of `hydrant queue` is about an access that its process had announced: the process, the
//!   tree, its origin and shard, the path, and a range of the file's place in its segment; and not older than that.
//! - An event's age grows with the time, whoever dies meanwhile; its worker is one of its shard that lives, and the
//!   process has the name and the user that it is said to have (`columns`).
//! - A reader that has been blocked for a while is in the queue, or somebody is for the same file.
//! - Events that came in are those that were answered and those that wait; no answer is one too many.

mod columns;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use hydrant_api::{QueueEvent, Status};
use hydrant_daemon::ids::SegmentId;
use hydrant_daemon::range::ByteRange;
use hydrant_daemon::segment::extents::Extents;

use columns::{Columns, Look};

use super::board::{Access, Announced, Board};
use super::trees::Rotation;
use super::{MS, now};
use crate::repository::Random;

/// The kernel reads ahead of what a reader asks for and, in page faults, around it: so far at most.
const READ_AHEAD: u64 = 4 << 20;

/// Where the files of a segment are, by their paths.
type Places = HashMap<Vec<u8>, ByteRange>;

/// What was compared.
#[derive(Debug, Default)]
pub struct Count {
    /// Times that the queue was asked for and told.
    pub samples: u64,
    /// Of these, by the command `hydrant queue --json`.
    pub by_command: u64,
    pub events: u64,
    /// Readers that were blocked for a while, and were in the queue.
    pub blocked: u64,
    /// Events of processes that are no readers, by name.
    pub others: BTreeMap<String, u64>,
    pub violations: Vec<String>,
    /// The longest that the queue was said to be at once.
    pub longest: usize,
    /// Sums of events that were given to another worker, over all supervisors.
    pub requeued: u64,
    /// Events of trees that were being replaced meanwhile.
    pub passed_over: u64,
    /// Events that were said to be with a worker.
    pub with_worker: u64,
    /// Supervisors whose counters were seen, and of these: events minus answers, which may not change.
    /// By their instance: ten thousand kills use up all pids.
    pub balances: BTreeMap<u64, i64>,
    counted: HashMap<u64, u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Witness<'a> {
    rotation: &'a Rotation<'a>,
    board: &'static Board,
    extents: HashMap<(u64, u64), Arc<Places>>,
    /// Readers that should have been in the last sample: slot and serial.
    missing: BTreeSet<(usize, u64)>,
    /// A reader that is blocked for longer, in nanoseconds, is in the queue.
    listed_after: u64,
    columns: Columns<'a>,
    /// Of the last supervisor that was asked for its counters: events minus answers.
    balance: Option<(u64, i64)>,
    pub count: Count,
}

impl<'a> Witness<'a> {
    #[must_use]
    pub fn new(rotation: &'a Rotation<'a>, listed_after: Duration) -> Self {
        let board = rotation.board;
        let (extents, missing, count) = (HashMap::new(), BTreeSet::new(), Count::default());
        let listed_after = listed_after.as_nanos() as u64;
        // a supervisor that is not late to read events is not late to hear of a death either
        let columns = Columns::new(rotation.register, listed_after);
        Self { rotation, board, extents, missing, listed_after, columns, balance: None, count }
    }

    /// Compares until `over`.
    pub fn run(mut self, seed: u64, over: impl Fn() -> bool) -> Count {
        let mut random = Random::new(seed);
        while !over() {
            thread::sleep(Duration::from_millis(50 + random.below(200) as u64));
            match random.below(20) {
                0 => self.sample(true),
                1..=4 => self.status(),
                _ => self.sample(false),
            }
        }
        self.count.with_worker = self.columns.with_worker;
        self.count.violations.extend(self.columns.verdict().err());
        self.count
    }

    fn announced(&self) -> Vec<Option<Announced>> {
        self.board.slots.iter().map(|slot| slot.announced()).collect()
    }

    fn queue(&self, by_command: bool) -> Result<Vec<QueueEvent>> {
        let daemon = &self.rotation.world.daemon;
        if by_command {
            let output = daemon.hydrant(&["queue", "--json"])?.check()?;
            return Ok(serde_json::from_slice(&output.stdout)?);
        }
        daemon.admin().queue()
    }

    /// Compares once. A supervisor that is dead or not up yet says nothing.
    pub fn sample(&mut self, by_command: bool) {
        let from = now();
        let stood = self.rotation.opened();
        let before = self.announced();
        let Ok(events) = self.queue(by_command) else { return };
        let after = self.announced();
        let to = now();
        self.count.samples += 1;
        self.count.by_command += u64::from(by_command);
        self.count.longest = self.count.longest.max(events.len());
        let (mut listed, mut found) = (BTreeSet::new(), Vec::new());
        for event in &events {
            self.count.events += 1;
            if let (Some(directory), Some(path)) = (&event.directory, &event.path) {
                listed.insert((directory.clone(), path.clone()));
            }
            for why in self.columns.check(event, Look { from, to }) {
                self.count.violations.push(format!("{why}: {event:?}"));
            }
            if let Err(why) = self.event(event, &before, &after, Look { from, to }) {
                found.push(format!("{why}: {event:?}"));
            }
        }
        self.columns.forget(Look { from, to });
        // what a path meant is not known any more
        if self.rotation.opened() == stood {
            self.count.violations.append(&mut found);
        }
        self.count.passed_over += found.len() as u64;
        let mut missing = BTreeSet::new();
        for (slot, (before, after)) in before.iter().zip(&after).enumerate() {
            let (Some(before), Some(after)) = (before, after) else { continue };
            if before.serial != after.serial || before.began + self.listed_after > from {
                continue;
            }
            let Some(open) = self.rotation.open(before.access.tree) else { continue };
            let directory = self.rotation.path(before.access.tree);
            let name =
                (directory.to_string_lossy().into_owned(), open.content.path(before.access.file));
            if listed.contains(&name) {
                self.count.blocked += 1;
            } else if is_blocked(
                self.board.slots[slot].pid.load(std::sync::atomic::Ordering::SeqCst),
            ) {
                if self.missing.contains(&(slot, before.serial)) {
                    let waited = (to - before.began) / MS;
                    self.count.violations.push(format!(
                        "reader {slot} has been blocked for {waited} ms and is not in the queue: \
                         {name:?} {before:?}"
                    ));
                } else {
                    // The supervisor may be new, and not have read the event. Look again.
                    missing.insert((slot, before.serial));
                }
            }
        }
        self.missing = missing;
    }

    fn event(
        &mut self,
        event: &QueueEvent,
        before: &[Option<Announced>],
        after: &[Option<Announced>],
        look: Look,
    ) -> Result<(), String> {
        let pid = u64::from(event.process.pid.unsigned_abs());
        let of_pid =
            |slot: &super::board::Slot| slot.pid.load(std::sync::atomic::Ordering::SeqCst) == pid;
        let Some(slot) = self.board.slots.iter().position(of_pid) else {
            let name = event.process.comm.clone().unwrap_or_else(|| "gone".to_owned());
            *self.count.others.entry(name).or_default() += 1;
            return Ok(());
        };
        columns::process(event)?;
        let now_and_then = [before[slot], after[slot]];
        let announced = now_and_then.iter().flatten();
        let mut accesses: Vec<(Access, u64)> =
            announced.map(|announced| (announced.access, announced.began)).collect();
        let state = &self.board.slots[slot];
        let recent = state.since(state.done().saturating_sub(64));
        let recent = recent.iter().filter(|done| done.ended >= look.from);
        accesses.extend(recent.map(|done| (done.access, done.began)));
        let path = event.path.as_deref().ok_or("an event without a path")?;
        let directory = event.directory.as_deref().ok_or("an event without a tree")?;
        let mut why = "no access of this reader";
        let arrived = Columns::arrival(event, look);
        for (access, began) in &accesses {
            if Path::new(directory) != self.rotation.path(access.tree) {
                continue;
            }
            let Some(open) = self.rotation.open(access.tree) else { continue };
            if path != open.content.path(access.file) {
                continue;
            }
            if arrived < *began {
                why = "older than what is read";
                continue;
            }
            let (_, url) = &self.rotation.sources[access.tree as usize];
            if event.origin.as_ref() != Some(url) || u64::from(event.shard) != access.shard {
                why = "not this tree's origin or shard";
                continue;
            }
            match self.overlaps(open.pool, event, path, access) {
                Some(true) => return Ok(()),
                Some(false) => why = "not the range that is read",
                None => why = "not a file of this segment",
            }
        }
        Err(format!("{why} (it has had {accesses:?})"))
    }

    /// Whether the event's range is in the file's extent and near what is read.
    fn overlaps(
        &mut self,
        pool: u64,
        event: &QueueEvent,
        path: &str,
        access: &Access,
    ) -> Option<bool> {
        let place = *self.extents(pool, event.segment)?.get(path.as_bytes())?;
        let range = ByteRange::new(event.offset, event.count);
        let file = place.to_blocks();
        let within = file.offset() <= range.offset() && range.end() <= file.end();
        let start = place.offset() + access.offset.saturating_sub(READ_AHEAD);
        let end = place.offset() + access.offset + access.length + READ_AHEAD;
        Some(within && !range.is_empty() && range.offset() < end && start < range.end())
    }

    fn extents(&mut self, pool: u64, segment: u64) -> Option<Arc<Places>> {
        if let Some(known) = self.extents.get(&(pool, segment)) {
            return Some(Arc::clone(known));
        }
        let state = &self.rotation.world.daemon.directories().state;
        let segment_name = SegmentId(segment).to_string();
        let file = state.join(format!("pools/{pool}/{segment_name}.extents"));
        let index = Extents::read(fs_err::File::open(file).ok()?).ok()?;
        let files =
            index.iter().map(|extent| (index.path(&extent).to_vec(), extent.range)).collect();
        let files = Arc::new(files);
        self.extents.insert((pool, segment), Arc::clone(&files));
        Some(files)
    }

    /// Looks whether the supervisor's counters add up.
    pub fn status(&mut self) {
        let Ok(status) = self.rotation.world.daemon.status() else { return };
        let Status { instance, pid, counters, .. } = status;
        let answered = counters.answered_present + counters.answered_fetched + counters.denied;
        // What a supervisor before it had read, it answers without having counted it as read.
        let balance = (answered + counters.waiting) as i64 - counters.events as i64;
        let known = self.count.counted.insert(instance, counters.requeued).unwrap_or(0);
        self.count.requeued += counters.requeued.saturating_sub(known);
        // With the kernel's queue the worker counts on while the supervisor looks. Look again: what is lost, stays so.
        if self.balance.replace((instance, balance)) != Some((instance, balance)) {
            return;
        }
        let first = *self.count.balances.entry(instance).or_insert(balance);
        if balance != first || balance < 0 {
            let what = if balance > first { "answered twice" } else { "lost" };
            self.count.violations.push(format!(
                "{} events {what} by supervisor {pid}: {counters:?}",
                balance.abs_diff(first)
            ));
        }
    }
}

/// Asleep, not just waiting for a processor.
fn is_blocked(pid: u64) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        let state = stat.rsplit(')').next().unwrap_or_default().trim_start().chars().next();
        matches!(state, Some('D' | 'S'))
    })
}
