//! Another worker in the place of one that does its work: it is told to stop, what it had goes back to the
//! head of the queue, and its successor starts with that. Readers wait for as long as it takes to start a process.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::{info, warn};

use super::Shard;
use crate::queue::wire::ToWorker;

/// A worker that was told to stop and has not ended by then is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Nobody waits longer for the next one.
const PATIENCE: Duration = Duration::from_secs(60);

/// A worker's end that was asked for.
#[derive(Debug)]
pub(super) struct Recycle {
    since: Instant,
    /// The old one is gone.
    pub(super) ended: bool,
    replies: Vec<oneshot::Sender<Result<(), String>>>,
}

impl Shard {
    pub(super) fn recycle(&mut self, reply: oneshot::Sender<Result<(), String>>) {
        if let Some(recycle) = &mut self.recycle {
            recycle.replies.push(reply);
            return;
        }
        let since = Instant::now();
        // what is asked for is a new process, which reads the machine's certificates anew
        self.spare.end();
        match self.worker.as_mut() {
            Some(worker) => {
                info!(shard = %self.id, pid = worker.pid(), "replacing the worker");
                worker.retire();
                worker.control().send(ToWorker::Stop, Vec::new());
            }
            // one is about to be started: at once, then
            None => self.restart_at = Some(tokio::time::Instant::now()),
        }
        let ended = self.worker.is_none();
        self.recycle = Some(Recycle { since, ended, replies: vec![reply] });
    }

    /// Whether the present worker is on its way out.
    pub(super) fn is_retiring(&self) -> bool {
        self.recycle.as_ref().is_some_and(|recycle| !recycle.ended)
    }

    /// A worker has taken over.
    pub(super) fn recycled(&mut self) {
        if let Some(Recycle { ended: true, .. }) = &self.recycle {
            self.end_recycle(Ok(()));
        }
    }

    /// Tells all who wait for another worker.
    pub(super) fn end_recycle(&mut self, result: Result<(), String>) {
        let replies = self.recycle.take().map(|recycle| recycle.replies).unwrap_or_default();
        for reply in replies {
            reply.send(result.clone()).ok();
        }
    }

    /// Sees to it that it comes to an end.
    pub(super) fn watch_recycle(&mut self) {
        let Some(Recycle { since, ended, .. }) = &self.recycle else { return };
        if since.elapsed() > PATIENCE {
            self.end_recycle(Err("the next worker does not start: see the log".into()));
        } else if !ended
            && since.elapsed() > STOP_PATIENCE
            && let Some(worker) = self.worker.as_mut()
        {
            warn!(shard = %self.id, pid = worker.pid(), "it was told to stop and goes on: killing it");
            worker.kill();
        }
    }
}
