//! What the supervisor before this one has left with the service manager: its fanotify groups, with
//! the readers that wait, and the in-flight tables that say what for.
//!
//! The kernel matches an answer with an event by the number that the event's fd had, and takes the one
//! that was read first (`fs/notify/fanotify/fanotify_user.c:process_access_response`). So before
//! anything is read from a group, every number that is still owed an answer must be occupied in this
//! process, or answered.
//!
//! Between the kernel's reading of an event and its entry in the table lie some microseconds (see
//! [`Shard`](super::shard::Shard)). Nobody knows what an event that falls in between is about, not even
//! its number, so all numbers that it may have are answered with `EAGAIN`: the reader can try again,
//! and neither hangs nor gets zeros.
//!
//! None of that concerns groups with the kernel's queue: there the kernel has taken back what had been
//! read.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use thiserror::Error;
use tracing::{debug, error, info, warn};

use crate::fanotify::{Answered, DenyErrno, Group, Owed, QueueKind, Verdict, answer_number};
use crate::ids::ShardId;
use crate::queue::inflight::{Record, Slot, Table, TableError};
use crate::standalone::keeper::{LIFELINE, TURN};
use crate::sys::{fdstore, limits};
use crate::version::OtherVersion;

/// An event gets the lowest free number. So what was read last has one that is at most so far above
/// the highest in the tables, unless that many other files were opened meanwhile.
const MARGIN: i32 = 4096;

/// How far to look when there is no table.
const FAR: i32 = 1 << 16;

/// The name of the admin socket where systemd listens for us: `FileDescriptorName=` in `hydrantd.socket`.
pub const LISTENER: &str = "admin";

/// The name of an admin socket that the program before us in this process made.
pub const OWN_LISTENER: &str = "own-admin";

/// The name of containerd's socket where systemd listens for us: `FileDescriptorName=` in `hydrant-containerd.socket`.
pub const CONTAINERD: &str = "containerd";

/// The name of one that a supervisor made.
pub const OWN_CONTAINERD: &str = "own-containerd";

/// The name of a pidfd: of the process that guards what a supervisor left when it was told to restart.
pub const GUARD: &str = "guard";

/// The name of the state directory's lock.
pub const LOCK: &str = "lock";

const GROUP: &str = "group-";
const TABLE: &str = "table-";

/// The name in the store of a shard's group.
pub fn group_name(shard: ShardId) -> String {
    format!("{GROUP}{shard}")
}

/// The name in the store of a shard's table.
pub fn table_name(shard: ShardId) -> String {
    format!("{TABLE}{shard}")
}

/// Everything that was kept.
#[derive(Debug, Default)]
pub struct Kept {
    shards: BTreeMap<u16, KeptShard>,
    listener: Option<Listener>,
    containerd: Option<Listener>,
    guard: Option<OwnedFd>,
    lock: Option<OwnedFd>,
    lifeline: Vec<(String, OwnedFd)>,
}

/// A socket that we did not make.
#[derive(Debug)]
pub enum Listener {
    /// systemd's.
    Managers(OwnedFd),
    /// Of a program before us.
    Ours(OwnedFd),
}

/// A shard whose group has never been closed.
#[derive(Debug)]
pub struct KeptShard {
    pub group: Group,
    /// `None`: it was lost, or can't be understood.
    pub table: Option<Table>,
    /// The readers that wait.
    pub owed: Vec<(Slot, Record, Owed)>,
}

