//! A shard's worker: its start and its end, and what it says.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;
use tracing::{debug, error, info, warn};

use super::handle::Said;
use super::{LastDeath, Pool, Prefetch, QUICK_DEATH, Shard};
use crate::ids::{PoolId, SegmentId};
use crate::queue::broker::{Death, MAX_STRIKES};
use crate::queue::wire::{self, Counters as FetchCounters, FromWorker, ToWorker, encode};
use crate::source::oci::fetch::CHUNK;
use crate::supervisor::worker::{Control, Exit, Upcall, Worker, cut};

/// As many workers that were killed from outside are followed at once by the next, in [`PACE_TIME`].
const PACE: usize = 20;
const PACE_TIME: Duration = Duration::from_secs(1);

/// The most that is kept of what a server can do, in bytes.
const MAX_SERVER: usize = 4 << 10;

/// So many quick deaths in a row, and nobody waits for the next worker.
const TOO_MANY_DEATHS: u32 = 5;

/// The first and the longest pause between workers that end as soon as they are started.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(5));

/// The workers in a row that ended soon by their own fault, or could not be started.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    deaths: u32,
    pause: Duration,
}

impl Backoff {
    /// How long to wait after a worker that has `lived` for so long. The first restart is at once; each that fails soon
    /// is followed by twice the pause of the one before.
    fn after(&mut self, lived: Duration) -> Duration {
        if lived > QUICK_DEATH {
            *self = Self::default();
        } else {
            self.deaths = self.deaths.saturating_add(1);
            self.pause = (self.pause * 2).clamp(BACK_OFF.0, BACK_OFF.1);
        }
        self.pause
    }

    fn is_loop(&self) -> bool {
        self.deaths >= TOO_MANY_DEATHS
    }
}

/// When the latest workers died by somebody else's doing.
#[derive(Debug, Default)]
pub(super) struct Pace(VecDeque<Instant>);

impl Pace {
    /// How long to wait after a death at `now`. A kill says nothing about the next worker, unless
    /// there are ever more.
    fn delay(&mut self, now: Instant) -> Duration {
        self.0.push_back(now);
        if self.0.len() <= PACE {
            return Duration::ZERO;
        }
        let first = self.0.pop_front().unwrap_or(now);
        PACE_TIME.saturating_sub(now.saturating_duration_since(first))
    }
}

impl Shard {
    /// The spare one, if there is one.
    pub(super) fn start_worker(&mut self) {
        self.restart_at = None;
        self.killed = None;
        self.worker_ready = false;
        if let Some((worker, ready)) = self.spare.take() {
            info!(shard = %self.id, pid = worker.pid(), "the spare worker takes over");
            self.worker = Some(worker);
            self.worker_ready = ready;
            self.introduce();
            return;
        }
        match Worker::start(self.id, self.queue.kind(), &self.store, &self.rules.cgroups) {
            Ok(worker) => {
                info!(shard = %self.id, pid = worker.pid(), "worker started");
                self.worker = Some(worker);
            }
            Err(error) => {
                error!(shard = %self.id, %error, "can't start a worker");
                self.schedule_restart(Duration::ZERO);
            }
        }
    }

    /// The next worker, after one that has `lived` for so long and ended by its own fault.
    pub(super) fn schedule_restart(&mut self, lived: Duration) {
        let pause = self.backoff.after(lived);
        if self.backoff.is_loop() {
            let why = "the workers end as soon as they are started: see the log";
            self.segments.values_mut().for_each(|segment| segment.refuse(why));
            for (_, Prefetch { reply, .. }) in self.prefetches.drain() {
                reply.send(Err(why.into())).ok();
            }
            self.end_recycle(Err(why.into()));
        }
        self.restart_after(pause);
    }

    fn restart_after(&mut self, pause: Duration) {
        if pause.is_zero() {
            // a timer would take a millisecond or two
            self.start_worker();
        } else {
            self.restart_at = Some(tokio::time::Instant::now() + pause);
        }
    }

    pub(super) fn kill_worker(&mut self, why: &str) {
        let retiring = self.is_retiring();
        if let Some(worker) = self.worker.as_mut()
            && self.killed.is_none()
        {
            warn!(shard = %self.id, pid = worker.pid(), why, "killing the worker");
            // one that was told to stop has not ended by its own fault
            self.killed = Some(why.to_owned()).filter(|_| !retiring);
            worker.kill();
        }
    }

