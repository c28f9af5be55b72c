//! The worker against a supervisor made of socket pairs, real files and a source that does what it
//! is told.

mod harness;

use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::*;
use crate::object::{HashKind, ObjectId};
use crate::queue::wire::Run;
use crate::range::BLOCK;
use crate::segment::frame::FIRST_ENTRY;
use harness::{Fault, Setup, Supervisor};

const EIO: Verdict = Verdict::Deny(DenyErrno::Eio);

fn quiet() -> Limits {
    Limits { read_ahead: false, ..Limits::default() }
}

#[tokio::test]
async fn a_reader_gets_its_bytes() {
    let setup = Setup::new(&[5000, 0, 10, 4096]);
    let mut s = Supervisor::start(&setup, quiet()).await;
    s.event(1, 1, ByteRange::new(8192, 4096)).await;
    assert_eq!(s.answer().await, (1, Verdict::Allow));
    setup.assert_present(&[false, true, true, false]);
    s.event(2, 1, ByteRange::new(0, 16384)).await;
    assert_eq!(s.answer().await, (2, Verdict::Allow));
    setup.assert_present(&[true; 4]);
    assert_eq!(setup.source.requests().len(), 2);
    let complete = s.until(|m| matches!(m, FromWorker::Complete { .. })).await;
    assert_eq!(complete, FromWorker::Complete { segment: SegmentId(1) });
    // What the last report did not have comes with the next.
    while s.counters.objects < 3 {
        s.until(|m| matches!(m, FromWorker::Report { .. })).await;
    }
    assert_eq!((s.counters.requests, s.counters.objects), (2, 3));
    assert_eq!((s.counters.content_bytes, s.counters.received_bytes), (9106, 9106));
    assert_eq!(s.counters.sent_bytes, 3, "one for each key");
    // what is there needs nobody
    s.event(3, 1, ByteRange::new(0, 16384)).await;
    assert_eq!(s.answer().await, (3, Verdict::Allow));
    assert_eq!(setup.source.requests().len(), 2);
    s.stop().await;
}

#[tokio::test]
async fn a_thousand_readers_of_different_objects() {
    let setup = Setup::new(&[1000; 1000]);
    let mut s = Supervisor::start(&setup, Limits::default()).await;
    setup.source.delay(Duration::from_millis(20));
    for n in 0..1000 {
        s.event(n, 1, ByteRange::new(n * BLOCK, BLOCK)).await;
    }
    let mut answered = s.answers(1000).await;
    answered.sort_by_key(|(event, _)| *event);
    assert!(answered.iter().zip(0..).all(|(answer, n)| *answer == (n, Verdict::Allow)));
    setup.assert_present(&[true; 1000]);
    let requests = setup.source.requests();
    assert!(requests.len() < 60, "{}", requests.len());
    // Impatience with a small read-ahead request is all that may ask twice.
    assert!(setup.source.fetched_more_than_once() <= 20);
    s.stop().await;
}

#[tokio::test]
async fn a_thousand_readers_of_one_object() {
    let setup = Setup::new(&[100_000, 1]);
    let mut s = Supervisor::start(&setup, Limits::default()).await;
    setup.source.delay(Duration::from_millis(50));
    for n in 0..1000 {
        s.event(n, 1, ByteRange::new((n % 25) * BLOCK, BLOCK)).await;
    }
    assert!(s.answers(1000).await.iter().all(|(_, verdict)| *verdict == Verdict::Allow));
    assert_eq!(setup.source.requests().len(), 1);
    setup.assert_present(&[true, false]);
    s.stop().await;
}

#[tokio::test]
async fn large_objects_go_through_a_spool_file() {
    let size = crate::source::SPOOL_FROM + 12_345;
    let setup = Setup::new(&[10, size, 10]);
    let mut s = Supervisor::start(&setup, quiet()).await;
    s.event(1, 1, ByteRange::new(5 << 20, BLOCK)).await;
    assert_eq!(s.answer().await, (1, Verdict::Allow));
    setup.assert_present(&[false, true, false]);
    s.stop().await;
}

