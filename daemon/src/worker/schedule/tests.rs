use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn schedule() -> Schedule {
    Schedule::new(6, Duration::from_secs(120), 1)
}

fn event(n: u64) -> Waiter {
    Waiter::Event(EventId(n))
}

fn small(numbers: std::ops::Range<u32>) -> Vec<(ObjectNo, u64)> {
    numbers.map(|n| (ObjectNo(n), 1000)).collect()
}

fn sent(effects: &[Effect]) -> Vec<(RequestId, Lane, Vec<ObjectNo>)> {
    let sent = |e: &Effect| match e {
        Effect::Send { request, lane, objects } => Some((*request, *lane, objects.clone())),
        _ => None,
    };
    effects.iter().filter_map(sent).collect()
}

fn retry(reason: &str) -> Outcome {
    Outcome::Retry { reason: reason.into(), after: None }
}

/// Objects come in fours.
fn in_fours(objects: &[ObjectNo], _: u64) -> Vec<(ObjectNo, u64)> {
    let four = |no: &ObjectNo| small(no.0 / 4 * 4..no.0 / 4 * 4 + 4);
    objects.iter().flat_map(four).filter(|(no, _)| !objects.contains(no)).collect()
}

#[test]
fn what_comes_along_is_not_asked_for_again() {
    let mut s = schedule();
    s.demand(Now::ZERO, event(1), &small(5..6));
    s.ahead(&small(6..9));
    let effects = s.poll_along(Now::ZERO, &mut in_fours);
    let numbers = |objects: &[ObjectNo]| objects.iter().map(|no| no.0).collect::<Vec<_>>();
    let [(first, Lane::Demand, objects), (second, Lane::Ahead, ahead)] = &sent(&effects)[..] else {
        panic!("{effects:?}")
    };
    assert_eq!((numbers(objects), numbers(ahead)), (vec![5, 4, 6, 7], vec![8, 9, 10, 11]));
    // it is waited for, and the request is one for readers
    s.demand(MS, event(2), &small(7..8));
    assert_eq!(s.poll_along(100 * MS, &mut in_fours), []);
    for no in [4, 5, 6] {
        let arrival = if no == 5 { Arrival::Awaited } else { Arrival::Unasked };
        assert_eq!(s.arrived(100 * MS, *first, ObjectNo(no)), arrival);
    }
    assert_eq!(s.poll(100 * MS), [Effect::Ready(event(1))]);
    // what is waited for is tried again, what is not is forgotten
    s.finished(100 * MS, *first, &retry("reset"));
    s.finished(100 * MS, *second, &retry("reset"));
    let effects = s.poll(10_000 * MS);
    assert_eq!(sent(&effects).len(), 1, "{effects:?}");
    assert_eq!(numbers(&sent(&effects)[0].2), [7]);
    assert!(!s.has(ObjectNo(4)) && !s.has(ObjectNo(9)) && s.has(ObjectNo(7)));
}

/// It is for a reader who goes on, and not where one of many objects is wrong.
#[test]
fn what_is_behind_comes_for_a_single_reader() {
    let mut s = schedule();
    s.demand(Now::ZERO, event(1), &small(5..6));
    s.ahead(&small(20..30));
    s.demand(Now::ZERO, Waiter::Prefetch(1), &small(40..50));
    let mut asked = Vec::new();
    let mut along = |objects: &[ObjectNo], behind| {
        asked.push((objects[0].0, behind));
        if behind > 0 { small(6..8) } else { Vec::new() }
    };
    let effects = s.poll_along(Now::ZERO, &mut along);
    let sent = sent(&effects);
    let demanded = sent.iter().find(|(_, lane, _)| *lane == Lane::Demand).unwrap();
    assert_eq!(demanded.2.iter().map(|no| no.0).collect::<Vec<_>>(), [5, 6, 7]);
    s.finished(MS, demanded.0, &Outcome::Wrong { reason: "wrong".into() });
    s.poll_along(100 * MS, &mut along);
    s.poll_along(10_000 * MS, &mut along);
    s.demand(10_001 * MS, event(2), &small(60..61));
    s.poll_along(10_001 * MS, &mut along);
    assert_eq!(asked, [(5, BEHIND), (20, 0), (40, 0), (5, 0), (60, 0)], "at last two wait");
}