    pub(super) fn worker_ended(&mut self, exit: Exit) {
        let Some(worker) = self.worker.take() else { return };
        let exit = worker.explain(exit);
        let killed = self.killed.take().filter(|_| exit.from_outside);
        let death =
            if exit.from_outside && killed.is_none() { Death::Outside } else { Death::Fault };
        let end = killed.map_or(exit.description, |why| format!("killed: {why}"));
        let retired = self.is_retiring();
        if let Some(recycle) = &mut self.recycle {
            recycle.ended = true;
        }
        let (queue, mut scope) = self.queue();
        let in_flight = queue.worker_ended(death, &end, &mut scope);
        self.counters.requeued += in_flight;
        if retired {
            info!(shard = %self.id, pid = worker.pid(), end, in_flight, "worker stopped");
        } else {
            warn!(shard = %self.id, pid = worker.pid(), end, in_flight, "worker ended");
            self.worker_deaths += 1;
            self.last_death =
                Some(LastDeath { pid: worker.pid(), at: Instant::now(), end: end.clone() });
        }
        if death == Death::Fault {
            self.strike_prefetches();
            // whatever is wrong, the next one finds out for itself
            self.servers.clear();
        }
        if self.stop.is_some() {
            return;
        }
        match death {
            Death::Fault => self.schedule_restart(worker.age()),
            Death::Outside => {
                let now = Instant::now();
                let delay = if retired { Duration::ZERO } else { self.pace.delay(now) };
                self.restart_after(delay);
            }
        }
    }

    /// What was asked for ahead of readers goes to the next worker, unless it killed three.
    fn strike_prefetches(&mut self) {
        self.prefetches.values_mut().for_each(|prefetch| prefetch.strikes += 1);
        let too_many = |_: &u64, prefetch: &mut Prefetch| prefetch.strikes >= MAX_STRIKES;
        for (_, Prefetch { reply, .. }) in self.prefetches.extract_if(too_many) {
            reply.send(Err("three workers died while they had it: see the log".into())).ok();
        }
    }

    pub(super) fn worker_message(&mut self, message: FromWorker) {
        match message {
            FromWorker::Ready { version } if version == wire::VERSION => {
                self.worker_ready = true;
                self.introduce();
            }
            FromWorker::Ready { version } => {
                self.kill_worker(&wire::other_version("worker", version));
            }
            FromWorker::Attached { segment, result } => {
                self.attached(segment, result.map_err(cut));
            }
            FromWorker::NeedTransport { request, pool } => {
                let (control, permit) = match self.upcall(pool) {
                    Some((control, Ok(permit))) => (control, permit),
                    Some((control, Err(why))) => {
                        let result = Err(why);
                        control.send(ToWorker::Transport { request, result }, Vec::new());
                        return;
                    }
                    None => return,
                };
                let origins = Arc::clone(&self.origins);
                tokio::spawn(async move {
                    let (result, fds) = match origins.transport(pool).await {
                        Ok(fds) => (Ok(()), fds.into()),
                        Err(error) => (Err(error), Vec::new()),
                    };
                    control.answer(permit, ToWorker::Transport { request, result }, fds);
                });
            }
            FromWorker::NeedCredential { request, pool, url, rejected } => {
                let (control, permit) = match self.upcall(pool) {
                    Some((control, Ok(permit))) => (control, permit),
                    Some((control, Err(why))) => {
                        let result = Err(why);
                        control.send(ToWorker::Credential { request, result }, Vec::new());
                        return;
                    }
                    None => return,
                };
                let origins = Arc::clone(&self.origins);
                tokio::spawn(async move {
                    let result = origins.credential(pool, &url, rejected.as_ref()).await;
                    control.answer(permit, ToWorker::Credential { request, result }, Vec::new());
                });
            }
            FromWorker::Complete { segment } => self.check_complete(segment, Said::Worker),
            FromWorker::PrefetchDone { request, result } => {
                if let Some(Prefetch { reply, .. }) = self.prefetches.remove(&request) {
                    reply.send(result.map_err(cut)).ok();
                }
            }
            FromWorker::Report { pool, .. }
            | FromWorker::Trouble { pool, .. }
            | FromWorker::Met { pool, .. }
                if !self.pools.contains_key(&pool) =>
            {
                debug!(shard = %self.id, %pool, "the worker speaks of a pool that it doesn't serve");
            }
            FromWorker::Touched { segment, mut records } => {
                let known = match self.segments.get_mut(&segment) {
                    Some(known) => Some((known.size, &mut known.touched)),
                    None => {
                        self.detached.get(&segment).copied().zip(self.touched.get_mut(&segment))
                    }
                };
                if let Some((size, touched)) = known {
                    // each is told once, however often a worker says so
                    records.retain(|record| {
                        u64::from(*record) * CHUNK < size && touched.insert(*record)
                    });
                    if !records.is_empty() {
                        (self.hooks.on_touched)(segment, records);
                    }
                }
            }
            FromWorker::Report { pool, counters } => {
                add(self.fetched.entry(pool).or_default(), &counters)
            }
            FromWorker::Met { pool, server } => {
                // nobody else looks at it, but it is we who keep it
                if encode(&server).is_ok_and(|bytes| bytes.len() <= MAX_SERVER) {
                    self.servers.insert(pool, server);
                }
            }
            FromWorker::Trouble { pool, message } => {
                let message = cut(message);
                if message.is_empty() {
                    self.trouble.remove(&pool);
                } else {
                    warn!(shard = %self.id, %pool, message, "trouble with the origin");
                    self.trouble.insert(pool, message);
                }
            }
        }
    }

