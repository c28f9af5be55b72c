//! Which objects go into the next requests.

use super::{
    AHEAD_BATCH, AHEAD_REQUESTS, Along, BEHIND, DEMAND_BATCH, Effect, LEAST_SHARE, LONG_SMALL,
    Lane, Now, Object, Request, RequestId, SMALL_OBJECTS, SMALL_REQUESTS, Schedule, State,
    TROUBLED, Waiter,
};
use crate::worker::ObjectNo;

impl Schedule {
    pub(super) fn send_demand(&mut self, now: Now, along: Along<'_>) {
        let ahead_waits = !self.ahead.is_empty() || !self.prefetch.is_empty();
        let ahead_runs = self.requests.values().any(|request| request.lane != Lane::Demand);
        let slots = match self.connections {
            _ if self.failures >= TROUBLED => 1,
            // Readers of a tree that is not being read ahead would keep it so.
            connections if ahead_waits && !ahead_runs => (connections - 1).max(1),
            connections => connections,
        };
        while self.requests.len() < slots {
            let objects = self.take_demand();
            if objects.is_empty() {
                self.backlog = false;
                return;
            }
            self.send(now, Lane::Demand, objects, along);
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
    pub(super) fn let_go(&mut self, no: ObjectNo) {
        let prefetched = self.has_waiters(no);
        match self.objects.get_mut(&no) {
            Some(object) if prefetched && object.requests.is_empty() => {
                object.state = State::Queued(Lane::Prefetch);
                self.prefetch.push_back(no);
            }
            _ => self.drop_object(no),
        }
    }

    pub(super) fn send_ahead(&mut self, now: Now, along: Along<'_>) {
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
            let of = |lane| self.requests.values().filter(|r| r.lane == lane).count();
            let (ahead, prefetch) = (of(Lane::Ahead), of(Lane::Prefetch));
            let free = room.saturating_sub(self.requests.len());
            let free = free.min(AHEAD_REQUESTS.saturating_sub(ahead + prefetch));
            if free == 0 {
                return;
            }
            let mut lane = Lane::Ahead;
            let mut objects = self.take_ahead();
            if objects.is_empty() {
                lane = Lane::Prefetch;
                let (requests, batch) = self.prefetch_limits(now);
                objects = self.take_prefetch(free.min(requests.saturating_sub(prefetch)), batch);
            }
            if objects.is_empty() {
                return;
            }
            self.send(now, lane, objects, along);
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

    /// How many requests a prefetch may have at the same time, and the most objects and bytes in one of them.
    fn prefetch_limits(&self, now: Now) -> (usize, (usize, u64)) {
        let waits = || self.waits.keys().any(|waiter| matches!(waiter, Waiter::Event(_)));
        if now < self.busy_until || waits() {
            let requests = if self.has_prefetch_begun(now) { 0 } else { SMALL_REQUESTS };
            (requests, (SMALL_OBJECTS, self.small))
        } else {
            (AHEAD_REQUESTS, AHEAD_BATCH)
        }
    }

    /// Whether more than two thirds of a prefetch's request are still to come: a second one beside it would only leave less of the
    /// line to readers. One that takes long may hang, and does not count.
    fn has_prefetch_begun(&self, now: Now) -> bool {
        let mut prefetches = self.requests.values().filter(|r| r.lane == Lane::Prefetch);
        prefetches.any(|r| r.left > r.size / 3 * 2 && now.saturating_sub(r.started) < LONG_SMALL)
    }

    /// The objects of the next request of a prefetch, when there may be `free` more: an even share, of at most `batch`
    /// objects and bytes.
    fn take_prefetch(&mut self, free: usize, batch: (usize, u64)) -> Vec<ObjectNo> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        if free == 0 {
            return taken;
        }
        let queued = self.prefetch_bytes(batch.1 * free as u64);
        let most = (queued / free as u64).clamp(LEAST_SHARE.min(batch.1), batch.1);
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
            let fits = taken.len() < batch.0 && bytes + object.size <= most;
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

    /// Bytes of content that prefetches have in the queue; not all of them are looked for where there are `enough`.
    fn prefetch_bytes(&self, enough: u64) -> u64 {
        let queued = self.prefetch.iter().filter_map(|no| self.objects.get(no));
        let sizes = queued.filter(|o| o.state == State::Queued(Lane::Prefetch)).map(|o| o.size);
        let mut bytes = 0;
        for size in sizes {
            bytes += size;
            if bytes >= enough {
                break;
            }
        }
        bytes
    }

    fn send(&mut self, now: Now, lane: Lane, mut objects: Vec<ObjectNo>, along: Along<'_>) {
        self.next_request += 1;
        let request = RequestId(self.next_request);
        let asked = objects.len();
        let others = along(&objects, self.behind(lane, &objects));
        objects.extend(others.into_iter().filter_map(|(no, size)| self.join(no, size)));
        let mut size = 0;
        for no in &objects {
            if let Some(object) = self.objects.get_mut(no) {
                object.requests.push(request);
                size += object.size;
            }
        }
        let running = Request {
            lane,
            objects: objects.clone(),
            asked,
            started: now,
            size,
            left: size,
            received: 0,
        };
        self.requests.insert(request, running);
        self.effects.push(Effect::Send { request, lane, objects });
    }

    /// How many bytes behind these objects are to come with them: some if a single reader waits, and nothing was wrong with them.
    fn behind(&self, lane: Lane, objects: &[ObjectNo]) -> u64 {
        let alone = |no: &ObjectNo| self.objects.get(no).is_some_and(|object| object.alone);
        let events = self.waits.keys().filter(|waiter| matches!(waiter, Waiter::Event(_)));
        let is_single = lane == Lane::Demand && events.take(2).count() == 1;
        if is_single && !objects.iter().any(alone) { BEHIND } else { 0 }
    }

    /// Takes an object into a request that brings it anyway, unless it is in another one, or has gone wrong.
    fn join(&mut self, no: ObjectNo, size: u64) -> Option<ObjectNo> {
        let object = self.objects.entry(no).or_insert_with(|| Object::new(size));
        let is_free = match object.state {
            State::Queued(_) => !object.alone,
            State::Out => object.requests.is_empty(),
            State::BackOff => false,
        };
        is_free.then(|| {
            object.state = State::Out;
            no
        })
    }
}