#[test]
fn a_thousand_events_on_one_object_are_one_request() {
    let mut s = schedule();
    let mut effects = Vec::new();
    for n in 0..1000 {
        s.demand(n as u32 * MS / 1000, event(n), &small(7..8));
        effects.extend(s.poll(MS));
    }
    let requests = sent(&effects);
    assert_eq!(requests.len(), 1);
    assert_eq!(s.arrived(2 * MS, requests[0].0, ObjectNo(7)), Arrival::Awaited);
    s.finished(2 * MS, requests[0].0, &Outcome::Done);
    let ready = s.poll(2 * MS);
    assert_eq!(ready.iter().filter(|e| matches!(e, Effect::Ready(_))).count(), 1000);
    assert!(s.is_idle());
}

#[test]
fn first_alone_then_together() {
    let mut s = schedule();
    let mut effects = Vec::new();
    for n in 0..1000 {
        s.demand(MS, event(n), &small(n as u32..n as u32 + 1));
        effects.extend(s.poll(MS));
    }
    let requests = sent(&effects);
    assert_eq!(requests.len(), 6, "one in each slot");
    assert!(requests.iter().all(|(_, lane, o)| o.len() == 1 && *lane == Lane::Demand));
    s.arrived(9 * MS, requests[0].0, requests[0].2[0]);
    s.finished(9 * MS, requests[0].0, &Outcome::Done);
    let next = sent(&s.poll(9 * MS));
    assert_eq!((next.len(), next[0].2.len()), (1, 994), "the rest in the slot that is free");
}

#[test]
fn what_one_event_needs_goes_together() {
    let mut s = schedule();
    s.demand(MS, event(1), &small(0..40));
    s.demand(MS, event(2), &small(40..41));
    let requests = sent(&s.poll(MS));
    assert_eq!(requests.iter().map(|r| r.2.len()).collect::<Vec<_>>(), [40, 1]);
}

#[test]
fn read_ahead_never_takes_the_last_slot() {
    let mut s = Schedule::new(2, Duration::from_secs(120), 1);
    s.ahead(&small(0..8));
    s.ahead(&small(8..5000));
    let first = sent(&s.poll(MS));
    assert_eq!(first.len(), 1);
    assert_eq!((first[0].1, first[0].2.len()), (Lane::Ahead, 4096), "units are joined");
    s.demand(2 * MS, event(1), &small(9000..9001));
    assert_eq!(sent(&s.poll(2 * MS)).len(), 1, "the reader goes beside");
    // what is queued but not sent is sent at once when a reader wants it
    let mut s = schedule();
    for unit in 0..4u32 {
        s.ahead(&small(unit * 4096..(unit + 1) * 4096));
    }
    assert_eq!(sent(&s.poll(MS)).len(), 3);
    s.demand(MS, event(1), &small(16000..16001));
    let demand = sent(&s.poll(MS));
    assert_eq!(demand, [(RequestId(4), Lane::Demand, vec![ObjectNo(16000)])]);
}

#[test]
fn a_reader_waits_for_read_ahead_only_so_long() {
    let mut s = schedule();
    s.ahead(&small(0..100));
    let ahead = sent(&s.poll(MS))[0].0;
    s.demand(2 * MS, event(1), &small(5..6));
    assert!(sent(&s.poll(3 * MS)).is_empty(), "it is on its way");
    assert!(s.next_wake().unwrap() <= 40 * MS);
    let alone = sent(&s.poll(33 * MS));
    assert_eq!((alone.len(), &alone[0].2), (1, &vec![ObjectNo(5)]));
    assert_eq!(s.arrived(40 * MS, alone[0].0, ObjectNo(5)), Arrival::Awaited);
    assert_eq!(s.poll(40 * MS), [Effect::Ready(event(1))]);
    assert_eq!(s.arrived(41 * MS, ahead, ObjectNo(5)), Arrival::Again);
    s.finished(41 * MS, alone[0].0, &Outcome::Done);
    for n in (0..100).filter(|n| *n != 5) {
        assert_eq!(s.arrived(42 * MS, ahead, ObjectNo(n)), Arrival::Unasked);
    }
    s.finished(42 * MS, ahead, &Outcome::Done);
    s.poll(42 * MS);
    assert!(s.objects.is_empty());
}

