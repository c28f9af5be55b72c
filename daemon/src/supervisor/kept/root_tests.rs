//! With a real group: what a supervisor that died has left, as a table or nothing.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::TempDir;

use super::*;
use crate::fanotify::testing::{Reader, directory, event, events, range, sparse};
use crate::fanotify::{Channel, PermissionEvent, mark};
use crate::ids::SegmentId;
use crate::queue::broker::Pending;
use crate::supervisor::shard::waiter;

/// A supervisor that is about to die.
struct Before {
    group: Group,
    channel: Channel,
    table: Table,
    path: PathBuf,
    _directory: TempDir,
    /// Other tests' files get lower numbers than the events here.
    low_numbers: Vec<File>,
    /// But another of these tests would take the numbers that this one has let go.
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Before {
    fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let low_numbers = (0..300).map(|_| File::open("/dev/null").unwrap()).collect();
        let directory = directory();
        let path = sparse(directory.path(), "segment", 1 << 20);
        let group = Group::stock().unwrap();
        mark::add(&group, File::open(&path).unwrap().as_fd()).unwrap();
        let (channel, table) = (group.channel(), Table::create(16).unwrap());
        Self { group, channel, table, path, _directory: directory, low_numbers, _alone: alone }
    }

    fn claim(&mut self, event: &PermissionEvent) {
        let pending = Pending {
            segment: SegmentId(7),
            range: event.range().unwrap(),
            pid: event.pid(),
            arrived: std::time::Duration::ZERO,
            attempts: 2,
            strikes: 1,
            dispatched: None,
            heard: std::time::Duration::ZERO,
            reason: None,
        };
        let record = waiter::record(self.table.next_event(), event.number(), &pending, None);
        let _ = self.table.claim(&record).unwrap();
    }

    /// As the next supervisor finds it.
    fn taken_back(&mut self, table: bool) -> KeptShard {
        self.low_numbers.clear();
        let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let table = table.then(|| Table::open(copy(self.table.as_fd())).unwrap());
        KeptShard::take_back(ShardId(0), copy(self.group.as_fd()), table).unwrap()
    }
}

#[test]
#[ignore = "needs root"]
fn root_what_is_in_the_table_waits_and_the_rest_tries_again() {
    let mut before = Before::new();
    let (first, second) = (range(0, 4096), range(8192, 4096));
    let mut known = Reader::start(&before.path, first);
    let event_known = event(&before.channel);
    before.claim(&event_known);
    // read by the supervisor, and then there was no time to write it down
    let missed = Reader::start(&before.path, second);
    let event_missed = event(&before.channel);
    // not even read
    let mut unread = Reader::start(&before.path, range(1 << 16, 4096));
    assert!(unread.is_blocked());
    let number = event_known.number();
    event_known.leave();
    event_missed.leave();

    let taken = before.taken_back(true);
    taken.sweep(ShardId(0), 4096);
    let message = missed.finish().message;
    assert!(message.contains("Resource temporarily unavailable"), "{message}");
    assert!(known.is_blocked(), "only what is in no table is swept");

    let event_unread = event(&taken.group.channel());
    assert_ne!(event_unread.number(), number, "it is occupied");
    let _ = event_unread.answer(Verdict::Deny(DenyErrno::Enospc)).unwrap();
    assert!(unread.finish().message.contains("No space left"), "the answer is its own");
    assert!(known.is_blocked());

    let KeptShard { owed, table, .. } = taken;
    let [(slot, record, owed)] = <[_; 1]>::try_from(owed).unwrap();
    assert_eq!((record.range, record.attempts, record.strikes), (first, 2, 1));
    // out of the table it comes while nobody else can get its number
    let number = owed.number();
    let is_open = || std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok();
    let answered = owed.answer_then(Verdict::Allow, || assert!(is_open(), "its number is free"));
    assert_eq!(answered.unwrap(), Answered::Delivered);
    assert!(known.finish().status.success());
    table.unwrap().free(slot);
    assert_eq!(before.table.snapshot().records, []);
}

#[test]
#[ignore = "needs root"]
fn root_without_a_table_all_try_again() {
    let mut before = Before::new();
    let readers = [0, 4096, 8192].map(|offset| Reader::start(&before.path, range(offset, 4096)));
    let read = events(&before.channel, 3);
    read.iter().for_each(|event| before.claim(event));
    read.into_iter().for_each(PermissionEvent::leave);
    let taken = before.taken_back(false);
    assert!(taken.table.is_none() && taken.owed.is_empty());
    taken.sweep(ShardId(0), 4096);
    for reader in readers {
        let message = reader.finish().message;
        assert!(message.contains("Resource temporarily unavailable"), "{message}");
    }
}

#[test]
#[ignore = "needs root"]
fn root_what_is_no_group_is_left_alone() {
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    assert!(KeptShard::take_back(ShardId(0), null(), None).is_none());
    let before = Before::new();
    let group = before.group.as_fd().try_clone_to_owned().unwrap();
    let table = open_table(null()).unwrap();
    let taken = KeptShard::take_back(ShardId(0), group, table).unwrap();
    assert!(taken.table.is_none(), "no table is better than a wrong one");
}
