//! A worker process, from the supervisor's side.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::{debug, error, warn};

use super::cgroups::{Cgroups, out_of_memory};
use super::store::Store;
use crate::fanotify::QueueKind;
use crate::ids::ShardId;
use crate::queue::wire::{self, FromQueue, FromWorker, ToQueue, ToWorker};
use crate::sys::cgroup::Cgroup;
use crate::sys::seqpacket::{self, Received, Seqpacket};
use crate::sys::spawn::{Child, Role, Spawn};

/// A worker that has closed its sockets ends by itself within this time.
const HANG_UP_PATIENCE: Duration = Duration::from_secs(1);

/// What a worker may ask for at the same time. Each is a process, or two fds that it has not taken yet.
const MAX_UPCALLS: usize = 64;

/// A worker that was refused so often in a row and asks on is out of order.
const MAX_REFUSED_UPCALLS: u32 = 10_000;

/// The longest text from an unprivileged process that is kept, in bytes.
const MAX_TEXT: usize = 1000;

/// Cuts a text that an unprivileged process sent.
#[must_use]
pub fn cut(mut text: String) -> String {
    let end = (0..=MAX_TEXT.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
    // what was truncated may be most of a message's length
    text.shrink_to_fit();
    text
}

/// What a worker may know of our environment: where the system's certificates are, and what to log.
pub const ENVIRONMENT: [&str; 3] = ["SSL_CERT_FILE", "SSL_CERT_DIR", "RUST_LOG"];

/// How a worker came to its end.
#[derive(Debug)]
pub struct Exit {
    /// SIGKILL or SIGTERM, or an exit that it was asked for: no fault of its own.
    pub from_outside: bool,
    pub description: String,
    pub signal: Option<i32>,
}

impl From<io::Result<ExitStatus>> for Exit {
    fn from(status: io::Result<ExitStatus>) -> Self {
        match status {
            Ok(status) => Self {
                from_outside: status.success()
                    || matches!(
                        status.signal(),
                        Some(libc::SIGKILL | libc::SIGTERM | libc::SIGINT)
                    ),
                description: status.to_string(),
                signal: status.signal(),
            },
            Err(error) => {
                Self { from_outside: false, description: error.to_string(), signal: None }
            }
        }
    }
}

/// What a worker does.
#[derive(Debug)]
pub enum Event {
    Control(FromWorker),
    Queue(FromQueue),
    /// The queue socket takes more.
    Writable,
    /// It closed a socket; its end follows.
    HungUp,
    /// It breaks the protocol, or lives on without sockets.
    Broken(String),
    Ended(Exit),
}

/// The control socket's sending side. Messages go out in the order in which they were given.
#[derive(Debug, Clone)]
pub struct Control {
    messages: mpsc::UnboundedSender<Outgoing>,
}

/// A message that waits for the worker to take it.
#[derive(Debug)]
struct Outgoing {
    message: ToWorker,
    fds: Vec<OwnedFd>,
    /// Of the upcall that this is the answer to.
    permit: Option<OwnedSemaphorePermit>,
}

/// Whether a worker may have what it asks for.
#[derive(Debug)]
pub enum Upcall {
    Granted(OwnedSemaphorePermit),
    /// To be answered with this error.
    Refused(String),
    /// It does nothing but ask.
    OutOfOrder,
}

impl Control {
    /// Sends a message with its fds; a worker that has ended gets none.
    pub fn send(&self, message: ToWorker, fds: Vec<OwnedFd>) {
        self.messages.send(Outgoing { message, fds, permit: None }).ok();
    }

    /// Answers an upcall, which is over once the worker has taken the message.
    pub fn answer(&self, permit: OwnedSemaphorePermit, message: ToWorker, fds: Vec<OwnedFd>) {
        self.messages.send(Outgoing { message, fds, permit: Some(permit) }).ok();
    }
}

/// A running worker process.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    /// Dropped after the child.
    cgroup: Option<Cgroup>,
    pid: i32,
    started: Instant,
    control: Arc<Seqpacket>,
    control_sender: Control,
    upcalls: Arc<Semaphore>,
    refused_upcalls: u32,
    queue: Seqpacket,
    control_buffer: Vec<u8>,
    queue_buffer: Vec<u8>,
    /// It has been told of all that it serves and takes events.
    running: bool,
    /// It has closed its sockets and has until then to end.
    hung_up: Option<tokio::time::Instant>,
}

