//! Which object is asked for when, and in which request.
//!
//! A pure state machine for one origin: no I/O, no clock, no randomness but a seed. The engine
//! tells it who waits for what and how requests went; [`Schedule::poll`] gives what is to be done.
//! What it keeps to:
//!
//! - **Single flight**: an object is asked for once, however many wait for it. The one exception is
//!   patience: a reader whose object is in a read-ahead request that does not deliver soon gets a
//!   request of its own, and the later of the two arrivals is dropped.
//! - **Demand first**: what an event waits for goes out at once, in a request of its own, as long
//!   as there is a free slot. When there is none, what accumulates goes out together in the next.
//!   Read-ahead never takes the last slot.
//! - **Every wait ends**: with the object, with an error that the origin's answer stands for, or
//!   at the event's deadline with the last reason.
//! - An object that nobody waits for is not tried twice.

mod timers;

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use timers::{Jitter, Timer, Timers};

use crate::fanotify::DenyErrno;
use crate::ids::EventId;
use crate::worker::ObjectNo;

/// Time since the worker's start.
pub type Now = Duration;

/// The most objects and bytes of content in one request for waiting readers.
const DEMAND_BATCH: (usize, u64) = (1000, 8 << 20);
/// The same for a request that nobody waits for.
const AHEAD_BATCH: (usize, u64) = (4096, 16 << 20);
/// Requests of read-ahead at the same time.
const AHEAD_REQUESTS: usize = 3;
/// How long a reader waits for an object that is in a read-ahead request.
const PATIENCE: Duration = Duration::from_millis(30);
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
}

#[derive(Debug)]
struct Request {
    lane: Lane,
    objects: Vec<ObjectNo>,
    started: Now,
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
    /// Requests in a row that ended in [`Outcome::Retry`].
    failures: u32,
    /// About how long a request for one object takes.
    latency: Duration,
    next_request: u64,
    next_group: u64,
    effects: Vec<Effect>,
}

