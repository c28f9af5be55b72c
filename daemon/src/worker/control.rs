//! The worker's end of the control socket, and what a source may ask the supervisor for.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::queue::Outbox;
use crate::ids::PoolId;
use crate::queue::wire::{self, Credential, FromWorker, MAX_MESSAGE, ToWorker};
use crate::source::git::Capabilities;
use crate::sys::seqpacket::Seqpacket;

/// What the supervisor could not give.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct UpcallError(pub String);

#[derive(Debug)]
enum Waiting {
    Transport(oneshot::Sender<Result<Vec<OwnedFd>, UpcallError>>),
    Credential(oneshot::Sender<Result<Option<Credential>, UpcallError>>),
}

type Table = Arc<Mutex<HashMap<u64, Waiting>>>;

/// The control socket.
#[derive(Debug)]
pub(super) struct Control {
    socket: Arc<Seqpacket>,
    buffer: Vec<u8>,
    out: Outbox<FromWorker>,
    waiting: Table,
    next: Arc<AtomicU64>,
}

impl Control {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let socket = Arc::new(Seqpacket::new(fd)?);
        Ok(Self {
            out: Outbox::new(&socket),
            socket,
            buffer: vec![0; MAX_MESSAGE],
            waiting: Table::default(),
            next: Arc::default(),
        })
    }

    /// The next message with its fds; `None`: the supervisor is gone. Can be cancelled.
    pub(super) async fn next(&mut self) -> io::Result<Option<(ToWorker, Vec<OwnedFd>)>> {
        let Some(received) = self.socket.recv(&mut self.buffer).await? else { return Ok(None) };
        let message = wire::decode(&self.buffer[..received.length]).map_err(io::Error::other)?;
        Ok(Some((message, received.fds)))
    }

    pub(super) fn send(&self, message: FromWorker) {
        self.out.send(message);
    }

    pub(super) async fn close(self) {
        self.out.close().await;
    }

    /// For the source of a pool.
    pub(super) fn upcalls(&self, pool: PoolId, server: Option<Box<Capabilities>>) -> Upcalls {
        let (waiting, next) = (Arc::clone(&self.waiting), Arc::clone(&self.next));
        Upcalls { pool, server, out: self.out.sender(), waiting, next }
    }

    /// [`ToWorker::Transport`] has come.
    pub(super) fn transport(&self, request: u64, result: Result<Vec<OwnedFd>, String>) {
        if let Some(Waiting::Transport(reply)) = self.take(request) {
            let _ = reply.send(result.map_err(UpcallError));
        }
    }

    /// [`ToWorker::Credential`] has come.
    pub(super) fn credential(&self, request: u64, result: Result<Option<Credential>, String>) {
        if let Some(Waiting::Credential(reply)) = self.take(request) {
            let _ = reply.send(result.map_err(UpcallError));
        }
    }

    fn take(&self, request: u64) -> Option<Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&request)
    }
}

/// What a source may ask the supervisor for, while it fetches. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Upcalls {
    pool: PoolId,
    server: Option<Box<Capabilities>>,
    out: UnboundedSender<FromWorker>,
    waiting: Table,
    next: Arc<AtomicU64>,
}

impl Upcalls {
    /// What a worker before this one has found out about the pool's server.
    #[must_use]
    pub fn server(&self) -> Option<Capabilities> {
        self.server.as_deref().cloned()
    }

    /// Has the next worker know it.
    pub fn met(&self, server: &Capabilities) {
        let server = Box::new(server.clone());
        let _ = self.out.send(FromWorker::Met { pool: self.pool, server });
    }

    /// The sockets of [`ToWorker::Transport`].
    pub async fn need_transport(&self) -> Result<Vec<OwnedFd>, UpcallError> {
        let (reply, answer) = oneshot::channel();
        let pool = self.pool;
        self.ask(Waiting::Transport(reply), |request| FromWorker::NeedTransport { request, pool });
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    /// A user name and password for `url`. `rejected`: what the origin has just refused.
    pub async fn need_credential(
        &self,
        url: String,
        rejected: Option<Credential>,
    ) -> Result<Option<Credential>, UpcallError> {
        let (reply, answer) = oneshot::channel();
        let pool = self.pool;
        self.ask(Waiting::Credential(reply), |request| FromWorker::NeedCredential {
            request,
            pool,
            url,
            rejected,
        });
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    fn ask(&self, waiting: Waiting, message: impl FnOnce(u64) -> FromWorker) {
        let request = self.next.fetch_add(1, Ordering::Relaxed);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(request, waiting);
        if self.out.send(message(request)).is_err() {
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&request);
        }
    }
}

fn gone() -> UpcallError {
    UpcallError("the supervisor is gone".into())
}