impl Worker {
    /// Starts a worker and greets it.
    pub fn start(
        shard: ShardId,
        queue: QueueKind,
        store: &Store,
        cgroups: &Cgroups,
    ) -> io::Result<Self> {
        let (control, their_control) = seqpacket::pair()?;
        let (queue_socket, their_queue) = seqpacket::pair()?;
        let user = store.worker_user;
        let cgroup = cgroups.make(&format!("worker-{shard}"));
        let mut spawn = Spawn::role(Role::Worker)
            .arguments(user.arguments())
            .argument(format!("--shard={shard}"));
        if queue == QueueKind::Kernel {
            spawn = spawn.argument("--event-files").argument(store.pools_dir());
        }
        let spawn = spawn
            .inherit(&ENVIRONMENT)
            .fd(their_control)
            .fd(their_queue)
            .fd(store.spool_dir(shard)?);
        let child = in_group(spawn, cgroup.as_ref()).start().map_err(io::Error::other)?;
        let pid = child.id();
        let control = Arc::new(Seqpacket::new(control)?);
        let queue = Seqpacket::new(queue_socket)?;
        let (messages, mut outgoing) = mpsc::unbounded_channel::<Outgoing>();
        let socket = Arc::clone(&control);
        tokio::spawn(async move {
            while let Some(Outgoing { message, fds, permit }) = outgoing.recv().await {
                let Ok(bytes) = wire::encode(&message) else { continue };
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                if let Err(error) = socket.send(&bytes, &fds).await {
                    // its end is noticed elsewhere
                    debug!(pid, %error, "can't send to the worker");
                    return;
                }
                drop(permit);
            }
        });
        let control_sender = Control { messages };
        control_sender.send(ToWorker::Hello { version: wire::VERSION }, Vec::new());
        Ok(Self {
            child,
            cgroup,
            pid,
            started: Instant::now(),
            control,
            control_sender,
            upcalls: Arc::new(Semaphore::new(MAX_UPCALLS)),
            refused_upcalls: 0,
            queue,
            control_buffer: vec![0; wire::MAX_MESSAGE],
            queue_buffer: vec![0; wire::MAX_MESSAGE],
            running: false,
            hung_up: None,
        })
    }

    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    #[must_use]
    pub fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_ref().map(Cgroup::directory)
    }

    /// Looks whether the kernel ended it for want of memory. To have reached its own limit is its own doing, and
    /// maybe that of what it had to fetch; that the machine has no memory left is not.
    #[must_use]
    pub fn explain(&self, exit: Exit) -> Exit {
        explain(exit, self.cgroup.as_ref())
    }

    /// As far as is known.
    pub fn is_alive(&mut self) -> bool {
        self.hung_up.is_none() && matches!(self.child.try_wait(), Ok(None))
    }

    /// It is a shard's worker from now on: how long it was ready for that is not its age.
    pub fn begin(&mut self) {
        self.started = Instant::now();
    }

    /// Since it was started or [began](Self::begin).
    #[must_use]
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    #[must_use]
    pub fn control(&self) -> Control {
        self.control_sender.clone()
    }

    /// To be called for each upcall. `served`: it is about a pool that the worker serves.
    pub fn upcall(&mut self, served: bool) -> Upcall {
        if served && let Ok(permit) = Arc::clone(&self.upcalls).try_acquire_owned() {
            self.refused_upcalls = 0;
            return Upcall::Granted(permit);
        }
        self.refused_upcalls = self.refused_upcalls.saturating_add(1);
        if self.refused_upcalls > MAX_REFUSED_UPCALLS {
            return Upcall::OutOfOrder;
        }
        Upcall::Refused(if served {
            "too many requests of this worker are under way".into()
        } else {
            "not a pool of this worker".into()
        })
    }

    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running
    }

    pub fn set_running(&mut self) {
        self.running = true;
    }

    /// It is going to be told to stop, and gets nothing more.
    pub fn retire(&mut self) {
        self.running = false;
    }

    /// Waits for what the worker does next. `want_write`: also for the queue socket to take another
    /// message.
    pub async fn next(&mut self, want_write: bool) -> Event {
        if let Some(patience) = self.hung_up {
            // its end is near, or we see to it
            return match tokio::time::timeout_at(patience, self.child.wait()).await {
                Ok(status) => self.last_words(status),
                Err(_) => {
                    self.hung_up = Some(tokio::time::Instant::now() + HANG_UP_PATIENCE);
                    Event::Broken("it hung up and goes on".into())
                }
            };
        }
        let event = tokio::select! {
            biased;
            message = receive(&self.queue, &mut self.queue_buffer) => message.map(|m| m.map(Event::Queue)),
            message = receive(&self.control, &mut self.control_buffer) => message.map(|m| m.map(Event::Control)),
            ready = self.queue.writable(), if want_write => ready.map(|()| Some(Event::Writable)),
            status = self.child.wait() => return self.last_words(status),
        };
        match event {
            Ok(Some(event)) => event,
            Ok(None) => self.hang_up(),
            // the end of a process that had not read all that was sent to it
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => self.hang_up(),
            Err(error) => {
                self.hung_up = Some(tokio::time::Instant::now() + HANG_UP_PATIENCE);
                Event::Broken(format!("it sent what can't be read: {error}"))
            }
        }
    }

    /// It has ended. The answers that it sent before come first: its end, and that of the control socket,
    /// may be noticed before them.
    fn last_words(&mut self, status: io::Result<ExitStatus>) -> Event {
        match decode(self.queue.try_recv(&mut self.queue_buffer), &self.queue_buffer) {
            Ok(Some(message)) => Event::Queue(message),
            // nothing more, or nothing that can be read
            Ok(None) | Err(_) => Event::Ended(Exit::from(status)),
        }
    }

    fn hang_up(&mut self) -> Event {
        self.hung_up = Some(tokio::time::Instant::now() + HANG_UP_PATIENCE);
        Event::HungUp
    }

    /// Sends on the queue socket without waiting.
    pub fn try_send(&mut self, message: &ToQueue) -> io::Result<()> {
        let bytes = wire::encode(message).map_err(io::Error::other)?;
        self.queue.try_send(&bytes, &[])
    }

    /// Kills the process. Its end is still to be waited for.
    pub fn kill(&mut self) {
        if let Err(error) = self.child.kill() {
            error!(pid = self.pid, %error, "can't kill a worker");
        }
    }
}

