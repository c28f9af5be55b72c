//! What the worker knows of one origin's pool: who waits ([`Schedule`]), what to fetch ahead
//! ([`ReadAhead`]), and what is to be prefetched. Pure, like these.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::ObjectNo;
use super::pool::{NameIndex, Pool, PoolError};
use super::readahead::{Catalog, Info, Look, ReadAhead};
use super::schedule::{self, Arrival, Lane, Now, Outcome, RequestId, Schedule, Waiter};
use crate::fanotify::DenyErrno;
use crate::ids::EventId;
use crate::queue::wire::Limits;

/// The most objects in a part of a prefetch.
const PREFETCH_PART: usize = 4096;
/// Parts of one prefetch, and of all, that are waited for at the same time.
const PARTS_OF_ONE: usize = 2;
const PARTS: usize = 16;

/// The pool, as far as decisions depend on it.
pub trait Shelf {
    /// The number of objects.
    fn len(&self) -> u32;
    fn info(&mut self, no: ObjectNo) -> Option<Info>;
    /// An object about which nothing can be found out counts as present.
    fn is_present(&mut self, no: ObjectNo) -> bool;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Those that are not there and come, too, when these are asked for, with their sizes: see [`schedule::Along`].
    fn along(&mut self, objects: &[ObjectNo], behind: u64) -> Vec<(ObjectNo, u64)> {
        let _ = (objects, behind);
        Vec::new()
    }
}

impl Shelf for Pool {
    fn len(&self) -> u32 {
        Self::len(self)
    }

    fn info(&mut self, no: ObjectNo) -> Option<Info> {
        let object = logged(self.object(no))??;
        let (size, directory, name) = (object.range.len(), object.directory, object.name);
        Some(Info { size, directory, name })
    }

    fn is_present(&mut self, no: ObjectNo) -> bool {
        logged(Self::is_present(self, no)).unwrap_or(true)
    }
}

/// Read-ahead does without; a reader that needs it is told.
fn logged<T>(result: Result<T, PoolError>) -> Option<T> {
    result.inspect_err(|error| tracing::debug!(%error, "can't look at a segment")).ok()
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    Send {
        request: RequestId,
        lane: Lane,
        objects: Vec<ObjectNo>,
    },
    /// All objects of an event are there.
    Ready(EventId),
    Deny {
        event: EventId,
        errno: DenyErrno,
        reason: String,
    },
    Waiting {
        event: EventId,
        reason: String,
    },
    PrefetchDone {
        request: u64,
        result: Result<(), String>,
    },
    /// Make the index of names, and give it to [`Engine::names`].
    IndexNames,
}

#[derive(Debug)]
enum Names {
    None,
    Asked,
    /// For so many objects.
    Made(Arc<NameIndex>, u32),
}

/// A prefetch.
#[derive(Debug)]
struct Job {
    request: u64,
    /// What the schedule has not been given yet, in order.
    left: VecDeque<Range<u32>>,
    parts: usize,
    error: Option<String>,
}

