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

fn next(filler: &mut Filler, now: Duration) -> Vec<Piece> {
    filler.next(now).unwrap().pieces
}

/// Where a piece begins, in MiB.
fn place(piece: &Piece) -> u32 {
    piece.run.first / (MIB / CHUNK) as u32
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
    assert_eq!(places(&pieces), [(2, 0), (2, 4)]);
    // until there may be more at once
    assert_eq!(wake, Some(ms(200)));
    assert_eq!(next(&mut filler, secs(60)).len(), 8);
    assert_eq!(filler.next(secs(60)).unwrap().wake, Some(secs(60)));
}

#[test]
fn readers_have_the_line() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    add(&mut filler, secs(1), layer(2));
    add(&mut filler, secs(1), at(3, "elsewhere"));
    // two of each registry
    let begun = next(&mut filler, secs(1));
    assert_eq!(places(&begun), [(1, 0), (1, 4), (3, 0), (3, 4)]);
    assert!(next(&mut filler, ms(1200)).is_empty());
    assert_eq!(next(&mut filler, ms(1300)).len(), 4);
    filler.demanded(Demanded { last: Some(ms(1350)), reads: Vec::new() });
    assert!(next(&mut filler, ms(1400)).is_empty());
    // what is under way counts, to the last
    begun.iter().for_each(|piece| filler.ended(ms(1400), piece, End::Came));
    assert!(next(&mut filler, ms(1400)).is_empty());
    assert_eq!(next(&mut filler, secs(9)).len(), 10 + 6);
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
    assert_eq!(next(&mut filler, secs(61)).len(), 8);
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
    let expected = [(2, 16), (2, 20), (1, 0), (1, 4), (2, 36), (2, 0), (2, 4), (2, 8)];
    assert_eq!(pieces, expected);
}

#[test]
fn what_was_read_at_the_last_start_goes_first() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    add(&mut filler, secs(1), at(2, "elsewhere"));
    add(&mut filler, secs(1), layer(3));
    let first = filler.replay_begins(ms(0), SegmentId(1), POOL, "registry".into());
    let second = filler.replay_begins(ms(0), SegmentId(3), POOL, "registry".into());
    assert_eq!((state(&filler, 1), state(&filler, 2)), (Some("replaying"), Some("waiting")));
    assert_eq!(places(&next(&mut filler, secs(1))), [(2, 0), (2, 4)]);
    // in any order
    filler.replay_ended(second, None);
    assert_eq!(state(&filler, 3), Some("waiting"));
    assert!(next(&mut filler, secs(1)).is_empty());
    filler.replay_ended(first, Some("refused".into()));
    assert_eq!(trouble(&filler, 1), Some("refused".into()));
    assert_eq!(places(&next(&mut filler, secs(1))), [(1, 0), (1, 4)]);
    assert_eq!(state(&filler, 1), Some("filling"));
}

/// The replay of a mount ends after all has come for another one: nothing waits.
#[test]
fn a_finished_layer_does_not_wait() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    drain(&mut filler, secs(1));
    let replay = filler.replay_begins(ms(0), SegmentId(1), POOL, "registry".into());
    assert_eq!(state(&filler, 1), Some("replaying"));
    filler.replay_ended(replay, None);
    assert_eq!(state(&filler, 1), Some("done"));
}

/// What an unmount has left can't make the next mount's fill end early, nor wait.
#[test]
fn evicted_and_mounted_again() {
    let mut filler = Filler::default();
    add(&mut filler, secs(1), layer(1));
    add(&mut filler, secs(1), New { pool: PoolId(8), ..layer(2) });
    let old = next(&mut filler, secs(1));
    let replay = filler.replay_begins(ms(0), SegmentId(1), POOL, "registry".into());
    filler.ended(secs(1), &old[0], failed());
    filler.forget(&HashSet::from([POOL]));
    assert_eq!((state(&filler, 1), state(&filler, 2)), (None, Some("waiting")));
    // before the last of what was under way has ended
    add(&mut filler, secs(2), layer(1));
    assert_eq!((state(&filler, 1), trouble(&filler, 1)), (Some("waiting"), None));
    filler.ended(secs(2), &old[1], failed());
    filler.replay_ended(replay, Some("gone".into()));
    assert_eq!((state(&filler, 1), trouble(&filler, 1)), (Some("waiting"), None));
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
    assert_eq!(places(&new), [(1, 0)], "no back-off is left, and one is still under way");
    filler.ended(secs(2), &old[1], End::Gone);
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
    let replay = filler.replay_begins(ms(0), SegmentId(3), POOL, "other".into());
    let now = secs(10);
    let hanging = next(&mut filler, now);
    assert!(hanging.len() == 10 + 2 && hanging[..10].iter().all(|piece| piece.segment.0 == 1));
    for piece in &hanging[10..] {
        filler.ended(now, piece, End::Came);
    }
    let others = next(&mut filler, now);
    assert_eq!(places(&others), [(2, 8), (2, 12)]);
    assert_eq!(filler.next(now).unwrap(), Next { pieces: Vec::new(), wake: Some(secs(50)) });
    // the replay is slow: the layer that it is of comes all the same
    let third = next(&mut filler, secs(60));
    assert!(third.len() == 10 && third.iter().all(|piece| piece.segment.0 == 3));
    // and now the first layer is: the second goes on, which has been heard of
    filler.ended(secs(65), &others[0], End::Came);
    filler.ended(secs(65), &others[1], End::Came);
    let more = next(&mut filler, secs(70));
    assert!(more.len() == 6 && more.iter().all(|piece| piece.segment.0 == 2), "{more:?}");
    // it comes at last
    for piece in &hanging[..10] {
        filler.ended(secs(80), piece, End::Came);
    }
    filler.replay_ended(replay, None);
    for piece in third.iter().chain(&more) {
        filler.ended(secs(80), piece, End::Came);
    }
    assert_eq!(drain(&mut filler, secs(81)), []);
}
