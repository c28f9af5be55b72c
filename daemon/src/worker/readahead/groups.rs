//! Readers of one directory, or of one name everywhere.

use std::time::Duration;

use super::{Batch, Brought, Catalog, LARGE, Owner, ReadAhead, Wanted};
use crate::worker::ObjectNo;
use crate::worker::schedule::Now;

/// The first step by directory or name, and the largest.
const STEP: (u32, u32) = (8, 2048);
/// The most bytes in one step by directory or name.
const STEP_BYTES: u64 = 8 << 20;
/// Misses of one name count together when they are no further apart.
pub(super) const NAME_MEMORY: Duration = Duration::from_secs(2);
/// The same for a directory.
const DIRECTORY_MEMORY: Duration = Duration::from_secs(5);
/// One look in so many files of a group is a sign that all of them are wanted: in a small group
/// and in a larger one.
const ALL_OF_IT: (u64, u64) = (24, 4);
const SMALL_GROUP: u32 = 512;
/// The most misses that a new try takes after fruitless ones.
const NEED_MAX: u32 = 64;

/// What objects have in common that are read together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Group {
    Directory(u64),
    Name(u32),
}

/// How well one kind of group does, of late: groups for which something was brought, and those among
/// them of which a quarter of a step was used.
#[derive(Debug, Default)]
pub(super) struct Score {
    tried: u32,
    paid: u32,
}

impl Score {
    /// So many times the usual number of misses bring the first step.
    fn caution(&self) -> u32 {
        match (self.tried, self.paid) {
            (tried, paid) if tried < 3 || paid * 2 >= tried => 1,
            (tried, paid) if paid * 4 >= tried => 2,
            _ => 4,
        }
    }

    fn tried(&mut self) {
        self.tried += 1;
        if self.tried > 64 {
            self.tried /= 2;
            self.paid /= 2;
        }
    }
}

/// A directory or a name that is being read.
#[derive(Debug)]
pub(super) struct Interest {
    /// The number of files in the group, as far as is known.
    files: u32,
    /// Looks at absent files or such as were brought.
    looks: u32,
    /// Misses since the last step.
    misses: u32,
    /// Enough was used of a step.
    paid: bool,
    /// So many misses bring the next step.
    need: u32,
    level: u32,
    /// The last step.
    batch: Option<u64>,
    pub(super) last: Now,
}

impl Interest {
    fn new(files: u32, need: u32, last: Now) -> Self {
        Self { files, looks: 0, misses: 0, paid: false, need, level: 0, batch: None, last }
    }
}

impl ReadAhead {
    fn score(&mut self, group: Group) -> &mut Score {
        match group {
            Group::Directory(_) => &mut self.by_directory,
            Group::Name(_) => &mut self.by_name,
        }
    }

    pub(super) fn group_miss(
        &mut self,
        now: Now,
        group: Group,
        no: ObjectNo,
        catalog: &mut impl Catalog,
        batches: &mut Vec<Batch>,
    ) {
        let (first_need, memory) = match group {
            Group::Directory(_) => (2, DIRECTORY_MEMORY),
            Group::Name(_) => (3, NAME_MEMORY),
        };
        let caution = self.score(group).caution();
        let first_need = first_need * caution;
        let known = self.groups.get(&group);
        if known.is_none_or(|known| now.saturating_sub(known.last) > memory) {
            let files = match group {
                Group::Directory(directory) => directory_size(no, directory, catalog),
                Group::Name(name) => {
                    catalog.names().map_or(u32::MAX, |names| names.get(name).len() as u32)
                }
            };
            self.groups.insert(group, Interest::new(files, first_need, now));
        }
        let Some(interest) = self.groups.get_mut(&group) else { return };
        interest.last = now;
        interest.looks += 1;
        interest.misses += 1;
        if interest.batch.is_none() {
            interest.need = first_need;
        }
        let last = interest.batch.and_then(|batch| self.batches.get(&batch));
        let share = if interest.files <= SMALL_GROUP { ALL_OF_IT.0 } else { ALL_OF_IT.1 };
        let good_part = u64::from(interest.looks) * share >= u64::from(interest.files);
        match last {
            Some(last) if last.is_half_used() => interest.level += 1,
            // A good part of it is being read, in an order of its own.
            Some(_) if good_part && interest.misses >= first_need => interest.level += 1,
            _ if interest.misses < interest.need => return,
            Some(last) if last.used * 4 < last.count => {
                interest.level = 0;
                let times = if last.used == 0 { 4 } else { 2 };
                interest.need = (interest.need * times).min(NEED_MAX);
            }
            Some(_) => {}
            None => interest.need *= 2,
        }
        self.group_step(group, no, catalog, batches);
    }