impl Job {
    fn next(&mut self) -> Option<ObjectNo> {
        loop {
            let range = self.left.front_mut()?;
            if let Some(no) = range.next() {
                return Some(ObjectNo(no));
            }
            self.left.pop_front();
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Engine {
    schedule: Schedule,
    read_ahead: ReadAhead,
    names: Names,
    jobs: VecDeque<Job>,
    /// Which job a part belongs to.
    parts: HashMap<u64, u64>,
    next_part: u64,
    effects: Vec<Effect>,
}

impl Engine {
    #[must_use]
    pub fn new(limits: &Limits, seed: u64) -> Self {
        let deadline = Now::from_secs(limits.deadline_secs);
        Self {
            schedule: Schedule::new(limits.connections, deadline, seed),
            read_ahead: ReadAhead::new(limits.read_ahead),
            names: Names::None,
            jobs: VecDeque::new(),
            parts: HashMap::new(),
            next_part: 0,
            effects: Vec::new(),
        }
    }

    /// A reader waits for these objects, which are absent.
    pub fn event(
        &mut self,
        now: Now,
        event: EventId,
        absent: &[(ObjectNo, u64)],
        look: Look,
        shelf: &mut impl Shelf,
    ) {
        self.schedule.demand(now, Waiter::Event(event), absent);
        for (no, _) in absent {
            self.look(now, *no, true, look, shelf);
        }
    }

    /// A reader was given these objects, which were there.
    pub fn touched(&mut self, now: Now, objects: &[ObjectNo], look: Look, shelf: &mut impl Shelf) {
        for no in objects {
            self.look(now, *no, false, look, shelf);
        }
    }

    fn look(&mut self, now: Now, no: ObjectNo, absent: bool, look: Look, shelf: &mut impl Shelf) {
        let Self { schedule, read_ahead, names, effects, .. } = self;
        let mut view = View { schedule, names, effects, shelf };
        for batch in read_ahead.access(now, no, absent, look, &mut view) {
            self.schedule.ahead(&batch);
        }
    }

    /// The index of names that was asked for; it is of use for the first `objects` objects.
    pub fn names(&mut self, index: NameIndex, objects: u32) {
        self.names = Names::Made(Arc::new(index), objects);
    }

    /// Fetch these objects, when there is nothing better to do.
    pub fn prefetch(&mut self, request: u64, objects: VecDeque<Range<u32>>) {
        self.jobs.push_back(Job { request, left: objects, parts: 0, error: None });
    }

    /// The event needs no answer any more.
    pub fn cancel(&mut self, event: EventId) {
        self.schedule.cancel(Waiter::Event(event));
    }

    /// An object is in its place.
    pub fn arrived(&mut self, now: Now, request: RequestId, no: ObjectNo) -> Arrival {
        self.read_ahead.arrived(no);
        self.schedule.arrived(now, request, no)
    }

    /// An object came and could not be written.
    pub fn failed(&mut self, no: ObjectNo, errno: DenyErrno, reason: &str) {
        self.schedule.failed(no, errno, reason);
    }

    /// So many bytes have come for this request since its start.
    pub fn progress(&mut self, now: Now, request: RequestId, received: u64) {
        self.schedule.progress(now, request, received);
    }

    /// A request has ended.
    pub fn finished(&mut self, now: Now, request: RequestId, outcome: &Outcome) {
        self.schedule.finished(now, request, outcome);
    }

    /// These objects are all there, and looks at them are not reported any more.
    pub fn completed(&mut self, objects: Range<u32>) {
        self.read_ahead.completed(objects);
    }

    /// When [`poll`](Self::poll) should be called again even if nothing happens.
    #[must_use]
    pub fn next_wake(&self) -> Option<Now> {
        self.schedule.next_wake()
    }

    /// Nobody waits and nothing is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.schedule.is_idle() && self.read_ahead.under_way() == 0 && self.jobs.is_empty()
    }

    /// All there is to do since the last call.
    pub fn poll(&mut self, now: Now, shelf: &mut impl Shelf) -> Vec<Effect> {
        loop {
            self.feed(now, shelf);
            let reads_ahead = self.read_ahead.is_enabled();
            let mut along = |objects: &[ObjectNo], behind| {
                shelf.along(objects, if reads_ahead { behind } else { 0 })
            };
            let effects = self.schedule.poll_along(now, &mut along);
            let mut parts_ended = false;
            for effect in effects {
                parts_ended |= self.apply(effect);
            }
            if !parts_ended {
                return std::mem::take(&mut self.effects);
            }
        }
    }

    /// `true`: a part of a prefetch has ended.
    fn apply(&mut self, effect: schedule::Effect) -> bool {
        let effect = match effect {
            schedule::Effect::Send { request, lane, objects } => {
                Effect::Send { request, lane, objects }
            }
            schedule::Effect::Ready(Waiter::Event(event)) => Effect::Ready(event),
            schedule::Effect::Fail { waiter: Waiter::Event(event), errno, reason } => {
                Effect::Deny { event, errno, reason }
            }
            schedule::Effect::Waiting { event, reason } => Effect::Waiting { event, reason },
            schedule::Effect::Dropped(no) => {
                self.read_ahead.dropped(no);
                return false;
            }
            schedule::Effect::Ready(Waiter::Prefetch(part)) => {
                self.part_ended(part, None);
                return true;
            }
            schedule::Effect::Fail { waiter: Waiter::Prefetch(part), reason, .. } => {
                self.part_ended(part, Some(reason));
                return true;
            }
        };
        self.effects.push(effect);
        false
    }

    fn part_ended(&mut self, part: u64, error: Option<String>) {
        let Some(request) = self.parts.remove(&part) else { return };
        if let Some(job) = self.jobs.iter_mut().find(|job| job.request == request) {
            job.parts -= 1;
            job.error = job.error.take().or(error);
        }
    }

    /// Gives the schedule more of the prefetches, the first ones first, and ends those that are done.
    fn feed(&mut self, now: Now, shelf: &mut impl Shelf) {
        for job in &mut self.jobs {
            while job.error.is_none()
                && job.parts < PARTS_OF_ONE
                && self.parts.len() < PARTS
                && !job.left.is_empty()
            {
                let mut absent = Vec::new();
                while absent.len() < PREFETCH_PART
                    && let Some(no) = job.next()
                {
                    if !shelf.is_present(no) {
                        absent.extend(shelf.info(no).map(|info| (no, info.size)));
                    }
                }
                if !absent.is_empty() {
                    self.next_part += 1;
                    job.parts += 1;
                    self.parts.insert(self.next_part, job.request);
                    self.schedule.demand(now, Waiter::Prefetch(self.next_part), &absent);
                }
            }
        }
        self.jobs.retain_mut(|job| {
            let ends = job.parts == 0 && (job.error.is_some() || job.left.is_empty());
            if ends {
                let result = job.error.take().map_or(Ok(()), Err);
                self.effects.push(Effect::PrefetchDone { request: job.request, result });
            }
            !ends
        });
    }
}

/// The pool and what is under way, for the policy.
struct View<'a, S> {
    schedule: &'a Schedule,
    names: &'a mut Names,
    effects: &'a mut Vec<Effect>,
    shelf: &'a mut S,
}

impl<S: Shelf> Catalog for View<'_, S> {
    fn len(&self) -> u32 {
        self.shelf.len()
    }

