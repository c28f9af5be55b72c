//! The semantics of control fd and queue fd, as checks that both queues pass.
//!
//! A [`System`] has one *control side*, which guards a segment, and of which a *queue* can be opened,
//! once at a time. Who holds the queue takes events and answers them, and may end at any moment. The
//! [checks] say what readers and the next holder see then. They run against
//!
//! - the kernel's queue ([`kernel::KernelSystem`]): the control fd and the fd that its ioctl opens, in a
//!   kernel with restartable events (tests named `guest_conformance`);
//! - the brokered queue ([`brokered::BrokeredSystem`]): a supervisor with a real [`Shard`] over a
//!   stock group, in whose place of a worker the holder is (tests named `root_conformance`).
//!
//! | what holds for both | check |
//! |---|---|
//! | One queue at a time; the next can be opened when the one before is closed | `one_queue_at_a_time` |
//! | Events come in the order in which they arrived, and are answered in any order; an answer reaches its own reader | `order_of_arrival` |
//! | What a holder had and did not answer goes back when it closes the queue, in the order of reading | `requeued_on_close` |
//! | The same when it is killed with SIGKILL | `requeued_on_kill` |
//! | Also if only some had been read, and some of these answered | `requeued_after_a_partial_read` |
//! | And again at each holder's end, in the same order | `requeued_again_and_again` |
//! | What has arrived meanwhile, or arrives then, comes after what was requeued | `new_events_come_last` |
//! | What was answered before the holder's end stays answered | `answered_is_answered` |
//! | Only what a holder has can be answered, and only once: other ids reach nobody | `only_events_in_hand_can_be_answered` |
//! | A reader that is killed harms nobody, and its answer reaches nobody: killed while its event is queued, ... | `reader_killed_while_queued` |
//! | ... while a holder has it, ... | `reader_killed_in_flight` |
//! | ... while a holder has it that ends before the answer, ... | `reader_killed_before_the_holder` |
//! | ... or between two holders | `reader_killed_between_two_holders` |
//! | The queue can be read from exactly when there is an event; a new one at once if any were requeued | `poll_tells_of_events` |
//! | Without a control side the queue is at its end, and readers are let go | `end_of_file_without_control` |
//! | All that with 10,000 events at once | `ten_thousand_events` |
//!
//! | where they differ | kernel | brokered |
//! |---|---|---|
//! | A second queue | `EEXIST` (`EBUSY` is taken as well); also as long as a copy of the queue fd is open elsewhere (`guest_one_queue_at_a_time` of `fanotify/guest_tests.rs`) | the shard starts no second worker; what matters is its process, copies of the socket don't |
//! | An event's id after it was requeued | new: it is the number of its fd. The old one is refused | the same. But it comes from the next holder's own socket only |
//! | The events of readers that were killed ([`System::FORGETS_THE_DEAD`]) | are not given out any more | are given out: only the answer finds out |
//! | The end of the control side | the queue is at its end | so it is, but the supervisor's end is also that of its workers (`PR_SET_PDEATHSIG`) |
//! | An event at whose holders' ends it was always in hand | is requeued for ever. [`KernelQueue`](super::kernel::KernelQueue) denies it by the strikes in the in-flight table | is denied after [`MAX_STRIKES`](super::broker::MAX_STRIKES) ends that were the worker's own fault |
//! | What is there already by the time the event is read | the holder sees it | the supervisor answers it |
//!
//! The same semantics without any kernel, against a model: [`super::model`].
//!
//! [`Shard`]: crate::supervisor::shard::Shard

mod brokered;
mod checks;
mod crowd;
mod holder;
mod intruder;
mod kernel;
mod line;
mod programs;
mod takeover;

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::fanotify::Verdict;
use crate::fanotify::testing::{LIMIT, Reader, range};
use crate::range::BLOCK as BLOCK_LEN;
use crate::sys::spawn::Child;
use holder::{Hello, Loot, Order};
use line::Line;

/// The number of a block of the segment. Each reader has its own.
type Block = u64;

/// How many the segment has.
const BLOCKS: Block = 1 << 14;

/// What a block is filled with.
fn content(block: Block) -> Vec<u8> {
    vec![byte(block); BLOCK_LEN as usize]
}

fn byte(block: Block) -> u8 {
    (block % 251) as u8 + 1
}

/// An event in a holder's hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Taken {
    /// By which the holder answers.
    event: u64,
    block: Block,
    pid: i32,
}

/// What a holder knows of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Said {
    Delivered,
    Refused,
    /// It will not be told.
    Sent,
}

