use proptest::prelude::*;

use super::*;

/// A record of any type: header and payload.
fn record(kind: u8, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + payload.len()).unwrap().to_ne_bytes();
    [&[kind, 0, len[0], len[1]], payload].concat()
}

fn range_record(offset: u64, count: u64) -> Vec<u8> {
    let payload = [&[0; 4][..], &offset.to_ne_bytes(), &count.to_ne_bytes()].concat();
    record(abi::INFO_TYPE_RANGE, &payload)
}

fn pidfd_record(fd: i32) -> Vec<u8> {
    record(abi::INFO_TYPE_PIDFD, &fd.to_ne_bytes())
}

fn event(mask: u64, fd: i32, records: &[Vec<u8>]) -> Vec<u8> {
    let records = records.concat();
    let len = u32::try_from(24 + records.len()).unwrap();
    [
        &len.to_ne_bytes()[..],
        &[3, 0],
        &24_u16.to_ne_bytes(),
        &mask.to_ne_bytes(),
        &fd.to_ne_bytes(),
        &77_i32.to_ne_bytes(),
        &records,
    ]
    .concat()
}

fn pre_access(fd: i32, offset: u64, count: u64) -> Vec<u8> {
    event(abi::FAN_PRE_ACCESS, fd, &[range_record(offset, count)])
}

#[test]
#[cfg(target_endian = "little")]
fn an_event_as_the_kernel_writes_it() {
    // pid 1000 reads 4096 bytes at 8192; little-endian, byte by byte after the uapi header
    #[rustfmt::skip]
    let bytes = [
        0x30, 0, 0, 0,  3, 0,  0x18, 0,  0, 0, 0x10, 0, 0, 0, 0, 0,  5, 0, 0, 0,  0xe8, 3, 0, 0,
        6, 0, 0x18, 0,  0, 0, 0, 0,  0, 0x20, 0, 0, 0, 0, 0, 0,  0, 0x10, 0, 0, 0, 0, 0, 0,
    ];
    let batch = parse(&bytes);
    let expected = RawEvent {
        mask: abi::FAN_PRE_ACCESS,
        fd: EventFd::Open(5),
        pid: 1000,
        range: Some(ByteRange::new(8192, 4096)),
        pidfds: vec![],
    };
    assert_eq!(batch, Batch { events: vec![expected], good: 48, fault: None });
    assert!(batch.events[0].is_permission());
}

#[test]
fn records_are_found_by_their_length() {
    let records = [record(200, b"12 bytes !!!"), pidfd_record(9), range_record(4096, 8192)];
    let bytes = [event(abi::FAN_PRE_ACCESS, 4, &records), pre_access(6, 0, 0)].concat();
    let batch = parse(&bytes);
    assert_eq!(batch.fault, None);
    assert_eq!(batch.good, bytes.len());
    assert_eq!(batch.events[0].range, Some(ByteRange::new(4096, 8192)));
    assert_eq!(batch.events[0].pidfds, [9]);
    assert_eq!(batch.events[1].range, Some(ByteRange::new(0, 0)), "a count of 0 is an event");
}

#[test]
fn fds_that_are_none() {
    let bytes = [
        event(abi::FAN_Q_OVERFLOW, -1, &[]),
        pre_access(-libc::EMFILE, 0, 4096),
        event(abi::FAN_PRE_ACCESS, 3, &[pidfd_record(-2)]),
        pre_access(i32::MIN, 0, 4096),
    ]
    .concat();
    let events = parse(&bytes).events;
    assert!(events[0].is_overflow());
    assert_eq!(events[0].fd, EventFd::None);
    assert_eq!(events[1].fd, EventFd::Error(libc::EMFILE));
    assert!(!events[1].is_permission(), "the kernel has denied it");
    assert_eq!((&events[2].pidfds[..], events[2].range), (&[][..], None));
    assert_eq!(events[3].fd, EventFd::Error(i32::MAX));
}

#[test]
fn a_fault_in_a_record_costs_one_event_its_range() {
    let mut short = range_record(4096, 4096);
    short[2] = 16; // a RANGE record that is too short for its fields
    let mut long = range_record(4096, 4096);
    long[2] = 255;
    let fault_at = |at, len, left| Some(Fault::InfoLen { at, len, left });
    for (bad, fault) in [
        (short, fault_at(72, 16, 24)),
        (long, fault_at(72, 255, 24)),
        (record(9, b"")[..3].to_vec(), Some(Fault::InfoTruncated { at: 72, left: 3 })),
        (vec![9, 0, 0, 0], fault_at(72, 0, 4)), // would never end
    ] {
        let parts =
            [pre_access(3, 0, 1), event(abi::FAN_PRE_ACCESS, 4, &[bad]), pre_access(5, 0, 1)];
        let batch = parse(&parts.concat());
        assert_eq!(batch.fault, fault);
        assert_eq!(batch.good, 48);
        let fds: Vec<_> = batch.events.iter().map(|e| e.fd).collect();
        assert_eq!(fds, [EventFd::Open(3), EventFd::Open(4), EventFd::Open(5)]);
        assert_eq!(batch.events[1].range, None);
        assert_eq!(batch.events[2].range, Some(ByteRange::new(0, 1)));
    }
}

