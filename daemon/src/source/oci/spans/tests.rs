use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;

/// Half of a span of 1000 bytes is asked for.
fn half(number: usize) -> Need {
    Need { number, asked: 500, len: 1000 }
}

fn whole(number: usize) -> Need {
    Need { number, asked: 1000, len: 1000 }
}

/// Bytes of which the last one is the window's.
fn encoded(bytes: &[u8]) -> Encoded {
    let mut bytes = Bytes::copy_from_slice(bytes);
    let frame = bytes.split_off(bytes.len().saturating_sub(1));
    Encoded { bytes, frame }
}

fn numbers(found: &Found<'_>) -> (Vec<usize>, Vec<usize>, Vec<usize>) {
    (
        found.here.iter().map(|(number, _)| *number).collect(),
        found.coming.iter().map(|coming| coming.need.number).collect(),
        found.absent.iter().map(|need| need.number).collect(),
    )
}

impl Spans {
    /// Somebody has fetched this, and asked for half of it.
    fn deliver(&self, number: usize, bytes: &[u8]) {
        self.claim(&[half(number)]).deliver(number, encoded(bytes));
    }
}

#[test]
fn what_others_need_too_is_fetched_once() {
    let spans = Spans::default();
    let mut first = spans.find([half(0), whole(1), half(2)]);
    assert_eq!(numbers(&first), (vec![], vec![], vec![0, 1, 2]));
    // what was asked for as a whole, nobody else asks for in general; who does is in a hurry
    let second = spans.find([whole(1), half(2), whole(3)]);
    assert_eq!(numbers(&second), (vec![], vec![2], vec![1, 3]));
    for number in 0..3 {
        first.claim.deliver(number, encoded(b"bytes"));
    }
    let third = spans.find([half(0), whole(1), half(2)]);
    assert_eq!(numbers(&third), (vec![0, 2], vec![], vec![1]));
    assert_eq!(third.here[0].1, encoded(b"bytes"));
    // all of them has been asked for
    assert_eq!(numbers(&spans.find([half(0), half(2)])).2, [0, 2]);
    assert_eq!(spans.table().bytes, 0);
}

#[tokio::test]
async fn who_waits_gets_what_has_come() {
    let spans = Spans::default();
    let mut first = spans.find([half(0), half(1)]);
    let waits = spans.wait(spans.find([half(0)]).coming);
    tokio::pin!(waits);
    assert!((&mut waits).now_or_never().is_none());
    first.claim.deliver(0, encoded(b"bytes"));
    let (here, absent) = waits.await;
    assert_eq!((here, absent), (vec![(0, encoded(b"bytes"))], vec![]));
    // both halves are done with
    assert_eq!(spans.table().kept.len(), 0);
    assert_eq!(spans.table().coming.len(), 1);
}

#[tokio::test]
async fn a_claim_that_is_dropped_lets_others_go_on_at_once() {
    let spans = Spans::default();
    let first = spans.find([half(0), half(1)]);
    let waits = spans.wait(spans.find([half(0), half(1)]).coming);
    tokio::pin!(waits);
    assert!((&mut waits).now_or_never().is_none());
    drop(first);
    let (here, absent) = waits.now_or_never().expect("there is nothing to wait for");
    assert_eq!((here, absent), (vec![], vec![half(0), half(1)]));
    // and to claim it themselves
    assert_eq!(spans.claim(&[half(0)]).open.len(), 1);
    assert!(spans.table().coming.is_empty());
}

#[tokio::test]
async fn nobody_hangs_on_a_slow_request() {
    let spans = Spans::default();
    let mut slow = spans.find([half(0), half(1), half(2)]);
    let coming = spans.find([half(0), half(1), half(2)]).coming;
    slow.claim.deliver(1, encoded(b"bytes"));
    let begun = Instant::now();
    let (here, absent) = spans.wait(coming).await;
    assert_eq!((here.len(), absent), (1, vec![half(0), half(2)]));
    assert!(begun.elapsed() >= PATIENCE);
    assert!(begun.elapsed() < 20 * PATIENCE, "once for all of them");
    // the claim is still the slow one's
    assert!(spans.claim(&[half(0)]).open.is_empty());
    slow.claim.deliver(0, encoded(b"bytes"));
    assert_eq!(numbers(&spans.find([half(0)])).0, [0]);
}

#[test]
fn what_is_kept_has_an_end() {
    let spans = Spans::default();
    let mib = vec![0; 1 << 20];
    for number in 0..40 {
        spans.deliver(number, &mib);
        assert!(spans.table().bytes <= KEPT);
    }
    let kept: Vec<_> = spans.table().ages.values().copied().collect();
    assert_eq!(kept, (24..40).collect::<Vec<_>>(), "the oldest go");
    spans.deliver(40, &vec![0; KEPT as usize + 1]);
    assert_eq!(spans.table().kept.len(), 16, "too long to be kept");
    // again: the newer one counts
    spans.deliver(24, b"new");
    spans.deliver(41, &mib);
    assert_eq!(numbers(&spans.find([half(24), half(25), half(26)])).0, [24, 26]);
    let table = spans.table();
    assert_eq!((table.kept.len(), table.ages.len(), table.bytes), (14, 14, 14 << 20));
}

