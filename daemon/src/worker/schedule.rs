//! Which object is asked for when, and in which request.
//!
//! A pure state machine for one origin: no I/O, no clock, no randomness but a seed. The engine
//! tells it who waits for what and how requests went; [`Schedule::poll_along`] gives what is to be done.
//! What it keeps to:
//!
//! - **Single flight**: an object is asked for once, however many wait for it. The one exception is
//!   patience: a reader whose object is in a read-ahead request that does not deliver soon gets a
//!   request of its own, and the later of the two arrivals is dropped. Not so where many wait.
//! - **Demand first**: what an event waits for goes out at once, in a request of its own, as long
//!   as there is a free slot. When there is none, what accumulates goes out together in the next.
//!   Read-ahead never takes the last slot, and always gets one.
//! - **A prefetch gives way**: while readers come, its requests are few, and as small as makes them short on this line, so that
//!   nobody waits behind a long one. When they have been quiet for a while, it takes what the line gives.
//! - **Every wait ends**: with the object, with an error that the origin's answer stands for, or
//!   at the event's deadline with the last reason. The deadline counts from the last bytes that
//!   came for it, up to [`LONGEST_WAIT`]: a large object on a slow line is no fault.
//! - An object that nobody waits for is not tried twice.
//! - What has to be decoded with what is asked for is not thrown away: it is asked for as well. What is right behind the place that a
//!   single reader waits for comes after it in the same answer, so that reading on does not cost a round trip each time.

mod dispatch;
mod endings;
mod progress;
mod timers;

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use timers::{Jitter, Timer, Timers};

use crate::fanotify::DenyErrno;
use crate::ids::EventId;
use crate::queue::wire::LONGEST_WAIT;
use crate::worker::ObjectNo;

/// Time since the worker's start.
pub type Now = Duration;

/// The objects that come, too, when these are asked for, with their sizes, if they are not there: those that have to be
/// decoded with them, and with those that are so many bytes behind them.
pub type Along<'a> = &'a mut dyn FnMut(&[ObjectNo], u64) -> Vec<(ObjectNo, u64)>;

/// The most objects and bytes of content in one request for waiting readers.
const DEMAND_BATCH: (usize, u64) = (1000, 8 << 20);
/// The same for a request that nobody waits for.
const AHEAD_BATCH: (usize, u64) = (4096, 16 << 20);
/// Requests of read-ahead, and of prefetches, at the same time.
const AHEAD_REQUESTS: usize = 3;
/// How many bytes behind what a reader waits for come after it: compressed, about what a line of 25 ms and 25 MB/s carries in a
/// round trip. With less there are more round trips, with more the next reader waits behind it.
const BEHIND: u64 = 2 << 20;
/// Bytes of content that a prefetch asks for in one request, if it has as many and no readers come: less would cost more in round
/// trips than it gains.
const LEAST_SHARE: u64 = 2 << 20;
/// Requests of a prefetch at the same time while readers come: the second is made when a third of the first has come, so that the line
/// is not idle for a round trip.
const SMALL_REQUESTS: usize = 2;
/// The most objects in one of them, the bytes of content in the first of them, and the least and the most bytes in those that follow.
const SMALL_OBJECTS: usize = 1000;
const FIRST_SMALL: u64 = 2 << 20;
const LEAST_SMALL: u64 = 256 << 10;
const MOST_SMALL: u64 = 4 << 20;
/// How long such a request is to take. With shorter ones the origin and we have more to do for the same bytes, with longer ones
/// it takes longer until what comes follows the readers.
const SMALL_TIME: Duration = Duration::from_millis(300);
/// One that takes longer than this does not keep the next one from being made.
const LONG_SMALL: Duration = Duration::from_secs(2);
/// How long after a reader has waited the next one is to be expected.
const BUSY: Duration = Duration::from_millis(500);
/// How long a reader waits for an object that is in a read-ahead request.
const PATIENCE: Duration = Duration::from_millis(30);
/// When more readers than this wait for objects of one read-ahead request, they wait on.
const MANY: usize = 16;
/// The first and the longest pause before an object is tried again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Wrong answers after which an object is given up.
const WRONG_TRIES: u32 = 3;
/// Failures after which an object that only a prefetch wants is given up.
const PREFETCH_TRIES: u32 = 8;
/// Failed requests in a row after which an origin is probed with one request at a time.
const TROUBLED: u32 = 3;

/// One request to the origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// On whose behalf a request runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    Demand,
    Ahead,
    Prefetch,
}

/// Who waits for objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Waiter {
    Event(EventId),
    /// A part of a prefetch. Has no deadline, but does not try for ever.
    Prefetch(u64),
}

/// How a request ended. Its objects that have arrived before have nothing to do with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Done,
    Retry {
        reason: String,
        after: Option<Duration>,
    },
    Refused {
        reason: String,
    },
    Missing {
        object: ObjectNo,
        reason: String,
    },
    Wrong {
        reason: String,
    },
    /// What came could not be written.
    Disk {
        errno: DenyErrno,
        reason: String,
    },
}