    fn info(&mut self, no: ObjectNo) -> Option<Info> {
        self.shelf.info(no)
    }

    fn is_wanted(&mut self, no: ObjectNo) -> bool {
        !self.schedule.has(no) && !self.shelf.is_present(no)
    }

    fn names(&mut self) -> Option<Arc<NameIndex>> {
        match self.names {
            Names::Made(names, objects) if *objects == self.shelf.len() => {
                return Some(Arc::clone(names));
            }
            Names::Asked => return None,
            // Segments have been attached since.
            Names::None | Names::Made(..) => {
                *self.names = Names::Asked;
                self.effects.push(Effect::IndexNames);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Objects of a MiB, and which of them are there.
    struct Chunks(HashSet<u32>);

    impl Shelf for Chunks {
        fn len(&self) -> u32 {
            100
        }

        fn info(&mut self, _: ObjectNo) -> Option<Info> {
            Some(Info { size: 1 << 20, directory: 0, name: 0 })
        }

        fn is_present(&mut self, no: ObjectNo) -> bool {
            self.0.contains(&no.0)
        }
    }

    /// A small prefetch does not wait for the end of the one before.
    #[test]
    fn prefetches_go_on_side_by_side() {
        let mut engine = Engine::new(&Limits::default(), 1);
        let mut shelf = Chunks(HashSet::from([20, 21]));
        for (request, objects) in [(1, 0..4), (2, 8..12), (3, 20..22)] {
            engine.prefetch(request, VecDeque::from([objects]));
        }
        let done = |request| Effect::PrefetchDone { request, result: Ok(()) };
        let mut effects = engine.poll(Now::ZERO, &mut shelf);
        assert_eq!(effects.remove(0), done(3));
        let mut requests = HashMap::new();
        for effect in effects {
            let Effect::Send { request, objects, .. } = effect else { panic!("{effect:?}") };
            requests.extend(objects.into_iter().map(|no| (no.0, request)));
        }
        assert_eq!(requests.len(), 8, "{requests:?}");
        let mut come = |range: Range<u32>| {
            for no in range {
                engine.arrived(Now::ZERO, requests[&no], ObjectNo(no));
            }
            engine.poll(Now::ZERO, &mut shelf)
        };
        assert_eq!(come(8..12), [done(2)]);
        assert_eq!(come(0..4), [done(1)]);
    }

    /// However many there are, the schedule is not given all of them.
    #[test]
    fn as_many_parts_as_may_be() {
        let mut engine = Engine::new(&Limits::default(), 1);
        let mut shelf = Chunks(HashSet::new());
        for request in 0..100 {
            let no = u32::try_from(request).unwrap();
            engine.prefetch(request, std::iter::once(no..no + 1).collect());
        }
        engine.poll(Now::ZERO, &mut shelf);
        assert_eq!(engine.parts.len(), PARTS);
    }
}
