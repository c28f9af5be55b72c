//! What only a kernel with restartable events can show: the worker dies, its readers don't notice.

use std::os::unix::fs::FileExt;

use super::root_tests::*;
use super::*;
use crate::fanotify::Group;
use crate::fanotify::testing::{Disk, LIMIT, Reader, range};
use crate::queue::broker::Death;

fn worker(group: &Group, table: &Table, segment: &Segment) -> KernelQueue {
    let queue = KernelQueue::new(group.open_queue().unwrap(), other(table)).unwrap();
    queue.know(SEGMENT, &segment.unmarked).unwrap();
    queue
}

#[tokio::test]
#[ignore = "needs a kernel with restartable permission events"]
async fn guest_a_reader_survives_its_worker() {
    let disk = Disk::mount();
    let group = Group::restartable().unwrap();
    let segment = Segment::new(&group, disk.path(), "segment");
    let table = Table::create(16).unwrap();

    let first = worker(&group, &table, &segment);
    let mut a = Reader::start(&segment.path, range(4096, 4096));
    let (event_a, _) = next_event(&first).await;
    let mut b = Reader::start(&segment.path, range(8192, 4096));
    let (event_b, _) = next_event(&first).await;
    let since = table.snapshot().records.iter().map(|r| r.since).min();
    drop(first);
    assert!(a.is_blocked() && b.is_blocked());

    let second = worker(&group, &table, &segment);
    let again = [next_event(&second).await, next_event(&second).await];
    assert_eq!(again, [(event_a, range(4096, 4096)), (event_b, range(8192, 4096))]);
    let records = table.snapshot().records;
    assert_eq!(records.iter().map(|r| r.since).min(), since);
    assert!(records.iter().all(|r| r.attempts == 2 && r.strikes == 0));
    segment.unmarked.write_all_at(&[5; 8192], 4096).unwrap();
    for (event, _) in again {
        assert_eq!(second.answer(event, Verdict::Allow).unwrap(), Answered::Delivered);
    }
    assert_eq!(a.finish().bytes, [5; 4096]);
    assert_eq!(b.finish().bytes, [5; 4096]);
    assert_eq!(table.snapshot().records, []);
    let reader = Reader::start(&segment.path, range(4096, 8192));
    let touched = Incoming::Touched { segment: SEGMENT, range: range(4096, 8192) };
    assert_eq!(next(&second).await, touched);
    assert_eq!(reader.finish().bytes, [5; 8192]);
}

/// The table shows who was killed in flight only until all has been read that was in the queue.
#[tokio::test]
#[ignore = "needs a kernel with restartable permission events"]
async fn guest_a_killed_reader_leaves_the_table() {
    let disk = Disk::mount();
    let group = Group::restartable().unwrap();
    let segment = Segment::new(&group, disk.path(), "segment");
    let table = Table::create(16).unwrap();
    let first = worker(&group, &table, &segment);
    let killed = Reader::start(&segment.path, range(0, 4096));
    let (gone, _) = next_event(&first).await;
    let mut readers = Vec::new();
    for n in 1..4 {
        readers.push(Reader::start(&segment.path, range(n * 4096, 4096)));
        next_event(&first).await;
    }
    drop(killed);
    drop(first);
    let second = worker(&group, &table, &segment);
    assert_eq!(table.snapshot().records.len(), 4);
    let mut events = Vec::new();
    for _ in &readers {
        events.push(next_event(&second).await.0);
    }
    let left: Vec<_> = table.snapshot().records.iter().map(|record| record.event).collect();
    assert!(left.len() == 3 && !left.contains(&gone), "{left:?}");
    segment.unmarked.write_all_at(&[5; 4 * 4096], 0).unwrap();
    for event in events {
        assert_eq!(second.answer(event, Verdict::Allow).unwrap(), Answered::Delivered);
    }
    assert!(readers.into_iter().all(|reader| reader.finish().status.success()));
    let tally = table.tally();
    assert_eq!((tally.events, tally.fetched), (4, 4));
}

#[tokio::test]
#[ignore = "needs a kernel with restartable permission events"]
async fn guest_an_event_that_kills_its_workers_is_given_up() {
    let disk = Disk::mount();
    let group = Group::restartable().unwrap();
    let segment = Segment::new(&group, disk.path(), "segment");
    let mut table = Table::create(16).unwrap();
    let reader = Reader::start(&segment.path, range(0, 4096));
    for strikes in 0..MAX_STRIKES {
        let queue = worker(&group, &table, &segment);
        next_event(&queue).await;
        assert_eq!(table.snapshot().records[0].strikes, strikes);
        drop(queue);
        assert_eq!(table.worker_died(Death::Fault), 1);
    }
    let queue = worker(&group, &table, &segment);
    assert!(is_quiet(&queue).await);
    assert!(reader.finish().message.contains("Input/output error"));
    // the next one is judged by itself
    let reader = Reader::start(&segment.path, range(0, 4096));
    let (event, _) = next_event(&queue).await;
    segment.unmarked.write_all_at(&[1; 4096], 0).unwrap();
    queue.answer(event, Verdict::Allow).unwrap();
    assert!(reader.finish().status.success());
}

#[tokio::test]
#[ignore = "needs a kernel with restartable permission events"]
async fn guest_the_end_of_the_group_is_the_end_of_the_queue() {
    let disk = Disk::mount();
    let group = Group::restartable().unwrap();
    let segment = Segment::new(&group, disk.path(), "segment");
    let table = Table::create(16).unwrap();
    let queue = worker(&group, &table, &segment);
    let reader = Reader::start(&segment.path, range(0, 4096));
    let (event, _) = next_event(&queue).await;
    // a task that waits already is woken
    let (end, ()) = tokio::join!(tokio::time::timeout(LIMIT, queue.next()), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(group);
    });
    assert_eq!(end.unwrap().unwrap(), None);
    assert_eq!(reader.finish().bytes, [0; 4096], "why the supervisor must not let go of it");
    assert_eq!(queue.answer(event, Verdict::Allow).unwrap(), Answered::ReaderGone);
}
