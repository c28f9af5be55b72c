use proptest::prelude::*;

use super::*;
use crate::source::oci::fetch::CHUNK;

const MIB: u64 = 1 << 20;
const POOL: PoolId = PoolId(7);

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// A layer of 40 MiB, which are ten pieces.
fn layer(segment: u64) -> New {
    New {
        segment: SegmentId(segment),
        size: 40 * MIB,
        pool: POOL,
        shard: ShardId(0),
        registry: "registry".into(),
        from: Duration::ZERO,
    }
}

fn at(segment: u64, registry: &str) -> New {
    New { registry: registry.into(), ..layer(segment) }
}

fn add(filler: &mut Filler, now: Duration, new: New) {
    let (layer, pool) = (crate::source::oci::digest::sha256(b"layer"), new.pool);
    filler.show(new.segment, Fill { layer, pool, traced: Vec::new(), trouble: None });
    filler.add(now, new);
}

/// What of a layer was read before, as places with runs of so many chunks. A run begins at ten MiB times its place.
fn replay(filler: &mut Filler, now: Duration, new: &New, places: &[(u32, u32)]) {
    let stretch = |(place, count): &(u32, u32)| {
        let run = Run { first: 10 * place * (MIB / CHUNK) as u32, count: *count };
        Stretch { place: (*place, 0), runs: vec![run] }
    };
    filler.replay(now, new, places.iter().map(stretch).collect());
}

/// So many chunks may be under way of what was read before.
const WINDOW: u32 = (pace::REPLAYED / CHUNK) as u32;

fn next(filler: &mut Filler, now: Duration) -> Vec<Piece> {
    filler.next(now).unwrap().pieces
}

/// Where a piece begins, in MiB.
fn place(piece: &Piece) -> u32 {
    piece.runs[0].first / (MIB / CHUNK) as u32
}

/// Segment and [`place`] of each.
fn places(pieces: &[Piece]) -> Vec<(u64, u32)> {
    pieces.iter().map(|piece| (piece.segment.0, place(piece))).collect()
}

fn state(filler: &Filler, segment: u64) -> Option<&'static str> {
    let shown = filler.shown().into_iter().find(|(id, ..)| id.0 == segment);
    shown.map(|(.., state)| state)
}

fn trouble(filler: &Filler, segment: u64) -> Option<String> {
    filler.shown().into_iter().find(|(id, ..)| id.0 == segment)?.1.trouble
}

fn failed() -> End {
    End::Failed("no route to host".into())
}

/// All that is to be had, one after the other.
fn drain(filler: &mut Filler, mut now: Duration) -> Vec<(u64, u32)> {
    let mut all = Vec::new();
    while let Some(Next { pieces, .. }) = filler.next(now) {
        all.extend(places(&pieces));
        pieces.iter().for_each(|piece| filler.ended(now, piece, End::Came));
        now += ms(10);
    }
    all
}

#[test]
fn all_layers_are_filled_in_order_and_the_task_ends() {
    let mut filler = Filler::default();
    assert!(!filler.start());
    add(&mut filler, secs(1), layer(1));
    add(&mut filler, secs(1), New { size: 5 * MIB, ..layer(2) });
    add(&mut filler, secs(1), New { size: 0, ..layer(3) });
    assert!(filler.start());
    assert!(!filler.start());
    assert_eq!((state(&filler, 1), state(&filler, 3)), (Some("waiting"), Some("done")));
    let mut expected: Vec<_> = (0..10).map(|piece| (1, 4 * piece)).collect();
    expected.extend([(2, 0), (2, 4)]);
    assert_eq!(drain(&mut filler, secs(1)), expected);
    assert_eq!((state(&filler, 1), state(&filler, 2)), (Some("done"), Some("done")));
    // the next mount needs another task
    add(&mut filler, secs(9), layer(4));
    assert!(filler.start());
}

