//! What others ask of a shard, done.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tracing::{debug, error, warn};

use super::handle::Said;
use super::{
    Check, Command, Completeness, GONE, GRACE, Pool, Prefetch, Queue, Segment, Shard, Snapshot,
    WorkerSnapshot, now,
};
use crate::ids::{PoolId, SegmentId};
use crate::queue::broker::Pending;
use crate::queue::wire::ToWorker;
use crate::supervisor::images;
use crate::supervisor::worker::Worker;

/// The wait after a check that failed; it doubles.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// A layer of which so many in a row have died who were to prove it is not proved any more.
const DEATHS: u32 = 5;

impl Shard {
    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::Pool { pool, origin, limits } => {
                let server = None;
                let message = ToWorker::Pool { pool, origin: origin.clone(), limits, server };
                let settings = Pool { origin, limits };
                // its connections are of use as long as nothing has changed
                if self.pools.get(&pool) != Some(&settings) {
                    self.pools.insert(pool, settings);
                    self.servers.remove(&pool);
                    self.to_running_worker(message, Vec::new());
                }
            }
            Command::Attach { pool, segment, reply } => self.attach(pool, segment, reply),
            Command::Detach { pool, reply } => {
                self.detach(pool);
                reply.send(()).ok();
            }
            Command::Close { pool, reply } => {
                let ids = self.segments.iter().filter(|(_, segment)| segment.pool == pool);
                let ids: Vec<_> = ids.map(|(id, _)| *id).collect();
                self.detach(pool);
                for id in ids {
                    self.detached.remove(&id);
                    self.touched.remove(&id);
                }
                reply.send(matches!(self.queue, Queue::Brokered(_))).ok();
            }
            // the catalog may be wrong, and the file can't be
            Command::Unmark { segment } => self.check_complete(segment, Said::Catalog),
            Command::Prefetch { segment, runs, reply } => {
                let Some(pool) = self.segments.get(&segment).map(|segment| segment.pool) else {
                    reply.send(Err(GONE.into())).ok();
                    return;
                };
                self.next_request += 1;
                let request = self.next_request;
                let message = ToWorker::Prefetch { request, segment, runs };
                // where there is no worker at the moment, the next one is told of it
                self.to_running_worker(message.clone(), Vec::new());
                self.prefetches.insert(request, Prefetch { pool, message, strikes: 0, reply });
            }
            // a worker that comes later does without
            Command::Preconnect { repository, limits } => {
                let repository = Box::new(repository);
                self.to_running_worker(ToWorker::Preconnect { repository, limits }, Vec::new());
            }
            Command::Demand { reply } => {
                self.queue.note_demand(&mut self.demand);
                reply.send(self.demand.take()).ok();
            }
            Command::Snapshot { reply } => {
                reply.send(self.snapshot()).ok();
            }
            Command::Serve => self.serve(),
            Command::Retry { event, reply } => {
                let (queue, mut scope) = self.queue();
                reply.send(queue.retry(event, &mut scope)).ok();
            }
            Command::Deny { event, reply } => {
                let (queue, mut scope) = self.queue();
                reply.send(queue.deny(event, &mut scope)).ok();
            }
            Command::DenyLate => self.deny_late(),
            Command::Recycle { reply } => self.recycle(reply),
            Command::Quarantine { ranges } => self.poison.quarantine(ranges),
            Command::ClearQuarantine { reply } => {
                self.poison.clear();
                let (queue, mut scope) = self.queue();
                queue.clear_quarantine(&mut scope);
                reply.send(()).ok();
            }
            Command::Stop { reply } => self.stop(reply),
            Command::Ping { reply } => {
                reply.send(()).ok();
            }
            Command::HandOver { reply } => {
                self.handing_over = Some(reply);
                self.over = true;
            }
            Command::Checked { segment, attachment, said, complete } => {
                self.checked(segment, attachment, said, complete);
            }
            Command::CheckAgain { segment, attachment, said } => {
                if self.segments.get(&segment).is_some_and(|s| s.attachment == attachment) {
                    self.check_complete(segment, said);
                }
            }
        }
    }

    pub(super) fn serve(&mut self) {
        self.serving = true;
        let (queue, mut scope) = self.queue();
        queue.serve(&mut scope);
        self.introduce();
    }

    pub(super) fn to_running_worker(&self, message: ToWorker, fds: Vec<OwnedFd>) {
        if let Some(worker) = self.worker.as_ref().filter(|worker| worker.is_running()) {
            worker.control().send(message, fds);
        }
    }

    pub(super) fn attach(
        &mut self,
        pool: PoolId,
        id: SegmentId,
        reply: oneshot::Sender<Result<(), String>>,
    ) {
        if let Some(segment) = self.segments.get_mut(&id) {
            // another tree of the pool has it; the mark may have gone with completeness
            if !segment.marked {
                match self.store.mark(&self.group, pool, id) {
                    Ok(_) => segment.marked = true,
                    Err(error) => {
                        reply.send(Err(format!("can't mark segment {id}: {error}"))).ok();
                        return;
                    }
                }
            }
            if segment.refused {
                // readers of another mount may wait for it, so it stays where it is
                match self.store.open_for_worker(pool, id) {
                    Ok(fds) => {
                        segment.refused = false;
                        segment.waiting_for_worker.push(reply);
                        self.to_running_worker(ToWorker::Segment { pool, segment: id }, fds);
                    }
                    Err(error) => {
                        reply.send(Err(format!("can't open segment {id}: {error}"))).ok();
                    }
                }
            } else if segment.waiting_for_worker.is_empty() {
                reply.send(Ok(())).ok();
            } else {
                segment.waiting_for_worker.push(reply);
            }
            return;
        }
        let marked = self.store.mark(&self.group, pool, id);
        let opened = self.store.open_for_worker(pool, id);
        match (marked, opened) {
            (Ok(file), Ok(fds)) => {
                self.files.insert(file.id, id);
                self.queue.know(id, file.id);
                self.detached.remove(&id);
                self.touched.remove(&id);
                let waiting_for_worker = vec![reply];
                self.attachments += 1;
                let segment = Segment {
                    pool,
                    size: file.size,
                    marked: true,
                    attachment: self.attachments,
                    check: Check::No,
                    failed_checks: 0,
                    deaths: 0,
                    refused: false,
                    touched: HashSet::new(),
                    waiting_for_worker,
                };
                self.segments.insert(id, segment);
                self.to_running_worker(ToWorker::Segment { pool, segment: id }, fds);
            }
            (Err(error), _) | (_, Err(error)) => {
                reply.send(Err(format!("can't take segment {id} into service: {error}"))).ok();
            }
        }
    }

    /// The worker lets go of the pool. The marks stay, and who still reaches a segment through a
    /// mount elsewhere is denied what is not there: a mark goes with its file.
    pub(super) fn detach(&mut self, pool: PoolId) {
        self.pools.remove(&pool);
        self.servers.remove(&pool);
        self.trouble.remove(&pool);
        for (id, mut segment) in self.segments.extract_if(|_, segment| segment.pool == pool) {
            segment.refuse(GONE);
            self.queue.forget(id);
            self.demand.forget(id);
            self.detached.insert(id, segment.size);
            self.touched.insert(id, segment.touched);
        }
        for (_, prefetch) in self.prefetches.extract_if(|_, prefetch| prefetch.pool == pool) {
            prefetch.reply.send(Err(GONE.into())).ok();
        }
        self.to_running_worker(ToWorker::Detach { pool }, Vec::new());
    }

    pub(super) fn unmark(&mut self, id: SegmentId) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        if segment.marked {
            match self.store.unmark(&self.group, segment.pool, id) {
                Ok(()) => segment.marked = false,
                Err(error) => {
                    error!(shard = %self.id, segment = %id, %error, "can't remove a mark")
                }
            }
        }
    }

    /// The worker or the catalog says that a segment is complete: look for ourselves, make it
    /// durable. Once at a time.
    pub(super) fn check_complete(&mut self, id: SegmentId, said: Said) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        if segment.check != Check::No {
            segment.check = Check::Again;
            return;
        }
        segment.check = Check::UnderWay;
        let (pool, size, attachment) = (segment.pool, segment.size, segment.attachment);
        let (store, own) = (Arc::clone(&self.store), self.own.clone());
        let cgroups = Arc::clone(&self.rules.cgroups);
        tokio::spawn(async move {
            let looking = Arc::clone(&store);
            let look = move || looking.sync_if_complete(pool, id, size);
            let complete = tokio::task::spawn_blocking(look).await;
            let complete = match complete.unwrap_or_else(|error| Err(io::Error::other(error))) {
                Ok(true) if said == Said::Worker => images::prove(&store, &cgroups, pool, id).await,
                Ok(true) => Ok(Completeness::Yes),
                Ok(false) => Ok(Completeness::No),
                Err(error) => Err(error),
            };
            if let Some(own) = own.upgrade() {
                own.send(Command::Checked { segment: id, attachment, said, complete }).ok();
            }
        });
    }

    /// Has a segment checked again after a while, longer each time.
    fn check_later(&mut self, id: SegmentId, said: Said) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        let wait = FIRST_WAIT.saturating_mul(1 << segment.failed_checks.min(16));
        segment.failed_checks = segment.failed_checks.saturating_add(1);
        let (attachment, own) = (segment.attachment, self.own.clone());
        tokio::spawn(async move {
            tokio::time::sleep(wait.min(LONGEST_WAIT)).await;
            if let Some(own) = own.upgrade() {
                own.send(Command::CheckAgain { segment: id, attachment, said }).ok();
            }
        });
    }

    pub(super) fn checked(
        &mut self,
        id: SegmentId,
        attachment: u64,
        said: Said,
        complete: io::Result<Completeness>,
    ) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        if segment.attachment != attachment {
            return;
        }
        let again = std::mem::replace(&mut segment.check, Check::No) == Check::Again;
        if let Ok(Completeness::Undecided(_)) = complete {
            segment.deaths += 1;
        }
        let enough = segment.deaths >= DEATHS;
        match complete {
            Ok(complete @ (Completeness::Yes | Completeness::Proved)) => {
                self.unmark(id);
                (self.hooks.on_complete)(id, complete == Completeness::Proved);
                debug!(shard = %self.id, segment = %id, ?complete, "complete");
            }
            Ok(Completeness::Refuted(error)) => {
                error!(shard = %self.id, segment = %id, error, "can't count it as complete");
                (self.hooks.on_refuted)(id, error);
            }
            Ok(Completeness::Undecided(why)) if enough => {
                error!(shard = %self.id, segment = %id, why, "can't count it as complete");
                (self.hooks.on_refuted)(id, format!("it can't be proved: {why}"));
            }
            Ok(Completeness::Undecided(why)) => {
                error!(shard = %self.id, segment = %id, why, "can't count it as complete yet");
                self.check_later(id, said);
            }
            Ok(Completeness::No) if again => self.check_complete(id, Said::Worker),
            Ok(Completeness::No) => {
                warn!(shard = %self.id, segment = %id, "said to be complete, but is not")
            }
            Err(error) => {
                error!(shard = %self.id, segment = %id, %error, "can't count it as complete yet");
                self.check_later(id, said);
            }
        }
    }

    pub(super) fn deny_late(&mut self) {
        let now = now();
        for (_, pending) in self.queue.events() {
            if now.saturating_sub(pending.arrived) > GRACE {
                self.late.insert(self.segments.get(&pending.segment).map(|segment| segment.pool));
            }
        }
        let (queue, mut scope) = self.queue();
        let denied = queue.deny_late(&mut scope);
        if denied > 0 {
            warn!(shard = %self.id, denied, "Hydrant stops: denied who waited for too long");
        }
    }

    pub(super) fn stop(&mut self, reply: oneshot::Sender<()>) {
        self.restart_at = None;
        self.spare.end();
        if let Some(worker) = self.worker.as_mut() {
            worker.kill();
        }
        self.stop = Some(reply);
        let (queue, mut scope) = self.queue();
        queue.stop(&mut scope);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let pool_of = |pending: &Pending| {
            self.segments.get(&pending.segment).map_or(PoolId(0), |segment| segment.pool)
        };
        let (mut counters, mut events) = (self.queue.counters(self.counters), self.queue.events());
        // with the kernel's queue the worker goes on meanwhile
        for _ in 0..8 {
            let again = self.queue.counters(self.counters);
            if again == counters {
                break;
            }
            (counters, events) = (again, self.queue.events());
        }
        Snapshot {
            shard: self.id,
            worker_pid: self.worker.as_ref().map(Worker::pid),
            worker: self.worker.as_ref().map(|worker| WorkerSnapshot {
                pid: worker.pid(),
                age: worker.age(),
                state: match worker.is_running() {
                    true => "running",
                    false if self.is_retiring() => "stopping",
                    false => "starting",
                },
                cgroup: worker.cgroup().map(Path::to_owned),
            }),
            spare_pid: self.spare.pid(),
            worker_deaths: self.worker_deaths,
            last_death: self.last_death.clone(),
            counters,
            fetched: self.fetched.clone(),
            trouble: self.trouble.clone(),
            events: events
                .into_iter()
                .map(|(event, pending)| (event, pool_of(&pending), pending))
                .collect(),
            now: now(),
        }
    }
}
