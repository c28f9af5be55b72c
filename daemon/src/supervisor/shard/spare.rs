//! A worker in reserve. It is started, has given up its privileges and has greeted us, and knows of no pool,
//! no segment and no event. When the shard's worker ends it is the next one at once: what takes its time about
//! a process has been done.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, warn};

use super::{QUICK_DEATH, START_PATIENCE, Shard};
use crate::queue::wire::{self, FromWorker};
use crate::supervisor::worker::{Event, Worker};

/// Between a worker that has its events and the next spare: those who waited go first.
const PAUSE: Duration = Duration::from_millis(50);
/// The same where spares end by themselves or can't be started, at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The spare of a shard, if it has one.
#[derive(Debug)]
pub(super) struct Spare {
    state: State,
    /// Before the one after the next that fails.
    pause: Duration,
}

#[derive(Debug)]
enum State {
    None,
    Due(Instant),
    There {
        worker: Box<Worker>,
        /// It has greeted us.
        ready: bool,
    },
}

/// What woke it.
#[derive(Debug)]
pub(super) enum Wake {
    Due,
    Event(Event),
}

impl Spare {
    pub fn new() -> Self {
        Self { state: State::None, pause: PAUSE }
    }

    /// Waits until there is something to do about it. May be dropped while it waits.
    pub async fn next(&mut self) -> Wake {
        match &mut self.state {
            State::None => std::future::pending().await,
            State::Due(at) => {
                tokio::time::sleep_until(*at).await;
                Wake::Due
            }
            State::There { worker, .. } => Wake::Event(worker.next(false).await),
        }
    }

    /// There is a worker that has its events: there is to be a spare, soon.
    pub fn want(&mut self) {
        if matches!(self.state, State::None) {
            self.state = State::Due(Instant::now() + PAUSE);
        }
    }

    /// There is none any more, and there will be none.
    pub fn end(&mut self) {
        self.state = State::None;
    }

    /// Gives it away, if it lives, to be the shard's worker. `true`: it has greeted us.
    pub fn take(&mut self) -> Option<(Worker, bool)> {
        // whoever is the worker then wants another one
        let State::There { mut worker, ready } = std::mem::replace(&mut self.state, State::None)
        else {
            return None;
        };
        if !worker.is_alive() {
            return None;
        }
        if ready {
            worker.begin();
        }
        self.pause = PAUSE;
        Some((*worker, ready))
    }

    /// One that is ready.
    pub fn pid(&self) -> Option<i32> {
        match &self.state {
            State::There { worker, ready: true } => Some(worker.pid()),
            _ => None,
        }
    }

    /// The next one, after one that failed.
    fn again(&mut self, lived: Duration) {
        if lived > QUICK_DEATH {
            self.pause = PAUSE;
        }
        self.state = State::Due(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    fn kill(&mut self, why: &str) {
        if let State::There { worker, .. } = &mut self.state {
            warn!(pid = worker.pid(), why, "killing the spare worker");
            worker.kill();
        }
    }

    fn event(&mut self, event: Event) {
        let State::There { worker, ready } = &mut self.state else { return };
        match event {
            Event::Control(FromWorker::Ready { version }) if version == wire::VERSION => {
                *ready = true;
            }
            Event::Control(FromWorker::Ready { version }) => {
                self.kill(&wire::other_version("worker", version));
            }
            Event::Control(_) | Event::Queue(_) => self.kill("it speaks without being asked"),
            Event::Broken(why) => self.kill(&why),
            Event::Writable | Event::HungUp => {}
            Event::Ended(exit) => {
                let (pid, lived) = (worker.pid(), worker.age());
                let end = worker.explain(exit).description;
                warn!(pid, end, "spare worker ended");
                self.again(lived);
            }
        }
    }
}

impl Shard {
    pub(super) fn spare(&mut self, wake: Wake) {
        match wake {
            Wake::Due => self.start_spare(),
            Wake::Event(event) => self.spare.event(event),
        }
    }

    fn start_spare(&mut self) {
        match Worker::start(self.id, self.queue.kind(), &self.store, &self.rules.cgroups) {
            Ok(worker) => {
                debug!(shard = %self.id, pid = worker.pid(), "spare worker started");
                self.spare.state = State::There { worker: Box::new(worker), ready: false };
            }
            Err(error) => {
                warn!(shard = %self.id, %error, "can't start a spare worker");
                self.spare.again(Duration::ZERO);
            }
        }
    }

    /// Looks whether it is stuck.
    pub(super) fn watch_spare(&mut self) {
        if let State::There { worker, ready: false } = &self.spare.state
            && worker.age() > START_PATIENCE
        {
            self.spare.kill("it is stuck at its start");
        }
    }
}
