//! The worker's side of the kernel's queue, on any kernel: a stock group's own fd is read and
//! answered in the same way, it only doesn't take events back.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::fanotify::testing::{LIMIT, Reader, detached_mount, directory, open_at, range, sparse};
use crate::fanotify::{Group, mark};

pub(super) const SIZE: u64 = 1 << 20;
pub(super) const SEGMENT: SegmentId = SegmentId(7);

/// A marked segment, and a way to write it that raises no events.
pub(super) struct Segment {
    pub(super) path: PathBuf,
    pub(super) unmarked: File,
    _mount: OwnedFd,
}

impl Segment {
    pub(super) fn new(group: &Group, directory: &std::path::Path, name: &str) -> Self {
        let path = sparse(directory, name, SIZE);
        mark::add(group, File::open(&path).unwrap().as_fd()).unwrap();
        let mount = detached_mount(directory);
        mark::ignore_mount(group, mount.as_fd()).unwrap();
        Self { path, unmarked: open_at(&mount, name), _mount: mount }
    }
}

pub(super) async fn next(queue: &KernelQueue) -> Incoming {
    timeout(LIMIT, queue.next()).await.expect("nothing comes").unwrap().expect("the group is gone")
}

pub(super) async fn next_event(queue: &KernelQueue) -> (EventId, ByteRange) {
    match next(queue).await {
        Incoming::Event { event, segment, range, .. } => {
            assert_eq!(segment, SEGMENT);
            (event, range)
        }
        other => panic!("{other:?}"),
    }
}

/// Nothing comes in a time in which something would have.
pub(super) async fn is_quiet(queue: &KernelQueue) -> bool {
    timeout(Duration::from_millis(50), queue.next()).await.is_err()
}

pub(super) fn other(table: &Table) -> Table {
    Table::open(table.as_fd().try_clone_to_owned().unwrap()).unwrap()
}

fn setting() -> (KernelQueue, Segment, Group, Table, TempDir) {
    let directory = directory();
    let group = Group::stock().unwrap();
    let segment = Segment::new(&group, directory.path(), "segment");
    let table = Table::create(16).unwrap();
    let fd = group.as_fd().try_clone_to_owned().unwrap();
    let queue = KernelQueue::new(fd, other(&table)).unwrap();
    queue.know(SEGMENT, &segment.unmarked).unwrap();
    (queue, segment, group, table, directory)
}

#[tokio::test]
#[ignore = "needs root"]
async fn root_a_reader_waits_for_its_range_and_gets_it() {
    let (queue, segment, _group, table, _directory) = setting();
    let mut reader = Reader::start(&segment.path, range(8192, 8192));
    let (event, wanted) = next_event(&queue).await;
    assert_eq!(wanted, range(8192, 8192));
    let records = table.snapshot().records;
    assert_eq!(records.len(), 1);
    let record = records[0];
    assert_eq!((record.event, record.segment, record.range), (event, SEGMENT, wanted));
    assert_eq!((record.pid, record.attempts, record.strikes), (reader.pid(), 1, 0));
    assert!(record.since > 0 && record.since <= now());
    assert!(reader.is_blocked());
    segment.unmarked.write_all_at(&[9; 8192], 8192).unwrap();
    assert!(is_quiet(&queue).await);
    assert_eq!(queue.answer(event, Verdict::Allow).unwrap(), Answered::Delivered);
    assert!(matches!(queue.answer(event, Verdict::Allow), Err(QueueError::Unknown { .. })));
    assert_eq!(reader.finish().bytes, [9; 8192]);
    assert_eq!(table.snapshot().records, []);
    // and once more, now that it is there
    let reader = Reader::start(&segment.path, range(8192, 8192));
    let touched = Incoming::Touched { segment: SEGMENT, range: wanted };
    assert_eq!(next(&queue).await, touched);
    assert_eq!(reader.finish().bytes, [9; 8192]);
    // half of it is there: the worker is asked for the whole
    let reader = Reader::start(&segment.path, range(4096, 8192));
    let (event, wanted) = next_event(&queue).await;
    assert_eq!(wanted, range(4096, 8192));
    queue.answer(event, Verdict::Deny(DenyErrno::Enospc)).unwrap();
    assert!(reader.finish().message.contains("No space left"));
}

#[tokio::test]
#[ignore = "needs root"]
async fn root_what_asks_for_nothing_is_not_the_workers_business() {
    let (queue, segment, group, _table, directory) = setting();
    let stranger = sparse(directory.path(), "stranger", SIZE);
    mark::add(&group, File::open(&stranger).unwrap().as_fd()).unwrap();
    let reader = Reader::start(&segment.path, range(SIZE + 8192, 4096));
    assert!(is_quiet(&queue).await);
    let outcome = reader.finish();
    assert!(outcome.status.success() && outcome.bytes.is_empty());
    let reader = Reader::start(&stranger, range(0, 4096));
    assert!(is_quiet(&queue).await);
    assert!(reader.finish().message.contains("Input/output error"));
    // a segment that is not served any more is a stranger, too
    queue.forget(SEGMENT);
    let reader = Reader::start(&segment.path, range(0, 4096));
    assert!(is_quiet(&queue).await);
    assert!(reader.finish().message.contains("Input/output error"));
}

#[tokio::test]
#[ignore = "needs root"]
async fn root_many_readers_and_a_small_table() {
    let (queue, segment, _group, table, _directory) = setting();
    let readers: Vec<_> =
        (0..20).map(|n| (n, Reader::start(&segment.path, range(n * 8192, 4096)))).collect();
    let mut events = Vec::new();
    while events.len() < readers.len() {
        events.push(next_event(&queue).await);
    }
    assert_eq!(queue.in_flight(), 20);
    assert_eq!((table.snapshot().records.len(), table.untracked()), (16, 4));
    for (event, wanted) in events.into_iter().rev() {
        let content = vec![(wanted.offset() / 8192) as u8 + 1; 4096];
        segment.unmarked.write_all_at(&content, wanted.offset()).unwrap();
        assert_eq!(queue.answer(event, Verdict::Allow).unwrap(), Answered::Delivered);
    }
    for (n, reader) in readers {
        assert_eq!(reader.finish().bytes, vec![n as u8 + 1; 4096]);
    }
    assert_eq!((queue.in_flight(), table.snapshot().records.len()), (0, 0));
}

#[tokio::test]
#[ignore = "needs root"]
async fn root_a_reader_that_dies_is_no_error() {
    let (queue, segment, _group, table, _directory) = setting();
    let mut reader = Reader::start(&segment.path, range(0, 4096));
    let (event, _) = next_event(&queue).await;
    reader.kill();
    queue.answer(event, Verdict::Allow).unwrap();
    assert_eq!(table.snapshot().records, []);
}
