//! The checks. What each says is in the table of the [module](super).

use std::collections::BTreeSet;
use std::time::Duration;

use super::crowd::{Crowd, THREADS};
use super::holder::Order;
use super::{BLOCK_LEN, Block, Holder, Said, System, Taken, byte, content};
use crate::fanotify::testing::{LIMIT, Reader};
use crate::fanotify::{DenyErrno, Verdict};

const NO_SPACE: Verdict = Verdict::Deny(DenyErrno::Enospc);

/// Readers whose events have been taken by `holder`, in this order.
fn readers<S: System, const N: usize>(
    system: &S,
    holder: &mut Holder,
    blocks: [Block; N],
) -> ([Reader; N], [Taken; N]) {
    let both = blocks.map(|block| (system.reader(block), holder.take_one(block)));
    let mut taken = both.iter().map(|(_, taken)| *taken);
    let taken = [(); N].map(|()| taken.next().unwrap());
    (both.map(|(reader, _)| reader), taken)
}

fn blocks(taken: &[Taken]) -> Vec<Block> {
    taken.iter().map(|taken| taken.block).collect()
}

fn set(blocks: impl IntoIterator<Item = Block>) -> BTreeSet<Block> {
    blocks.into_iter().collect()
}

fn got_its_bytes(reader: Reader, block: Block) {
    let outcome = reader.finish();
    assert!(outcome.status.success(), "block {block}: {}", outcome.message);
    assert!(outcome.bytes == content(block), "other bytes than those of block {block}");
}

fn got_no_space(reader: Reader) {
    let outcome = reader.finish();
    assert!(outcome.message.contains("No space left"), "{outcome:?}");
}

pub(super) fn one_queue_at_a_time<S: System>() {
    let mut system = S::start();
    let mut first = system.open();
    system.expect_busy();
    let ([reader], _) = readers(&system, &mut first, [0]);
    system.expect_busy();
    first.close();
    let mut second = system.open();
    system.expect_busy();
    let again = second.take_one(0);
    second.fill(&[again]);
    got_its_bytes(reader, 0);
    second.kill();
    system.open();
}

pub(super) fn order_of_arrival<S: System>() {
    let mut system = S::start();
    let mut holder = system.open();
    let ([a, b, c, d], taken) = readers(&system, &mut holder, [5, 3, 9, 4]);
    let (mut a, mut b) = (a, b);
    assert_eq!(taken.map(|taken| taken.pid), [a.pid(), b.pid(), c.pid(), d.pid()]);
    holder.fill(&[taken[3]]);
    got_its_bytes(d, 4);
    holder.answer(taken[2].event, NO_SPACE);
    got_no_space(c);
    assert!(a.is_blocked() && b.is_blocked());
    holder.fill(&taken[..2]);
    got_its_bytes(a, 5);
    got_its_bytes(b, 3);
    assert!(holder.is_quiet());
}

pub(super) fn requeued_on_close<S: System>() {
    requeued_when_the_holder_ends::<S>(Holder::close);
}

pub(super) fn requeued_on_kill<S: System>() {
    requeued_when_the_holder_ends::<S>(Holder::kill);
}

fn requeued_when_the_holder_ends<S: System>(end: impl FnOnce(Holder)) {
    let mut system = S::start();
    let mut first = system.open();
    let ([mut a, mut b, mut c], before) = readers(&system, &mut first, [7, 2, 5]);
    end(first);
    assert!(a.is_blocked() && b.is_blocked() && c.is_blocked());
    let mut second = system.open();
    let after = second.take(3);
    assert_eq!(blocks(&after), [7, 2, 5]);
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.pid, after.pid);
    }
    assert!(a.is_blocked() && b.is_blocked() && c.is_blocked());
    second.answer(after[1].event, NO_SPACE);
    second.fill(&[after[2], after[0]]);
    got_its_bytes(a, 7);
    got_no_space(b);
    got_its_bytes(c, 5);
    assert!(second.is_quiet(), "each came back once");
}

pub(super) fn requeued_after_a_partial_read<S: System>() {
    let mut system = S::start();
    let mut first = system.open();
    let ([a, b, c], taken) = readers(&system, &mut first, [7, 2, 5]);
    let (d, e) = (system.reader(1), system.reader(9));
    first.expect_event();
    first.fill(&[taken[1]]);
    got_its_bytes(b, 2);
    first.kill();
    let mut second = system.open();
    let again = second.take(4);
    assert_eq!(blocks(&again[..2]), [7, 5]);
    assert_eq!(set(blocks(&again[2..])), set([1, 9]), "these arrived at about the same time");
    second.fill(&again);
    for (reader, block) in [(a, 7), (c, 5), (d, 1), (e, 9)] {
        got_its_bytes(reader, block);
    }
}

