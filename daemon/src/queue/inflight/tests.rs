use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

fn record(event: u64) -> Record {
    Record {
        event: EventId(event),
        number: 5,
        segment: SegmentId(event * 3),
        range: ByteRange::new(event * 4096, 4096),
        pid: 77,
        since: event + 1,
        dispatched: event + 2,
        attempts: 1,
        strikes: 0,
        worker: 99,
        state: State::InFlight,
    }
}

/// As another process would have it.
fn other(table: &Table) -> Table {
    Table::open(table.as_fd().try_clone_to_owned().unwrap()).unwrap()
}

fn word(table: &Table, slot: usize, word: usize) -> &AtomicU64 {
    &table.memory.words()[(slot + 1) * SLOT_WORDS + word]
}

#[test]
fn what_one_writes_another_reads() {
    let mut table = Table::create(4).unwrap();
    assert_eq!(other(&table).snapshot(), Snapshot::default());
    let slot = table.claim(&record(1)).unwrap();
    let reader = other(&table);
    assert_eq!(reader.snapshot().records, [record(1)]);
    let extreme = Record {
        event: EventId(u64::MAX),
        number: -1,
        pid: -1,
        attempts: u32::MAX,
        state: State::Waiting,
        ..record(2)
    };
    table.update(&slot, &extreme);
    assert_eq!(reader.snapshot().records, [extreme]);
    table.free(slot);
    assert_eq!(reader.snapshot(), Snapshot::default());
}

#[test]
fn a_full_table_counts_what_it_has_no_room_for() {
    let mut table = Table::create(2).unwrap();
    let slots: Vec<_> = (0..2).map(|n| table.claim(&record(n)).unwrap()).collect();
    assert_eq!(table.claim(&record(3)), None);
    assert_eq!((table.untracked(), other(&table).untracked()), (1, 1));
    slots.into_iter().for_each(|slot| table.free(slot));
    assert!(table.claim(&record(4)).is_some());
    assert_eq!(table.snapshot().records, [record(4)]);
}

#[test]
fn a_successor_goes_on() {
    let mut table = Table::create(8).unwrap();
    assert_eq!((table.next_event(), table.next_event()), (EventId(1), EventId(2)));
    let first = table.claim(&record(1)).unwrap();
    let _ = table.claim(&record(2)).unwrap();
    let _ = table.claim(&Record { state: State::Waiting, ..record(3) }).unwrap();
    table.free(first);
    let mut successor = other(&table);
    drop(table);
    assert_eq!(successor.next_event(), EventId(3), "ids are not given twice");
    assert!(successor.claim(&record(4)).is_some());
    let mut events: Vec<_> = successor.snapshot().records.iter().map(|r| r.event.0).collect();
    events.sort_unstable();
    assert_eq!(events, [2, 3, 4], "what was left is not overwritten");
    let (inherited, corrupt) = other(&successor).inherit();
    let mut events: Vec<_> = inherited.iter().map(|(_, record)| record.event.0).collect();
    events.sort_unstable();
    assert_eq!((events, corrupt), (vec![2, 3, 4], 0));
    assert_eq!(successor.highest_number(), 5);
    assert_eq!(successor.worker_died(Death::Fault), 2);
    assert_eq!(successor.worker_died(Death::Fault), 0, "what waits was with no worker");
    let left = successor.snapshot().records;
    assert!(left.iter().all(|r| r.state == State::Waiting), "{left:?}");
    let strikes: HashMap<_, _> = left.iter().map(|r| (r.event.0, r.strikes)).collect();
    assert_eq!(strikes, HashMap::from([(2, 1), (3, 0), (4, 1)]));
    inherited.into_iter().for_each(|(slot, _)| successor.free(slot));
    assert_eq!(successor.snapshot(), Snapshot::default());
    assert_eq!((0..8).filter_map(|n| successor.claim(&record(n))).count(), 8);
}