#[test]
fn read_ahead_for_which_many_wait_is_not_asked_for_again() {
    let mut s = schedule();
    s.ahead(&small(0..100));
    let ahead = sent(&s.poll(MS))[0].0;
    for n in 0..50 {
        s.demand(2 * MS, event(n), &small(n as u32..n as u32 + 1));
    }
    assert!(sent(&s.poll(500 * MS)).is_empty());
    for n in 0..100 {
        s.arrived(600 * MS, ahead, ObjectNo(n));
    }
    assert_eq!(s.poll(600 * MS).len(), 50);
}

#[test]
fn retries_with_growing_pauses_and_gives_up_at_the_deadline() {
    let mut s = schedule();
    s.demand(MS, event(1), &small(0..1));
    let mut now = MS;
    let mut tries = Vec::new();
    let failed = loop {
        let effects = s.poll(now);
        if let Some(fail) = effects.iter().find(|e| matches!(e, Effect::Fail { .. })) {
            break fail.clone();
        }
        for (request, _, objects) in sent(&effects) {
            assert_eq!(objects, [ObjectNo(0)]);
            tries.push(now);
            s.finished(now, request, &retry("connection refused"));
        }
        now = s.next_wake().unwrap().max(now);
    };
    assert!((20..60).contains(&tries.len()), "{tries:?}");
    assert!(tries[1] - tries[0] <= 100 * MS && tries.windows(2).all(|w| w[0] < w[1]));
    assert_eq!(now, MS + Duration::from_secs(120));
    let Effect::Fail { errno, reason, .. } = failed else { unreachable!() };
    assert_eq!(errno, DenyErrno::Eio);
    assert_eq!(reason, "gave up after 120 s: connection refused");
    // later events try anew
    while let Some(wake) = s.next_wake() {
        s.poll(wake);
    }
    s.demand(now, event(2), &small(0..1));
    assert_eq!(sent(&s.poll(now + 10_000 * MS)).len(), 1);
}

#[test]
fn waiting_is_told_with_its_reason() {
    let mut s = schedule();
    s.demand(MS, event(1), &small(0..3));
    let request = sent(&s.poll(MS))[0].0;
    s.finished(2 * MS, request, &retry("503"));
    s.demand(3 * MS, event(2), &small(0..1));
    let waiting = |event| Effect::Waiting { event: EventId(event), reason: "503".into() };
    assert_eq!(s.poll(3 * MS), [waiting(1), waiting(2)]);
}

#[test]
fn retry_after_keeps_everybody_quiet() {
    let mut s = schedule();
    s.demand(MS, event(1), &small(0..1));
    let request = sent(&s.poll(MS))[0].0;
    let after = Some(Duration::from_secs(7));
    s.finished(2 * MS, request, &Outcome::Retry { reason: "429".into(), after });
    s.demand(3 * MS, event(2), &small(1..2));
    s.ahead(&small(2..10));
    assert!(sent(&s.poll(6999 * MS)).is_empty());
    assert_eq!(s.next_wake(), Some(7002 * MS));
    let all: usize = sent(&s.poll(7002 * MS)).iter().map(|r| r.2.len()).sum();
    assert_eq!(all, 10);
}

#[test]
fn an_origin_in_trouble_is_probed_one_request_at_a_time() {
    let mut s = schedule();
    for n in 0..3 {
        s.demand(MS, event(n), &small(n as u32..n as u32 + 1));
    }
    for (request, ..) in sent(&s.poll(MS)) {
        s.finished(2 * MS, request, &retry("refused"));
    }
    s.demand(3 * MS, event(10), &small(10..11));
    s.demand(3 * MS, event(11), &small(11..12));
    s.ahead(&small(20..30));
    let probe = sent(&s.poll(3 * MS));
    assert_eq!(probe.len(), 1);
    s.arrived(4 * MS, probe[0].0, probe[0].2[0]);
    s.finished(4 * MS, probe[0].0, &Outcome::Done);
    assert_eq!(sent(&s.poll(200 * MS)).iter().map(|r| r.2.len()).sum::<usize>(), 4);
}