pub(super) fn requeued_again_and_again<S: System>() {
    let mut system = S::start();
    let mut holder = system.open();
    let order = [4, 8, 1, 6];
    let (readers, _) = readers(&system, &mut holder, order);
    for taken in [1, 3, 0, 4] {
        holder.kill();
        holder = system.open();
        assert_eq!(blocks(&holder.take(taken)), order[..taken]);
    }
    holder.close();
    let mut last = system.open();
    let taken = last.take(4);
    assert_eq!(blocks(&taken), order);
    last.fill(&taken);
    for (reader, block) in readers.into_iter().zip(order) {
        got_its_bytes(reader, block);
    }
}

pub(super) fn new_events_come_last<S: System>() {
    let mut system = S::start();
    let mut first = system.open();
    let ([a, b], _) = readers(&system, &mut first, [4, 1]);
    let c = system.reader(0);
    first.expect_event();
    first.kill();
    let mut d = system.reader(6);
    assert!(d.is_blocked());
    let mut second = system.open();
    let taken = second.take(4);
    assert_eq!(blocks(&taken), [4, 1, 0, 6]);
    let (readers_later, later) = readers(&system, &mut second, [3]);
    second.fill(&taken);
    second.fill(&later);
    let [e] = readers_later;
    for (reader, block) in [(a, 4), (b, 1), (c, 0), (d, 6), (e, 3)] {
        got_its_bytes(reader, block);
    }
}

pub(super) fn answered_is_answered<S: System>() {
    let mut system = S::start();
    let mut first = system.open();
    let ([a, mut b], taken) = readers(&system, &mut first, [3, 6]);
    first.fill(&taken[..1]);
    // whether the answer has arrived by then or not
    first.kill();
    got_its_bytes(a, 3);
    let mut second = system.open();
    let again = second.take_one(6);
    assert!(second.is_quiet() && b.is_blocked());
    second.fill(&[again]);
    got_its_bytes(b, 6);
}

pub(super) fn only_events_in_hand_can_be_answered<S: System>() {
    let mut system = S::start();
    let mut first = system.open();
    let refused = |said| assert!(matches!(said, Said::Refused | Said::Sent), "{said:?}");
    let ([a], [before]) = readers(&system, &mut first, [1]);
    let mut a = a;
    first.kill();
    let mut second = system.open();
    if S::NEW_IDS {
        second.expect_event();
        assert_eq!(second.answer(before.event, NO_SPACE), Said::Refused);
        assert!(a.is_blocked());
    }
    let again = second.take_one(1);
    refused(second.answer(1_000_000, NO_SPACE));
    // its answer comes after that one
    second.fill(&[again]);
    got_its_bytes(a, 1);
    let (mut b, mut c) = (system.reader(2), system.reader(3));
    second.expect_event();
    refused(second.answer(again.event, NO_SPACE));
    let taken = second.take(2);
    assert!(b.is_blocked() && c.is_blocked());
    second.fill(&taken);
    got_its_bytes(b, 2);
    got_its_bytes(c, 3);
}

/// The reader of block 0 was killed; reader of block 1 lives. `comes`: its event is given out all the same.
fn the_other_is_served(holder: &mut Holder, other: Reader, comes: bool) {
    let mut taken = holder.take(1 + usize::from(comes));
    if comes {
        let dead = taken.remove(0);
        assert_eq!(dead.block, 0);
        holder.answer(dead.event, NO_SPACE);
    }
    assert_eq!(blocks(&taken), [1]);
    holder.fill(&taken);
    got_its_bytes(other, 1);
    assert!(holder.is_quiet());
}

pub(super) fn reader_killed_while_queued<S: System>() {
    let mut system = S::start();
    let mut holder = system.open();
    let mut dead = system.reader(0);
    holder.expect_event();
    dead.kill();
    assert_eq!(holder.poll(Duration::ZERO), !S::FORGETS_THE_DEAD);
    let other = system.reader(1);
    the_other_is_served(&mut holder, other, !S::FORGETS_THE_DEAD);
}

