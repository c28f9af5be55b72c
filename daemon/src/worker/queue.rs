//! The worker's end of the queue: *next event*, *answer*.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use crate::fanotify::Verdict;
use crate::ids::{EventId, SegmentId};
use crate::queue::inflight::Table;
use crate::queue::kernel::{Incoming, KernelQueue};
use crate::queue::quarantine::Quarantined;
use crate::queue::wire::{self, FromQueue, MAX_MESSAGE, ToQueue};
use crate::sys::seqpacket::Seqpacket;

/// The queue. Events come by way of the supervisor, or from the kernel if it has
/// [given](Self::take_from_kernel) us its queue; then the socket is for what is to be said of them.
#[derive(Debug)]
pub struct Queue {
    socket: Socket,
    kernel: Option<KernelQueue>,
    /// What is to come of an order of the supervisor.
    ordered: VecDeque<ToQueue>,
}

impl Queue {
    /// `fd`: the worker's end of a `SOCK_SEQPACKET` pair. To be called in a tokio runtime.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: Socket::new(fd)?, kernel: None, ordered: VecDeque::new() })
    }

    /// Takes events from the kernel's queue. Its segments are to be [made known](Self::know) then.
    pub fn take_from_kernel(
        &mut self,
        queue: OwnedFd,
        table: OwnedFd,
        quarantine: &[Quarantined],
    ) -> io::Result<()> {
        let table = Table::open(table).map_err(io::Error::other)?;
        let kernel = KernelQueue::new(queue, table).map_err(io::Error::other)?;
        kernel.quarantine(quarantine);
        self.kernel = Some(kernel);
        Ok(())
    }

    /// The next event or hint; `None`: there will be none, the supervisor has closed its end or the
    /// group is gone. Can be cancelled.
    pub async fn next(&mut self) -> io::Result<Option<ToQueue>> {
        let Some(kernel) = &self.kernel else { return self.socket.next().await };
        loop {
            if let Some(message) = self.ordered.pop_front() {
                return Ok(Some(message));
            }
            tokio::select! {
                message = self.socket.next() => match message? {
                    Some(order) => obey(kernel, order, &mut self.ordered),
                    None => return Ok(None),
                },
                incoming = kernel.next() => match incoming.map_err(io::Error::other)? {
                    Some(Incoming::Event { event, segment, range, pid }) => {
                        return Ok(Some(ToQueue::Event { event, segment, range, pid }));
                    }
                    Some(Incoming::Touched { segment, range }) => {
                        return Ok(Some(ToQueue::Touched { segment, range }));
                    }
                    Some(Incoming::Settled { segment, range }) => {
                        self.socket.out.send(FromQueue::Settled { segment, range });
                    }
                    None => return Ok(None),
                },
            }
        }
    }

    /// Gives an answer, or says what keeps it. Doesn't wait.
    pub fn answer(&self, answer: FromQueue) {
        match (&self.kernel, answer) {
            (Some(kernel), FromQueue::Answer { event, verdict, .. }) => {
                settle(kernel, event, verdict);
            }
            (_, answer) => self.socket.out.send(answer),
        }
    }

    /// Events of the file that `data` is open on are this segment's from now on.
    pub fn know(&self, segment: SegmentId, data: impl AsFd) -> io::Result<()> {
        match &self.kernel {
            Some(kernel) => Ok(kernel.know(segment, data)?),
            None => Ok(()),
        }
    }

    /// The segment is not served any more.
    pub fn forget(&self, segment: SegmentId) {
        if let Some(kernel) = &self.kernel {
            kernel.forget(segment);
        }
    }

    /// Says that we go on, where that is not to be seen from answers.
    pub fn beat(&self) {
        if let Some(kernel) = &self.kernel {
            kernel.beat();
        }
    }

    /// Sees what has been said out.
    pub async fn close(self) {
        self.socket.out.close().await;
    }
}

fn settle(kernel: &KernelQueue, event: EventId, verdict: Verdict) -> bool {
    let answered = kernel.answer(event, verdict);
    if let Err(error) = &answered {
        tracing::error!(%event, error = error as &dyn std::error::Error, "can't answer");
    }
    answered.is_ok()
}

/// Does what the supervisor says of an event. What the worker is to know of it goes to `ordered`.
fn obey(kernel: &KernelQueue, order: ToQueue, ordered: &mut VecDeque<ToQueue>) {
    match order {
        ToQueue::Deny { event, errno } => {
            // else it has just been answered
            if kernel.waits_for(event).is_some() && settle(kernel, event, Verdict::Deny(errno)) {
                ordered.push_back(ToQueue::Cancelled { event });
            }
        }
        ToQueue::Retry { event } => {
            if let Some((segment, range, pid)) = kernel.waits_for(event) {
                ordered.push_back(ToQueue::Cancelled { event });
                ordered.push_back(ToQueue::Event { event, segment, range, pid });
            }
        }
        ToQueue::ClearQuarantine => kernel.clear_quarantine(),
        // those are the kernel's
        ToQueue::Event { .. } | ToQueue::Touched { .. } | ToQueue::Cancelled { .. } => {}
    }
}

/// The socket to the supervisor.
#[derive(Debug)]
struct Socket {
    socket: Arc<Seqpacket>,
    buffer: Vec<u8>,
    out: Outbox<FromQueue>,
}

impl Socket {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let socket = Arc::new(Seqpacket::new(fd)?);
        Ok(Self { out: Outbox::new(&socket), socket, buffer: vec![0; MAX_MESSAGE] })
    }

    async fn next(&mut self) -> io::Result<Option<ToQueue>> {
        let Some(received) = self.socket.recv(&mut self.buffer).await? else { return Ok(None) };
        wire::decode(&self.buffer[..received.length]).map(Some).map_err(io::Error::other)
    }
}

/// Messages on their way out, in order, in a task of their own: the main loop never waits for a
/// supervisor that is busy sending to it.
#[derive(Debug)]
pub(super) struct Outbox<T> {
    messages: UnboundedSender<T>,
    task: JoinHandle<()>,
}

impl<T: serde::Serialize + Send + Sync + 'static> Outbox<T> {
    pub(super) fn new(socket: &Arc<Seqpacket>) -> Self {
        let (messages, receiver) = unbounded_channel();
        Self { messages, task: tokio::spawn(deliver(Arc::clone(socket), receiver)) }
    }

    /// What is sent after the other end has gone is lost; reading says so.
    pub(super) fn send(&self, message: T) {
        let _ = self.messages.send(message);
    }

    pub(super) fn sender(&self) -> UnboundedSender<T> {
        self.messages.clone()
    }

    /// Waits a little until all has been sent. Senders that were given away are cut off then.
    pub(super) async fn close(mut self) {
        drop(self.messages);
        let _ = tokio::time::timeout(Duration::from_secs(1), &mut self.task).await;
        self.task.abort();
    }
}

async fn deliver<T: serde::Serialize>(socket: Arc<Seqpacket>, mut messages: UnboundedReceiver<T>) {
    while let Some(message) = messages.recv().await {
        let bytes = match wire::encode(&message) {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::error!(%error, "can't encode a message");
                continue;
            }
        };
        if let Err(error) = socket.send(&bytes, &[]).await {
            tracing::debug!(%error, "the supervisor is gone");
            return;
        }
    }
}