#[tokio::test]
async fn faults_are_retried_and_told() {
    let setup = Setup::new(&[10, 20, 30]);
    let mut s = Supervisor::start(&setup, quiet()).await;
    setup.source.fault(Fault::Retry);
    setup.source.fault(Fault::CutShort);
    setup.source.fault(Fault::Wrong);
    s.event(1, 1, ByteRange::new(0, 3 * BLOCK)).await;
    assert_eq!(s.answer().await, (1, Verdict::Allow));
    setup.assert_present(&[true; 3]);
    assert!(s.waiting.contains(&(1, "connection reset".to_owned())), "{:?}", s.waiting);
    let trouble = s.until(|m| matches!(m, FromWorker::Trouble { .. })).await;
    let FromWorker::Trouble { message, .. } = trouble else { unreachable!() };
    assert_eq!(message, "connection reset");
    let over = FromWorker::Trouble { pool: PoolId(1), message: String::new() };
    s.until(|m| *m == over).await;
    s.stop().await;
}

#[tokio::test]
async fn refusals_become_errnos() {
    let setup = Setup::new(&[10, 20, 30]);
    let mut s = Supervisor::start(&setup, quiet()).await;
    setup.source.fault(Fault::Refused);
    s.event(1, 1, ByteRange::new(0, BLOCK)).await;
    assert_eq!(s.answer().await, (1, EIO));
    assert_eq!(s.reason, "403 Forbidden");
    // the one that is missing, not those beside it
    setup.source.fault(Fault::Missing(1));
    s.event(2, 1, ByteRange::new(0, 2 * BLOCK)).await;
    assert_eq!(s.answer().await, (2, EIO));
    setup.source.fault(Fault::Missing(1));
    s.event(3, 1, ByteRange::new(BLOCK, BLOCK)).await;
    assert_eq!(s.answer().await, (3, EIO));
    assert!(s.reason.contains("does not give object"), "{}", s.reason);
    for _ in 0..3 {
        setup.source.fault(Fault::Wrong);
    }
    s.event(4, 1, ByteRange::new(2 * BLOCK, BLOCK)).await;
    assert_eq!(s.answer().await, (4, EIO));
    assert!(s.reason.contains("wrong data"), "{}", s.reason);
    setup.source.fault(Fault::Full);
    s.event(5, 1, ByteRange::new(2 * BLOCK, BLOCK)).await;
    assert_eq!(s.answer().await, (5, Verdict::Deny(DenyErrno::Enospc)));
    // and none of that sticks
    s.event(6, 1, ByteRange::new(0, 3 * BLOCK)).await;
    assert_eq!(s.answer().await, (6, Verdict::Allow));
    setup.assert_present(&[true; 3]);
    s.stop().await;
}

#[tokio::test]
async fn a_stalled_origin_is_given_up_and_the_deadline_holds() {
    let setup = Setup::new(&[10]);
    let limits = Limits { stall_secs: 1, deadline_secs: 3, ..quiet() };
    let mut s = Supervisor::start(&setup, limits).await;
    setup.source.fault(Fault::Stall);
    s.event(1, 1, ByteRange::new(0, BLOCK)).await;
    assert_eq!(s.answer().await, (1, Verdict::Allow), "the second try");
    setup.source.all(Fault::Stall);
    setup.data.set_len(0).unwrap();
    setup.data.set_len(BLOCK).unwrap();
    s.event(2, 1, ByteRange::new(0, BLOCK)).await;
    assert_eq!(s.answer().await, (2, EIO));
    assert!(s.reason.starts_with("gave up after 3 s: the origin has sent nothing"), "{}", s.reason);
    s.stop().await;
}

#[tokio::test]
async fn a_slow_line_is_no_fault() {
    let setup = Setup::new(&[10, 20]);
    let limits = Limits { stall_secs: 1, deadline_secs: 1, connections: 1, ..quiet() };
    let mut s = Supervisor::start(&setup, limits).await;
    setup.source.fault(Fault::Slow(45));
    s.event(1, 1, ByteRange::new(0, BLOCK)).await;
    s.event(2, 1, ByteRange::new(BLOCK, BLOCK)).await;
    assert_eq!(s.answers(2).await, [(1, Verdict::Allow), (2, Verdict::Allow)]);
    let told = |event, with: &str| {
        s.waiting.iter().any(|(of, reason)| *of == event && reason.contains(with))
    };
    assert!(told(1, "bytes have come, for 10 bytes of content"), "{:?}", s.waiting);
    assert!(told(2, "in line"), "{:?}", s.waiting);
    setup.assert_present(&[true, true]);
    s.stop().await;
}