pub(super) fn reader_killed_in_flight<S: System>() {
    let mut system = S::start();
    let mut holder = system.open();
    let ([mut dead], [taken]) = readers(&system, &mut holder, [0]);
    dead.kill();
    let ([other], [other_taken]) = readers(&system, &mut holder, [1]);
    // the kernel takes it, once, for the reader that is gone
    holder.answer(taken.event, NO_SPACE);
    assert_ne!(holder.answer(taken.event, NO_SPACE), Said::Delivered);
    holder.fill(&[other_taken]);
    got_its_bytes(other, 1);
    // its block is nobody's now: the next reader is a reader like all
    let ([late], late_taken) = readers(&system, &mut holder, [0]);
    holder.fill(&late_taken);
    got_its_bytes(late, 0);
}

pub(super) fn reader_killed_before_the_holder<S: System>() {
    let mut system = S::start();
    let mut first = system.open();
    let ([mut dead, other], _) = readers(&system, &mut first, [0, 1]);
    dead.kill();
    first.kill();
    let mut second = system.open();
    the_other_is_served(&mut second, other, !S::FORGETS_THE_DEAD);
}

pub(super) fn reader_killed_between_two_holders<S: System>() {
    let mut system = S::start();
    let mut first = system.open();
    let ([mut dead, other], _) = readers(&system, &mut first, [0, 1]);
    first.kill();
    dead.kill();
    let mut second = system.open();
    the_other_is_served(&mut second, other, !S::FORGETS_THE_DEAD);
}

pub(super) fn poll_tells_of_events<S: System>() {
    let mut system = S::start();
    let mut first = system.open();
    assert!(first.is_quiet());
    // who waits already is woken
    first.line.send(&Order::Poll(LIMIT.as_millis() as u64));
    std::thread::sleep(Duration::from_millis(50));
    let reader = system.reader(0);
    assert!(first.line.recv::<bool>().unwrap());
    assert!(first.poll(Duration::ZERO), "until it is taken");
    first.take_one(0);
    assert!(first.is_quiet(), "what was taken is not there");
    first.kill();
    let mut second = system.open();
    second.expect_event();
    let again = second.take_one(0);
    assert!(second.is_quiet());
    second.fill(&[again]);
    got_its_bytes(reader, 0);
    assert!(second.is_quiet());
    let _waiting = system.reader(1);
    second.expect_event();
    second.take_one(1);
    system.close_control();
    assert!(second.poll(LIMIT), "the end can be read");
}

pub(super) fn end_of_file_without_control<S: System>() {
    let mut system = S::start();
    let mut holder = system.open();
    let ([held], [taken]) = readers(&system, &mut holder, [0]);
    let waiting = system.reader(1);
    holder.expect_event();
    system.close_control();
    holder.take_to_the_end();
    assert_eq!(holder.answer(taken.event, NO_SPACE), Said::Refused);
    // zeros: why somebody must keep a copy of the control fd
    for reader in [held, waiting] {
        assert_eq!(reader.finish().bytes, [0; BLOCK_LEN as usize]);
    }
}

/// Few of them are answered: an answer wakes all readers that wait in the group, of which all but one
/// sleep on (`access_waitq` in `fs/notify/fanotify/fanotify.c:fanotify_get_response`).
pub(super) fn ten_thousand_events<S: System>() {
    const READERS: u64 = 10_000;
    const PART: usize = 4000;
    let mut system = S::start();
    let mut first = system.open();
    let mut crowd = Crowd::start(system.directory(), system.segment(), 0..READERS);
    let part = blocks(&first.take(PART));
    first.kill();
    let mut second = system.open();
    let all = second.take(READERS as usize);
    let order = blocks(&all);
    assert!(order[..PART] == part, "another order after the first holder's end");
    assert_eq!(set(order.iter().copied()), set(0..READERS));
    // four for each of the crowd's programs
    let (answered, rest): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|taken| taken.block % (THREADS / 4) == 0);
    second.answer(answered[0].event, NO_SPACE);
    second.fill(&answered[1..]);
    for (block, outcome) in crowd.outcomes(4) {
        let denied = block == answered[0].block;
        assert_eq!(outcome, if denied { Err(libc::ENOSPC) } else { Ok(byte(block)) });
    }
    second.kill();
    let mut third = system.open();
    let taken = third.take(rest.len());
    assert!(blocks(&taken) == blocks(&rest), "another order after the second holder's end");
    crowd.kill();
    let ([late], late_taken) = readers(&system, &mut third, [READERS]);
    third.fill(&late_taken);
    got_its_bytes(late, READERS);
    third.kill();
    let mut last = system.open();
    if S::FORGETS_THE_DEAD {
        assert!(last.is_quiet());
    } else {
        assert_eq!(blocks(&last.take(rest.len())), blocks(&rest));
    }
}