    /// Something that was brought for the group is used.
    pub(super) fn group_hit(
        &mut self,
        now: Now,
        group: Group,
        batch: u64,
        no: ObjectNo,
        catalog: &mut impl Catalog,
        batches: &mut Vec<Batch>,
    ) {
        let Some(interest) = self.groups.get_mut(&group) else { return };
        interest.last = now;
        interest.looks += 1;
        let quarter_used = self.batches.get(&batch).is_some_and(|b| b.used * 4 >= b.count);
        if quarter_used && !std::mem::replace(&mut interest.paid, true) {
            self.score(group).paid += 1;
        }
        let Some(interest) = self.groups.get_mut(&group) else { return };
        let half_used = self.batches.get(&batch).is_some_and(Brought::is_half_used);
        if interest.batch == Some(batch) && half_used {
            interest.level += 1;
            self.group_step(group, no, catalog, batches);
        }
    }

    fn group_step(
        &mut self,
        group: Group,
        no: ObjectNo,
        catalog: &mut impl Catalog,
        batches: &mut Vec<Batch>,
    ) {
        let Some(interest) = self.groups.get_mut(&group) else { return };
        interest.misses = 0;
        let count = STEP.0.saturating_mul(4u32.saturating_pow(interest.level)).min(STEP.1);
        let looks = interest.looks;
        // However it goes, no more than four times of what has been read.
        let count = count.min((4 * looks).max(STEP.0));
        let mut wanted = Wanted::new(self, count as usize, STEP_BYTES, LARGE);
        match group {
            Group::Directory(directory) => {
                // A directory's files are neighbours. Those after this one first.
                let patience = 4 * count + 1024;
                let mut add = |no: u32| {
                    let Some(info) = catalog.info(ObjectNo(no)) else { return false };
                    info.directory == directory && wanted.add(ObjectNo(no), info.size, catalog)
                };
                let end = catalog_end(no.0, patience);
                let _ = (no.0.saturating_add(1)..end).all(&mut add);
                let _ = (no.0.saturating_sub(patience)..no.0).rev().all(&mut add);
            }
            Group::Name(name) => {
                let Some(names) = catalog.names() else { return };
                let all = names.get(name);
                let after = all.partition_point(|(_, other, _)| *other <= no);
                let (before, after) = all.split_at(after);
                let _ = after.iter().chain(before).all(|(_, other, size)| {
                    *other == no || wanted.add(*other, u64::from(*size), catalog)
                });
            }
        }
        let batch = wanted.batch;
        if !batch.is_empty() {
            let id = self.bring(Owner::Group(group), &batch);
            if let Some(interest) = self.groups.get_mut(&group)
                && interest.batch.replace(id).is_none()
            {
                self.score(group).tried();
            }
            batches.push(batch);
        }
    }
}

/// The number of files in a directory, as far as they are found next to this one.
fn directory_size(no: ObjectNo, directory: u64, catalog: &mut impl Catalog) -> u32 {
    let mut same =
        |no: &u32| catalog.info(ObjectNo(*no)).is_some_and(|info| info.directory == directory);
    let after = (no.0..catalog_end(no.0, STEP.1)).take_while(&mut same).count();
    let before = (no.0.saturating_sub(STEP.1)..no.0).rev().take_while(&mut same).count();
    u32::try_from(after + before).unwrap_or(u32::MAX)
}

fn catalog_end(no: u32, patience: u32) -> u32 {
    no.saturating_add(1).saturating_add(patience)
}
