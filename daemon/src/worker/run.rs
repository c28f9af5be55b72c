//! The worker's main loop.
//!
//! One task owns all state: it waits for whatever comes first (a message, an event, news from a
//! request, a timer), applies it, and lets the pools say what is to be done. Everything slow runs
//! in tasks that report back through a channel, so nothing here waits for the network, and no lock
//! is taken.

mod denials;
mod layered;
mod pools;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::Instant;

use super::control::{Control, Upcalls};
use super::queue::Queue;
use super::request::Note;
use super::schedule::Now;
use crate::fanotify::{DenyErrno, Verdict};
use crate::ids::{EventId, PoolId, SegmentId};
use crate::queue::quarantine::Quarantined;
use crate::queue::wire::image::Repository;
use crate::queue::wire::{self, FromQueue, FromWorker, Limits, OriginSpec, ToQueue, ToWorker};
use crate::range::ByteRange;
use crate::source::Fetch;
use denials::Denials;
use pools::{PoolState, Shared, Slow};

/// How often counters are reported, if they have changed.
const REPORT: Duration = Duration::from_millis(500);
/// How long written data stays in the segments' page cache, about: reports between two rounds.
const CACHE_ROUND: u32 = 10;
/// A denial after so long is not to be waited for again by the same access.
const LONG_WAIT: Duration = Duration::from_secs(1);
/// News applied before the others get their turn.
const AT_ONCE: usize = 256;

/// The process's name (`comm` in proc(5)) once it takes events, and before.
const WORKER_NAME: &CStr = c"hydrantd-worker";
pub(super) const SPARE_NAME: &CStr = c"hydrantd-spare";

/// Why a worker ends before it is told to.
#[derive(Debug, Error)]
pub enum RunError {
    #[error("can't set up the {what} socket")]
    Socket {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("can't read from the {what} socket")]
    Receive {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("can't use the kernel's queue")]
    KernelQueue(#[source] io::Error),
    #[error("{}", wire::other_version("supervisor", *.0))]
    Version(u32),
}

/// Makes the sources of pools. Nothing of it may wait for the network.
pub trait Sources {
    type Source: Fetch;

    fn source(
        &self,
        pool: PoolId,
        origin: OriginSpec,
        limits: Limits,
        upcalls: Upcalls,
    ) -> Self::Source;