    /// Whether the worker may have what it asks for.
    pub(super) fn upcall(
        &mut self,
        pool: PoolId,
    ) -> Option<(Control, Result<OwnedSemaphorePermit, String>)> {
        let served = self.pools.contains_key(&pool);
        let worker = self.worker.as_mut()?;
        let control = worker.control();
        match worker.upcall(served) {
            Upcall::Granted(permit) => Some((control, Ok(permit))),
            Upcall::Refused(why) => Some((control, Err(why))),
            Upcall::OutOfOrder => {
                self.kill_worker("it asks for ever more transports and credentials");
                None
            }
        }
    }

    pub(super) fn attached(&mut self, id: SegmentId, result: Result<(), String>) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        match result {
            Ok(()) => {
                segment.refused = false;
                for reply in segment.waiting_for_worker.drain(..) {
                    reply.send(Ok(())).ok();
                }
            }
            Err(why) => {
                error!(shard = %self.id, segment = %id, why, "the worker can't take a segment");
                segment.refused = true;
                segment.refuse(&why);
            }
        }
    }

    /// Tells a new worker all that it serves, then lets it take events.
    pub(super) fn introduce(&mut self) {
        if !(self.serving && self.worker_ready) || self.is_retiring() {
            return;
        }
        let Some(worker) = self.worker.as_mut() else { return };
        let control = worker.control();
        for (pool, Pool { origin, limits }) in &self.pools {
            let (origin, server) = (origin.clone(), self.servers.get(pool).cloned());
            let message = ToWorker::Pool { pool: *pool, origin, limits: *limits, server };
            control.send(message, Vec::new());
        }
        let mut failed = Vec::new();
        for (id, segment) in &self.segments {
            match self.store.open_for_worker(segment.pool, *id) {
                Ok(fds) => {
                    control.send(ToWorker::Segment { pool: segment.pool, segment: *id }, fds)
                }
                Err(error) => failed.push((*id, error)),
            }
        }
        worker.set_running();
        let (queue, mut scope) = self.queue();
        queue.begin(&mut scope);
        for prefetch in self.prefetches.values() {
            control.send(prefetch.message.clone(), Vec::new());
        }
        for (id, error) in failed {
            error!(shard = %self.id, segment = %id, %error, "can't open a segment for the worker");
            if let Some(segment) = self.segments.get_mut(&id) {
                segment.refused = true;
                segment.refuse(&format!("can't open segment {id} for the worker: {error}"));
            }
        }
        self.recycled();
        if self.rules.spare && self.stop.is_none() {
            self.spare.want();
        }
    }
}

fn add(sum: &mut FetchCounters, more: &FetchCounters) {
    sum.requests = sum.requests.saturating_add(more.requests);
    sum.retries = sum.retries.saturating_add(more.retries);
    sum.objects = sum.objects.saturating_add(more.objects);
    sum.read_ahead_objects = sum.read_ahead_objects.saturating_add(more.read_ahead_objects);
    sum.content_bytes = sum.content_bytes.saturating_add(more.content_bytes);
    sum.received_bytes = sum.received_bytes.saturating_add(more.received_bytes);
    sum.sent_bytes = sum.sent_bytes.saturating_add(more.sent_bytes);
    sum.rejected_objects = sum.rejected_objects.saturating_add(more.rejected_objects);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_loop_gets_slower_and_ends_with_the_first_worker_that_lives() {
        let at_once = Duration::from_millis(5);
        let mut backoff = Backoff::default();
        assert_eq!(backoff.after(2 * QUICK_DEATH), Duration::ZERO, "the first one");
        let pauses: Vec<_> = (0..12).map(|_| backoff.after(at_once).as_millis()).collect();
        assert_eq!(pauses[..6], [20, 40, 80, 160, 320, 640]);
        assert_eq!(pauses[8..], [5000, 5000, 5000, 5000]);
        assert!(backoff.is_loop());
        // each shard has its own
        assert!(!Backoff::default().is_loop());
        assert_eq!(backoff.after(2 * QUICK_DEATH), Duration::ZERO);
        assert!(!backoff.is_loop());
        assert_eq!(backoff.after(at_once), BACK_OFF.0);
        assert!((0..3).all(|_| {
            backoff.after(at_once);
            !backoff.is_loop()
        }));
        backoff.after(at_once);
        assert!(backoff.is_loop());
    }

    #[test]
    fn kills_are_followed_at_once_up_to_a_pace() {
        let start = Instant::now();
        let mut pace = Pace::default();
        for n in 0..PACE as u32 {
            assert_eq!(pace.delay(start + n * Duration::from_millis(10)), Duration::ZERO);
        }
        let late = start + Duration::from_millis(300);
        assert_eq!(pace.delay(late), Duration::from_millis(700));
        assert_eq!(pace.delay(start + 2 * PACE_TIME), Duration::ZERO);
    }
}
