//! Readers, a worker's engine and an origin, all on a made-up clock: what would a pattern of reads
//! cost?
//!
//! The tree is of u-boot's shape. The origin takes a round trip, 7 ms and 0.15 ms an object, as
//! measured with `git http-backend`. Counts are asserted, and times of the made-up clock; nothing
//! here depends on the machine.

mod tree;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashSet};
use std::time::Duration;

use super::ObjectNo;
use super::engine::{Effect, Engine, Shelf};
use super::pool::NameIndex;
use super::readahead::{Info, Look};
use super::schedule::{Lane, Now, Outcome, RequestId};
use crate::ids::EventId;
use crate::queue::wire::Limits;
use tree::{Random, Tree};

/// What happens next.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Read(usize),
    Arrive(RequestId, ObjectNo),
    Finish(RequestId),
    Names,
    Wake,
}

/// What it has cost.
#[derive(Debug, Default)]
struct Cost {
    /// Requests by lane.
    demand: usize,
    ahead: usize,
    objects: usize,
    /// Objects fetched that no reader looked at.
    over_read: usize,
    /// The readers' time.
    time: Duration,
}

struct World<'a> {
    tree: &'a Tree,
    present: HashSet<ObjectNo>,
}

impl Shelf for World<'_> {
    fn len(&self) -> u32 {
        self.tree.files.len() as u32
    }
    fn info(&mut self, no: ObjectNo) -> Option<Info> {
        self.tree.files.get(no.0 as usize).copied()
    }
    fn is_present(&mut self, no: ObjectNo) -> bool {
        self.present.contains(&no)
    }
}

/// `threads` readers, each of which takes the next of the reads when it is done with one, 20 us
/// later.
fn run(tree: &Tree, reads: &[u32], threads: usize, round_trip: Duration) -> Cost {
    run_with(tree, reads, threads, round_trip, true)
}

fn run_with(
    tree: &Tree,
    reads: &[u32],
    threads: usize,
    round_trip: Duration,
    read_ahead: bool,
) -> Cost {
    let limits = Limits { read_ahead, ..Limits::default() };
    let mut engine = Engine::new(&limits, 1);
    let mut world = World { tree, present: HashSet::new() };
    let mut steps = BinaryHeap::new();
    let mut cost = Cost::default();
    let mut next = reads.iter();
    let mut waiting: BTreeMap<EventId, usize> = BTreeMap::new();
    let mut events = 0;
    for reader in 0..threads {
        steps.push(Reverse((Duration::ZERO, Step::Read(reader))));
    }
    let mut wake: Option<Now> = None;
    let think = Duration::from_micros(20);
    while let Some(Reverse((now, step))) = steps.pop() {
        match step {
            Step::Read(reader) => {
                let Some(file) = next.next() else {
                    cost.time = now;
                    continue;
                };
                let no = ObjectNo(*file);
                if world.present.contains(&no) {
                    engine.touched(now, &[no], Look::File, &mut world);
                    steps.push(Reverse((now + think, Step::Read(reader))));
                } else {
                    events += 1;
                    waiting.insert(EventId(events), reader);
                    let size = tree.files[*file as usize].size;
                    engine.event(now, EventId(events), &[(no, size)], Look::File, &mut world);
                }
            }
            Step::Arrive(request, no) => {
                world.present.insert(no);
                engine.arrived(now, request, no);
            }
            Step::Finish(request) => engine.finished(now, request, &Outcome::Done),
            Step::Names => {
                let files = tree.files.iter().zip(0..);
                let names = files.map(|(f, no)| (f.name, ObjectNo(no), f.size as u32)).collect();
                engine.names(NameIndex::new(names), tree.files.len() as u32);
            }
            Step::Wake => {}
        }
        for effect in engine.poll(now, &mut world) {
            match effect {
                Effect::Send { request, lane, objects } => {
                    match lane {
                        Lane::Demand => cost.demand += 1,
                        Lane::Ahead | Lane::Prefetch => cost.ahead += 1,
                    }
                    let mut at: Now = now + round_trip + Duration::from_millis(7);
                    for no in objects {
                        at += Duration::from_micros(150);
                        steps.push(Reverse((at, Step::Arrive(request, no))));
                    }
                    steps.push(Reverse((at, Step::Finish(request))));
                }
                Effect::Ready(event) => {
                    let reader = waiting.remove(&event).unwrap();
                    steps.push(Reverse((now + think, Step::Read(reader))));
                }
                Effect::IndexNames => {
                    steps.push(Reverse((now + Duration::from_millis(10), Step::Names)));
                }
                Effect::Deny { .. } | Effect::Waiting { .. } | Effect::PrefetchDone { .. } => {
                    panic!("{effect:?}");
                }
            }
        }
        if let Some(at) = engine.next_wake()
            && !waiting.is_empty()
            && wake.is_none_or(|wake| at < wake || wake <= now)
        {
            wake = Some(at);
            steps.push(Reverse((at.max(now + Duration::from_micros(1)), Step::Wake)));
        }
    }

    assert!(waiting.is_empty() && engine.is_idle());
    let read: HashSet<_> = reads.iter().copied().map(ObjectNo).collect();
    assert!(read.is_subset(&world.present));
    cost.objects = world.present.len();
    cost.over_read = world.present.len() - read.len();
    cost
}