/// Why nothing can be taken back. It is all left as it was: readers wait for a program that can.
#[derive(Debug, Error)]
pub enum KeptError {
    #[error("can't take what the service manager keeps")]
    Take(#[from] io::Error),
    #[error(transparent)]
    Version(#[from] OtherVersion),
}

impl Kept {
    /// Takes it back. To be called once, before this process opens anything else.
    pub fn take_back() -> Result<Self, KeptError> {
        let begin = Instant::now();
        let mut groups = BTreeMap::new();
        let mut tables = BTreeMap::new();
        let (mut listener, mut containerd) = (None, None);
        let (mut guard, mut lock, mut lifeline) = (None, None, Vec::new());
        for (name, fd) in fdstore::take()? {
            match (name.as_str(), number_after(&name, GROUP), number_after(&name, TABLE)) {
                (LISTENER, ..) => listener = Some(Listener::Managers(fd)),
                (OWN_LISTENER, ..) => listener = Some(Listener::Ours(fd)),
                (CONTAINERD, ..) => containerd = Some(Listener::Managers(fd)),
                // of several, systemd's
                (OWN_CONTAINERD, ..) => containerd = containerd.or(Some(Listener::Ours(fd))),
                (GUARD, ..) => guard = Some(fd),
                (LOCK, ..) => lock = Some(fd),
                (LIFELINE | TURN, ..) => lifeline.push((name, fd)),
                (_, Some(shard), _) => drop(groups.insert(shard, fd)),
                (_, _, Some(shard)) => drop(tables.insert(shard, fd)),
                _ => warn!(name, "a file descriptor that nobody here knows"),
            }
        }
        let shards = BTreeMap::new();
        let mut kept = Self { shards, listener, containerd, guard, lock, lifeline };
        let mut ours = Vec::with_capacity(groups.len());
        for (shard, group) in groups {
            let table = tables.remove(&shard).map(open_table).transpose()?.flatten();
            ours.push((shard, group, table));
        }
        for (shard, group, table) in ours {
            if let Some(taken) = KeptShard::take_back(ShardId(shard), group, table) {
                kept.shards.insert(shard, taken);
            }
        }
        // the group was closed, so nobody waits for what they list
        for shard in tables.into_keys() {
            forget(&table_name(ShardId(shard)));
        }
        kept.sweep();
        if !kept.shards.is_empty() {
            let queue = kept.kind();
            let owed: usize = kept.shards.values().map(|shard| shard.owed.len()).sum();
            info!(
                shards = kept.shards.len(),
                ?queue,
                waiting = owed,
                micros = begin.elapsed().as_micros() as u64,
                "taken over from the supervisor before"
            );
        }
        Ok(kept)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shards.is_empty()
    }

    /// How many shards there were: pools are assigned by that.
    #[must_use]
    pub fn count(&self) -> Option<u16> {
        Some(self.shards.last_key_value()?.0.saturating_add(1))
    }

    /// Of which kind their groups are: they stay so as long as they are kept.
    #[must_use]
    pub fn kind(&self) -> Option<QueueKind> {
        self.shards.values().next().map(|shard| shard.group.kind())
    }

    /// The shards that were never without their group.
    #[must_use]
    pub fn ids(&self) -> HashSet<ShardId> {
        self.shards.keys().copied().map(ShardId).collect()
    }

    /// The admin socket, if somebody listens for us.
    #[must_use]
    pub fn listener(&mut self) -> Option<Listener> {
        self.listener.take()
    }

    /// containerd's socket, if there has been one all the time.
    #[must_use]
    pub fn containerd(&mut self) -> Option<Listener> {
        self.containerd.take()
    }

    /// The lock of the state directory, which nobody else could have meanwhile.
    #[must_use]
    pub fn lock(&mut self) -> Option<OwnedFd> {
        self.lock.take()
    }

    /// What a keeper sees the end of when this process and its parent are gone: to be held for life.
    #[must_use]
    pub fn lifeline(&mut self) -> Vec<(String, OwnedFd)> {
        std::mem::take(&mut self.lifeline)
    }

    /// Ends the process that has guarded what is ours now. To be called once orders are taken.
    pub fn relieve_guard(&mut self) {
        if let Some(guard) = self.guard.take() {
            if let Err(error) = crate::sys::spawn::signal(&guard, nix::sys::signal::Signal::SIGKILL)
            {
                warn!(%error, "can't end the process that guarded the readers in the restart");
            }
            forget(GUARD);
        }
    }

    #[must_use]
    pub fn take(&mut self, shard: ShardId) -> Option<KeptShard> {
        self.shards.remove(&shard.0)
    }

    /// Answers what is in no table.
    fn sweep(&self) {
        let limit = limits::open_files().map_or(u64::MAX, |limit| limit.soft);
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let stock = || self.shards.iter().filter(|(_, kept)| kept.group.kind() == QueueKind::Stock);
        let tables = stock().map(|(_, shard)| shard.table.as_ref());
        let highest = tables.map(|table| table.map_or(FAR, Table::highest_number)).max();
        let end = highest.unwrap_or(0).saturating_add(MARGIN).min(limit);
        for (id, shard) in stock() {
            shard.sweep(ShardId(*id), end);
        }
    }
}

impl KeptShard {
    fn take_back(id: ShardId, group: OwnedFd, mut table: Option<Table>) -> Option<Self> {
        let group = match Group::from_owned_fd(group) {
            Ok(group) => group,
            Err(error) => {
                error!(shard = %id, %error, "this is no group of ours");
                forget(&group_name(id));
                return None;
            }
        };
        if table.is_none() {
            error!(shard = %id, "the table of those who wait is lost");
            forget(&table_name(id));
        }
        if group.kind() == QueueKind::Kernel {
            // what the worker before had is in the kernel's queue again, and under no number
            return Some(Self { group, table, owed: Vec::new() });
        }
        let (records, corrupt) = table.as_ref().map(Table::inherit).unwrap_or_default();
        if corrupt > 0 {
            warn!(shard = %id, corrupt, "events whose entry was not finished: they get EAGAIN");
        }
        let channel = group.channel();
        let mut owed = Vec::with_capacity(records.len());
        for (slot, record) in records {
            match Owed::new(&channel, record.number) {
                Ok(number) if number.is_occupied() => owed.push((slot, record, number)),
                // Something else has the number, and may let it go at any time; or there are too many.
                other => {
                    error!(shard = %id, number = record.number, error = ?other.err(), "can't occupy a number");
                    deny(id, &group, record.number);
                    if let Some(table) = &mut table {
                        table.free(slot);
                    }
                }
            }
        }
        Some(Self { group, table, owed })
    }

    fn sweep(&self, id: ShardId, end: i32) {
        let known: HashSet<i32> = self.owed.iter().map(|(_, record, _)| record.number).collect();
        let unknown = (0..end).filter(|number| !known.contains(number));
        let found = unknown.filter(|number| deny(id, &self.group, *number)).count();
        if found > 0 {
            warn!(shard = %id, found, "events that were in no table: their readers got EAGAIN");
        } else {
            debug!(shard = %id, end, "no event was missed");
        }
    }
}

/// `None`: it is damaged. One of another version is not: some program can read it.
fn open_table(fd: OwnedFd) -> Result<Option<Table>, OtherVersion> {
    match Table::open(fd) {
        Ok(table) => Ok(Some(table)),
        Err(TableError::Version(version)) => Err(version),
        Err(error) => {
            error!(%error, "a table of those who wait can't be used");
            Ok(None)
        }
    }
}

/// True where somebody waited.
fn deny(shard: ShardId, group: &Group, number: i32) -> bool {
    use std::os::fd::AsFd;
    match answer_number(group.as_fd(), number, Verdict::Deny(DenyErrno::Eagain)) {
        Ok(answered) => answered == Answered::Delivered,
        Err(error) => {
            error!(%shard, %error, "can't answer for a supervisor that died");
            false
        }
    }
}

fn number_after(name: &str, prefix: &str) -> Option<u16> {
    name.strip_prefix(prefix)?.parse().ok()
}

/// Has the manager close something.
pub fn forget(name: &str) {
    if let Err(error) = fdstore::remove(name) {
        error!(name, %error, "can't tell the service manager to close what it keeps");
    }
}

/// Has the manager keep a shard's fds.
pub fn keep(name: &str, fd: std::os::fd::BorrowedFd<'_>) {
    if let Err(error) = fdstore::store(name, fd) {
        error!(name, %error, "can't leave a file descriptor with the service manager: \
            readers would get zeros if this process was killed");
    }
}

/// A clean stop: nothing is mounted.
pub fn forget_all(shards: impl IntoIterator<Item = ShardId>) {
    for shard in shards {
        forget(&group_name(shard));
        forget(&table_name(shard));
    }
    forget(LOCK);
    forget(OWN_CONTAINERD);
}

#[cfg(test)]
mod root_tests;