    /// There will soon be sources of layers in this repository.
    fn preconnect(&self, repository: &Repository, limits: Limits);
}

/// Serves a queue until the supervisor says [`ToWorker::Stop`] or closes the control socket.
///
/// `control`: the control socket. `spool`: a directory in which unlinked files can be made
/// (`O_TMPFILE`). `sources` makes the sources of pools.
pub async fn run<S: Sources>(
    control: OwnedFd,
    queue: Queue,
    spool: OwnedFd,
    sources: S,
) -> Result<(), RunError> {
    let control =
        Control::new(control).map_err(|source| RunError::Socket { what: "control", source })?;
    let (notes, news) = unbounded_channel();
    let (slow, slow_news) = unbounded_channel();
    let worker = Worker {
        control,
        queue,
        shared: Shared { spool: Arc::new(spool), notes, slow },
        sources,
        started: Instant::now(),
        pools: HashMap::new(),
        segments: HashMap::new(),
        events: HashMap::new(),
        denials: Denials::default(),
        dirty: HashSet::new(),
        rounds: 0,
        taking_events: false,
    };
    worker.run(news, slow_news).await
}

/// An event that has not been answered.
#[derive(Debug, Clone, Copy)]
struct Event {
    pool: PoolId,
    segment: SegmentId,
    range: ByteRange,
    pid: i32,
    since: Now,
    /// How often all seemed to be there and was not.
    surprises: u8,
}

/// What comes in.
enum Action {
    Control(ToWorker, Vec<OwnedFd>),
    Queue(ToQueue),
    Note(Note),
    Slow(Slow),
    Report,
    Wake,
    /// The supervisor is gone.
    End,
}

struct Worker<S: Sources> {
    control: Control,
    queue: Queue,
    shared: Shared,
    sources: S,
    started: Instant,
    pools: HashMap<PoolId, PoolState<S::Source>>,
    segments: HashMap<SegmentId, PoolId>,
    events: HashMap<EventId, Event>,
    denials: Denials,
    /// Pools to which something has happened.
    dirty: HashSet<PoolId>,
    rounds: u32,
    taking_events: bool,
}

/// Waits until then; without a time, for ever.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

impl<S: Sources> Worker<S> {
    async fn run(
        mut self,
        mut news: UnboundedReceiver<Note>,
        mut slow: UnboundedReceiver<Slow>,
    ) -> Result<(), RunError> {
        let mut report = tokio::time::interval(REPORT);
        report.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let receive = |what| move |source| RunError::Receive { what, source };
        loop {
            let wake = self.pools.values().filter_map(|pool| pool.engine.next_wake()).min();
            let wake = wake.map(|wake| self.started + wake);
            let action = tokio::select! {
                message = self.control.next() => match message.map_err(receive("control"))? {
                    Some((message, fds)) => Action::Control(message, fds),
                    None => Action::End,
                },
                event = self.queue.next(), if self.taking_events => {
                    match event.map_err(receive("queue"))? {
                        Some(event) => Action::Queue(event),
                        None => Action::End,
                    }
                }
                Some(note) = news.recv() => Action::Note(note),
                Some(done) = slow.recv() => Action::Slow(done),
                _ = report.tick() => Action::Report,
                () = until(wake) => Action::Wake,
            };
            match action {
                Action::Control(ToWorker::Stop, _) | Action::End => break,
                Action::Control(message, fds) => self.control(message, fds)?,
                Action::Queue(event) => self.event(event),
                Action::Note(note) => {
                    self.note(note);
                    for _ in 0..AT_ONCE {
                        let Ok(note) = news.try_recv() else { break };
                        self.note(note);
                    }
                }
                Action::Slow(done) => self.slow(done),
                Action::Report => {
                    self.queue.beat();
                    self.progress();
                    self.report();
                }
                Action::Wake => {
                    // A deadline may be due: it counts from the last progress.
                    self.progress();
                    self.dirty.extend(self.pools.keys());
                }
            }
            self.settle();
        }
        // What has not been answered goes to the next worker.
        for pool in std::mem::take(&mut self.pools).into_values() {
            pool.stop(&self.control);
        }
        self.queue.close().await;
        self.control.close().await;
        Ok(())
    }

    fn now(&self) -> Now {
        self.started.elapsed()
    }

    fn control(&mut self, message: ToWorker, fds: Vec<OwnedFd>) -> Result<(), RunError> {
        match message {
            ToWorker::Hello { version } if version != wire::VERSION => {
                return Err(RunError::Version(version));
            }
            ToWorker::Hello { version } => self.control.send(FromWorker::Ready { version }),
            ToWorker::Pool { pool, origin, limits, server } => {
                let upcalls = self.control.upcalls(pool, server);
                let source = self.sources.source(pool, origin, limits, upcalls);
                match self.pools.entry(pool) {
                    Entry::Occupied(mut known) => known.get_mut().settings(source, limits),
                    Entry::Vacant(new) => drop(new.insert(PoolState::new(pool, source, limits))),
                }
            }
            ToWorker::Segment { pool, segment } => self.attach(pool, segment, fds),
            ToWorker::Detach { pool } => self.detach(pool),
            ToWorker::Start { quarantine } => self.start(&quarantine, fds)?,
            ToWorker::Transport { request, result } => {
                self.control.transport(request, result.map(|()| fds));
            }
            ToWorker::Credential { request, result } => self.control.credential(request, result),
            ToWorker::Prefetch { request, segment, runs } => {
                let result = match self.segments.get(&segment) {
                    Some(pool) => {
                        self.dirty.insert(*pool);
                        self.pools
                            .get_mut(pool)
                            .map_or(Ok(()), |pool| pool.prefetch(request, segment, &runs))
                    }
                    None => Err(format!("segment {segment} is not attached")),
                };
                if result.is_err() {
                    self.control.send(FromWorker::PrefetchDone { request, result });
                }
            }
            ToWorker::Preconnect { repository, limits } => {
                self.sources.preconnect(&repository, limits);
            }
            ToWorker::Stop => {}
        }
        Ok(())
    }