#[test]
fn missing_denies_the_one_and_fetches_the_others() {
    let mut s = schedule();
    s.demand(MS, event(1), &small(0..1));
    s.demand(MS, event(2), &small(0..3));
    let requests = sent(&s.poll(MS));
    let missing = Outcome::Missing { object: ObjectNo(1), reason: "not our ref".into() };
    s.demand(MS, event(3), &small(2..3));
    s.finished(2 * MS, requests[1].0, &missing);
    let effects = s.poll(2 * MS);
    let failed: Vec<_> = effects.iter().filter(|e| matches!(e, Effect::Fail { .. })).collect();
    assert!(matches!(failed[..], [Effect::Fail { waiter: Waiter::Event(EventId(2)), .. }]));
    assert_eq!(sent(&effects)[0].2, [ObjectNo(2)], "event 3 still wants it");
}

#[test]
fn refused_denies_at_once() {
    let mut s = schedule();
    s.demand(MS, event(1), &small(0..2));
    let request = sent(&s.poll(MS))[0].0;
    s.arrived(2 * MS, request, ObjectNo(0));
    s.finished(2 * MS, request, &Outcome::Refused { reason: "403".into() });
    let effects = s.poll(2 * MS);
    assert!(
        matches!(&effects[0], Effect::Fail { errno: DenyErrno::Eio, reason, .. } if reason == "403")
    );
    assert!(s.is_idle());
}

#[test]
fn a_full_disk_is_told_and_tried_anew_only_by_the_next_event() {
    let mut s = schedule();
    s.demand(MS, event(1), &small(0..1));
    let request = sent(&s.poll(MS))[0].0;
    let full = Outcome::Disk { errno: DenyErrno::Enospc, reason: "no space".into() };
    s.finished(2 * MS, request, &full);
    let effects = s.poll(500_000 * MS);
    assert!(matches!(effects[0], Effect::Fail { errno: DenyErrno::Enospc, .. }));
    assert!(sent(&effects).is_empty() && s.objects.is_empty());
    s.demand(500_001 * MS, event(2), &small(0..1));
    assert_eq!(sent(&s.poll(500_001 * MS)).len(), 1);
}

#[test]
fn wrong_data_is_tried_twice_more_alone() {
    let mut s = schedule();
    s.demand(MS, event(1), &small(0..2));
    let wrong = Outcome::Wrong { reason: "bad pack".into() };
    let mut now = MS;
    let (mut asked, mut failed) = (HashMap::new(), 0);
    for _ in 0..20 {
        now += 1000 * MS;
        let effects = s.poll(now);
        failed += effects.iter().filter(|e| matches!(e, Effect::Fail { .. })).count();
        for (request, _, objects) in sent(&effects) {
            objects.iter().for_each(|no| *asked.entry(*no).or_insert(0) += 1);
            if objects[..] == [ObjectNo(0)] {
                s.arrived(now, request, ObjectNo(0));
                s.finished(now, request, &Outcome::Done);
            } else {
                s.finished(now, request, &wrong);
            }
        }
    }
    assert_eq!(failed, 1);
    assert_eq!(asked, HashMap::from([(ObjectNo(0), 2), (ObjectNo(1), 3)]));
    assert!(s.is_idle());
}

#[test]
fn prefetch_ends_also_when_the_origin_is_gone() {
    let mut s = schedule();
    s.demand(MS, Waiter::Prefetch(1), &small(0..10));
    let (mut now, mut ended) = (MS, false);
    for _ in 0..100 {
        let effects = s.poll(now);
        ended |= effects.iter().any(|e| matches!(e, Effect::Fail { .. }));
        for (request, lane, _) in sent(&effects) {
            assert_eq!(lane, Lane::Prefetch);
            s.finished(now, request, &retry("gone"));
        }
        now = s.next_wake().unwrap_or(now + MS);
    }
    assert!(ended && s.is_idle());
}

/// Objects of 1 MiB.
fn chunks(numbers: std::ops::Range<u32>) -> Vec<(ObjectNo, u64)> {
    numbers.map(|n| (ObjectNo(n), 1 << 20)).collect()
}

/// The lane and the number of objects of each request.
fn amounts(effects: &[Effect]) -> Vec<(Lane, usize)> {
    sent(effects).iter().map(|(_, lane, objects)| (*lane, objects.len())).collect()
}

/// All of these requests bring what they were asked for, and end.
fn bring(s: &mut Schedule, now: Now, requests: &[(RequestId, Lane, Vec<ObjectNo>)]) {
    for (request, _, objects) in requests {
        for no in objects {
            s.arrived(now, *request, *no);
        }
        s.finished(now, *request, &Outcome::Done);
    }
}