/// For whom an object has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// For a reader.
    Awaited,
    /// Before anybody wanted to read it.
    Unasked,
    /// It was there already.
    Again,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    Send {
        request: RequestId,
        lane: Lane,
        objects: Vec<ObjectNo>,
    },
    /// All that it waited for is there.
    Ready(Waiter),
    Fail {
        waiter: Waiter,
        errno: DenyErrno,
        reason: String,
    },
    /// Still waiting, because.
    Waiting {
        event: EventId,
        reason: String,
    },
    /// Will not come: nobody waits for it.
    Dropped(ObjectNo),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In flight, or about to be removed.
    Out,
    Queued(Lane),
    BackOff,
}

#[derive(Debug)]
struct Object {
    size: u64,
    waiters: Vec<Waiter>,
    /// Requests that have been asked for it and have not ended.
    requests: Vec<RequestId>,
    state: State,
    tries: u32,
    wrong: u32,
    /// Was in a request that went wrong: asked for by itself, to find the culprit.
    alone: bool,
    reason: Option<String>,
}

#[derive(Debug)]
struct Wait {
    missing: usize,
    reason: Option<String>,
    /// Objects of one wait go out together: the reader needs them all.
    group: u64,
    began: Now,
    /// When bytes came for it last, or when it began.
    heard: Now,
    /// When it was said last that they do.
    said: Now,
}

#[derive(Debug)]
struct Request {
    lane: Lane,
    /// The first `asked` of them are what it was made for; the others come along.
    objects: Vec<ObjectNo>,
    asked: usize,
    started: Now,
    /// Bytes of content asked for, and of objects that have not come.
    size: u64,
    left: u64,
    /// Bytes that have come, as far as is known.
    received: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Schedule {
    connections: usize,
    deadline: Duration,
    objects: HashMap<ObjectNo, Object>,
    waits: HashMap<Waiter, Wait>,
    requests: HashMap<RequestId, Request>,
    /// Objects in [`State::Queued`], by lane; entries whose object is in another state are stale.
    demand: VecDeque<(ObjectNo, u64)>,
    ahead: VecDeque<Vec<ObjectNo>>,
    prefetch: VecDeque<ObjectNo>,
    /// There were no slots for all of `demand`: what is left goes out together.
    backlog: bool,
    timers: Timers,
    jitter: Jitter,
    /// The origin has asked for quiet.
    paused_until: Now,
    /// Until then prefetches give way to the readers to come; zero when that is over.
    busy_until: Now,
    /// Requests in a row that ended in [`Outcome::Retry`].
    failures: u32,
    /// About how long a request for one object takes.
    latency: Duration,
    /// The most bytes of content in one request of a prefetch while readers come.
    small: u64,
    next_request: u64,
    next_group: u64,
    effects: Vec<Effect>,
}

impl Schedule {
    /// `connections`: requests at the same time. `deadline`: the longest that an event waits
    /// without progress.
    #[must_use]
    pub fn new(connections: u32, deadline: Duration, seed: u64) -> Self {
        Self {
            connections: connections.max(1) as usize,
            deadline,
            objects: HashMap::new(),
            waits: HashMap::new(),
            requests: HashMap::new(),
            demand: VecDeque::new(),
            ahead: VecDeque::new(),
            prefetch: VecDeque::new(),
            backlog: false,
            timers: Timers::default(),
            jitter: Jitter::new(seed),
            paused_until: Duration::ZERO,
            busy_until: Duration::ZERO,
            failures: 0,
            latency: PATIENCE,
            small: FIRST_SMALL,
            next_request: 0,
            next_group: 0,
            effects: Vec::new(),
        }
    }

    /// The object has been asked for or is going to be.
    #[must_use]
    pub fn has(&self, object: ObjectNo) -> bool {
        self.objects.contains_key(&object)
    }

    /// Nothing is waited for and nothing is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.objects.is_empty() && self.waits.is_empty() && self.requests.is_empty()
    }

    /// Requests that are running.
    #[must_use]
    pub fn running(&self) -> usize {
        self.requests.len()
    }

    /// `waiter` waits for these objects, which are not there; with none it is ready at once.
    pub fn demand(&mut self, now: Now, waiter: Waiter, objects: &[(ObjectNo, u64)]) {
        self.next_group += 1;
        let group = self.next_group;
        let wait = Wait { missing: 0, reason: None, group, began: now, heard: now, said: now };
        self.waits.insert(waiter, wait);
        if let Waiter::Event(event) = waiter {
            self.busy_until = now + BUSY;
            self.timers.set(now + self.deadline, Timer::Deadline(event));
            self.timers.tidy(&self.waits);
        }
        let mut missing = 0;
        for (no, size) in objects {
            let object = self.objects.entry(*no).or_insert_with(|| Object::new(*size));
            if object.waiters.contains(&waiter) {
                continue;
            }
            object.waiters.push(waiter);
            missing += 1;
            if let (Some(reason), Waiter::Event(event)) = (&object.reason, waiter) {
                self.effects.push(Effect::Waiting { event, reason: reason.clone() });
            }
            self.push(now, *no, waiter);
        }
        match self.waits.get_mut(&waiter) {
            Some(wait) if missing > 0 => wait.missing = missing,
            _ => {
                self.waits.remove(&waiter);
                self.effects.push(Effect::Ready(waiter));
            }
        }
    }

