//! The kernel's queue, as a worker reads it and the supervisor between two workers: what is done with
//! events, and the table, over a kernel of a few lines.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, RawFd};
use std::rc::Rc;

use super::{Machine, Name, Rules};
use crate::fanotify::{Answered, DenyErrno, Error, FileId, Verdict};
use crate::ids::{EventId, SegmentId};
use crate::queue::broker::Death;
use crate::queue::inflight::{State, Table};
use crate::queue::kernel::{Inner, Reader, Waits};
use crate::range::{BLOCK, ByteRange};

const SEGMENT: SegmentId = SegmentId(1);
const FILE: FileId = FileId { dev: 1, ino: 1 };

/// A restartable group (`conformance` shows that the real one does the same).
#[derive(Debug, Default)]
struct Kernel {
    queue: VecDeque<Name>,
    /// Read and not answered, in the order of reading, with the numbers of their fds.
    read: Vec<(RawFd, Name)>,
    dead: HashSet<Name>,
    /// Events whose bytes are there.
    present: HashSet<Name>,
    outcomes: BTreeMap<Name, Verdict>,
}

impl Kernel {
    fn answer(&mut self, number: RawFd, verdict: Verdict) -> Answered {
        let Some(at) = self.read.iter().position(|(other, _)| *other == number) else {
            return Answered::ReaderGone;
        };
        let (_, name) = self.read.remove(at);
        if !self.dead.contains(&name) {
            let before = self.outcomes.insert(name, verdict);
            assert!(before.is_none(), "answered twice");
        }
        Answered::Delivered
    }

    fn close(&mut self) {
        for (_, name) in self.read.drain(..).rev() {
            if !self.dead.contains(&name) {
                self.queue.push_front(name);
            }
        }
    }

    fn kill(&mut self, name: Name) {
        self.dead.insert(name);
        self.queue.retain(|other| *other != name);
    }
}

#[derive(Debug)]
struct Event {
    kernel: Rc<RefCell<Kernel>>,
    number: RawFd,
    name: Name,
}

impl Waits for Event {
    fn number(&self) -> RawFd {
        self.number
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.name).unwrap()
    }

    /// Some read the same.
    fn range(&self) -> Option<ByteRange> {
        Some(ByteRange::new(self.name % 8 * BLOCK, BLOCK))
    }

    fn file(&self) -> nix::Result<(FileId, u64)> {
        Ok((FILE, 8 * BLOCK))
    }

    fn is_present(&self, _: ByteRange) -> nix::Result<bool> {
        Ok(self.kernel.borrow().present.contains(&self.name))
    }

    fn answer(self, verdict: Verdict) -> Result<Answered, Error> {
        Ok(self.kernel.borrow_mut().answer(self.number, verdict))
    }

    fn leave(self) {}
}

pub(super) struct KernelMachine {
    kernel: Rc<RefCell<Kernel>>,
    table: Table,
    worker: Option<Inner<Event>>,
    ids: HashMap<Name, EventId>,
}

impl KernelMachine {
    fn reader(&self, reader: Reader) -> Inner<Event> {
        let table = Table::open(self.table.as_fd().try_clone_to_owned().unwrap()).unwrap();
        Inner::new(table, reader, self.kernel.borrow().queue.len() as u64)
    }

    fn read(&self) -> Option<Event> {
        let mut kernel = self.kernel.borrow_mut();
        let name = kernel.queue.pop_front()?;
        // the lowest that is free, so they come again
        let number = (10..).find(|number| kernel.read.iter().all(|(other, _)| other != number))?;
        kernel.read.push((number, name));
        Some(Event { kernel: Rc::clone(&self.kernel), number, name })
    }
}

impl Machine for KernelMachine {
    const RULES: Rules = Rules { forgets_the_dead: true, gives_up_at_once: false };

    fn new() -> Self {
        let table = Table::create(256).unwrap();
        Self { kernel: Rc::default(), table, worker: None, ids: HashMap::new() }
    }

    fn arrive(&mut self, name: Name) {
        self.kernel.borrow_mut().queue.push_back(name);
    }

    fn open(&mut self) {
        self.worker = Some(self.reader(Reader::Worker { pid: 1 }));
    }

    fn take(&mut self, count: usize) -> Vec<Name> {
        let mut taken = Vec::new();
        for _ in 0..count {
            let Some(event) = self.read() else { break };
            let name = event.name;
            if let Some(id) = self.worker.as_mut().unwrap().take(SEGMENT, FILE, event) {
                self.ids.insert(name, id);
                taken.push(name);
            }
        }
        taken
    }

    fn answer(&mut self, name: Name, verdict: Verdict) -> bool {
        let id = self.ids.get(&name).copied().unwrap_or(EventId(u64::MAX));
        let Some(worker) = &mut self.worker else { return false };
        if verdict == Verdict::Allow {
            self.kernel.borrow_mut().present.insert(name);
        }
        let answered = worker.answer(id, verdict).is_ok();
        self.kernel.borrow_mut().present.remove(&name);
        answered
    }

    fn holder_ends(&mut self, death: Death) {
        self.worker = None;
        self.kernel.borrow_mut().close();
        self.table.worker_died(death);
    }

    fn reader_dies(&mut self, name: Name) {
        self.kernel.borrow_mut().kill(name);
    }

    fn deny(&mut self, name: Name) -> bool {
        self.answer(name, Verdict::Deny(DenyErrno::Eio))
    }

    /// It is begun anew where it is.
    fn retry(&mut self, _: Name) -> bool {
        false
    }

    fn supervisor_ends(&mut self) {
        let mut stand_in = self.reader(Reader::StandIn);
        while let Some(event) = self.read() {
            stand_in.take(SEGMENT, FILE, event);
        }
        drop(stand_in);
        self.kernel.borrow_mut().close();
    }

    fn outcomes(&self) -> BTreeMap<Name, Verdict> {
        self.kernel.borrow().outcomes.clone()
    }

    fn books(&self) -> (usize, usize) {
        let kernel = self.kernel.borrow();
        let held = self.worker.as_ref().map_or(0, Inner::held);
        assert_eq!(held, kernel.read.len());
        let records = self.table.snapshot().records;
        assert_eq!(records.iter().filter(|r| r.state == State::InFlight).count(), held);
        // but for what is left of the dead, no more than there is
        let dead = kernel.dead.len();
        assert!(records.len() <= held + kernel.queue.len() + dead, "{records:?}");
        (kernel.queue.len(), held)
    }
}