#[test]
fn a_layer_begins_when_it_may() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), New { from: secs(120), ..layer(1) });
    add(&mut filler, secs(1), New { from: ms(1100), ..layer(2) });
    let expected = Next { pieces: Vec::new(), wake: Some(ms(100)) };
    assert_eq!(filler.next(secs(1)), Some(expected));
    let Next { pieces, wake } = filler.next(ms(1100)).unwrap();
    assert_eq!(places(&pieces), [(2, 0), (2, 4), (2, 8), (2, 12)]);
    // until there may be more at once
    assert_eq!(wake, Some(ms(200)));
    assert_eq!(next(&mut filler, secs(60)).len(), 6);
    assert_eq!(filler.next(secs(60)).unwrap().wake, Some(secs(60)));
}

#[test]
fn readers_have_the_line() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    add(&mut filler, secs(1), layer(2));
    add(&mut filler, secs(1), at(3, "elsewhere"));
    // four of each registry
    let begun = next(&mut filler, secs(1));
    let first = |segment| [0, 4, 8, 12].map(|place| (segment, place));
    assert_eq!(places(&begun), [first(1), first(3)].concat());
    assert!(next(&mut filler, ms(1200)).is_empty());
    assert_eq!(next(&mut filler, ms(1300)).len(), 4);
    filler.demanded(Demanded { last: Some(ms(1350)), reads: Vec::new() });
    assert!(next(&mut filler, ms(1400)).is_empty());
    // what is under way counts, to the last
    begun[..2].iter().for_each(|piece| filler.ended(ms(1400), piece, End::Came));
    assert!(next(&mut filler, ms(1400)).is_empty());
    begun[2..].iter().for_each(|piece| filler.ended(ms(1400), piece, End::Came));
    assert_eq!(next(&mut filler, ms(1400)).len(), 2 + 2);
    assert_eq!(next(&mut filler, secs(9)).len(), 8 + 2);
}

/// It is not only the first mount that has a moment of quiet.
#[test]
fn a_later_mount_is_quiet_too() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    filler.demanded(Demanded { last: Some(secs(2)), reads: Vec::new() });
    add(&mut filler, secs(100), layer(2));
    assert_eq!(next(&mut filler, secs(100)).len(), pace::LEAST);
    assert_eq!(next(&mut filler, secs(101)).len(), pace::MOST - pace::LEAST);
}

/// A reader who waits for a minute is one who waits, to the end.
#[test]
fn a_long_wait_is_no_quiet() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    for now in 2..60 {
        filler.demanded(Demanded { last: Some(secs(now)), reads: Vec::new() });
        assert!(filler.next(secs(now)).unwrap().pieces.len() <= pace::LEAST);
    }
    assert_eq!(next(&mut filler, secs(61)).len(), 6);
}

#[test]
fn readers_are_followed_from_layer_to_layer() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    add(&mut filler, secs(1), layer(2));
    let mut pieces = Vec::new();
    let mut now = secs(2);
    let mut step = |filler: &mut Filler, segment, offset| {
        now += ms(1);
        let read = Read { segment: SegmentId(segment), offset, at: now };
        filler.demanded(Demanded { last: Some(now), reads: vec![read] });
        let begun = next(filler, now);
        pieces.extend(places(&begun));
        begun.iter().for_each(|piece| filler.ended(now, piece, End::Came));
    };
    step(&mut filler, 2, 17 * MIB);
    step(&mut filler, 1, 0);
    step(&mut filler, 2, 38 * MIB);
    step(&mut filler, 3, 0);
    let behind = |segment, from: u32| [0, 4, 8, 12].map(|more| (segment, from + more));
    let [mut expected, first] = [behind(2, 16), behind(1, 0)].map(Vec::from);
    expected.extend(first);
    expected.extend([(2, 36), (2, 0), (2, 4), (2, 8), (2, 12), (2, 32), (1, 16), (1, 20)]);
    assert_eq!(pieces, expected);
}