const LOOPBACK: Duration = Duration::ZERO;
const FAR: Duration = Duration::from_millis(20);

fn shuffled(mut reads: Vec<u32>) -> Vec<u32> {
    let mut random = Random(11);
    for at in (1..reads.len()).rev() {
        reads.swap(at, random.below(at as u64 + 1) as usize);
    }
    reads
}

#[test]
fn grep_of_a_directory() {
    let tree = Tree::like_u_boot();
    let sorted = tree.directory_of(257);
    let shuffled = shuffled(sorted.clone());
    for (reads, what, most) in [(sorted, "in order", 8), (shuffled, "in no order", 30)] {
        let cost = run(&tree, &reads, 1, LOOPBACK);
        println!("directory of 257 files {what}: {cost:?}");
        assert!(cost.demand + cost.ahead <= most, "{what}: {cost:?}");
        assert!(cost.over_read <= 16, "{what}: {cost:?}");
        let far = run(&tree, &reads, 1, FAR);
        assert!(far.time < 2 * most as u32 * FAR, "{what}: {far:?}");
    }
}

#[test]
fn configure_reads_one_name_everywhere() {
    let tree = Tree::like_u_boot();
    let kconfigs = tree.named("Kconfig");
    assert!((900..1300).contains(&kconfigs.len()), "{}", kconfigs.len());
    assert_eq!(tree.files.len(), 38_571);
    for reads in [kconfigs.clone(), tree.source_order("Kconfig")] {
        let cost = run(&tree, &reads, 1, LOOPBACK);
        println!("all Kconfig: {cost:?}");
        assert!(cost.demand + cost.ahead <= 25, "{cost:?}");
        assert!(cost.over_read <= 64, "{cost:?}");
    }
    let without = run_with(&tree, &kconfigs, 1, LOOPBACK, false);
    assert_eq!(without.demand, kconfigs.len());
}

#[test]
fn whole_tree_comes_close_to_one_fetch() {
    let tree = Tree::like_u_boot();
    let all = tree.files.len() as u32;
    // Three requests side by side, of all there is.
    let straight = FAR + all * Duration::from_micros(150) / 3;
    for (reads, threads, what) in [
        (tree.depth_first(), 1, "grep -r"),
        (tree.depth_first(), 8, "git grep"),
        (tree.by_directories(8), 8, "ripgrep"),
        ((0..all).collect(), 1, "in the pool's order"),
    ] {
        let cost = run(&tree, &reads, threads, FAR);
        println!("{what}: {cost:?}, straight {straight:?}");
        assert_eq!(cost.objects, tree.files.len());
        assert!(cost.demand + cost.ahead <= 150, "{what}: {cost:?}");
        assert!(cost.time < straight * 2, "{what}: {cost:?}");
    }
}

#[test]
fn random_reads_bring_little_else() {
    let tree = Tree::like_u_boot();
    for (k, most) in [(50, 40), (200, 80), (1000, 120), (4000, 400)] {
        for seed in 1..4 {
            let cost = run(&tree, &tree.random(k, seed), 1, LOOPBACK);
            println!("{k} at random: {cost:?}");
            assert!(cost.over_read <= most, "{k} at random: {cost:?}");
        }
    }
}

#[test]
fn two_of_each_directory_do_not_bring_all() {
    let tree = Tree::like_u_boot();
    let reads = tree.some_of_each_directory(2);
    let cost = run(&tree, &reads, 1, LOOPBACK);
    println!("2 of each directory ({} reads): {cost:?}", reads.len());
    assert!(cost.over_read <= reads.len() / 5, "{cost:?}");
}

#[test]
fn a_build_reads_sources_and_headers() {
    let tree = Tree::like_u_boot();
    let reads = tree.build(1300, 5);
    let cost = run(&tree, &reads, 2, LOOPBACK);
    println!("a build that reads {}: {cost:?}", reads.len());
    assert!(cost.demand + cost.ahead <= reads.len() / 2, "{cost:?}");
    assert!(cost.over_read <= reads.len(), "{cost:?}");
}