#[test]
fn a_fault_in_the_metadata_ends_the_batch() {
    let spoil = |at: usize, value: u8| {
        let mut bytes = [pre_access(3, 0, 1), pre_access(4, 0, 1), pre_access(5, 0, 1)].concat();
        bytes[48 + at] = value;
        let batch = parse(&bytes);
        assert_eq!(batch.good, 48);
        (batch.fault.unwrap(), batch.events.iter().map(|e| e.fd).collect::<Vec<_>>())
    };
    let one = vec![EventFd::Open(3)];
    let two = vec![EventFd::Open(3), EventFd::Open(4)];
    // the fd of another layout is not known, that of a known layout is
    assert_eq!(spoil(4, 4), (Fault::Version { at: 48, version: 4 }, one.clone()));
    assert_eq!(spoil(6, 32), (Fault::MetadataLen { at: 48, len: 32 }, one));
    assert_eq!(spoil(0, 23), (Fault::EventLen { at: 48, len: 23, left: 96 }, two.clone()));
    assert_eq!(spoil(0, 97), (Fault::EventLen { at: 48, len: 97, left: 96 }, two));
    let batch = parse(&pre_access(3, 0, 1)[..20]);
    assert_eq!(batch.fault, Some(Fault::Truncated { at: 0, left: 20 }));
}

#[derive(Debug, Clone)]
struct Spec {
    fd: i32,
    offset: u64,
    count: u64,
    extra: Vec<(u8, Vec<u8>)>,
}

fn spec() -> impl Strategy<Value = Spec> {
    let extra = (7_u8.., prop::collection::vec(any::<u8>(), 0..20));
    (0..i32::MAX, any::<u64>(), any::<u64>(), prop::collection::vec(extra, 0..3))
        .prop_map(|(fd, offset, count, extra)| Spec { fd, offset, count, extra })
}

fn bytes_of(spec: &Spec) -> Vec<u8> {
    let mut records: Vec<_> = spec.extra.iter().map(|(kind, p)| record(*kind, p)).collect();
    records.push(range_record(spec.offset, spec.count));
    event(abi::FAN_PRE_ACCESS, spec.fd, &records)
}

proptest! {
    #[test]
    fn any_bytes_are_taken(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let batch = parse(&bytes);
        prop_assert!(batch.good <= bytes.len());
        prop_assert_eq!(batch.fault.is_none(), batch.good == bytes.len());
    }

    #[test]
    fn what_was_written_is_read(specs in prop::collection::vec(spec(), 0..10)) {
        let batch = parse(&specs.iter().flat_map(bytes_of).collect::<Vec<_>>());
        prop_assert_eq!(batch.fault, None);
        prop_assert_eq!(batch.events.len(), specs.len());
        for (event, spec) in batch.events.iter().zip(&specs) {
            prop_assert_eq!(event.fd, EventFd::Open(spec.fd));
            prop_assert_eq!(event.range, Some(ByteRange::new(spec.offset, spec.count)));
        }
    }

    /// Wherever a batch is spoilt, the events before that place are whole, and no fd is made up.
    #[test]
    fn a_mutated_batch(
        specs in prop::collection::vec(spec(), 1..6),
        place in any::<prop::sample::Index>(),
        value in any::<u8>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let parts: Vec<_> = specs.iter().map(bytes_of).collect();
        let mut bytes = parts.concat();
        let place = place.index(bytes.len());
        bytes[place] = value;
        let bytes = &bytes[..cut.index(bytes.len()) + 1];
        let batch = parse(bytes);
        let spoilt = place.min(bytes.len());
        let mut end = 0;
        for (index, (part, spec)) in parts.iter().zip(&specs).enumerate() {
            end += part.len();
            if end > spoilt {
                break;
            }
            prop_assert_eq!(batch.events[index].fd, EventFd::Open(spec.fd));
            prop_assert_eq!(batch.events[index].range, Some(ByteRange::new(spec.offset, spec.count)));
            prop_assert!(batch.good >= end);
        }
    }
}
