//! Single rules; whole patterns of reads are in the simulation.

use std::collections::HashSet;
use std::time::Duration;

use super::*;

/// Directories of `per_directory` files of one size, each with a file of name 0.
struct Fake {
    files: u32,
    per_directory: u32,
    size: u64,
    wanted: HashSet<u32>,
    names: Option<Arc<NameIndex>>,
}

impl Fake {
    fn new(files: u32, per_directory: u32, size: u64) -> Self {
        let name = |no: u32| (no % per_directory, ObjectNo(no), size as u32);
        let names = Some(Arc::new(NameIndex::new((0..files).map(name).collect())));
        Self { files, per_directory, size, wanted: (0..files).collect(), names }
    }
}

impl Catalog for Fake {
    fn len(&self) -> u32 {
        self.files
    }
    fn info(&mut self, no: ObjectNo) -> Option<Info> {
        (no.0 < self.files).then_some(Info {
            size: self.size,
            directory: u64::from(no.0 / self.per_directory),
            name: no.0 % self.per_directory,
        })
    }
    fn is_wanted(&mut self, no: ObjectNo) -> bool {
        self.wanted.contains(&no.0)
    }
    fn names(&mut self) -> Option<Arc<NameIndex>> {
        self.names.clone()
    }
}

const MS: Duration = Duration::from_millis(1);

/// Misses an object; what that brings.
fn miss(policy: &mut ReadAhead, now: Now, no: u32, fake: &mut Fake) -> Vec<Vec<u32>> {
    fake.wanted.remove(&no);
    let batches = policy.access(now, ObjectNo(no), true, Look::File, fake);
    let numbers = |batch: Batch| batch.into_iter().map(|(no, _)| no.0).collect();
    let batches: Vec<Vec<u32>> = batches.into_iter().map(numbers).collect();
    batches.iter().flatten().for_each(|no| assert!(fake.wanted.remove(no), "{no} twice"));
    batches
}

#[test]
fn second_miss_in_a_directory_brings_what_follows() {
    let mut fake = Fake::new(1000, 100, 10);
    let mut policy = ReadAhead::new(true);
    assert!(miss(&mut policy, MS, 310, &mut fake).is_empty());
    let batches = miss(&mut policy, MS, 395, &mut fake);
    // to the directory's end, then what is before
    assert_eq!(batches, [vec![396, 397, 398, 399, 394, 393, 392, 391]]);
    // half of that used brings more, before the rest is used
    for no in [396, 397, 398] {
        assert!(policy.access(2 * MS, ObjectNo(no), false, Look::File, &mut fake).is_empty());
    }
    let more = policy.access(2 * MS, ObjectNo(399), false, Look::File, &mut fake);
    assert_eq!(more[0].len(), 24, "four times of what has been looked at");
}

#[test]
fn third_miss_of_a_name_within_two_seconds() {
    let mut fake = Fake::new(10_000, 100, 10);
    let mut policy = ReadAhead::new(true);
    let name = |directory: u32| directory * 100 + 7;
    assert!(miss(&mut policy, MS, name(50), &mut fake).is_empty());
    assert!(miss(&mut policy, 2 * MS, name(10), &mut fake).is_empty());
    // too late to count together
    assert!(miss(&mut policy, 3000 * MS, name(90), &mut fake).is_empty());
    assert!(miss(&mut policy, 3001 * MS, name(92), &mut fake).is_empty());
    let batches = miss(&mut policy, 3002 * MS, name(95), &mut fake);
    let expected: Vec<u32> = [96, 97, 98, 99, 0, 1, 2, 3].map(name).to_vec();
    assert_eq!(batches, [expected], "on from here, in order, and around");
}

/// A commit or a switch reads old content here and there; who reads all of it is seen.
#[test]
fn of_what_is_read_in_a_pack_only_walks_count() {
    let mut fake = Fake::new(1000, 100, 10);
    let mut policy = ReadAhead::new(true);
    let mut miss = |no: u32| {
        let brought = policy.access(MS, ObjectNo(no), true, Look::Pack, &mut fake);
        brought.iter().map(Vec::len).sum::<usize>()
    };
    assert_eq!((0..40).map(|n| miss(n * 7 % 100)).sum::<usize>(), 0, "of one directory");
    assert_eq!((0..10).map(|n| miss(n * 100 + 3)).sum::<usize>(), 0, "of one name");
    assert!((550..750).map(miss).sum::<usize>() >= 64, "one after the other");
}

#[test]
fn no_more_under_way_than_the_limits() {
    let mut fake = Fake::new(200_000, 10, 20_000);
    let mut policy = ReadAhead::new(true);
    let mut asked = HashSet::new();
    for no in 0..200_000 {
        if !asked.contains(&no) {
            asked.extend(miss(&mut policy, MS, no, &mut fake).concat());
        } else {
            for (no, _) in policy.access(MS, ObjectNo(no), false, Look::File, &mut fake).concat() {
                assert!(fake.wanted.remove(&no.0));
                asked.insert(no.0);
            }
        }
        assert!(policy.under_way_bytes <= UNDER_WAY.1 && policy.under_way() <= UNDER_WAY.0);
        if policy.under_way() > 1000 {
            let some: Vec<_> = policy.under_way.keys().copied().take(100).collect();
            some.into_iter().for_each(|no| policy.arrived(no));
        }
    }
    assert!(asked.len() > 100_000);
}

#[test]
fn large_objects_only_in_walks() {
    let mut fake = Fake::new(1000, 10, LARGE + 1);
    let mut policy = ReadAhead::new(true);
    let mut brought = 0;
    for no in 0..15 {
        brought += miss(&mut policy, MS, no, &mut fake).len();
    }
    assert_eq!(brought, 0);
    for no in 15..25 {
        brought += miss(&mut policy, MS, no, &mut fake).len();
    }
    assert!(brought > 0, "now it is a walk");
}

#[test]
fn what_completes_says_nothing_of_use() {
    let mut fake = Fake::new(1000, 100, 10);
    let mut policy = ReadAhead::new(true);
    miss(&mut policy, MS, 1, &mut fake);
    assert_eq!(miss(&mut policy, MS, 2, &mut fake).concat().len(), 8);
    assert_eq!(policy.unused(), 8);
    policy.completed(0..1000);
    assert_eq!(policy.unused(), 0);
    // nothing is left to be judged by: the next miss counts as if all had been used
    assert!(!miss(&mut policy, MS, 50, &mut fake).is_empty());
}

#[test]
fn off_is_off() {
    let mut fake = Fake::new(1000, 100, 10);
    let mut policy = ReadAhead::new(false);
    assert!((0..100).all(|no| miss(&mut policy, MS, no, &mut fake).is_empty()));
}