#[test]
fn what_was_read_at_the_last_start_goes_first() {
    let mut filler = Filler::default();
    let (first, second) = (layer(1), layer(3));
    for new in [first.clone(), at(2, "elsewhere"), second.clone()] {
        add(&mut filler, secs(1), New { from: ms(1100), ..new });
    }
    replay(&mut filler, secs(1), &first, &[(0, 2), (2, 1)]);
    replay(&mut filler, secs(1), &second, &[(1, 1)]);
    assert_eq!((state(&filler, 1), state(&filler, 2)), (Some("replaying"), Some("waiting")));
    // at once, whoever waits, and in the order of all layers
    filler.demanded(Demanded { last: Some(secs(1)), reads: Vec::new() });
    let begun = next(&mut filler, secs(1));
    assert_eq!(places(&begun), [(1, 0), (3, 10), (1, 20)]);
    assert!(begun.iter().all(Piece::is_replayed));
    assert_eq!(places(&next(&mut filler, ms(1100))), [(2, 0), (2, 4), (2, 8), (2, 12)]);
    // in any order
    filler.ended(ms(1200), &begun[2], End::Came);
    filler.ended(ms(1200), &begun[1], End::Came);
    assert_eq!((state(&filler, 1), state(&filler, 3)), (Some("replaying"), Some("waiting")));
    assert!(next(&mut filler, ms(1200)).is_empty());
    // and not again
    filler.ended(ms(1200), &begun[0], failed());
    assert!(trouble(&filler, 1).is_some());
    let rest = next(&mut filler, ms(1200));
    assert_eq!(places(&rest), [(1, 0), (1, 4), (1, 8), (1, 12)]);
    assert!(!rest.iter().any(Piece::is_replayed));
    assert_eq!(state(&filler, 1), Some("filling"));
}

/// As much as makes the line full, by its length: few long ones, or more that are short.
#[test]
fn so_much_of_what_was_read_is_under_way() {
    let mut filler = Filler::default();
    let (one, two) = (layer(1), layer(2));
    let half = WINDOW / 2;
    replay(&mut filler, secs(1), &one, &[(0, half), (2, half - 1), (3, 2), (5, half - 3)]);
    replay(&mut filler, secs(1), &two, &[(4, 1), (6, 1)]);
    let begun = next(&mut filler, secs(1));
    // what would fit is not asked for before what comes first
    assert_eq!(places(&begun), [(1, 0), (1, 20)]);
    filler.ended(secs(1), &begun[1], End::Came);
    let begun = next(&mut filler, secs(1));
    assert_eq!(places(&begun), [(1, 30), (2, 40), (1, 50)]);

    let mut filler = Filler::default();
    let short: Vec<_> = (0..2 * WINDOW).map(|place| (place, 1)).collect();
    replay(&mut filler, secs(1), &one, &short);
    assert_eq!(next(&mut filler, secs(1)).len(), WINDOW as usize);
    assert!(next(&mut filler, secs(1)).is_empty());
    // another registry's line is another one
    replay(&mut filler, secs(1), &at(2, "elsewhere"), &short);
    assert_eq!(next(&mut filler, secs(1)).len(), WINDOW as usize);
}

/// A registry that says no is not asked for all that was read: the fill goes on, one piece at a time.
#[test]
fn what_does_not_come_ends_a_replay() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    let most: Vec<_> = (0..9).map(|place| (place, WINDOW / 2)).collect();
    replay(&mut filler, secs(1), &layer(1), &most);
    let begun = next(&mut filler, secs(1));
    assert_eq!(places(&begun), [(1, 0), (1, 10)]);
    filler.ended(secs(1), &begun[0], failed());
    assert!(next(&mut filler, secs(1)).is_empty(), "what is under way is waited for");
    filler.ended(secs(1), &begun[1], failed());
    let filled = next(&mut filler, secs(1));
    assert!(filled.len() == pace::LEAST && !filled.iter().any(Piece::is_replayed));
    assert!(trouble(&filler, 1).is_some());
}

