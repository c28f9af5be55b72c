//! The worker's end of the queue: *next event*, *answer*.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use crate::ids::SegmentId;
use crate::queue::kernel::{Incoming, KernelQueue};
use crate::queue::wire::{self, FromQueue, MAX_MESSAGE, ToQueue};
use crate::sys::seqpacket::Seqpacket;

/// One of the two queues.
#[derive(Debug)]
pub enum Queue {
    Brokered(Brokered),
    Kernel(Box<KernelQueue>),
}

impl Queue {
    /// The next event or hint; `None`: there will be none, the supervisor has closed its end or the
    /// group is gone. Can be cancelled.
    pub async fn next(&mut self) -> io::Result<Option<ToQueue>> {
        match self {
            Self::Brokered(queue) => queue.next().await,
            Self::Kernel(queue) => {
                let incoming = queue.next().await.map_err(io::Error::other)?;
                Ok(incoming.map(|incoming| match incoming {
                    Incoming::Event { event, segment, range, pid } => {
                        ToQueue::Event { event, segment, range, pid }
                    }
                    Incoming::Touched { segment, range } => ToQueue::Touched { segment, range },
                }))
            }
        }
    }

    /// Sends an answer, or what keeps it. Doesn't wait.
    pub fn answer(&self, answer: FromQueue) {
        match (self, answer) {
            (Self::Brokered(queue), answer) => queue.out.send(answer),
            (Self::Kernel(queue), FromQueue::Answer { event, verdict, .. }) => {
                if let Err(error) = queue.answer(event, verdict) {
                    tracing::error!(%event, %error, "can't answer");
                }
            }
            // Nobody is there to show it to.
            (Self::Kernel(_), FromQueue::Waiting { .. }) => {}
        }
    }

    /// Events of the file that `data` is open on are this segment's from now on.
    pub fn know(&self, segment: SegmentId, data: impl AsFd) -> io::Result<()> {
        match self {
            Self::Brokered(_) => Ok(()),
            Self::Kernel(queue) => Ok(queue.know(segment, data)?),
        }
    }

    /// The segment is not served any more.
    pub fn forget(&self, segment: SegmentId) {
        if let Self::Kernel(queue) = self {
            queue.forget(segment);
        }
    }

    /// Sees what has been said out.
    pub async fn close(self) {
        if let Self::Brokered(queue) = self {
            queue.out.close().await;
        }
    }
}

/// Events by way of the supervisor.
#[derive(Debug)]
pub struct Brokered {
    socket: Arc<Seqpacket>,
    buffer: Vec<u8>,
    out: Outbox<FromQueue>,
}

impl Brokered {
    /// `fd`: the worker's end of a `SOCK_SEQPACKET` pair. To be called in a tokio runtime.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
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