/// A control side, and what it guards: a segment of [`BLOCKS`] blocks, all of them missing.
trait System: Sized {
    /// The event of a reader that was killed is not given out any more.
    const FORGETS_THE_DEAD: bool;
    /// A requeued event has a new id.
    const NEW_IDS: bool;

    fn start() -> Self;
    /// For sockets and the like.
    fn directory(&self) -> &Path;
    fn segment(&self) -> &Path;
    /// The queue, in the hands of a new process. The holder before has been killed or has closed it.
    fn open(&mut self) -> Holder;
    /// Fails unless a second queue is refused now.
    fn expect_busy(&mut self);
    /// Ends the control side.
    fn close_control(&mut self);

    fn reader(&self, block: Block) -> Reader {
        Reader::start(self.segment(), range(block * BLOCK_LEN, BLOCK_LEN))
    }
}

/// The process that has the queue. Ends when this goes out of scope.
#[derive(Debug)]
struct Holder {
    line: Line,
    pid: i32,
    /// `None`: it is the shard's.
    child: Option<Child>,
}

impl Holder {
    fn new(mut line: Line, child: Option<Child>) -> Self {
        let Hello { pid } = line.recv().expect("a holder greets");
        let mut holder = Self { line, pid, child };
        let () = holder.ask(&Order::Begin);
        holder
    }

    fn ask<T: DeserializeOwned>(&mut self, order: &Order) -> T {
        self.line.send(order);
        self.line.recv().expect("the holder lives")
    }

    /// Takes exactly so many events.
    fn take(&mut self, count: usize) -> Vec<Taken> {
        let Loot { taken, ended } = self.ask(&Order::Take(count));
        assert!(!ended, "the queue has ended");
        assert_eq!(taken.len(), count, "not all came");
        taken
    }

    /// Takes the event of a reader that has just been started.
    fn take_one(&mut self, block: Block) -> Taken {
        let taken = self.take(1)[0];
        assert_eq!(taken.block, block);
        taken
    }

    /// Takes what is left, up to the end.
    fn take_to_the_end(&mut self) {
        let loot: Loot = self.ask(&Order::Take(100));
        assert!(loot.ended, "{loot:?}");
    }

    /// Nothing can be taken, in a time in which something would have come.
    fn is_quiet(&mut self) -> bool {
        !self.poll(Duration::from_millis(100))
    }

    fn poll(&mut self, limit: Duration) -> bool {
        self.ask(&Order::Poll(limit.as_millis() as u64))
    }

    /// An event has come, and waits to be taken.
    fn expect_event(&mut self) {
        assert!(self.poll(LIMIT), "no event comes");
    }

    fn answer(&mut self, event: u64, verdict: Verdict) -> Said {
        self.ask(&Order::Answer(event, verdict))
    }

    /// Gives readers their blocks.
    fn fill(&mut self, events: &[Taken]) -> Vec<Said> {
        self.ask(&Order::Fill(events.iter().map(|taken| taken.event).collect()))
    }

    /// Closes the queue, by an orderly end.
    fn close(self) {
        let Self { line, child, .. } = self;
        drop(line);
        if let Some(mut child) = child {
            assert!(child.wait_blocking().unwrap().success());
        }
    }

    /// With SIGKILL.
    fn kill(self) {
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).unwrap();
        if let Some(mut child) = self.child {
            child.wait_blocking().unwrap();
        }
    }
}

/// All checks, for one system.
macro_rules! conformance {
    ($system:ty, $needs:literal) => {
        conformance! {
            $system, $needs:
            one_queue_at_a_time,
            order_of_arrival,
            requeued_on_close,
            requeued_on_kill,
            requeued_after_a_partial_read,
            requeued_again_and_again,
            new_events_come_last,
            answered_is_answered,
            only_events_in_hand_can_be_answered,
            reader_killed_while_queued,
            reader_killed_in_flight,
            reader_killed_before_the_holder,
            reader_killed_between_two_holders,
            poll_tells_of_events,
            end_of_file_without_control,
            ten_thousand_events,
        }
    };
    ($system:ty, $needs:literal: $($check:ident,)*) => {
        $(
            #[test]
            #[ignore = $needs]
            fn $check() {
                super::checks::$check::<$system>();
            }
        )*
    };
}

mod guest_conformance {
    conformance!(super::kernel::KernelSystem, "needs the guest kernel");
}

mod root_conformance {
    conformance!(super::brokered::BrokeredSystem, "needs root");
}
