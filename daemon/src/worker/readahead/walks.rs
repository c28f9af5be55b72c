//! Readers that advance through the pool's order.
//!
//! A tree's files lie in the pool directory by directory, each subtree together, so `grep -r`,
//! `tar` and `git grep` go through it in almost that order: files of a directory come a little
//! earlier or later than its subdirectories, and several threads overtake each other. A walk is
//! believed in once it has crossed directories, or gone far in one, and has left out less than
//! half of what it passed. What is fetched ahead of it is never more than twice what it has read.

use std::collections::{HashMap, VecDeque};

use super::{Brought, Owner};
use crate::worker::ObjectNo;
use crate::worker::schedule::Now;

/// Looks so near to a walk belong to it.
const NEAR: u32 = 256;
/// Walks that are watched at the same time.
const WALKS_MAX: usize = 16;
/// Objects in the first window and in the largest. A window is four times the one before.
const WINDOW: (u32, u32) = (64, 4096);
/// The most bytes in a window.
const WINDOW_BYTES: u64 = 16 << 20;
/// So many looks in three directories make a walk, or so many in two.
const BELIEVED: (u32, u32) = (16, 48);
/// Looks after which the earlier ones begin to count less.
const MEMORY: u32 = 512;

#[derive(Debug)]
struct Walk {
    id: u64,
    start: u32,
    /// First looks in all: what is ahead of the reader is never more than twice that.
    seen: u32,
    /// The last object looked at, and the first that no window had yet.
    at: u32,
    frontier: u32,
    looks: u32,
    directories: u32,
    directory: u64,
    /// Objects in the last window; 0 before the first.
    window: u32,
    /// Windows that the reader has not passed, with their ends.
    windows: VecDeque<(u64, u32)>,
    /// Windows in a row that were hardly used.
    strikes: u32,
    last: Now,
}

/// A window to be fetched: from which object, how many at most. Without objects: the walk goes on
/// and needs nothing now.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) walk: u64,
    pub(super) from: u32,
    pub(super) objects: u32,
    pub(super) bytes: u64,
}

#[derive(Debug, Default)]
pub(super) struct Walks {
    walks: Vec<Walk>,
    next: u64,
}

impl Walks {
    /// A reader looks at an object; `first_look`: it was absent, or had been brought and not used.
    /// `None`: this belongs to no walk that is believed in.
    pub(super) fn access(
        &mut self,
        now: Now,
        no: ObjectNo,
        directory: u64,
        first_look: bool,
        owner: Option<Owner>,
        batches: &HashMap<u64, Brought>,
    ) -> Option<Step> {
        let no = no.0;
        let near = |walk: &&mut Walk| {
            let end = walk.frontier.max(walk.at).saturating_add(NEAR);
            (walk.at.saturating_sub(NEAR)..=end).contains(&no)
                || owner == Some(Owner::Walk(walk.id))
        };
        let Some(walk) = self
            .walks
            .iter_mut()
            .filter(near)
            .min_by_key(|walk| (owner != Some(Owner::Walk(walk.id)), walk.at.abs_diff(no)))
        else {
            self.start(now, no, directory);
            return None;
        };
        walk.last = now;
        if no <= walk.at && !first_look {
            return None;
        }
        walk.looks += 1;
        walk.seen = walk.seen.saturating_add(1);
        if no > walk.at {
            walk.at = no;
            if walk.directory != directory {
                walk.directory = directory;
                walk.directories += 1;
            }
        }
        walk.pass(batches);
        walk.step(batches)
    }

    fn start(&mut self, now: Now, no: u32, directory: u64) {
        if self.walks.len() >= WALKS_MAX {
            let oldest = self.walks.iter().enumerate().min_by_key(|(_, walk)| walk.last);
            if let Some((at, _)) = oldest {
                self.walks.swap_remove(at);
            }
        }
        self.next += 1;
        self.walks.push(Walk {
            id: self.next,
            start: no,
            seen: 1,
            at: no,
            frontier: no.saturating_add(1),
            looks: 1,
            directories: 1,
            directory,
            window: 0,
            windows: VecDeque::new(),
            strikes: 0,
            last: now,
        });
    }

    /// What was asked for is under way: up to `end`, as this batch unless there was nothing to
    /// bring.
    pub(super) fn brought(&mut self, walk: u64, end: u32, objects: u32, batch: Option<u64>) {
        if let Some(walk) = self.walks.iter_mut().find(|w| w.id == walk) {
            walk.frontier = walk.frontier.max(end);
            if let Some(batch) = batch {
                walk.window = objects;
                walk.windows.push_back((batch, end));
            }
        }
    }
}

impl Walk {
    /// Judges the windows that the reader has left behind.
    fn pass(&mut self, batches: &HashMap<u64, Brought>) {
        while let Some((batch, end)) = self.windows.front().copied() {
            if end.saturating_add(NEAR) >= self.at {
                return;
            }
            self.windows.pop_front();
            let Some(batch) = batches.get(&batch) else { continue };
            if batch.used * 4 >= batch.count {
                self.strikes = 0;
                continue;
            }
            self.strikes += 1;
            self.window /= 4;
            if self.strikes >= 2 {
                // Has to be earned anew.
                (self.start, self.looks, self.directories) = (self.at, 1, 1);
                (self.window, self.strikes) = (0, 0);
            }
        }
    }

    /// The next window, where it is time for it.
    fn step(&mut self, batches: &HashMap<u64, Brought>) -> Option<Step> {
        if self.looks > MEMORY {
            self.start += (self.at - self.start) / 2;
            self.looks /= 2;
        }
        let dense = u64::from(self.looks) * 2 > u64::from(self.at - self.start);
        let far = self.directories >= 3 && self.looks >= BELIEVED.0
            || self.directories == 2 && self.looks >= BELIEVED.1;
        if !dense || !far {
            return None;
        }
        let before_reader: u32 = self
            .windows
            .iter()
            .filter_map(|(batch, _)| batches.get(batch))
            .map(|batch| batch.count.saturating_sub(batch.used))
            .sum();
        let next = (self.window * 4).clamp(WINDOW.0, WINDOW.1);
        // While it grows, a window ahead is enough; at full size there are two or three under way.
        let enough = if self.window == WINDOW.1 { 2 * WINDOW.1 } else { self.window / 2 };
        let from = self.frontier.max(self.at.saturating_add(1));
        // a subtree may end anywhere, and what is ahead then was for nothing
        let room = (self.seen.saturating_mul(2)).max(WINDOW.0).saturating_sub(before_reader);
        let objects =
            if before_reader <= enough && room >= WINDOW.0 / 2 { next.min(room) } else { 0 };
        Some(Step { walk: self.id, from, objects, bytes: WINDOW_BYTES })
    }
}
