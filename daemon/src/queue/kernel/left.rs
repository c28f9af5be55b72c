//! What the table says of events that were read before, by who does not have them any more.

use std::collections::HashMap;

use crate::ids::SegmentId;
use crate::queue::inflight::{Record, Slot};
use crate::range::ByteRange;

/// How an event is known again: its segment, range and process.
type Key = (SegmentId, ByteRange, i32);

/// Records without an owner. The kernel reports their events again, before any others; after these, what
/// is still here is of readers that were killed meanwhile.
#[derive(Debug, Default)]
pub struct Left {
    records: HashMap<Key, Vec<(Slot, Record)>>,
    /// What is still to be read of the events that may be among them, in bytes.
    again: u64,
}

impl Left {
    /// `again`: what was in the queue when it was opened, in bytes.
    pub fn new(records: Vec<(Slot, Record)>, again: u64) -> Self {
        let mut left = Self { records: HashMap::new(), again };
        for (slot, record) in records {
            let key = (record.segment, record.range, record.pid);
            left.records.entry(key).or_default().push((slot, record));
        }
        left
    }

    /// The record of an event that has just been read. Of several equal ones (threads of a process) the
    /// one that was read first.
    pub fn take(
        &mut self,
        segment: SegmentId,
        range: ByteRange,
        pid: i32,
    ) -> Option<(Slot, Record)> {
        let key = (segment, range, pid);
        let records = self.records.get_mut(&key)?;
        let first = (0..records.len()).min_by_key(|n| records.get(*n).map(|(_, r)| r.event))?;
        let found = records.swap_remove(first);
        if records.is_empty() {
            self.records.remove(&key);
        }
        Some(found)
    }

    pub fn was_read(&mut self, bytes: u64) {
        self.again = self.again.saturating_sub(bytes);
    }

    /// What nobody will ask for any more.
    pub fn take_if_over(&mut self) -> Vec<Slot> {
        if self.again > 0 || self.records.is_empty() {
            return Vec::new();
        }
        self.records.drain().flat_map(|(_, records)| records).map(|(slot, _)| slot).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::EventId;
    use crate::queue::inflight::{State, Table};

    #[test]
    fn the_events_of_one_process_are_told_apart_by_their_age() {
        let mut table = Table::create(4).unwrap();
        let range = ByteRange::new(0, 4096);
        let record = |event, pid| Record {
            event: EventId(event),
            number: 7,
            segment: SegmentId(1),
            range,
            pid,
            since: event,
            dispatched: 0,
            attempts: 1,
            strikes: 0,
            worker: 0,
            state: State::Waiting,
        };
        for (event, pid) in [(3, 10), (1, 10), (2, 11)] {
            let _ = table.claim(&record(event, pid)).unwrap();
        }
        let mut left = Left::new(table.inherit().0, 96);
        let mut take = |pid| left.take(SegmentId(1), range, pid).map(|(_, record)| record.event.0);
        assert_eq!([take(10), take(12), take(10), take(10)], [Some(1), None, Some(3), None]);
        left.was_read(48);
        assert_eq!(left.take_if_over().len(), 0);
        left.was_read(48);
        assert_eq!(left.take_if_over().len(), 1, "of a reader that was killed");
    }
}
