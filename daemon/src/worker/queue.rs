//! The worker's end of the queue: *next event*, *answer*.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use crate::queue::wire::{self, FromQueue, MAX_MESSAGE, ToQueue};
use crate::sys::seqpacket::Seqpacket;

/// One of the two queues. The kernel's own gets its variant here.
#[derive(Debug)]
pub enum Queue {
    Brokered(Brokered),
}

impl Queue {
    /// The next event or hint; `None`: there will be none, the supervisor has closed its end. Can
    /// be cancelled.
    pub async fn next(&mut self) -> io::Result<Option<ToQueue>> {
        match self {
            Self::Brokered(queue) => queue.next().await,
        }
    }

    /// Sends an answer, or what keeps it. Doesn't wait.
    pub fn answer(&self, answer: FromQueue) {
        match self {
            Self::Brokered(queue) => queue.out.send(answer),
        }
    }

    /// Sees what has been said out.
    pub async fn close(self) {
        match self {
            Self::Brokered(queue) => queue.out.close().await,
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