impl Schedule {
    /// `connections`: requests at the same time. `deadline`: the longest that an event waits.
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
            failures: 0,
            latency: PATIENCE,
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
        let wait = Wait { missing: 0, reason: None, group };
        self.waits.insert(waiter, wait);
        if let Waiter::Event(event) = waiter {
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

    /// An object has come with this request and is in its place.
    pub fn arrived(&mut self, now: Now, request: RequestId, no: ObjectNo) -> Arrival {
        self.failures = 0;
        if let Some(request) = self.requests.get(&request)
            && let [only] = request.objects[..]
            && only == no
        {
            let took = now.saturating_sub(request.started);
            self.latency = (self.latency * 7 + took) / 8;
        }
        let Some(object) = self.objects.remove(&no) else { return Arrival::Again };
        let mut arrival = Arrival::Unasked;
        for waiter in object.waiters {
            if let Some(wait) = self.waits.get_mut(&waiter) {
                if matches!(waiter, Waiter::Event(_)) {
                    arrival = Arrival::Awaited;
                }
                wait.missing -= 1;
                if wait.missing == 0 {
                    self.waits.remove(&waiter);
                    self.effects.push(Effect::Ready(waiter));
                }
            }
        }
        arrival
    }

    /// One object of a request could not be written. Who waits for it is told so.
    pub fn failed(&mut self, no: ObjectNo, errno: DenyErrno, reason: &str) {
        self.give_up(no, errno, reason);
    }

    /// A request has ended.
    pub fn finished(&mut self, now: Now, request: RequestId, outcome: &Outcome) {
        let Some(ended) = self.requests.remove(&request) else { return };
        let pause = self.note(now, outcome);
        // The same pause for all, so that they go out together again.
        let mut back_off = None;
        for no in ended.objects {
            let Some(object) = self.objects.get_mut(&no) else { continue };
            let Some(at) = object.requests.iter().position(|r| *r == request) else { continue };
            object.requests.swap_remove(at);
            match outcome {
                Outcome::Refused { reason } => self.give_up(no, DenyErrno::Eio, reason),
                Outcome::Disk { errno, reason } => self.give_up(no, *errno, reason),
                Outcome::Missing { object, reason } if *object == no => {
                    self.give_up(no, DenyErrno::Eio, reason);
                }
                _ if !object.requests.is_empty() || object.state != State::Out => {}
                Outcome::Missing { .. } => self.again(no),
                Outcome::Retry { reason, .. } => {
                    object.tries += 1;
                    let tries = object.tries;
                    let delay = *back_off.get_or_insert_with(|| self.jitter.back_off(tries));
                    self.try_later(now, no, pause.max(delay), reason);
                }
                Outcome::Done | Outcome::Wrong { .. } => {
                    let reason = match outcome {
                        Outcome::Wrong { reason } => reason,
                        _ => "the origin left the object out",
                    };
                    object.wrong += 1;
                    object.alone = true;
                    if object.wrong >= WRONG_TRIES {
                        self.give_up(no, DenyErrno::Eio, reason);
                    } else {
                        let wrong = object.wrong;
                        let delay = *back_off.get_or_insert_with(|| self.jitter.back_off(wrong));
                        self.try_later(now, no, delay, reason);
                    }
                }
            }
        }
    }

    /// Draws the conclusions about the origin as a whole. How long it wants to be left alone.
    fn note(&mut self, now: Now, outcome: &Outcome) -> Duration {
        let Outcome::Retry { after, .. } = outcome else {
            self.failures = 0;
            return Duration::ZERO;
        };
        self.failures += 1;
        let pause = after.unwrap_or_default();
        self.paused_until = self.paused_until.max(now + pause);
        pause
    }

    fn has_waiters(&self, no: ObjectNo) -> bool {
        self.objects
            .get(&no)
            .is_some_and(|object| object.waiters.iter().any(|w| self.waits.contains_key(w)))
    }

    fn wants_event(&self, no: ObjectNo) -> bool {
        self.objects.get(&no).is_some_and(|object| {
            let live = |w: &Waiter| matches!(w, Waiter::Event(_)) && self.waits.contains_key(w);
            object.waiters.iter().any(live)
        })
    }

    /// Tries an object again after `delay`, if anybody waits for it.
    fn try_later(&mut self, now: Now, no: ObjectNo, delay: Duration, reason: &str) {
        if !self.has_waiters(no) {
            return self.drop_object(no);
        }
        let wants_event = self.wants_event(no);
        let Some(object) = self.objects.get_mut(&no) else { return };
        if !wants_event && object.tries >= PREFETCH_TRIES {
            return self.give_up(no, DenyErrno::Eio, reason);
        }
        object.state = State::BackOff;
        object.reason = Some(reason.to_owned());
        self.timers.set(now + delay, Timer::Again(no));
        for waiter in object.waiters.clone() {
            if let Some(wait) = self.waits.get_mut(&waiter)
                && let Waiter::Event(event) = waiter
            {
                // One message an event, not one for each of its objects.
                if wait.reason.as_deref() != Some(reason) {
                    self.effects.push(Effect::Waiting { event, reason: reason.to_owned() });
                }
                wait.reason = Some(reason.to_owned());
            }
        }
    }

    /// Puts an object back into the queue of those that wait for it.
    fn again(&mut self, no: ObjectNo) {
        let lane = match (self.wants_event(no), self.has_waiters(no)) {
            (true, _) => Lane::Demand,
            (false, true) => Lane::Prefetch,
            (false, false) => return self.drop_object(no),
        };
        let Some(object) = self.objects.get_mut(&no) else { return };
        object.state = State::Queued(lane);
        match lane {
            // What failed together is tried together.
            Lane::Demand => self.demand.push_back((no, 0)),
            _ => self.prefetch.push_back(no),
        }
    }

    /// Ends the waits for an object. What other requests bring of it is still taken.
    fn give_up(&mut self, no: ObjectNo, errno: DenyErrno, reason: &str) {
        let Some(object) = self.objects.get_mut(&no) else { return };
        for waiter in std::mem::take(&mut object.waiters) {
            if self.waits.remove(&waiter).is_some() {
                let reason = reason.to_owned();
                self.effects.push(Effect::Fail { waiter, errno, reason });
            }
        }
        self.drop_object(no);
    }

    /// Forgets an object, unless a request for it is under way.
    fn drop_object(&mut self, no: ObjectNo) {
        let Some(object) = self.objects.get_mut(&no) else { return };
        if object.requests.is_empty() {
            self.objects.remove(&no);
            self.effects.push(Effect::Dropped(no));
        } else {
            object.state = State::Out;
        }
    }

    /// When [`poll`](Self::poll) should be called again even if nothing happens.
    #[must_use]
    pub fn next_wake(&self) -> Option<Now> {
        let queued = !self.demand.is_empty() || !self.ahead.is_empty() || !self.prefetch.is_empty();
        let pause = (queued && self.paused_until > Duration::ZERO).then_some(self.paused_until);
        match (self.timers.next(), pause) {
            (Some(timer), Some(pause)) => Some(timer.min(pause)),
            (timer, pause) => timer.or(pause),
        }
    }

    /// Does what is due, and gives all there is to do since the last call.
    pub fn poll(&mut self, now: Now) -> Vec<Effect> {
        while let Some(timer) = self.timers.pop(now) {
            match timer {
                Timer::Deadline(event) => self.deadline(event),
                Timer::Again(no) => {
                    if self.objects.get(&no).is_some_and(|o| o.state == State::BackOff) {
                        self.again(no);
                    }
                }
                Timer::Patience(no) => self.patience(no),
            }
        }
        if self.paused_until <= now {
            self.paused_until = Duration::ZERO;
            self.send_demand(now);
            self.send_ahead(now);
        }
        std::mem::take(&mut self.effects)
    }

    fn deadline(&mut self, event: EventId) {
        let waiter = Waiter::Event(event);
        if let Some(wait) = self.waits.remove(&waiter) {
            let last = wait.reason.unwrap_or_else(|| "the origin has not answered".to_owned());
            let reason = format!("gave up after {} s: {last}", self.deadline.as_secs());
            self.effects.push(Effect::Fail { waiter, errno: DenyErrno::Eio, reason });
        }
    }

    /// A reader has waited long enough for a request that was not made for it.
    fn patience(&mut self, no: ObjectNo) {
        let Some(object) = self.objects.get(&no) else { return };
        let in_demand = object.requests.iter().any(|request| {
            self.requests.get(request).is_some_and(|request| request.lane == Lane::Demand)
        });
        if object.state == State::Out && !in_demand && self.wants_event(no) {
            if let Some(object) = self.objects.get_mut(&no) {
                object.state = State::Queued(Lane::Demand);
            }
            self.demand.push_back((no, 0));
        }
    }

    fn send_demand(&mut self, now: Now) {
        let slots = if self.failures >= TROUBLED { 1 } else { self.connections };
        while self.requests.len() < slots {
            let objects = self.take_demand();
            if objects.is_empty() {
                self.backlog = false;
                return;
            }
            self.send(now, Lane::Demand, objects);
        }
        self.backlog = self.demand.iter().any(|(no, _)| self.is_queued(*no, Lane::Demand));
        if !self.backlog {
            self.demand.clear();
        }
    }

    fn is_queued(&self, no: ObjectNo, lane: Lane) -> bool {
        self.objects.get(&no).is_some_and(|object| object.state == State::Queued(lane))
    }

    /// The objects of the next request for waiting readers: those of one event, or in a backlog as
    /// many as go into one request.
    fn take_demand(&mut self) -> Vec<ObjectNo> {
        let mut taken: Vec<ObjectNo> = Vec::new();
        let (mut bytes, mut first_group) = (0, None);
        while let Some((no, group)) = self.demand.front().copied() {
            if !self.is_queued(no, Lane::Demand) {
                self.demand.pop_front();
                continue;
            }
            if !self.wants_event(no) {
                // Its events have ended meanwhile.
                self.demand.pop_front();
                self.let_go(no);
                continue;
            }
            let Some(object) = self.objects.get_mut(&no) else { break };
            let fits = taken.len() < DEMAND_BATCH.0 && bytes + object.size <= DEMAND_BATCH.1;
            let together = self.backlog || first_group == Some(group);
            if !taken.is_empty() && (!fits || !together || object.alone) {
                break;
            }
            self.demand.pop_front();
            object.state = State::Out;
            bytes += object.size;
            first_group.get_or_insert(group);
            taken.push(no);
            if object.alone {
                break;
            }
        }
        taken
    }

    /// Takes an object that no event waits for any more out of its queue.
    fn let_go(&mut self, no: ObjectNo) {
        let prefetched = self.has_waiters(no);
        match self.objects.get_mut(&no) {
            Some(object) if prefetched && object.requests.is_empty() => {
                object.state = State::Queued(Lane::Prefetch);
                self.prefetch.push_back(no);
            }
            _ => self.drop_object(no),
        }
    }

    fn send_ahead(&mut self, now: Now) {
        if self.failures >= TROUBLED {
            for no in std::mem::take(&mut self.ahead).into_iter().flatten() {
                if self.is_queued(no, Lane::Ahead) {
                    self.let_go(no);
                }
            }
            // A prefetch goes on, one request at a time, when no reader is there to probe.
            if !self.requests.is_empty() {
                return;
            }
        }
        let room = self.connections.saturating_sub(1).max(1);
        loop {
            let running = self.requests.values().filter(|r| r.lane != Lane::Demand).count();
            if self.requests.len() >= room || running >= AHEAD_REQUESTS {
                return;
            }
            let mut lane = Lane::Ahead;
            let mut objects = self.take_ahead();
            if objects.is_empty() {
                lane = Lane::Prefetch;
                objects = self.take_prefetch();
            }
            if objects.is_empty() {
                return;
            }
            self.send(now, lane, objects);
            if self.failures >= TROUBLED {
                return;
            }
        }
    }

    fn take_ahead(&mut self) -> Vec<ObjectNo> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(mut unit) = self.ahead.pop_front() {
            let mut used = 0;
            for no in &unit {
                if !self.is_queued(*no, Lane::Ahead) {
                    used += 1;
                    continue;
                }
                let Some(object) = self.objects.get_mut(no) else { continue };
                let fits = taken.len() < AHEAD_BATCH.0 && bytes + object.size <= AHEAD_BATCH.1;
                if !taken.is_empty() && !fits {
                    break;
                }
                object.state = State::Out;
                bytes += object.size;
                taken.push(*no);
                used += 1;
            }
            if used < unit.len() {
                self.ahead.push_front(unit.split_off(used));
                break;
            }
        }
        taken
    }

    fn take_prefetch(&mut self) -> Vec<ObjectNo> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(no) = self.prefetch.front().copied() {
            let stale = !self.is_queued(no, Lane::Prefetch);
            if stale || !self.has_waiters(no) {
                self.prefetch.pop_front();
                if !stale {
                    self.drop_object(no);
                }
                continue;
            }
            let Some(object) = self.objects.get_mut(&no) else { break };
            let fits = taken.len() < AHEAD_BATCH.0 && bytes + object.size <= AHEAD_BATCH.1;
            if !taken.is_empty() && (!fits || object.alone) {
                break;
            }
            self.prefetch.pop_front();
            object.state = State::Out;
            bytes += object.size;
            taken.push(no);
            if object.alone {
                break;
            }
        }
        taken
    }

    fn send(&mut self, now: Now, lane: Lane, objects: Vec<ObjectNo>) {
        self.next_request += 1;
        let request = RequestId(self.next_request);
        for no in &objects {
            if let Some(object) = self.objects.get_mut(no) {
                object.requests.push(request);
            }
        }
        let started = now;
        self.requests.insert(request, Request { lane, objects: objects.clone(), started });
        self.effects.push(Effect::Send { request, lane, objects });
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
mod tests;
