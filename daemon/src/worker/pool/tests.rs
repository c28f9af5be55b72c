use crate::object::HashKind;
use crate::range::BLOCK;
use crate::segment::extents::{ExtentsWriter, name_hash};

use super::*;

fn key(n: u64) -> ObjectId {
    ObjectId::of_blob(HashKind::Sha1, &n.to_le_bytes())
}

/// A segment with one object for each size; `(data, index)`.
fn segment(id: u64, sizes: &[u64]) -> (File, File) {
    let mut writer = ExtentsWriter::new(SegmentId(id), SegmentKind::Data, HashKind::Sha1);
    let mut end = 0;
    for (n, size) in sizes.iter().enumerate() {
        let path = format!("d{}/f{}", n / 2, n % 2);
        writer.push_file(end, *size, key(n as u64), n as u32 / 2, path.as_bytes());
        end += size.next_multiple_of(BLOCK);
    }
    let data = tempfile::tempfile().unwrap();
    data.set_len(end).unwrap();
    let mut index = tempfile::tempfile().unwrap();
    writer.write(&mut index, end).unwrap();
    (data, index)
}

fn attach(pool: &mut Pool, id: u64, sizes: &[u64]) -> File {
    let (data, index) = segment(id, sizes);
    pool.attach(SegmentId(id), data.try_clone().unwrap().into(), index.into()).unwrap();
    data
}

#[test]
fn finds_what_is_there() {
    let (data, index) = segment(1, &[5000, 0, 1, 4096, 20_000]);
    data.write_all_at(&[1; 8192], 0).unwrap();
    data.write_all_at(&[1; 4096], 12288).unwrap();
    data.write_all_at(&[1; 8192], 16384).unwrap();
    let mut pool = Pool::default();
    pool.attach(SegmentId(1), data.into(), index.into()).unwrap();
    let present: Vec<_> = (0..5).map(|n| pool.is_present(ObjectNo(n)).unwrap()).collect();
    assert_eq!(present, [true, true, false, true, false]);
    assert_eq!(pool.arrived(ObjectNo(2)), None);
    assert_eq!(pool.arrived(ObjectNo(2)), None);
    assert_eq!(pool.arrived(ObjectNo(4)), Some(SegmentId(1)));
    pool.vanished(ObjectNo(0));
    assert_eq!(pool.arrived(ObjectNo(0)), Some(SegmentId(1)));
}

#[test]
fn numbers_go_through_all_segments() {
    let mut pool = Pool::default();
    attach(&mut pool, 9, &[1, 2]);
    attach(&mut pool, 5, &[]);
    attach(&mut pool, 7, &[3, 4, 5]);
    assert_eq!(pool.len(), 5);
    assert_eq!(pool.number(SegmentId(7), 1).unwrap(), ObjectNo(3));
    assert!(pool.number(SegmentId(7), 3).is_err());
    let sizes: Vec<_> =
        (0..5).map(|n| pool.object(ObjectNo(n)).unwrap().unwrap().range.len()).collect();
    assert_eq!(sizes, [1, 2, 3, 4, 5]);
    assert_eq!(pool.object(ObjectNo(5)).unwrap(), None);
    let directories: Vec<_> =
        (0..5).map(|n| pool.object(ObjectNo(n)).unwrap().unwrap().directory).collect();
    assert_ne!(directories[0], directories[2], "numbers are a segment's own");
    assert_eq!(directories[2], directories[3]);
    assert_eq!(pool.segment_of(ObjectNo(2)).unwrap().id, SegmentId(7));
}

#[test]
fn sees_holes_in_the_file_itself() {
    let mut pool = Pool::default();
    let data = attach(&mut pool, 1, &[4096, 4096, 100]);
    assert_eq!(
        pool.holes(SegmentId(1), ByteRange::new(0, 1 << 30)).unwrap(),
        [ByteRange::new(0, 12288)]
    );
    data.write_all_at(&[0; 4096], 4096).unwrap();
    assert_eq!(
        pool.holes(SegmentId(1), ByteRange::new(0, 12288)).unwrap(),
        [ByteRange::new(0, 4096), ByteRange::new(8192, 4096)]
    );
    assert!(!pool.is_full(SegmentId(1)).unwrap());
    data.write_all_at(&[0; 12288], 0).unwrap();
    assert!(pool.holes(SegmentId(1), ByteRange::new(0, 12288)).unwrap().is_empty());
    assert!(pool.is_full(SegmentId(1)).unwrap());
}

#[test]
fn refuses_what_does_not_fit() {
    let mut pool = Pool::default();
    let (data, index) = segment(1, &[4096]);
    let fds = || (data.try_clone().unwrap().into(), index.try_clone().unwrap().into());
    let (d, i) = fds();
    assert!(pool.attach(SegmentId(2), d, i).is_err(), "another segment's index");
    let (d, i) = fds();
    pool.attach(SegmentId(1), d, i).unwrap();
    let (d, i) = fds();
    assert!(pool.attach(SegmentId(1), d, i).is_err(), "twice");
    let short = tempfile::tempfile().unwrap();
    let error = Pool::default().attach(SegmentId(1), short.into(), index.into()).unwrap_err();
    assert!(matches!(error, PoolError::Wrong { .. }), "{error}");
}

#[test]
fn keeps_few_indexes_in_memory() {
    let mut pool = Pool::default();
    let sizes = vec![1; 20_000];
    for id in 0..30 {
        attach(&mut pool, id, &sizes);
    }
    for n in (0..pool.len()).step_by(5000) {
        assert!(pool.object(ObjectNo(n)).unwrap().is_some());
        assert!(pool.loaded_bytes() <= LOADED_MAX);
    }
    assert!(pool.loaded_bytes() > LOADED_MAX / 2);
    assert!(!pool.is_present(ObjectNo(7)).unwrap());
}

#[test]
fn index_of_names() {
    let mut pool = Pool::default();
    attach(&mut pool, 1, &[1, 2, 3, 4]);
    attach(&mut pool, 2, &[5, 6, 7]);
    let names = NameIndex::build(&pool.indexes()).unwrap();
    let numbers: Vec<_> = names.get(name_hash(b"f1")).iter().map(|(_, no, s)| (no.0, *s)).collect();
    assert_eq!(numbers, [(1, 2), (3, 4), (5, 6)]);
    assert!(names.get(name_hash(b"f2")).is_empty());
}