    /// Puts an object that has just got a waiter where it will be asked for.
    fn push(&mut self, now: Now, no: ObjectNo, waiter: Waiter) {
        let Some(object) = self.objects.get_mut(&no) else { return };
        let group = self.waits.get(&waiter).map_or(0, |wait| wait.group);
        match (waiter, object.state) {
            (_, State::BackOff | State::Queued(Lane::Demand)) => {}
            (Waiter::Event(_), State::Queued(_)) => {
                object.state = State::Queued(Lane::Demand);
                self.demand.push_back((no, group));
            }
            (Waiter::Event(_), State::Out) if object.requests.is_empty() => {
                object.state = State::Queued(Lane::Demand);
                self.demand.push_back((no, group));
            }
            (Waiter::Event(_), State::Out) => {
                let patience = self.latency.max(PATIENCE);
                self.timers.set(now + patience, Timer::Patience(no));
            }
            (Waiter::Prefetch(_), State::Out) if object.requests.is_empty() => {
                object.state = State::Queued(Lane::Prefetch);
                self.prefetch.push_back(no);
            }
            (Waiter::Prefetch(_), State::Out | State::Queued(_)) => {}
        }
    }

    /// These objects, which nobody waits for, should be fetched in this order. Those that are under
    /// way already are left out.
    pub fn ahead(&mut self, objects: &[(ObjectNo, u64)]) {
        let mut unit = Vec::with_capacity(objects.len());
        for (no, size) in objects {
            if !self.objects.contains_key(no) {
                let object = Object { state: State::Queued(Lane::Ahead), ..Object::new(*size) };
                self.objects.insert(*no, object);
                unit.push(*no);
            }
        }
        if !unit.is_empty() {
            self.ahead.push_back(unit);
        }
    }

    /// Nobody waits on this behalf any more.
    pub fn cancel(&mut self, waiter: Waiter) {
        self.waits.remove(&waiter);
    }

    /// When [`poll`](Self::poll_along) should be called again even if nothing happens.
    #[must_use]
    pub fn next_wake(&self) -> Option<Now> {
        let queued = !self.demand.is_empty() || !self.ahead.is_empty() || !self.prefetch.is_empty();
        let pause = (queued && self.paused_until > Duration::ZERO).then_some(self.paused_until);
        // there may be room for more then
        let held_back = !self.prefetch.is_empty() && self.busy_until > Duration::ZERO;
        let quiet = held_back.then_some(self.busy_until);
        [self.timers.next(), pause, quiet].into_iter().flatten().min()
    }

    /// [`poll_along`](Self::poll_along) where objects come alone.
    #[cfg(test)]
    pub fn poll(&mut self, now: Now) -> Vec<Effect> {
        self.poll_along(now, &mut |_, _| Vec::new())
    }

    /// Does what is due, and gives all there is to do since the last call.
    pub fn poll_along(&mut self, now: Now, along: Along<'_>) -> Vec<Effect> {
        while let Some(timer) = self.timers.pop(now) {
            match timer {
                Timer::Deadline(event) => self.deadline(now, event),
                Timer::Again(no) => {
                    if self.objects.get(&no).is_some_and(|o| o.state == State::BackOff) {
                        self.again(no);
                    }
                }
                Timer::Patience(no) => self.patience(no),
            }
        }
        if self.busy_until <= now {
            self.busy_until = Duration::ZERO;
        }
        if self.paused_until <= now {
            self.paused_until = Duration::ZERO;
            self.send_demand(now, along);
            self.send_ahead(now, along);
        }
        std::mem::take(&mut self.effects)
    }

    /// A reader has waited long enough for a request that was not made for it.
    fn patience(&mut self, no: ObjectNo) {
        let Some(object) = self.objects.get(&no) else { return };
        if object.state != State::Out || !self.wants_event(no) {
            return;
        }
        if object.requests.iter().any(|request| self.is_for_readers(*request)) {
            return;
        }
        if let Some(object) = self.objects.get_mut(&no) {
            object.state = State::Queued(Lane::Demand);
        }
        self.demand.push_back((no, 0));
    }

    /// A request for readers; also one for read-ahead for which many wait by now: asking for all of
    /// that again would only take longer.
    fn is_for_readers(&self, id: RequestId) -> bool {
        let Some(request) = self.requests.get(&id) else { return false };
        let awaited = |no: &&ObjectNo| {
            self.objects.get(no).is_some_and(|object| object.requests.contains(&id))
                && self.wants_event(**no)
        };
        request.lane == Lane::Demand || request.objects.iter().filter(awaited).nth(MANY).is_some()
    }
}

impl Object {
    fn new(size: u64) -> Self {
        Self {
            size,
            waiters: Vec::new(),
            requests: Vec::new(),
            state: State::Out,
            tries: 0,
            wrong: 0,
            alone: false,
            reason: None,
        }
    }
}

#[cfg(test)]
mod progress_tests;
#[cfg(test)]
mod tests;