#[test]
fn a_prefetch_is_shared_among_the_free_requests() {
    for (objects, expected) in [
        (chunks(0..100), vec![16, 16, 16]),
        (chunks(0..24), vec![8, 8, 8]),
        (chunks(0..10), vec![3, 3, 4]),
        // no smaller than a small one
        (chunks(0..5), vec![2, 2, 1]),
        (chunks(0..2), vec![2]),
        (small(0..2000), vec![2000]),
        (small(0..9000), vec![3000, 3000, 3000]),
    ] {
        let mut s = schedule();
        s.demand(MS, Waiter::Prefetch(1), &objects);
        let requests = amounts(&s.poll(MS));
        assert!(requests.iter().all(|(lane, _)| *lane == Lane::Prefetch));
        let counts: Vec<_> = requests.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, expected);
    }
}

#[test]
fn a_prefetch_gives_way_to_readers() {
    let mut s = schedule();
    s.demand(MS, event(1), &chunks(1000..1001));
    s.demand(MS, Waiter::Prefetch(1), &chunks(0..100));
    let first = sent(&s.poll(MS));
    let small = (Lane::Prefetch, 2);
    let lanes: Vec<_> = first.iter().map(|(_, lane, objects)| (*lane, objects.len())).collect();
    assert_eq!(lanes, [(Lane::Demand, 1), small], "one, and small");
    // the next when a third of it has come
    assert_eq!(s.poll(2 * MS), []);
    s.arrived(2 * MS, first[1].0, first[1].2[0]);
    let second = sent(&s.poll(2 * MS));
    assert_eq!((second.len(), second[0].2.len()), (1, 2));
    // as long as it takes
    let mut now = 3000 * MS;
    bring(&mut s, now, &first[1..]);
    bring(&mut s, now, &second);
    let next = sent(&s.poll(now));
    assert_eq!((next.len(), next[0].2.len()), (1, 1), "the reader still waits");
    // and a while after it
    bring(&mut s, now, &first[..1]);
    assert_eq!(s.poll(now), [Effect::Ready(event(1))]);
    assert_eq!(s.next_wake(), Some(now + BUSY), "there is a request to spare then");
    now += BUSY - MS;
    bring(&mut s, now, &next);
    let next = sent(&s.poll(now));
    assert_eq!(next.len(), 1, "one at a time");
    now += MS;
    let large = (Lane::Prefetch, 16);
    assert_eq!(amounts(&s.poll(now)), [large, large], "nobody has come since");
    assert!(s.next_wake().is_none_or(|wake| wake > now));
    bring(&mut s, now, &next);
    assert_eq!(amounts(&s.poll(now)), [large]);
    // the next reader goes beside what is on its way, and what ends meanwhile is not replaced
    s.demand(now, event(2), &chunks(1001..1002));
    assert_eq!(amounts(&s.poll(now)), [(Lane::Demand, 1)]);
}

#[test]
fn a_prefetch_that_hangs_does_not_hold_up_the_next() {
    let mut s = schedule();
    s.demand(MS, event(1), &chunks(1000..1001));
    s.demand(MS, Waiter::Prefetch(1), &chunks(0..100));
    assert_eq!(sent(&s.poll(MS)).len(), 2);
    assert_eq!(amounts(&s.poll(LONG_SMALL)), []);
    assert_eq!(amounts(&s.poll(MS + LONG_SMALL)), [(Lane::Prefetch, 2)]);
    assert_eq!(amounts(&s.poll(3 * LONG_SMALL)), [], "two at most");
}

#[test]
fn a_prefetch_beside_readers_asks_for_what_the_line_brings_soon() {
    // round trip in ms, bytes in a ms, and what becomes of a request then
    for (round_trip, rate, expected) in [
        (0, 100_000, MOST_SMALL..=MOST_SMALL),
        (25, 14_000, 3600 << 10..=3900 << 10),
        (25, 4_000, 1000 << 10..=1100 << 10),
        (25, 100, LEAST_SMALL..=LEAST_SMALL),
    ] {
        let mut s = schedule();
        let objects: Vec<_> = (0..8000).map(|n| (ObjectNo(n), 16 << 10)).collect();
        s.demand(MS, Waiter::Prefetch(1), &objects);
        s.demand(MS, event(1), &chunks(9000..9001));
        let (mut now, mut last) = (MS, 0);
        for n in 0..12 {
            let of_prefetch = |(_, lane, _): &(_, Lane, _)| *lane == Lane::Prefetch;
            let requests: Vec<_> = sent(&s.poll(now)).into_iter().filter(of_prefetch).collect();
            assert_eq!(requests.len(), 1);
            last = requests[0].2.len() as u64 * (16 << 10);
            assert!(n > 0 || last == FIRST_SMALL);
            now += Duration::from_millis(round_trip + last / rate);
            bring(&mut s, now, &requests);
        }
        assert!(expected.contains(&last), "{rate} bytes in a ms: {last}");
    }
}