#[tokio::test]
async fn nothing_that_vanished_is_taken_for_present() {
    let setup = Setup::new(&[10, 10]);
    let mut s = Supervisor::start(&setup, quiet()).await;
    s.event(1, 1, ByteRange::new(0, 2 * BLOCK)).await;
    assert_eq!(s.answer().await, (1, Verdict::Allow));
    // evicted behind the worker's back
    setup.data.set_len(0).unwrap();
    setup.data.set_len(2 * BLOCK).unwrap();
    s.event(2, 1, ByteRange::new(BLOCK, BLOCK)).await;
    assert_eq!(s.answer().await, (2, Verdict::Allow));
    setup.assert_present(&[false, true]);
    s.stop().await;
}

#[tokio::test]
async fn gaps_between_objects_are_filled() {
    let setup = Setup::with_gap(&[10, 10], 3 * BLOCK);
    let mut s = Supervisor::start(&setup, quiet()).await;
    let size = setup.data.metadata().unwrap().len();
    s.event(1, 1, ByteRange::new(0, size)).await;
    assert_eq!(s.answer().await, (1, Verdict::Allow));
    let whole = ByteRange::new(0, size);
    assert!(crate::worker::pool::holes(&setup.data, whole).unwrap().is_empty());
    s.until(|m| matches!(m, FromWorker::Complete { .. })).await;
    s.stop().await;
}

#[tokio::test]
async fn the_existence_pack_is_made_of_the_objects() {
    let setup = Setup::new(&[10, 20, 70_000, 5000, 4096]);
    let (pack_file, index, expected) = setup.pack(2);
    let mut s = Supervisor::start(&setup, quiet()).await;
    s.attach(2, &pack_file, &index).await;
    // a window in the middle needs what it repeats, not more
    s.event(1, 2, ByteRange::new(FIRST_ENTRY + 7 * BLOCK, BLOCK)).await;
    assert_eq!(s.answer().await, (1, Verdict::Allow));
    setup.assert_present(&[false, false, true, false, false]);
    s.event(2, 2, ByteRange::new(0, expected.len() as u64)).await;
    assert_eq!(s.answer().await, (2, Verdict::Allow));
    let mut made = vec![0; expected.len()];
    pack_file.read_exact_at(&mut made, 0).unwrap();
    assert!(made == expected);
    let pack_complete = FromWorker::Complete { segment: SegmentId(2) };
    s.until(|m| *m == pack_complete).await;
    s.stop().await;
}

#[tokio::test]
async fn prefetch_brings_all_and_says_so() {
    let setup = Setup::new(&[1000; 9000]);
    let mut s = Supervisor::start(&setup, Limits::default()).await;
    let segment = SegmentId(1);
    let runs = vec![Run { first: 5, count: u32::MAX }];
    s.control(&ToWorker::Prefetch { request: 7, segment, runs }).await;
    let done = s.until(|m| matches!(m, FromWorker::PrefetchDone { .. })).await;
    assert_eq!(done, FromWorker::PrefetchDone { request: 7, result: Ok(()) });
    let present = std::iter::repeat_n(false, 5).chain(std::iter::repeat_n(true, 8995));
    setup.assert_present(&present.collect::<Vec<_>>());
    assert!(setup.source.requests().len() <= 4, "{}", setup.source.requests().len());
    let runs = vec![Run { first: 0, count: 1 }];
    s.control(&ToWorker::Prefetch { request: 8, segment: SegmentId(99), runs }).await;
    let done = s.until(|m| matches!(m, FromWorker::PrefetchDone { .. })).await;
    assert!(matches!(done, FromWorker::PrefetchDone { request: 8, result: Err(_) }));
    s.stop().await;
}

#[tokio::test]
async fn read_ahead_follows_a_reader() {
    let setup = Setup::new(&[1000; 600]);
    let mut s = Supervisor::start(&setup, Limits::default()).await;
    setup.source.delay(Duration::from_millis(2));
    for n in 0..600 {
        let range = ByteRange::new(n * BLOCK, BLOCK);
        if crate::worker::pool::holes(&setup.data, range).unwrap().is_empty() {
            s.queue(&ToQueue::Touched { segment: SegmentId(1), range }).await;
        } else {
            s.event(n, 1, range).await;
            assert_eq!(s.answer().await, (n, Verdict::Allow));
        }
    }
    setup.assert_present(&[true; 600]);
    let requests = setup.source.requests();
    assert!(requests.len() < 80, "{}", requests.len());
    assert!(setup.source.fetched_more_than_once() < 10);
    s.stop().await;
}

