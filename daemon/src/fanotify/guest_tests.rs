//! Restartable groups, on a kernel that has them.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::testing::*;
use super::*;

const SIZE: u64 = 1 << 20;

fn marked(disk: &Disk) -> (Group, PathBuf) {
    let group = Group::restartable().unwrap();
    let path = sparse(disk.path(), "segment", SIZE);
    mark::add(&group, File::open(&path).unwrap().as_fd()).unwrap();
    (group, path)
}

fn open(group: &Group) -> Channel {
    Channel::from_owned_fd(group.open_queue().unwrap())
}

#[test]
#[ignore = "needs a kernel with restartable permission events"]
fn guest_one_queue_at_a_time() {
    assert_eq!(probe().unwrap(), QueueKind::Kernel);
    let group = Group::restartable().unwrap();
    let copy = Group::from_owned_fd(group.as_fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!(copy.kind(), QueueKind::Kernel);
    let queue = group.open_queue().unwrap();
    assert!(matches!(group.open_queue(), Err(Error::QueueBusy { .. })));
    let duplicate = queue.try_clone().unwrap();
    drop(queue);
    assert!(matches!(copy.open_queue(), Err(Error::QueueBusy { .. })));
    drop(duplicate);
    assert!(copy.open_queue().is_ok());
    let stock = Group::stock().unwrap();
    assert!(matches!(stock.open_queue(), Err(Error::OpenQueue { .. })));
    assert!(matches!(group.channel().read(), Err(Error::Read { .. })));
}

#[test]
#[ignore = "needs a kernel with restartable permission events"]
fn guest_what_a_closed_queue_had_comes_first() {
    let disk = Disk::mount();
    let (group, path) = marked(&disk);
    let queue = open(&group);
    let start = |n: u64| Reader::start(&path, range(n * 4096, 4096));
    let first = start(1);
    let first_event = event(&queue);
    let second = start(2);
    let second_event = event(&queue);
    let third = start(3);
    assert!(readable(&queue, LIMIT));
    let numbers = [first_event.number(), second_event.number()];
    first_event.leave();
    second_event.leave();
    drop(queue);

    let queue = open(&group);
    // the old numbers are dead
    for number in numbers {
        let answered = answer_number(queue.as_fd(), number, Verdict::Allow).unwrap();
        assert_eq!(answered, Answered::ReaderGone);
    }
    let again = events(&queue, 3);
    let offsets: Vec<_> = again.iter().map(|e| e.range().unwrap().offset() / 4096).collect();
    assert_eq!(offsets, [1, 2, 3]);
    assert_eq!(again[0].pid(), first.pid());
    for event in again {
        assert_eq!(event.answer(Verdict::Allow).unwrap(), Answered::Delivered);
    }
    for reader in [first, second, third] {
        assert_eq!(reader.finish().bytes, [0; 4096]);
    }
}

#[test]
#[ignore = "needs a kernel with restartable permission events"]
fn guest_a_killed_holder_gives_its_events_back() {
    let disk = Disk::mount();
    let (group, path) = marked(&disk);
    let queue = group.open_queue().unwrap();
    let mut reader = Reader::start(&path, range(4096, 4096));
    assert!(readable(&queue, LIMIT));
    // reads the event, then holds the queue until it is killed
    let mut holder = Command::new("/bin/bash")
        .args(["-c", "dd bs=4096 count=1 status=none; exec sleep 60"])
        .stdin(Stdio::from(queue))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut event_bytes = [0; 48];
    holder.stdout.take().unwrap().read_exact(&mut event_bytes).unwrap();
    assert_eq!(parse(&event_bytes).events[0].range, Some(range(4096, 4096)));
    assert!(matches!(group.open_queue(), Err(Error::QueueBusy { .. })));
    assert!(reader.is_blocked());
    holder.kill().unwrap();
    holder.wait().unwrap();
    let queue = open(&group);
    let event = event(&queue);
    assert_eq!((event.range(), event.pid()), (Some(range(4096, 4096)), reader.pid()));
    nix::sys::uio::pwrite(&event, &[3; 4096], 4096).unwrap();
    assert_eq!(event.answer(Verdict::Allow).unwrap(), Answered::Delivered);
    assert_eq!(reader.finish().bytes, [3; 4096]);
}

#[test]
#[ignore = "needs a kernel with restartable permission events"]
fn guest_a_reader_killed_between_two_workers_is_forgotten() {
    let disk = Disk::mount();
    let (group, path) = marked(&disk);
    let queue = open(&group);
    let mut reader = Reader::start(&path, range(0, 4096));
    event(&queue).leave();
    reader.kill();
    drop(queue);
    assert!(is_quiet(&open(&group)));
}

#[test]
#[ignore = "needs a kernel with restartable permission events"]
fn guest_a_queue_without_a_group_is_at_its_end() {
    let disk = Disk::mount();
    let (group, path) = marked(&disk);
    let queue = open(&group);
    let held = Reader::start(&path, range(0, 4096));
    let held_event = event(&queue);
    let waiting = Reader::start(&path, range(4096, 4096));
    assert!(readable(&queue, LIMIT));
    drop(group);
    assert!(matches!(queue.read().unwrap(), Read::Gone));
    assert_eq!(held_event.answer(Verdict::Allow).unwrap(), Answered::ReaderGone);
    // the last close of a group allows: zeros
    assert_eq!(held.finish().bytes, [0; 4096]);
    assert_eq!(waiting.finish().bytes, [0; 4096]);
}
