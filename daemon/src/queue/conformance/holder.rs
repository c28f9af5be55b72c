//! The process that holds a queue, and does nothing but what a check tells it.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::line::Line;
use super::{BLOCK_LEN, Block, Said, Taken, content};
use crate::fanotify::testing::{LIMIT, readable};
use crate::fanotify::{Answered, Channel, Event, PermissionEvent, Read, Verdict, answer_number};
use crate::ids::EventId;
use crate::queue::wire::{self, FromQueue, FromWorker, ToQueue, ToWorker};
use crate::sys::limits;
use crate::sys::seqpacket;
use crate::sys::spawn::inherited;

/// Its roles.
pub(super) const KERNEL: &str = "holder of a kernel queue";
pub(super) const BROKERED: &str = "holder of a brokered queue";

/// The first word of a holder.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) pid: i32,
}

/// What a holder is told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Take the queue.
    Begin,
    /// Take so many events, waiting for them. Answered with a [`Loot`].
    Take(usize),
    /// Say whether something can be read, waiting so many milliseconds for it. Answered with a bool.
    Poll(u64),
    /// Answered with [`Said`].
    Answer(u64, Verdict),
    /// Write the blocks of these events, and allow. Answered with a list of [`Said`].
    Fill(Vec<u64>),
}

/// What came out of a queue.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Loot {
    pub(super) taken: Vec<Taken>,
    /// There will be no more.
    pub(super) ended: bool,
}

/// The holder's end of a queue.
trait End {
    /// Leaves what was taken to the next holder.
    fn leave(self: Box<Self>);
    fn fd(&self) -> BorrowedFd<'_>;
    /// Reads what is there, up to `count` events. `false`: that was the end.
    fn read(&mut self, count: usize, into: &mut Vec<Taken>) -> bool;
    fn answer(&mut self, event: u64, verdict: Verdict) -> Said;
    fn fill(&mut self, event: u64) -> Said;
}

fn serve(open: impl FnOnce() -> Box<dyn End>) {
    let mut line = Line::connect();
    limits::raise_open_files().unwrap();
    line.send(&Hello { pid: std::process::id().cast_signed() });
    let Some(Order::Begin) = line.recv() else { return };
    let mut end = open();
    line.send(&());
    while let Some(order) = line.recv() {
        match order {
            Order::Begin => unreachable!("told twice"),
            Order::Take(count) => line.send(&take(&mut *end, count)),
            Order::Poll(millis) => {
                line.send(&readable(end.fd(), Duration::from_millis(millis)));
            }
            Order::Answer(event, verdict) => line.send(&end.answer(event, verdict)),
            Order::Fill(events) => {
                line.send(&events.into_iter().map(|event| end.fill(event)).collect::<Vec<_>>());
            }
        }
    }
    end.leave();
}

fn take(end: &mut dyn End, count: usize) -> Loot {
    let deadline = Instant::now() + LIMIT;
    let mut loot = Loot::default();
    while loot.taken.len() < count && !loot.ended && Instant::now() < deadline {
        if readable(end.fd(), Duration::from_secs(1)) {
            loot.ended = !end.read(count - loot.taken.len(), &mut loot.taken);
        }
    }
    loot
}

/// The program for a queue fd, which is its first.
pub(super) fn hold_kernel_queue() {
    let [queue] = inherited().unwrap();
    let channel = Channel::from_owned_fd(queue);
    serve(|| Box::new(Kernel { channel, held: HashMap::new() }));
}

struct Kernel {
    channel: Channel,
    held: HashMap<u64, PermissionEvent>,
}