    fn start(&mut self, quarantine: &[Quarantined], fds: Vec<OwnedFd>) -> Result<(), RunError> {
        let mut fds = fds.into_iter();
        if let (Some(queue), Some(table)) = (fds.next(), fds.next()) {
            let taken = self.queue.take_from_kernel(queue, table, quarantine);
            taken.map_err(RunError::KernelQueue)?;
            for (segment, pool) in &self.segments {
                let known = self.pools.get_mut(pool).map(|state| state.pool.segment(*segment));
                if let Some(Ok(known)) = known {
                    self.queue.know(*segment, &known.data).map_err(RunError::KernelQueue)?;
                }
            }
        }
        self.taking_events = true;
        let _ = nix::sys::prctl::set_name(WORKER_NAME);
        Ok(())
    }

    fn attach(&mut self, pool: PoolId, segment: SegmentId, fds: Vec<OwnedFd>) {
        let now = self.now();
        let mut fds = fds.into_iter();
        let result = match (self.pools.get_mut(&pool), fds.next(), fds.next()) {
            (Some(state), Some(data), Some(index)) => {
                self.queue.know(segment, &data).map_err(|error| error.to_string()).and_then(|()| {
                    state
                        .attach(now, segment, data, index, fds.next())
                        .map_err(|error| chain(&error))
                })
            }
            (None, ..) => Err(format!("there is no pool {pool}")),
            _ => Err("its two fds are missing".to_owned()),
        };
        let attached = result.is_ok();
        self.control.send(FromWorker::Attached { segment, result });
        if attached {
            self.segments.insert(segment, pool);
            if let Some(state) = self.pools.get_mut(&pool) {
                state.check_complete(segment, &self.control);
            }
        }
    }

    fn detach(&mut self, pool: PoolId) {
        let Some(mut state) = self.pools.remove(&pool) else { return };
        state.report_touched(&self.control);
        self.segments.retain(|segment, of| {
            if *of == pool {
                self.queue.forget(*segment);
            }
            *of != pool
        });
        let ended: Vec<_> =
            self.events.iter().filter(|(_, event)| event.pool == pool).map(|(id, _)| *id).collect();
        for event in ended {
            self.deny(event, DenyErrno::Eio, "its tree is being removed".to_owned());
        }
        state.stop(&self.control);
    }

    fn event(&mut self, message: ToQueue) {
        match message {
            ToQueue::Event { event, segment, range, pid } => match self.segments.get(&segment) {
                Some(pool) => {
                    let pool = *pool;
                    let since = self.started.elapsed();
                    self.events
                        .insert(event, Event { pool, segment, range, pid, since, surprises: 0 });
                    match self.denials.find(since, pid, segment, range) {
                        Some((errno, reason)) => self.deny(event, errno, reason),
                        None => self.look(event),
                    }
                }
                None => {
                    let reason = format!("segment {segment} is not attached");
                    self.deny(event, DenyErrno::Eio, reason);
                }
            },
            ToQueue::Touched { segment, range } => {
                let now = self.now();
                if let Some(pool) = self.segments.get(&segment)
                    && let Some(state) = self.pools.get_mut(pool)
                {
                    state.touched(now, segment, range);
                    self.dirty.insert(*pool);
                }
            }
            ToQueue::Cancelled { event } => {
                if let Some(Event { pool, .. }) = self.events.remove(&event)
                    && let Some(state) = self.pools.get_mut(&pool)
                {
                    state.engine.cancel(event);
                }
            }
            // `Queue` does what there is to do
            ToQueue::Deny { .. } | ToQueue::Retry { .. } | ToQueue::ClearQuarantine => {}
        }
    }

    /// Finds out what an event needs.
    fn look(&mut self, id: EventId) {
        let now = self.now();
        let Some(event) = self.events.get(&id).copied() else { return };
        let Some(state) = self.pools.get_mut(&event.pool) else { return };
        self.dirty.insert(event.pool);
        match state.event(now, id, event.segment, event.range) {
            Ok(true) => self.allow(id),
            Ok(false) => {}
            Err(error) => self.deny(id, DenyErrno::Eio, chain(&error)),
        }
    }

    fn allow(&mut self, event: EventId) {
        if self.events.remove(&event).is_some() {
            self.queue.answer(FromQueue::Answer { event, verdict: Verdict::Allow, reason: None });
        }
    }

    fn deny(&mut self, event: EventId, errno: DenyErrno, reason: String) {
        self.events.remove(&event);
        tracing::warn!(%event, ?errno, reason, "denied");
        let (verdict, reason) = (Verdict::Deny(errno), Some(shortened(reason)));
        self.queue.answer(FromQueue::Answer { event, verdict, reason });
    }

