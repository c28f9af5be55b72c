//! What becomes of objects and of those who wait for them when a request brings something, or ends.

use std::time::Duration;

use super::timers::Timer;
use super::{
    Arrival, BUSY, Effect, LEAST_SMALL, Lane, MOST_SMALL, Now, Outcome, PREFETCH_TRIES, Request,
    RequestId, SMALL_TIME, Schedule, State, WRONG_TRIES, Waiter,
};
use crate::fanotify::DenyErrno;
use crate::worker::ObjectNo;

impl Schedule {
    /// An object has come with this request and is in its place.
    pub fn arrived(&mut self, now: Now, request: RequestId, no: ObjectNo) -> Arrival {
        self.failures = 0;
        if let Some(request) = self.requests.get(&request)
            && request.asked == 1
            && request.objects.first() == Some(&no)
        {
            let took = now.saturating_sub(request.started);
            self.latency = (self.latency * 7 + took) / 8;
        }
        let Some(object) = self.objects.remove(&no) else { return Arrival::Again };
        for request in &object.requests {
            if let Some(request) = self.requests.get_mut(request) {
                request.left = request.left.saturating_sub(object.size);
            }
        }
        let mut arrival = Arrival::Unasked;
        for waiter in object.waiters {
            if let Some(wait) = self.waits.get_mut(&waiter) {
                if matches!(waiter, Waiter::Event(_)) {
                    self.busy_until = now + BUSY;
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
        if ended.lane == Lane::Demand {
            // whoever waited for it may soon come again
            self.busy_until = self.busy_until.max(now + BUSY);
        }
        if ended.lane == Lane::Prefetch && *outcome == Outcome::Done {
            self.measure(now, &ended);
        }
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

    /// Draws the conclusion from a prefetch's request that has brought all: of how many bytes one takes the time that it is to.
    fn measure(&mut self, now: Now, ended: &Request) {
        let took = now.saturating_sub(ended.started).max(Duration::from_millis(1));
        // one that was short because little was asked for says nothing of the line
        if ended.left > 0 || ended.size < self.small / 2 && took < SMALL_TIME {
            return;
        }
        let fit = u128::from(ended.size) * SMALL_TIME.as_micros() / took.as_micros();
        let most = MOST_SMALL.min(self.small * 2);
        self.small = u64::try_from(fit).unwrap_or(most).clamp(LEAST_SMALL, most);
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

    pub(super) fn has_waiters(&self, no: ObjectNo) -> bool {
        self.objects
            .get(&no)
            .is_some_and(|object| object.waiters.iter().any(|w| self.waits.contains_key(w)))
    }

    pub(super) fn wants_event(&self, no: ObjectNo) -> bool {
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
    pub(super) fn again(&mut self, no: ObjectNo) {
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
    pub(super) fn drop_object(&mut self, no: ObjectNo) {
        let Some(object) = self.objects.get_mut(&no) else { return };
        if object.requests.is_empty() {
            self.objects.remove(&no);
            self.effects.push(Effect::Dropped(no));
        } else {
            object.state = State::Out;
        }
    }
}
