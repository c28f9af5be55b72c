//! What to fetch before anybody asks for it.
//!
//! A pure policy: it is told each first look at an object (absent, or there already) and names
//! objects to be fetched. Three kinds of reader are recognised:
//!
//! - in one **directory**: the second miss brings 8 more of its files, then 32, 128…;
//! - by **name**: the third miss of a base name within two seconds (`Makefile`, `Kconfig`) brings
//!   files of that name from anywhere, in the pool's order, in the same steps;
//! - a walk: a reader that advances through the pool's order and leaves little out gets
//!   windows that grow to thousands of objects, several under way before it.
//!
//! Of what git reads in the existence pack only walks are recognised: a commit, a merge or a switch reads
//! old content of here and there, and what is beside it is of no use.
//!
//! Growth has to be earned: the next step comes when half of the last one has been used, which also
//! is before the reader gets to its end. Where what was brought is not used, the next try is small,
//! and it takes ever more misses to get one. So reading files at random brings little more than
//! those files.

mod groups;
mod walks;

use std::collections::HashMap;
use std::sync::Arc;

use groups::{Group, Interest, NAME_MEMORY, Score};
use walks::{Step, Walks};

use super::ObjectNo;
use super::pool::NameIndex;
use super::schedule::Now;

/// The most objects and bytes of read-ahead under way.
const UNDER_WAY: (usize, u64) = (20_000, 64 << 20);
/// Larger objects come ahead in walks only.
const LARGE: u64 = 1 << 20;
/// So many directories and names are kept in mind.
const GROUPS_MAX: usize = 8192;
/// So many objects that came and were not looked at are kept in mind.
const UNUSED_MAX: usize = 65_536;

/// How a reader looks at an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// It reads the file.
    File,
    /// Git reads it in the existence pack.
    Pack,
}

/// What the policy must know of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// In bytes.
    pub size: u64,
    /// The number of its directory.
    pub directory: u64,
    /// The hash of its name.
    pub name: u32,
}

/// What the policy looks things up in.
pub trait Catalog {
    /// The number of objects.
    fn len(&self) -> u32;
    fn info(&mut self, no: ObjectNo) -> Option<Info>;
    /// The object is neither there nor under way.
    fn is_wanted(&mut self, no: ObjectNo) -> bool;
    /// The files by name; `None` as long as there is no such index. Asking has one made.
    fn names(&mut self) -> Option<Arc<NameIndex>>;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Objects to be fetched together, in this order, with their sizes.
pub type Batch = Vec<(ObjectNo, u64)>;

/// For whom a batch was brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Group(Group),
    Walk(u64),
}

#[derive(Debug)]
struct Brought {
    owner: Owner,
    count: u32,
    used: u32,
}

impl Brought {
    fn is_half_used(&self) -> bool {
        self.used * 2 >= self.count
    }
}

/// See the module's documentation. Costs some 40 bytes for each object that was brought and not yet
/// looked at, within limits.
#[derive(Debug, Default)]
pub struct ReadAhead {
    enabled: bool,
    groups: HashMap<Group, Interest>,
    walks: Walks,
    by_directory: Score,
    by_name: Score,
    batches: HashMap<u64, Brought>,
    /// Objects brought and not looked at, with their batch.
    unused: HashMap<ObjectNo, u64>,
    /// Objects asked for that have not come.
    under_way: HashMap<ObjectNo, u64>,
    under_way_bytes: u64,
    next_batch: u64,
    last: Option<ObjectNo>,
}

impl ReadAhead {
    #[must_use]
    pub fn new(enabled: bool) -> Self {
        Self { enabled, ..Self::default() }
    }

    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// A reader looks at an object. `absent`: it is not there yet.
    pub fn access(
        &mut self,
        now: Now,
        no: ObjectNo,
        absent: bool,
        look: Look,
        catalog: &mut impl Catalog,
    ) -> Vec<Batch> {
        // The pages of one file come one after the other.
        if !self.enabled || self.last == Some(no) {
            return Vec::new();
        }
        self.last = Some(no);
        let Some(info) = catalog.info(no) else { return Vec::new() };
        let brought = self.unused.remove(&no).and_then(|batch| {
            let brought = self.batches.get_mut(&batch)?;
            brought.used += 1;
            Some((batch, brought.owner))
        });
        let first_look = absent || brought.is_some();
        let mut batches = Vec::new();
        let owner = brought.map(|(_, owner)| owner);
        let step = self.walks.access(now, no, info.directory, first_look, owner, &self.batches);
        let walking = step.as_ref().is_some_and(|step| step.objects > 0);
        if let Some(Step { walk, from, objects, bytes }) = step
            && objects > 0
            && self.has_room()
        {
            let (batch, end) = self.walk_window(from, objects, bytes, catalog);
            let id = self.bring(Owner::Walk(walk), &batch);
            self.walks.brought(walk, end, objects, (!batch.is_empty()).then_some(id));
            batches.push(batch);
        }
        match brought {
            Some((batch, Owner::Group(group))) => {
                self.group_hit(now, group, batch, no, catalog, &mut batches);
            }
            None if absent && !walking && look == Look::File => {
                for group in [Group::Directory(info.directory), Group::Name(info.name)] {
                    self.group_miss(now, group, no, catalog, &mut batches);
                }
            }
            _ => {}
        }
        batches.retain(|batch| !batch.is_empty());
        self.tidy(now);
        batches
    }