#[test]
fn what_is_kept_goes_after_a_while() {
    let spans = Spans::default();
    let (begun, second) = (Instant::now(), Duration::from_secs(1));
    let bytes = encoded(b"bytes");
    let mut table = spans.table();
    table.keep(begun, half(7), bytes.clone());
    table.keep(begun + second, half(3), bytes.clone());
    table.keep(begun + 2 * second, half(5), bytes.clone());
    // it has come again
    table.keep(begun + 3 * second, half(7), bytes.clone());
    let mut left_at = |now| {
        table.expire(now);
        assert_eq!(
            (table.kept.len(), table.bytes),
            (table.ages.len(), 5 * table.ages.len() as u64)
        );
        table.ages.values().copied().collect::<Vec<_>>()
    };
    let end = begun + KEEP_FOR;
    assert_eq!(left_at(end), [3, 5, 7]);
    assert_eq!(left_at(end + second - Duration::from_nanos(1)), [3, 5, 7]);
    assert_eq!(left_at(end + second), [5, 7]);
    assert!(left_at(end + 3 * second).is_empty());
}

#[test]
fn what_has_been_kept_for_too_long_is_not_given() {
    let spans = Spans::default();
    let bytes = encoded(b"bytes");
    let begun = Instant::now().checked_sub(KEEP_FOR).unwrap();
    spans.table().keep(begun, half(0), bytes);
    spans.deliver(1, b"bytes");
    let found = spans.find([half(0), half(1)]);
    assert_eq!(numbers(&found), (vec![1], vec![], vec![0]));
    assert_eq!(found.claim.open.len(), 1, "to be fetched anew");
}

#[tokio::test]
async fn what_is_kept_goes_when_there_are_no_more_requests() {
    let spans = Arc::new(Spans::default());
    spans.tidy_later();
    assert!(!spans.table().is_tidied, "there is nothing to do");
    // not for much longer
    let begun = Instant::now().checked_sub(KEEP_FOR).unwrap() + Duration::from_millis(300);
    spans.table().keep(begun, half(0), encoded(b"bytes"));
    spans.tidy_later();
    assert!(spans.table().is_tidied);
    tidy(Arc::downgrade(&spans), Duration::from_millis(1), Spans::is_tidy).await;
    assert!(begun.elapsed() >= KEEP_FOR);
    let table = spans.0.lock().unwrap();
    assert_eq!((table.kept.len(), table.ages.len(), table.bytes), (0, 0, 0));
    assert!(!table.is_tidied, "what is kept from now on needs another task");
}

#[tokio::test]
async fn what_is_kept_goes_with_the_layer() {
    let spans = Arc::new(Spans::default());
    spans.deliver(0, b"bytes");
    let weak = Arc::downgrade(&spans);
    spans.tidy_later();
    drop(spans);
    assert!(weak.upgrade().is_none(), "the task does not hold it");
    tidy(weak, Duration::ZERO, Spans::is_tidy).await;
}

#[test]
fn what_is_wrong_is_forgotten() {
    let spans = Spans::default();
    spans.deliver(0, b"wrong");
    spans.forget(0);
    spans.forget(1);
    assert_eq!(numbers(&spans.find([half(0)])).2, [0]);
    assert_eq!(spans.table().bytes, 0);
}

proptest! {
    /// Requests that come, deliver what they will and end, in any order: nothing is claimed twice or for ever, and the books
    /// are right.
    #[test]
    fn claims_and_what_is_kept_add_up(
        steps in proptest::collection::vec((0..4usize, 0..12usize, 1..6usize, 0..5_000_000usize), 1..80),
    ) {
        let spans = Spans::default();
        let mut running: Vec<Found<'_>> = Vec::new();
        for (step, number, count, len) in steps {
            match step {
                0 | 1 => {
                    let last = number + count - 1;
                    let need = |no| if no == number || no == last { half(no) } else { whole(no) };
                    let found = spans.find((number..=last).map(need));
                    let (here, coming, absent) = numbers(&found);
                    let claimed: Vec<_> = running.iter().flat_map(|f| f.claim.open.keys()).collect();
                    prop_assert!(coming.iter().all(|number| claimed.contains(&number)));
                    prop_assert!(!found.claim.open.keys().any(|number| claimed.contains(&number)));
                    prop_assert_eq!(here.len() + coming.len() + absent.len(), count);
                    running.push(found);
                }
                2 if !running.is_empty() => {
                    let at = number % running.len();
                    let open = running[at].claim.open.keys().copied().min();
                    if let Some(number) = open {
                        running[at].claim.deliver(number, encoded(&vec![1; len]));
                    }
                }
                _ if !running.is_empty() => drop(running.swap_remove(number % running.len())),
                _ => {}
            }
            let table = spans.table();
            let open: usize = running.iter().map(|found| found.claim.open.len()).sum();
            prop_assert_eq!(table.coming.len(), open);
            let bytes: usize = table.kept.values().map(|kept| kept.encoded.len() as usize).sum();
            prop_assert_eq!(table.bytes, bytes as u64);
            prop_assert!(table.bytes <= KEPT);
            let ages = table.ages.iter().map(|(age, number)| (table.kept[number].age, *age));
            prop_assert!(ages.clone().all(|(kept, age)| kept == age));
            prop_assert_eq!(ages.count(), table.kept.len());
            prop_assert!(table.kept.values().all(|kept| kept.left > 0));
        }
        drop(running);
        prop_assert!(spans.table().coming.is_empty());
    }
}