#[test]
fn what_was_counted_outlives_who_counts() {
    let table = Table::create(1).unwrap();
    table.count_event();
    table.count_end(End::Fetched, 7);
    let successor = other(&table);
    drop(table);
    successor.count_event();
    successor.count_event();
    successor.count_end(End::Present, 0);
    successor.count_end(End::Denied, 3);
    let expected = Tally { events: 3, present: 1, fetched: 1, denied: 1, longest_wait: 7 };
    assert_eq!(successor.tally(), expected);
    successor.reset_tally();
    assert_eq!(successor.tally(), Tally::default());
    assert_eq!(successor.last_beat(), 0);
    successor.beat();
    assert!((1..=now()).contains(&successor.last_beat()));
}

#[test]
fn a_writer_that_died_in_the_middle() {
    let mut table = Table::create(4).unwrap();
    let _ = table.claim(&record(1)).unwrap();
    let _ = table.claim(&record(2)).unwrap();
    word(&table, 0, 0).fetch_or(1, Ordering::Relaxed);
    let mut successor = other(&table);
    assert_eq!(successor.snapshot(), Snapshot { records: vec![record(2)], corrupt: 1 });
    let _ = successor.claim(&record(3)).unwrap();
    assert_eq!(successor.snapshot(), Snapshot { records: vec![record(3), record(2)], corrupt: 0 });
}

#[test]
fn memory_that_is_no_table() {
    let open = |fd: OwnedFd| Table::open(fd).map(|_| ());
    let blank = sealed_memory("test", 4096).unwrap();
    assert!(matches!(open(blank), Err(TableError::Format { .. })));
    let small = sealed_memory("test", 64).unwrap();
    assert!(matches!(open(small), Err(TableError::Format { .. })));
    let table = Table::create(4).unwrap();
    for (header, value) in [(Header::Capacity, 5), (Header::Capacity, u64::MAX), (Header::Magic, 2)]
    {
        let old = table.header(header).swap(value, Ordering::Relaxed);
        let copy = table.as_fd().try_clone_to_owned().unwrap();
        assert!(matches!(open(copy), Err(TableError::Format { .. })), "{header:?}");
        table.header(header).store(old, Ordering::Relaxed);
    }
    table.header(Header::Used).store(u64::MAX, Ordering::Relaxed);
    assert_eq!(other(&table).snapshot(), Snapshot::default(), "slots never written are free");
}