#[test]
fn what_readers_wait_for_in_a_prefetch_counts_to_its_end() {
    let mut s = Schedule::new(1, Duration::from_secs(120), 1);
    s.demand(MS, Waiter::Prefetch(1), &chunks(0..100));
    let large = sent(&s.poll(MS));
    assert_eq!(large[0].2.len(), 16);
    s.demand(2 * MS, event(1), &chunks(0..1));
    s.poll(2 * MS);
    let now = 5000 * MS;
    s.poll(now - MS);
    bring(&mut s, now, &large);
    assert_eq!(amounts(&s.poll(now)), [(Lane::Prefetch, 1)]);
}

#[test]
fn a_reader_that_fails_may_come_again() {
    let mut s = schedule();
    s.demand(MS, event(1), &chunks(1000..1001));
    let demand = sent(&s.poll(MS));
    s.demand(MS, Waiter::Prefetch(1), &chunks(0..100));
    let now = 5000 * MS;
    s.finished(now, demand[0].0, &Outcome::Refused { reason: "403".into() });
    let small = (Lane::Prefetch, 2);
    assert_eq!(amounts(&s.poll(now)), [small]);
}

#[test]
fn read_ahead_does_not_give_way() {
    let mut s = schedule();
    s.demand(MS, event(1), &chunks(1000..1001));
    s.demand(MS, Waiter::Prefetch(1), &chunks(0..100));
    s.ahead(&chunks(200..230));
    let expected = [(Lane::Demand, 1), (Lane::Ahead, 16), (Lane::Ahead, 14), (Lane::Prefetch, 2)];
    assert_eq!(amounts(&s.poll(MS)), expected);
}

#[test]
fn old_deadlines_take_no_memory() {
    let mut s = schedule();
    for n in 0..50_000 {
        s.demand(MS, event(n), &small(0..1));
        for (request, ..) in sent(&s.poll(MS)) {
            s.arrived(MS, request, ObjectNo(0));
            s.finished(MS, request, &Outcome::Done);
        }
        s.poll(MS);
    }
    assert!(s.timers.len() < 10_000);
}