/// Containerd has the layers of an image mounted one after the other.
#[test]
fn what_is_mounted_later_may_have_been_read_first() {
    let mut filler = Filler::default();
    let half = WINDOW / 2;
    replay(&mut filler, secs(1), &layer(1), &[(1, half), (3, half), (5, half)]);
    let begun = next(&mut filler, secs(1));
    assert_eq!(places(&begun), [(1, 10), (1, 30)]);
    replay(&mut filler, secs(2), &layer(2), &[(2, half), (4, half), (6, half)]);
    begun.iter().for_each(|piece| filler.ended(secs(2), piece, End::Came));
    assert_eq!(drain(&mut filler, secs(2)), [(2, 20), (2, 40), (1, 50), (2, 60)]);
}

/// Without a background fill there is a task all the same.
#[test]
fn a_replay_alone_has_a_task() {
    let mut filler = Filler::default();
    replay(&mut filler, secs(1), &layer(1), &[]);
    assert!(!filler.start());
    replay(&mut filler, secs(1), &layer(1), &[(0, 1)]);
    assert!(filler.start());
    let begun = next(&mut filler, secs(1));
    assert_eq!(filler.next(secs(1)), Some(Next { pieces: Vec::new(), wake: None }));
    filler.ended(secs(1), &begun[0], failed());
    assert_eq!(filler.next(secs(1)), None);
    replay(&mut filler, secs(2), &layer(1), &[(0, 1)]);
    assert!(filler.start());
}

/// A mount begins with all that was read, also when the replay of another mount of the layer is not over.
#[test]
fn a_later_replay_takes_the_place_of_an_earlier_one() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    let most = [(0, WINDOW), (1, 1)];
    replay(&mut filler, secs(1), &layer(1), &most);
    let old = next(&mut filler, secs(1));
    replay(&mut filler, secs(2), &layer(1), &most);
    // it is found under way
    let new = next(&mut filler, secs(2));
    assert_eq!((places(&old), places(&new)), (vec![(1, 0)], vec![(1, 0)]));
    filler.ended(secs(2), &old[0], failed());
    assert!(next(&mut filler, secs(2)).is_empty());
    assert_eq!((state(&filler, 1), trouble(&filler, 1)), (Some("replaying"), None));
    filler.ended(secs(2), &new[0], End::Came);
    assert_eq!(places(&next(&mut filler, secs(2))), [(1, 10)]);
}

/// The replay of a mount ends after all has come for another one: nothing waits.
#[test]
fn a_finished_layer_does_not_wait() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    drain(&mut filler, secs(1));
    replay(&mut filler, secs(2), &layer(1), &[(0, 1)]);
    assert_eq!(state(&filler, 1), Some("replaying"));
    assert_eq!(drain(&mut filler, secs(2)), [(1, 0)]);
    assert_eq!(state(&filler, 1), Some("done"));
}

/// What an unmount has left can't make the next mount's fill end early, nor wait.
#[test]
fn evicted_and_mounted_again() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    add(&mut filler, secs(1), New { pool: PoolId(8), ..layer(2) });
    let old = next(&mut filler, secs(1));
    let traced = [(0, WINDOW), (1, 1)];
    replay(&mut filler, secs(1), &layer(1), &traced);
    let old_replay = next(&mut filler, secs(1));
    assert_eq!(places(&old_replay), [(1, 0)]);
    filler.ended(secs(1), &old[0], failed());
    filler.forget(&HashSet::from([POOL]));
    assert_eq!((state(&filler, 1), state(&filler, 2)), (None, Some("waiting")));
    // before the last of what was under way has ended
    add(&mut filler, secs(2), layer(1));
    assert_eq!((state(&filler, 1), trouble(&filler, 1)), (Some("waiting"), None));
    for piece in &old[1..] {
        filler.ended(secs(2), piece, failed());
    }
    filler.ended(secs(2), &old_replay[0], failed());
    assert_eq!((state(&filler, 1), trouble(&filler, 1)), (Some("waiting"), None));
    // nor its replay
    replay(&mut filler, secs(2), &layer(1), &traced);
    let new_replay = next(&mut filler, secs(2));
    filler.ended(secs(2), &old_replay[0], End::Gone);
    assert_eq!(state(&filler, 1), Some("replaying"));
    filler.ended(secs(2), &new_replay[0], End::Came);
    let second = next(&mut filler, secs(2));
    assert_eq!(places(&second), [(1, 10)]);
    filler.ended(secs(2), &second[0], End::Came);
    let all = drain(&mut filler, secs(3));
    assert_eq!(all.iter().filter(|(segment, _)| *segment == 1).count(), 10);
}