    /// An object that was named here has come.
    pub fn arrived(&mut self, no: ObjectNo) {
        if let Some(size) = self.under_way.remove(&no) {
            self.under_way_bytes -= size;
        }
    }

    /// An object that was named here will not come.
    pub fn dropped(&mut self, no: ObjectNo) {
        self.arrived(no);
        self.forget(no);
    }

    /// From now on nothing is heard of looks at these objects: their segment is complete.
    pub fn completed(&mut self, objects: std::ops::Range<u32>) {
        if (objects.len()) < self.unused.len() {
            objects.for_each(|no| self.forget(ObjectNo(no)));
        } else {
            let inside: Vec<_> =
                self.unused.keys().copied().filter(|no| objects.contains(&no.0)).collect();
            inside.into_iter().for_each(|no| self.forget(no));
        }
    }

    /// Says nothing about whether it is used or not.
    fn forget(&mut self, no: ObjectNo) {
        if let Some(batch) = self.unused.remove(&no)
            && let Some(brought) = self.batches.get_mut(&batch)
        {
            brought.count = brought.count.saturating_sub(1);
        }
    }

    /// Objects asked for that have not come.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Objects brought that nobody has looked at.
    #[must_use]
    pub fn unused(&self) -> usize {
        self.unused.len()
    }

    /// There is room for a good part of a window: many small ones would cost more.
    fn has_room(&self) -> bool {
        self.under_way.len() <= UNDER_WAY.0 * 3 / 4 && self.under_way_bytes <= UNDER_WAY.1 * 3 / 4
    }

    /// The next objects of a walk, and where the one after them starts.
    fn walk_window(
        &self,
        from: u32,
        objects: u32,
        bytes: u64,
        catalog: &mut impl Catalog,
    ) -> (Batch, u32) {
        let mut wanted = Wanted::new(self, objects as usize, bytes, u64::MAX);
        let mut at = from;
        let end = catalog.len().min(from.saturating_add(8 * objects + 4096));
        while at < end {
            let size = catalog.info(ObjectNo(at)).map_or(0, |info| info.size);
            if !wanted.add(ObjectNo(at), size, catalog) {
                break;
            }
            at += 1;
        }
        (wanted.batch, at)
    }

    fn bring(&mut self, owner: Owner, batch: &Batch) -> u64 {
        self.next_batch += 1;
        let id = self.next_batch;
        if !batch.is_empty() {
            let count = u32::try_from(batch.len()).unwrap_or(u32::MAX);
            self.batches.insert(id, Brought { owner, count, used: 0 });
        }
        for (no, size) in batch {
            self.unused.insert(*no, id);
            if self.under_way.insert(*no, *size).is_none() {
                self.under_way_bytes += size;
            }
        }
        id
    }

    /// Keeps memory within limits: the oldest goes.
    fn tidy(&mut self, now: Now) {
        if self.unused.len() > UNUSED_MAX {
            let mut ids: Vec<_> = self.unused.values().copied().collect();
            let (_, middle, _) = ids.select_nth_unstable(UNUSED_MAX / 2);
            let middle = *middle;
            self.unused.retain(|_, batch| *batch > middle);
        }
        if self.batches.len() > 2 * GROUPS_MAX {
            let oldest = self.next_batch - GROUPS_MAX as u64;
            self.batches.retain(|id, _| *id > oldest);
        }
        if self.groups.len() > GROUPS_MAX {
            self.groups.retain(|_, interest| now.saturating_sub(interest.last) < NAME_MEMORY);
            if self.groups.len() > GROUPS_MAX {
                self.groups.clear();
            }
        }
    }
}

/// A batch that is being put together.
struct Wanted<'a> {
    policy: &'a ReadAhead,
    batch: Batch,
    objects: usize,
    bytes: u64,
    large: u64,
}

impl<'a> Wanted<'a> {
    fn new(policy: &'a ReadAhead, objects: usize, bytes: u64, large: u64) -> Self {
        Self {
            policy,
            batch: Vec::new(),
            objects: objects.min(UNDER_WAY.0.saturating_sub(policy.under_way.len())),
            bytes: bytes.min(UNDER_WAY.1.saturating_sub(policy.under_way_bytes)),
            large,
        }
    }

    /// Adds an object if it is wanted and not too large. `false`: there is no room for more.
    fn add(&mut self, no: ObjectNo, size: u64, catalog: &mut impl Catalog) -> bool {
        if size > self.large || self.policy.under_way.contains_key(&no) || !catalog.is_wanted(no) {
            return true;
        }
        if self.batch.len() >= self.objects || size > self.bytes {
            return false;
        }
        self.bytes -= size;
        self.batch.push((no, size));
        true
    }
}

#[cfg(test)]
mod tests;