/// An origin that does anything, readers that come and go: whatever happens, limits are kept and
/// every wait ends once.
fn anything_goes(seed: u64, steps: usize) -> Result<(), TestCaseError> {
    let mut rng = Jitter::new(seed);
    let mut random = move |below: u64| rng.next() % below;
    let connections = 1 + random(6) as u32;
    let mut s = Schedule::new(connections, Duration::from_secs(5), seed);
    let mut now = Duration::ZERO;
    let mut running: BTreeMap<RequestId, (Lane, Vec<ObjectNo>)> = BTreeMap::new();
    let mut waiting: HashSet<Waiter> = HashSet::new();
    // What has come in another request meanwhile.
    let mut done: HashSet<(RequestId, ObjectNo)> = HashSet::new();
    let mut next = 0;
    // Some of each size; and when a reader came last, or got something.
    let size = |no: ObjectNo| [1000, 300 << 10, 1 << 20, 3 << 20][no.0 as usize % 4];
    let sized = |numbers: std::ops::Range<u32>| -> Vec<(ObjectNo, u64)> {
        numbers.map(|n| (ObjectNo(n), size(ObjectNo(n)))).collect()
    };
    let mut last_reader = None;
    for step in 0..steps + 10_000 {
        now += Duration::from_micros(random(3000));
        let winding_down = step >= steps;
        if winding_down && s.is_idle() {
            break;
        }
        match random(if winding_down { 4 } else { 8 }) {
            0..=2 if !running.is_empty() => {
                let at = random(running.len() as u64) as usize;
                let request = *running.keys().nth(at).unwrap();
                let (_, objects) = running.get_mut(&request).unwrap();
                if !objects.is_empty() && random(10) > 0 {
                    let no = objects.remove(random(objects.len() as u64) as usize);
                    if s.arrived(now, request, no) == Arrival::Awaited {
                        last_reader = Some(now);
                    }
                    done.extend(running.keys().map(|request| (*request, no)));
                } else {
                    let (lane, objects) = running.remove(&request).unwrap();
                    if lane == Lane::Demand {
                        last_reader = Some(now);
                    }
                    let reason = "x".to_owned();
                    let after = (random(9) == 0).then_some(Duration::from_millis(300));
                    let outcome = match random(6) {
                        0 => Outcome::Refused { reason },
                        1 if !objects.is_empty() => Outcome::Missing { object: objects[0], reason },
                        2 => Outcome::Wrong { reason },
                        3 => Outcome::Disk { errno: DenyErrno::Enospc, reason },
                        4 => Outcome::Done,
                        _ => Outcome::Retry { reason, after },
                    };
                    s.finished(now, request, &outcome);
                }
            }
            3 if random(20) == 0 => now += BUSY,
            3 => now += Duration::from_millis(random(200)),
            4 => s.ahead(&sized(random(100) as u32..100 + random(50) as u32)),
            5 if !waiting.is_empty() => {
                let waiter = *waiting.iter().min_by_key(|w| format!("{w:?}")).unwrap();
                if random(4) == 0 {
                    waiting.remove(&waiter);
                    s.cancel(waiter);
                }
            }
            6.. => {
                next += 1;
                let first = random(150) as u32;
                let (waiter, count) = if random(5) == 0 {
                    (Waiter::Prefetch(next), random(60))
                } else {
                    last_reader = Some(now);
                    (event(next), random(5))
                };
                waiting.insert(waiter);
                s.demand(now, waiter, &sized(first..first + count as u32));
            }
            _ => {}
        }
        for effect in s.poll(now) {
            match effect {
                Effect::Send { request, lane, objects } => {
                    prop_assert!(!objects.is_empty());
                    for no in &objects {
                        let with = running.iter().filter(|(request, (_, objects))| {
                            objects.contains(no) && !done.contains(&(**request, *no))
                        });
                        let lanes: Vec<_> = with.map(|(_, (lane, _))| *lane).collect();
                        prop_assert!(!lanes.contains(&Lane::Demand), "{no:?} is under way");
                        prop_assert!(lanes.is_empty() || lane == Lane::Demand);
                    }
                    if lane == Lane::Prefetch {
                        let busy = last_reader.is_some_and(|last| now < last + BUSY)
                            || waiting.iter().any(|waiter| matches!(waiter, Waiter::Event(_)));
                        let (requests, batch) = match busy {
                            true => (SMALL_REQUESTS, (SMALL_OBJECTS, MOST_SMALL)),
                            false => (AHEAD_REQUESTS, AHEAD_BATCH),
                        };
                        let bytes: u64 = objects.iter().copied().map(size).sum();
                        let before = running.values().filter(|(lane, _)| *lane == Lane::Prefetch);
                        prop_assert!(before.count() < requests, "busy: {busy}");
                        prop_assert!(objects.len() <= batch.0);
                        prop_assert!(bytes <= batch.1 || objects.len() == 1, "{bytes}: {busy}");
                    }
                    running.insert(request, (lane, objects));
                    prop_assert!(running.len() <= connections as usize);
                    let ahead = running.values().filter(|(lane, _)| *lane != Lane::Demand).count();
                    prop_assert!(ahead <= (connections as usize - 1).clamp(1, AHEAD_REQUESTS));
                }
                Effect::Ready(waiter) | Effect::Fail { waiter, .. } => {
                    prop_assert!(waiting.remove(&waiter), "{waiter:?} ends once");
                }
                Effect::Waiting { event, .. } => {
                    prop_assert!(waiting.contains(&Waiter::Event(event)));
                }
                Effect::Dropped(_) => {}
            }
        }
        if let Some(wake) = s.next_wake() {
            now = if random(10) == 0 { now.max(wake) } else { now };
        }
    }
    prop_assert!(s.is_idle(), "seed {seed}: {} waits left", s.waits.len());
    prop_assert!(waiting.is_empty());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_wait_ends_once(seed: u64) {
        anything_goes(seed, 600)?;
    }
}
