//! The brokered queue, as a shard drives it: the broker, and the table that outlives it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::AsFd;
use std::time::Duration;

use super::{Machine, Name, Rules};
use crate::fanotify::{DenyErrno, Verdict};
use crate::ids::{EventId, SegmentId};
use crate::queue::broker::{Answer, Broker, Death};
use crate::queue::inflight::{Slot, Table};
use crate::range::ByteRange;
use crate::supervisor::shard::waiter;

const NOW: Duration = Duration::from_secs(1);

pub(super) struct BrokerMachine {
    broker: Broker,
    table: Table,
    slots: HashMap<EventId, Slot>,
    names: HashMap<EventId, Name>,
    ids: HashMap<Name, EventId>,
    dead: HashSet<Name>,
    outcomes: BTreeMap<Name, Verdict>,
}

impl BrokerMachine {
    fn note(&mut self, event: EventId) {
        let pending = self.broker.get(event).unwrap();
        let record = waiter::record(event, 0, pending, Some(1));
        self.table.update(&self.slots[&event], &record);
    }

    fn finish(&mut self, answer: Answer) {
        let name = self.names[&answer.event];
        self.table.free(self.slots.remove(&answer.event).unwrap());
        if !self.dead.contains(&name) {
            let before = self.outcomes.insert(name, answer.verdict);
            assert!(before.is_none(), "answered twice");
        }
    }

    fn id(&self, name: Name) -> EventId {
        self.ids.get(&name).copied().unwrap_or(EventId(u64::MAX))
    }
}

impl Machine for BrokerMachine {
    const RULES: Rules = Rules { forgets_the_dead: false, gives_up_at_once: true };

    fn new() -> Self {
        Self {
            broker: Broker::new(),
            table: Table::create(256).unwrap(),
            slots: HashMap::new(),
            names: HashMap::new(),
            ids: HashMap::new(),
            dead: HashSet::new(),
            outcomes: BTreeMap::new(),
        }
    }

    fn arrive(&mut self, name: Name) {
        let event = self.table.next_event();
        self.broker.arrived(event, SegmentId(1), ByteRange::new(name * 4096, 4096), 1, NOW);
        let record = waiter::record(event, 0, self.broker.get(event).unwrap(), None);
        self.slots.insert(event, self.table.claim(&record).unwrap());
        self.names.insert(event, name);
        self.ids.insert(name, event);
    }

    fn open(&mut self) {}

    fn take(&mut self, count: usize) -> Vec<Name> {
        let mut taken = Vec::new();
        while taken.len() < count
            && let Some((event, _)) = self.broker.next_to_dispatch()
        {
            self.broker.dispatched(event, NOW);
            self.note(event);
            taken.push(self.names[&event]);
        }
        taken
    }

    fn answer(&mut self, name: Name, verdict: Verdict) -> bool {
        let answer = self.broker.answered(self.id(name), verdict, None);
        let accepted = answer.is_some();
        answer.into_iter().for_each(|answer| self.finish(answer));
        accepted
    }

    fn holder_ends(&mut self, death: Death) {
        for answer in self.broker.worker_died(death, NOW) {
            self.finish(answer);
        }
        let left: Vec<_> = self.slots.keys().copied().collect();
        left.into_iter().for_each(|event| self.note(event));
    }

    fn reader_dies(&mut self, name: Name) {
        self.dead.insert(name);
    }

    fn deny(&mut self, name: Name) -> bool {
        let answer = self.broker.deny(self.id(name), DenyErrno::Eio, "");
        let known = answer.is_some();
        answer.into_iter().for_each(|answer| self.finish(answer));
        known
    }

    fn retry(&mut self, name: Name) -> bool {
        let in_flight = self.broker.retry(self.id(name));
        self.note(self.id(name));
        in_flight == Some(true)
    }

    fn supervisor_ends(&mut self) {
        let fd = self.table.as_fd().try_clone_to_owned().unwrap();
        self.table = Table::open(fd).unwrap();
        self.broker = Broker::new();
        self.slots.clear();
        let (left, corrupt) = self.table.inherit();
        assert_eq!(corrupt, 0);
        for (slot, record) in left {
            self.broker.restored(record.event, waiter::pending(&record));
            self.slots.insert(record.event, slot);
        }
    }

    fn outcomes(&self) -> BTreeMap<Name, Verdict> {
        self.outcomes.clone()
    }

    fn books(&self) -> (usize, usize) {
        let records = self.table.snapshot().records;
        assert_eq!(records.len(), self.broker.waiting() + self.broker.in_flight());
        for record in records {
            let pending = self.broker.get(record.event).unwrap();
            assert_eq!(record.strikes, pending.strikes);
            assert_eq!(record.dispatched > 0, pending.dispatched.is_some());
        }
        (self.broker.waiting(), self.broker.in_flight())
    }
}