/// A mount of a layer that is being filled for another one begins anew: what is under way is asked for again, and found.
#[test]
fn a_known_segment_is_replaced() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    let old = next(&mut filler, secs(1));
    filler.ended(secs(1), &old[0], failed());
    assert!(next(&mut filler, ms(1900)).is_empty());
    add(&mut filler, ms(1900), layer(1));
    let new = next(&mut filler, ms(1900));
    assert_eq!(places(&new), [(1, 0)], "no back-off is left, and three are still under way");
    for piece in &old[1..] {
        filler.ended(secs(2), piece, End::Gone);
    }
    assert_eq!(state(&filler, 1), Some("filling"));
    filler.ended(secs(2), &new[0], End::Came);
    assert_eq!(drain(&mut filler, secs(2)).len(), 9);
}

/// What does not come does not keep others waiting, and is tried again, at last once in five minutes.
#[test]
fn a_layer_that_does_not_come() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    add(&mut filler, secs(1), layer(2));
    let begun = next(&mut filler, secs(10));
    assert_eq!(begun.len(), 12);
    for piece in &begun {
        let end = if piece.segment.0 == 1 { failed() } else { End::Came };
        filler.ended(secs(10), piece, end);
    }
    assert_eq!((state(&filler, 1), trouble(&filler, 1).is_some()), (Some("waiting"), true));
    assert!(next(&mut filler, secs(10)).iter().all(|piece| piece.segment.0 == 2));
    let mut now = secs(10);
    let mut waits = Vec::new();
    for _ in 0..11 {
        let left = filler.missing[0].backoff.left(now).unwrap();
        waits.push(left.as_secs());
        assert!(next(&mut filler, now).iter().all(|piece| piece.segment.0 == 2));
        now += left;
        let probe = next(&mut filler, now);
        assert_eq!(probe.iter().filter(|piece| piece.segment.0 == 1).count(), 1);
        filler.ended(now, &probe[0], failed());
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
    now += secs(300);
    let probe = next(&mut filler, now);
    filler.ended(now, &probe[0], End::Came);
    assert_eq!(trouble(&filler, 1), None);
    assert!(next(&mut filler, now).len() > 1, "and all at once again");
}

/// A single piece that can't be had does not keep the rest of its layer away.
#[test]
fn a_piece_that_does_not_come() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    let mut now = secs(10);
    let mut came = HashSet::new();
    while came.len() < 9 {
        for piece in next(&mut filler, now) {
            let end = if place(&piece) == 8 { failed() } else { End::Came };
            if end == End::Came {
                assert!(came.insert(place(&piece)));
            }
            filler.ended(now, &piece, end);
        }
        now += ms(100);
        assert!(now < secs(20));
    }
    assert_eq!(state(&filler, 1), Some("waiting"));
}

/// Whether it is the layer that has gone or the shard: the others come, the task ends, and the next mount has one.
#[test]
fn what_is_gone_is_forgotten() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    add(&mut filler, secs(1), New { size: MIB, ..layer(2) });
    assert!(filler.start());
    for piece in next(&mut filler, secs(1)) {
        filler.ended(secs(1), &piece, End::Gone);
    }
    assert_eq!((state(&filler, 1), state(&filler, 2)), (None, Some("waiting")));
    assert_eq!(drain(&mut filler, secs(2)), [(2, 0)]);
    assert!(!filler.runs && filler.under_way.is_empty());
    add(&mut filler, secs(3), layer(1));
    assert!(filler.start());
}

