//! One request to an origin, from its start to its end, as a task of its own.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::ObjectNo;
use super::fill::{Target, deny_errno};
use super::schedule::{Outcome, RequestId};
use crate::fanotify::DenyErrno;
use crate::ids::PoolId;
use crate::object::ObjectId;
use crate::source::{Content, Fetch, FetchError, Sink};

/// What a request tells the main loop.
#[derive(Debug)]
pub struct Note {
    pub pool: PoolId,
    pub request: RequestId,
    pub news: News,
}

#[derive(Debug)]
pub enum News {
    /// The object is in its place; `bytes` of content.
    Arrived {
        no: ObjectNo,
        bytes: u64,
    },
    /// It came and could not be written.
    Failed {
        no: ObjectNo,
        errno: DenyErrno,
        reason: String,
    },
    Finished(Outcome),
}

/// What to ask for, and where it goes.
#[derive(Debug)]
pub struct Plan {
    pub pool: PoolId,
    pub request: RequestId,
    pub targets: HashMap<ObjectId, Arc<Target>>,
    /// A directory for spool files.
    pub spool: Arc<OwnedFd>,
    /// Counts what came in for the pool, and for this request, in bytes.
    pub received: Arc<AtomicU64>,
    pub progress: Arc<AtomicU64>,
    /// Counts what went out, in bytes.
    pub sent: Arc<AtomicU64>,
    /// No byte for so long ends the request.
    pub stall: Duration,
    pub notes: UnboundedSender<Note>,
}

/// Runs a request. Always ends with [`News::Finished`], unless it is aborted.
pub async fn run<F: Fetch>(source: Arc<F>, keys: Vec<ObjectId>, plan: Plan) {
    let (pool, request, notes, stall) = (plan.pool, plan.request, plan.notes.clone(), plan.stall);
    let started = Instant::now();
    let last = Arc::new(AtomicU64::new(0));
    let mut filler =
        Filler { plan, started, last: Arc::clone(&last), copies: Vec::new(), error: None };
    let result = tokio::select! {
        result = source.fetch(&keys, &mut filler) => result,
        () = stalled(started, &last, stall) => Err(FetchError::Retry {
            message: format!("the origin has sent nothing for {} s", stall.as_secs()),
            after: None,
        }),
    };
    for copy in std::mem::take(&mut filler.copies) {
        // A copy that panicked has sent nothing, and its object counts as left out.
        let _ = copy.await;
    }
    let outcome = filler.outcome(result);
    drop(filler);
    let _ = notes.send(Note { pool, request, news: News::Finished(outcome) });
}

/// Returns once there has been no sign of life for so long.
async fn stalled(started: Instant, last: &AtomicU64, stall: Duration) {
    loop {
        let until = started + Duration::from_millis(last.load(Ordering::Relaxed)) + stall;
        if Instant::now() >= until {
            return;
        }
        tokio::time::sleep_until(until).await;
    }
}

/// Puts objects into their places.
struct Filler {
    plan: Plan,
    started: Instant,
    /// When the last bytes came, in ms after the start.
    last: Arc<AtomicU64>,
    /// Large objects on their way into a segment.
    copies: Vec<JoinHandle<()>>,
    error: Option<(DenyErrno, String)>,
}

impl Filler {
    fn outcome(&mut self, result: Result<(), FetchError>) -> Outcome {
        match result {
            Ok(()) => Outcome::Done,
            Err(FetchError::Retry { message, after }) => Outcome::Retry { reason: message, after },
            Err(FetchError::Refused { message } | FetchError::Unable { message }) => {
                Outcome::Refused { reason: message }
            }
            Err(error @ FetchError::Missing { key, .. }) => {
                let reason = error.to_string();
                match self.plan.targets.get(&key) {
                    Some(target) => Outcome::Missing { object: target.no, reason },
                    None => Outcome::Wrong { reason },
                }
            }
            Err(error @ FetchError::Wrong { .. }) => Outcome::Wrong { reason: error.to_string() },
            Err(FetchError::Sink(error)) => {
                let (errno, reason) = self.error.take().unwrap_or_else(|| cant_write(&error));
                Outcome::Disk { errno, reason }
            }
        }
    }

    fn tell(&self, news: News) {
        let Plan { pool, request, .. } = self.plan;
        let _ = self.plan.notes.send(Note { pool, request, news });
    }
}

fn cant_write(error: &io::Error) -> (DenyErrno, String) {
    (deny_errno(error), format!("can't keep what was fetched: {error}"))
}

/// Writes an object and says how that went.
fn put(target: &Target, content: Content) -> Result<News, (io::Error, News)> {
    let (no, bytes) = (target.no, target.range.len());
    match target.write(content) {
        // Also when another request was first: this one's account must be right.
        Ok(_) => Ok(News::Arrived { no, bytes }),
        Err(error) => {
            let (errno, reason) = cant_write(&error);
            Err((error, News::Failed { no, errno, reason }))
        }
    }
}

impl Sink for Filler {
    fn object(&mut self, key: ObjectId, content: Content) -> io::Result<()> {
        let Some(target) = self.plan.targets.get(&key) else { return Ok(()) };
        if matches!(content, Content::Spooled { .. }) {
            let (target, notes) = (Arc::clone(target), self.plan.notes.clone());
            let (pool, request) = (self.plan.pool, self.plan.request);
            self.copies.push(tokio::task::spawn_blocking(move || {
                let (Ok(news) | Err((_, news))) = put(&target, content);
                drop(target);
                let _ = notes.send(Note { pool, request, news });
            }));
            return Ok(());
        }
        match put(target, content) {
            Ok(news) => {
                self.tell(news);
                Ok(())
            }
            Err((error, news)) => {
                self.error = Some(cant_write(&error));
                self.tell(news);
                Err(error)
            }
        }
    }

    fn spool(&mut self) -> io::Result<File> {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let file = openat(&*self.plan.spool, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let file = file.map_err(io::Error::from).inspect_err(|error| {
            self.error = Some((deny_errno(error), format!("can't make a spool file: {error}")));
        })?;
        Ok(File::from(file))
    }

    fn received(&mut self, bytes: u64) {
        self.plan.received.fetch_add(bytes, Ordering::Relaxed);
        self.plan.progress.fetch_add(bytes, Ordering::Relaxed);
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    fn sent(&mut self, bytes: u64) {
        self.plan.sent.fetch_add(bytes, Ordering::Relaxed);
    }
}