impl End for Kernel {
    fn leave(self: Box<Self>) {
        self.held.into_values().for_each(PermissionEvent::leave);
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    fn read(&mut self, count: usize, into: &mut Vec<Taken>) -> bool {
        let events = match self.channel.read_at_most(count).unwrap() {
            Read::Events(events) => events,
            Read::Empty => return true,
            Read::Gone => return false,
        };
        for event in events {
            let Event::Permission(event) = event else { panic!("{event:?}") };
            let range = event.range().unwrap();
            assert_eq!(range.len(), BLOCK_LEN);
            let number = u64::try_from(event.number()).unwrap();
            into.push(Taken { event: number, block: range.offset() / BLOCK_LEN, pid: event.pid() });
            assert!(self.held.insert(number, event).is_none());
        }
        true
    }

    fn answer(&mut self, event: u64, verdict: Verdict) -> Said {
        let answered = match self.held.remove(&event) {
            Some(event) => event.answer(verdict),
            None => answer_number(self.fd(), RawFd::try_from(event).unwrap(), verdict),
        };
        match answered.unwrap() {
            Answered::Delivered => Said::Delivered,
            Answered::ReaderGone => Said::Refused,
        }
    }

    fn fill(&mut self, number: u64) -> Said {
        let event = &self.held[&number];
        let offset = event.range().unwrap().offset();
        let bytes = content(offset / BLOCK_LEN);
        let offset = i64::try_from(offset).unwrap();
        assert_eq!(nix::sys::uio::pwrite(event, &bytes, offset).unwrap(), bytes.len());
        self.answer(number, Verdict::Allow)
    }
}

/// The program for a worker's sockets: it stands in for `hydrantd worker`.
pub(super) fn hold_brokered_queue() {
    let [control, queue, _spool] = inherited().unwrap();
    serve(|| {
        let data = introduce(&control);
        Box::new(Brokered { _control: control, queue, data, held: HashMap::new() })
    });
}

struct Brokered {
    _control: OwnedFd,
    queue: OwnedFd,
    data: File,
    held: HashMap<u64, Block>,
}

/// As `worker/run.rs` does, until events may come. Gives the one segment's data.
pub(super) fn introduce(control: &OwnedFd) -> File {
    let mut buffer = vec![0; wire::MAX_MESSAGE];
    let mut data = None;
    let send = |message: FromWorker| {
        seqpacket::send(control.as_fd(), &wire::encode(&message).unwrap(), &[]).unwrap();
    };
    loop {
        assert!(readable(control, LIMIT), "the supervisor says nothing");
        let Some(received) = seqpacket::receive(control.as_fd(), &mut buffer).unwrap() else {
            // the supervisor was killed
            std::process::exit(0);
        };
        match wire::decode(&buffer[..received.length]).unwrap() {
            ToWorker::Hello { version } => send(FromWorker::Ready { version }),
            ToWorker::Segment { segment, .. } => {
                data = received.fds.into_iter().next();
                send(FromWorker::Attached { segment, result: Ok(()) });
            }
            ToWorker::Start { .. } => return File::from(data.expect("a segment")),
            _ => {}
        }
    }
}

impl End for Brokered {
    fn leave(self: Box<Self>) {}

    fn fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    fn read(&mut self, count: usize, into: &mut Vec<Taken>) -> bool {
        let mut buffer = [0; 1024];
        for _ in 0..count {
            let received = match seqpacket::receive(self.fd(), &mut buffer) {
                Ok(Some(received)) => received,
                Ok(None) => return false,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) => panic!("{error}"),
            };
            match wire::decode(&buffer[..received.length]).unwrap() {
                ToQueue::Event { event, range, pid, .. } => {
                    assert_eq!(range.len(), BLOCK_LEN);
                    let block = range.offset() / BLOCK_LEN;
                    assert!(self.held.insert(event.0, block).is_none(), "given out twice");
                    into.push(Taken { event: event.0, block, pid });
                }
                other => panic!("{other:?}"),
            }
        }
        true
    }

    fn answer(&mut self, event: u64, verdict: Verdict) -> Said {
        self.held.remove(&event);
        let answer = FromQueue::Answer { event: EventId(event), verdict, reason: None };
        let bytes = wire::encode(&answer).unwrap();
        let deadline = Instant::now() + LIMIT;
        loop {
            match seqpacket::send(self.fd(), &bytes, &[]) {
                Ok(()) => return Said::Sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    assert!(Instant::now() < deadline, "the supervisor takes no answers");
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Said::Refused,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn fill(&mut self, event: u64) -> Said {
        let block = self.held[&event];
        self.data.write_all_at(&content(block), block * BLOCK_LEN).unwrap();
        self.answer(event, Verdict::Allow)
    }
}