#[tokio::test]
async fn ends_and_strangers() {
    let setup = Setup::new(&[10, 10]);
    let mut s = Supervisor::start(&setup, quiet()).await;
    s.event(1, 77, ByteRange::new(0, BLOCK)).await;
    assert_eq!(s.answer().await, (1, EIO));
    assert_eq!(s.reason, "segment 77 is not attached");
    // cancelled: no answer
    setup.source.all(Fault::Stall);
    s.event(2, 1, ByteRange::new(0, BLOCK)).await;
    s.event(3, 1, ByteRange::new(0, BLOCK)).await;
    s.queue(&ToQueue::Cancelled { event: EventId(2) }).await;
    // so that the two sockets are in step
    s.event(4, 77, ByteRange::new(0, BLOCK)).await;
    assert_eq!(s.answer().await, (4, EIO));
    s.control(&ToWorker::Detach { pool: PoolId(1) }).await;
    assert_eq!(s.answer().await, (3, EIO));
    assert_eq!(s.reason, "its tree is being removed");
    s.stop().await;
}

#[tokio::test]
async fn complete_segments_are_told_at_once_and_twice_is_refused() {
    let setup = Setup::new(&[10]);
    setup.data.write_all_at(&[1; 4096], 0).unwrap();
    let mut s = Supervisor::start(&setup, quiet()).await;
    s.until(|m| matches!(m, FromWorker::Complete { .. })).await;
    let error = s.try_attach(1, &setup.data, &setup.index).await.unwrap_err();
    assert!(error.contains("attached already"), "{error}");
    s.stop().await;
}

#[tokio::test]
async fn sources_reach_the_supervisor() {
    let setup = Setup::new(&[10]);
    let mut s = Supervisor::start(&setup, quiet()).await;
    setup.source.fault(Fault::AskTransport);
    s.event(1, 1, ByteRange::new(0, BLOCK)).await;
    let ask = s.until(|m| matches!(m, FromWorker::NeedTransport { .. })).await;
    let FromWorker::NeedTransport { request, pool: PoolId(1) } = ask else { panic!("{ask:?}") };
    let message = ToWorker::Transport { request, result: Err("no such repository".into()) };
    s.control(&message).await;
    assert_eq!(s.answer().await, (1, EIO));
    assert_eq!(s.reason, "no such repository");
    setup.source.fault(Fault::AskCredential);
    s.event(2, 1, ByteRange::new(0, BLOCK)).await;
    let ask = s.until(|m| matches!(m, FromWorker::NeedCredential { .. })).await;
    let FromWorker::NeedCredential { request, url, .. } = ask else { panic!("{ask:?}") };
    assert_eq!(url, "http://origin/");
    s.control(&ToWorker::Credential { request, result: Ok(None) }).await;
    assert_eq!(s.answer().await, (2, EIO));
    assert_eq!(s.reason, "no credential");
    s.stop().await;
}

#[tokio::test]
async fn ends_when_the_supervisor_is_gone_and_refuses_another_version() {
    let setup = Setup::new(&[10]);
    let s = Supervisor::start(&setup, quiet()).await;
    assert!(s.hang_up().await.is_ok());
    let version = Supervisor::version(&setup, 99).await;
    assert!(matches!(version, Err(RunError::Version(99))));
}

#[test]
fn long_reasons_are_cut() {
    assert_eq!(shortened("ä".repeat(2000)).len(), 1000);
    let key = ObjectId::of_blob(HashKind::Sha1, b"");
    let error = PoolErrorText(key);
    assert_eq!(chain(&error), format!("outer: {key}"));
}

#[derive(Debug, thiserror::Error)]
#[error("outer: {0}")]
struct PoolErrorText(ObjectId);

/// A worker of which nothing is asked waits, however long it has run.
#[tokio::test]
async fn without_a_time_there_is_no_end() {
    let long_ago = Instant::now() - Duration::from_secs(3);
    until(Some(long_ago)).await;
    let moment = Duration::from_millis(20);
    assert!(tokio::time::timeout(moment, until(None)).await.is_err());
}