/// Starts a process in a group, if there is one.
pub fn in_group(spawn: Spawn, group: Option<&Cgroup>) -> Spawn {
    match group.map(Cgroup::open) {
        Some(Ok(directory)) => spawn.cgroup(directory),
        Some(Err(error)) => {
            warn!(%error, "can't open a cgroup: the process runs without");
            spawn
        }
        None => spawn,
    }
}

/// See [`Worker::explain`].
pub fn explain(exit: Exit, group: Option<&Cgroup>) -> Exit {
    match group.and_then(out_of_memory) {
        Some((description, own_limit)) if exit.signal == Some(libc::SIGKILL) => {
            Exit { from_outside: !own_limit, description, ..exit }
        }
        _ => exit,
    }
}

async fn receive<T: DeserializeOwned>(
    socket: &Seqpacket,
    buffer: &mut [u8],
) -> io::Result<Option<T>> {
    let received = socket.recv(buffer).await;
    decode(received, buffer)
}

/// What was received into `buffer`.
fn decode<T: DeserializeOwned>(
    received: io::Result<Option<Received>>,
    buffer: &[u8],
) -> io::Result<Option<T>> {
    let Some(received) = received? else { return Ok(None) };
    let bytes = buffer.get(..received.length).unwrap_or_default();
    wire::decode(bytes).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(cut("short".into()), "short");
        assert_eq!(cut("x".repeat(MAX_TEXT)).len(), MAX_TEXT);
        assert_eq!(cut("x".repeat(MAX_TEXT + 1)).len(), MAX_TEXT);
        // three bytes each
        assert_eq!(cut("\u{20ac}".repeat(MAX_TEXT)), "\u{20ac}".repeat(MAX_TEXT / 3));
    }
}