    fn note(&mut self, note: Note) {
        let now = self.now();
        if let Some(state) = self.pools.get_mut(&note.pool) {
            self.dirty.insert(note.pool);
            state.note(now, note.request, note.news, &self.control);
        }
    }

    fn slow(&mut self, done: Slow) {
        match done {
            Slow::Names { pool, index, objects } => {
                if let Some(state) = self.pools.get_mut(&pool) {
                    state.engine.names(index, objects);
                }
            }
            Slow::Composed { event: id, result } => {
                let Some(event) = self.events.get(&id).copied() else { return };
                if let Some(state) = self.pools.get_mut(&event.pool) {
                    state.composed(event.segment, &self.control);
                }
                match result {
                    Ok(()) => self.allow(id),
                    Err((errno, reason)) => self.deny(id, errno, reason),
                }
            }
        }
    }

    fn progress(&mut self) {
        let now = self.now();
        let running =
            self.pools.iter_mut().filter_map(|(id, pool)| pool.progress(now).then_some(*id));
        self.dirty.extend(running);
    }

    fn report(&mut self) {
        for (pool, state) in &mut self.pools {
            if let Some(counters) = state.report() {
                self.control.send(FromWorker::Report { pool: *pool, counters });
            }
            state.report_touched(&self.control);
        }
        self.rounds += 1;
        if self.rounds >= CACHE_ROUND {
            self.rounds = 0;
            for state in self.pools.values_mut() {
                state.drop_cache();
            }
        }
    }

    /// Does what the pools to which something has happened want done.
    fn settle(&mut self) {
        while !self.dirty.is_empty() {
            for pool in std::mem::take(&mut self.dirty) {
                let now = self.now();
                let Some(state) = self.pools.get_mut(&pool) else { continue };
                for effect in state.poll(now) {
                    self.apply(pool, effect);
                }
            }
        }
    }

    fn apply(&mut self, pool: PoolId, effect: super::engine::Effect) {
        use super::engine::Effect;
        let Some(state) = self.pools.get_mut(&pool) else { return };
        match effect {
            Effect::Send { request, lane, objects } => {
                if !state.send(request, lane, &objects, &self.shared) {
                    self.dirty.insert(pool);
                }
            }
            Effect::Ready(id) => self.ready(id),
            Effect::Deny { event, errno, reason } => {
                if let Some(Event { segment, range, pid, since, .. }) =
                    self.events.get(&event).copied()
                {
                    let now = self.started.elapsed();
                    // what was refused at once may as well be asked again
                    if now.saturating_sub(since) > LONG_WAIT || errno != DenyErrno::Eio {
                        let wanted = (segment, state.whole_objects(segment, range));
                        self.denials.add(now, pid, wanted, errno, &reason);
                    }
                    self.deny(event, errno, reason);
                }
            }
            Effect::Waiting { event, reason } => {
                if self.events.contains_key(&event) {
                    let reason = shortened(reason);
                    self.queue.answer(FromQueue::Waiting { event, reason });
                }
            }
            Effect::PrefetchDone { request, result } => {
                let result = result.map_err(shortened);
                self.control.send(FromWorker::PrefetchDone { request, result });
            }
            Effect::IndexNames => state.index_names(&self.shared),
        }
    }

    /// All objects of an event are there.
    fn ready(&mut self, id: EventId) {
        let Some(event) = self.events.get_mut(&id) else { return };
        let Some(state) = self.pools.get_mut(&event.pool) else { return };
        match state.ready(id, event.segment, event.range, &self.shared) {
            Ok(pools::Ready::Allow) => self.allow(id),
            Ok(pools::Ready::Composing) => {}
            Ok(pools::Ready::Surprise) if event.surprises < 3 => {
                event.surprises += 1;
                self.look(id);
            }
            Ok(pools::Ready::Surprise) => {
                self.deny(id, DenyErrno::Eio, "what was fetched does not stay".to_owned());
            }
            Err((errno, reason)) => self.deny(id, errno, reason),
        }
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Cut so that it goes into a message.
fn shortened(mut text: String) -> String {
    const MAX: usize = 1000;
    if text.len() > MAX {
        let end = (0..=MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests;