/// A reader never sees half of one record and half of another.
#[test]
fn no_record_is_torn() {
    let mut table = Table::create(1).unwrap();
    let slot = table.claim(&record(0)).unwrap();
    let reader = other(&table);
    let (done, seen) = (AtomicBool::new(false), AtomicU64::new(0));
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for found in reader.snapshot().records {
                    assert_eq!(found, record(found.event.0));
                    seen.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let mut event = 0;
        while event < 200_000 || seen.load(Ordering::Relaxed) < 1000 {
            table.update(&slot, &record(event));
            event += 1;
            if started.elapsed() > Duration::from_secs(20) {
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(seen.into_inner() >= 1000);
}

proptest! {
    /// Whatever is in the memory, nothing panics, and a slot that was not touched is read right.
    #[test]
    fn a_corrupt_slot_is_skipped(
        slot in 0..3_usize,
        at in 0..SLOT_WORDS,
        bits in 1..=u64::MAX,
    ) {
        let mut table = Table::create(3).unwrap();
        for event in 0..3 {
            let _ = table.claim(&record(event)).unwrap();
        }
        word(&table, slot, at).fetch_xor(bits, Ordering::Relaxed);
        let snapshot = other(&table).snapshot();
        let spoilt = u32::from(at <= PAYLOAD_WORDS + 1);
        prop_assert_eq!(snapshot.corrupt, spoilt);
        prop_assert_eq!(snapshot.records.len(), 3 - spoilt as usize);
        for found in snapshot.records {
            prop_assert_eq!(found, record(found.event.0));
        }
    }

    #[test]
    fn arbitrary_memory_is_read(words in prop::collection::vec(any::<u64>(), 5 * SLOT_WORDS)) {
        let table = Table::create(4).unwrap();
        for (word, value) in table.memory.words().iter().zip(&words).skip(3) {
            word.store(*value, Ordering::Relaxed);
        }
        let mut table = other(&table);
        table.worker_died(Death::Fault);
        let (left, _) = table.inherit();
        left.into_iter().for_each(|(slot, _)| table.free(slot));
        let records = table.snapshot().records;
        prop_assert_eq!(records, []);
        // what makes no sense is overwritten, last of all
        prop_assert_eq!((0..4).filter_map(|n| table.claim(&record(n))).count(), 4);
    }
}

/// A table as version 1 lays it out, word by word: what a supervisor of that version has left is taken
/// over by the next one, which makes it its own.
#[test]
fn a_table_of_version_1_is_taken_over() {
    let fd = sealed_memory("version 1", 5 * 16 * 8).unwrap();
    let memory = SharedWords::map(fd.as_fd()).unwrap();
    let write = |at: usize, words: &[u64]| {
        for (word, value) in memory.words()[at..].iter().zip(words) {
            word.store(*value, Ordering::Relaxed);
        }
    };
    // magic, version, capacity, slots used, without a slot, last event, highest number
    write(0, &[u64::from_be_bytes(*b"HydraInF"), 1, 4, 3, 0, 41, 23]);
    let slot = |number: usize, sequence: u64, payload: [u64; 9]| {
        // the CRC-32 of IEEE 802.3, bit by bit
        let mut crc = u32::MAX;
        for byte in [sequence].iter().chain(&payload).flat_map(|word| word.to_ne_bytes()) {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                crc = crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
            }
        }
        write(16 * (number + 1), &[sequence, u64::from(!crc) | 1 << 32]);
        write(16 * (number + 1) + 2, &payload);
    };
    slot(0, 2, [40, 7, 8192, 4096, 21 << 32 | 1234, 2 << 32 | 1, 99 << 32 | 2, 1_000, 2_000]);
    slot(1, 4, [0; 9]);
    slot(2, 2, [41, 7, 0, 4096, 23 << 32 | 1235, 0, 1, 3_000, 0]);
    let table = Table::open(fd).unwrap();
    assert_eq!((table.highest_number(), table.next_event()), (23, EventId(42)));
    let (left, corrupt) = table.inherit();
    assert_eq!(corrupt, 0);
    let records: Vec<_> = left.into_iter().map(|(_, record)| record).collect();
    let first = Record {
        event: EventId(40),
        number: 21,
        segment: SegmentId(7),
        range: ByteRange::new(8192, 4096),
        pid: 1234,
        since: 1_000,
        dispatched: 2_000,
        attempts: 2,
        strikes: 1,
        worker: 99,
        state: State::InFlight,
    };
    let second = Record {
        event: EventId(41),
        number: 23,
        range: ByteRange::new(0, 4096),
        pid: 1235,
        since: 3_000,
        dispatched: 0,
        attempts: 0,
        strikes: 0,
        worker: 0,
        state: State::Waiting,
        ..first
    };
    assert_eq!(records, [first, second]);
    table.adopt();
    assert_eq!(memory.words()[1].load(Ordering::Relaxed), VERSION);
    assert_eq!(other(&table).snapshot().records, [first, second]);
}

#[test]
fn tables_of_other_versions_are_refused() {
    let table = Table::create(1).unwrap();
    for version in [0, VERSION + 1] {
        table.header(Header::Version).store(version, Ordering::Relaxed);
        let error = Table::open(table.as_fd().try_clone_to_owned().unwrap()).unwrap_err();
        assert!(matches!(error, TableError::Version(_)), "{error}");
        assert!(error.to_string().contains(&format!("is of version {version}, and")), "{error}");
    }
}