/// The task lives as long as something is under way: what it has to do comes with the next mount.
#[test]
fn the_task_waits_for_what_it_has_begun() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    assert!(filler.start());
    let begun = next(&mut filler, secs(1));
    filler.forget(&HashSet::from([POOL]));
    assert_eq!(filler.next(secs(1)), Some(Next { pieces: Vec::new(), wake: None }));
    add(&mut filler, secs(2), layer(1));
    assert!(!filler.start());
    begun.iter().for_each(|piece| filler.ended(secs(2), piece, End::Gone));
    assert_eq!(state(&filler, 1), Some("waiting"));
    assert_eq!(drain(&mut filler, secs(3)).len(), 10);
    assert!(!filler.runs);
}

/// A layer that hangs, or a replay, holds nobody else back for long.
#[test]
fn what_hangs_is_not_waited_for() {
    let mut filler = Filler::default();
    add(&mut filler, ms(0), layer(1));
    add(&mut filler, ms(0), layer(2));
    add(&mut filler, ms(0), at(3, "other"));
    replay(&mut filler, ms(0), &at(3, "other"), &[(0, 1)]);
    let replayed = next(&mut filler, ms(0));
    assert_eq!(places(&replayed), [(3, 0), (1, 0), (1, 4), (1, 8), (1, 12)]);
    let now = secs(10);
    let mut hanging = replayed[1..].to_vec();
    hanging.extend(next(&mut filler, now));
    assert!(hanging.len() == 10 + 2 && hanging[..10].iter().all(|piece| piece.segment.0 == 1));
    // the latest that is known of the first layer
    filler.ended(now, &hanging[0], End::Came);
    for piece in &hanging[10..] {
        filler.ended(now, piece, End::Came);
    }
    let others = next(&mut filler, now);
    assert_eq!(places(&others), [(2, 8), (2, 12), (2, 16)]);
    assert_eq!(filler.next(now).unwrap(), Next { pieces: Vec::new(), wake: Some(secs(50)) });
    // the replay is slow: the layer that it is of comes all the same
    let third = next(&mut filler, secs(60));
    assert!(third.len() == 10 && third.iter().all(|piece| piece.segment.0 == 3));
    assert_eq!(state(&filler, 3), Some("replaying"));
    // and now the first layer is: the second goes on, which has been heard of
    for piece in &others {
        filler.ended(secs(65), piece, End::Came);
    }
    let more = next(&mut filler, secs(70));
    assert!(more.len() == 5 && more.iter().all(|piece| piece.segment.0 == 2), "{more:?}");
    // it comes at last
    for piece in &hanging[1..10] {
        filler.ended(secs(80), piece, End::Came);
    }
    filler.ended(secs(80), &replayed[0], End::Came);
    for piece in third.iter().chain(&more) {
        filler.ended(secs(80), piece, End::Came);
    }
    assert_eq!(drain(&mut filler, secs(81)), []);
}

/// A replay that comes, however slowly, goes first. One that hangs leaves the line to those behind it.
#[test]
fn replays_do_not_wait_for_one_that_hangs() {
    let mut filler = Filler::default();
    let half = WINDOW / 2;
    add(&mut filler, ms(0), layer(2));
    replay(&mut filler, ms(0), &layer(1), &[(0, half), (1, half), (2, half)]);
    replay(&mut filler, ms(0), &layer(2), &[(3, half), (4, half), (5, half)]);
    let slow = next(&mut filler, ms(0));
    assert_eq!(places(&slow), [(1, 0), (1, 10)]);
    assert_eq!(filler.next(secs(20)).unwrap().wake, Some(secs(40)));
    filler.ended(secs(50), &slow[0], End::Came);
    let hanging = next(&mut filler, secs(50));
    assert_eq!(places(&hanging), [(1, 20)]);
    assert_eq!(filler.next(secs(60)), Some(Next { pieces: Vec::new(), wake: Some(secs(50)) }));
    let others = next(&mut filler, secs(110));
    assert_eq!(places(&others), [(2, 30), (2, 40)], "and nothing is filled");
    // it counts again when it is heard of
    filler.ended(secs(111), &slow[1], End::Came);
    filler.ended(secs(111), &others[0], End::Came);
    assert_eq!(places(&next(&mut filler, secs(111))), []);
    filler.ended(secs(111), &hanging[0], End::Came);
    assert_eq!(places(&next(&mut filler, secs(111))), [(2, 50)]);
}

