//! Deadlines of readers whose bytes are on the way.

use super::*;

const SEC: Duration = Duration::from_secs(1);

fn schedule(connections: u32) -> Schedule {
    Schedule::new(connections, 120 * SEC, 1)
}

fn event(n: u64) -> Waiter {
    Waiter::Event(EventId(n))
}

fn large(n: u32) -> Vec<(ObjectNo, u64)> {
    vec![(ObjectNo(n), 200_000_000)]
}

fn sent(effects: &[Effect]) -> Option<RequestId> {
    effects.iter().find_map(|effect| match effect {
        Effect::Send { request, .. } => Some(*request),
        _ => None,
    })
}

/// The event and the reason of each failure.
fn failures(effects: &[Effect]) -> Vec<(Waiter, &str)> {
    let failure = |effect| match effect {
        &Effect::Fail { waiter, ref reason, .. } => Some((waiter, reason.as_str())),
        _ => None,
    };
    effects.iter().filter_map(failure).collect()
}

#[test]
fn a_reader_waits_as_long_as_its_bytes_come() {
    let mut s = schedule(6);
    s.demand(Now::ZERO, event(1), &large(1));
    let request = sent(&s.poll(Now::ZERO)).unwrap();
    let mut told = Vec::new();
    for second in 1..=600 {
        s.progress(second * SEC, request, u64::from(second) * 300_000);
        let effects = s.poll(second * SEC);
        assert!(failures(&effects).is_empty(), "after {second} s");
        told.extend(effects.into_iter().map(|effect| (second, effect)));
    }
    assert_eq!(told.len(), 200, "once in three seconds");
    let reason = "900 kB have come, for 200 MB of content".to_owned();
    assert_eq!(told[0], (3, Effect::Waiting { event: EventId(1), reason }));
    // no news is no progress
    s.progress(650 * SEC, request, 600 * 300_000);
    assert!(s.poll(719 * SEC).is_empty());
    let effects = s.poll(720 * SEC);
    let reason = "gave up after 720 s: 180 MB have come, for 200 MB of content";
    assert_eq!(failures(&effects), [(event(1), reason)]);
}

#[test]
fn not_for_ever() {
    let mut s = schedule(6);
    s.demand(Now::ZERO, event(1), &large(1));
    let request = sent(&s.poll(Now::ZERO)).unwrap();
    let longest = u32::try_from(LONGEST_WAIT.as_secs()).unwrap();
    for second in 1..longest {
        s.progress(second * SEC, request, second.into());
        assert!(failures(&s.poll(second * SEC)).is_empty(), "after {second} s");
    }
    assert_eq!(failures(&s.poll(LONGEST_WAIT)).len(), 1);
}

#[test]
fn the_progress_of_others_counts_only_in_line_behind_them() {
    let mut s = schedule(1);
    s.demand(Now::ZERO, event(1), &large(1));
    let request = sent(&s.poll(Now::ZERO)).unwrap();
    s.demand(Now::ZERO, event(2), &large(2));
    for second in 1..=200 {
        s.progress(second * SEC, request, second.into());
        assert!(failures(&s.poll(second * SEC)).is_empty(), "after {second} s");
    }
    let mut s = schedule(2);
    s.demand(Now::ZERO, event(1), &large(1));
    s.demand(Now::ZERO, event(2), &large(2));
    let request = sent(&s.poll(Now::ZERO)).unwrap();
    let mut failed = Vec::new();
    for second in 1..=200 {
        s.progress(second * SEC, request, second.into());
        let effects = s.poll(second * SEC);
        failed.extend(failures(&effects).iter().map(|(waiter, _)| (second, *waiter)));
    }
    assert_eq!(failed, [(120, event(2))]);
}

#[test]
fn an_origin_that_always_breaks_off_makes_no_progress() {
    let mut s = schedule(6);
    s.demand(Now::ZERO, event(1), &large(1));
    let mut now = Now::ZERO;
    let reason = loop {
        let effects = s.poll(now);
        if let [(_, reason)] = failures(&effects)[..] {
            break reason.to_owned();
        }
        now = match sent(&effects) {
            Some(request) => {
                now += 20 * SEC;
                s.progress(now, request, 1000);
                let reason = "connection reset".to_owned();
                s.finished(now, request, &Outcome::Retry { reason, after: None });
                now
            }
            None => s.next_wake().unwrap().max(now),
        };
    };
    // three tries of 20 s, and then the deadline
    assert!((180 * SEC..205 * SEC).contains(&now), "{now:?}");
    assert!(reason.ends_with("connection reset"), "{reason}");
}