/// Where layers are, by their segments.
const REGISTRIES: [&str; 4] = ["a", "b", "a", "b"];

proptest! {
    /// Whatever comes when: of each registry all that was read is asked for in the order in which it was read, once, and so much
    /// of it that the line is full and not more. What is unmounted, or of which something has failed, is not asked for any more.
    #[test]
    fn all_that_was_read_is_asked_for_in_order(
        read in prop::collection::vec((0..4u64, 0..1000u32), 0..200),
        ends in prop::collection::vec((any::<prop::sample::Index>(), 0..10u32, 0..200u64), 400),
        unmounted in prop::option::of((0..4u64, 0..50usize)),
    ) {
        let mut known = HashSet::new();
        let read = read.into_iter().filter(|of| known.insert(*of));
        let read: Vec<_> = read.map(|(id, record)| (SegmentId(id), record)).collect();
        let placed = (0..).zip(&read).map(|(place, (id, no))| ((place, 0), *id, *no));
        let placed: Vec<_> = placed.collect();
        let registry = |segment: SegmentId| REGISTRIES[segment.0 as usize];
        let mut filler = Filler::default();
        for (segment, stretches) in replay::stretches(&placed) {
            let new = New { pool: PoolId(segment.0), ..at(segment.0, registry(segment)) };
            filler.replay(ms(0), &new, stretches);
        }
        let (mut asked, mut under_way) = (Vec::new(), Vec::<Piece>::new());
        let (mut ends, mut now, mut gone) = (ends.into_iter(), ms(0), None);
        let mut ended = HashSet::new();
        while let Some(Next { pieces, .. }) = filler.next(now) {
            for piece in &pieces {
                let records = piece.runs.iter().flat_map(|run| run.range());
                asked.extend(records.map(|record| (piece.segment, record)));
            }
            prop_assert!(pieces.iter().all(|piece| Some(piece.segment) != gone));
            prop_assert!(pieces.iter().all(|piece| !ended.contains(&piece.segment)));
            under_way.extend(pieces);
            for of in ["a", "b"] {
                let is_here = |id: SegmentId| registry(id) == of && Some(id) != gone;
                let bytes = under_way.iter().filter(|piece| is_here(piece.segment));
                let bytes: u64 = bytes.map(|piece| replay::bytes(&piece.runs)).sum();
                prop_assert!(bytes <= pace::REPLAYED);
                let goes_on = |id: SegmentId| is_here(id) && !ended.contains(&id);
                let [known, begun] = [&read, &asked]
                    .map(|records| records.iter().filter(|(id, _)| goes_on(*id)).count());
                prop_assert!(begun == known || bytes + replay::LONGEST > pace::REPLAYED);
            }
            if let Some((segment, after)) = unmounted && gone.is_none() && asked.len() > after {
                filler.forget(&HashSet::from([PoolId(segment)]));
                gone = Some(SegmentId(segment));
                continue;
            }
            prop_assert!(!under_way.is_empty(), "nothing is done");
            let (which, how, after) = ends.next().unwrap();
            let piece = under_way.swap_remove(which.index(under_way.len()));
            now += ms(after);
            if how == 0 {
                ended.insert(piece.segment);
            }
            filler.ended(now, &piece, if how == 0 { failed() } else { End::Came });
        }
        for of in ["a", "b"] {
            let of = |read: &[(SegmentId, u32)]| -> Vec<_> {
                let here = |id: SegmentId| {
                    registry(id) == of && Some(id) != gone && !ended.contains(&id)
                };
                read.iter().copied().filter(|(id, _)| here(*id)).collect()
            };
            prop_assert_eq!(of(&asked), of(&read));
        }
        let each: HashSet<_> = asked.iter().collect();
        prop_assert_eq!(each.len(), asked.len());
    }
}
