//! `git upload-pack` at the other end of a stream socket: local paths and ssh.
//!
//! A server in version 2 sends its capabilities once and then takes command after command, so the
//! connections are kept.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::capabilities::Capabilities;
use super::pktline::Decoder;
use super::retry;
use super::transport::{Body, Command, Reply, check_hash, stalled};
use crate::object::HashKind;
use crate::source::FetchError;

/// Opens connections to `git upload-pack`, in version 2 (`GIT_PROTOCOL=version=2`).
pub trait Connector: Send + Sync {
    /// A connection on which nothing has been read or written. The error is a message.
    fn connect(&self) -> BoxFuture<'_, Result<Pipe, String>>;
}

/// Both ways to a `git upload-pack`.
#[derive(Debug)]
pub struct Pipe {
    pub stream: UnixStream,
    /// Once it has ended, this says why, if that is known, and ends too.
    pub why: Option<UnixStream>,
}

impl Pipe {
    /// Of the stream sockets that another process has sent, for use in a tokio runtime.
    pub fn received(sockets: Vec<OwnedFd>) -> io::Result<Self> {
        let mut sockets = sockets.into_iter().map(|socket| {
            let stream = std::os::unix::net::UnixStream::from(socket);
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        });
        let stream = sockets.next().ok_or_else(|| io::Error::other("no socket was sent"))??;
        Ok(Self { stream, why: sockets.next().transpose()? })
    }
}

/// How long git or ssh may take to end once it has hung up, and so much of what it says is shown.
const LAST_WORDS: (Duration, u64) = (Duration::from_secs(2), 512);

/// A connection that has not been used for so long is not used again: firewalls forget.
const IDLE: Duration = Duration::from_secs(300);

/// How much is read at a time.
const READ: usize = 64 << 10;

/// The connections to one repository.
pub struct Pipes {
    connector: Arc<dyn Connector>,
    slots: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
    stall: Duration,
}

impl std::fmt::Debug for Pipes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pipes").field("slots", &self.slots).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    why: Option<UnixStream>,
    capabilities: Option<Arc<Capabilities>>,
    last_used: Instant,
}

/// A connection in use. Dropped, it is closed; [`give_back`](Self::give_back) keeps it.
#[derive(Debug)]
pub struct Exchange {
    connection: Connection,
    pipes: Arc<Pipes>,
    _slot: OwnedSemaphorePermit,
}

impl Exchange {
    pub async fn read(&mut self, decoder: &mut Decoder) -> io::Result<usize> {
        let buffer = decoder.buffer();
        buffer.reserve(READ);
        self.connection.stream.read_buf(buffer).await
    }

    /// Of one that has hung up: that it has, and why, as far as git or ssh have said that.
    pub async fn ended(&mut self) -> FetchError {
        let mut said = Vec::new();
        if let Some(why) = &mut self.connection.why {
            let mut why = why.take(LAST_WORDS.1);
            // what came in time counts
            let _ = tokio::time::timeout(LAST_WORDS.0, why.read_to_end(&mut said)).await;
        }
        // it may be the origin's text
        let said: String = String::from_utf8_lossy(&said)
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        match said.trim() {
            "" => retry("the answer ends too early"),
            said => retry(format!("git upload-pack has ended: {said}")),
        }
    }

    pub fn give_back(mut self) {
        self.connection.last_used = Instant::now();
        let mut idle = self.pipes.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(self.connection);
    }
}

impl Pipes {
    pub fn new(connector: Arc<dyn Connector>, connections: usize, stall: Duration) -> Self {
        let slots = Arc::new(Semaphore::new(connections));
        Self { connector, slots, idle: Mutex::default(), stall }
    }

    pub async fn capabilities(self: &Arc<Self>) -> Result<Arc<Capabilities>, FetchError> {
        let (exchange, capabilities) = self.exchange().await?;
        exchange.give_back();
        Ok(capabilities)
    }

    pub async fn command(
        self: &Arc<Self>,
        hash: HashKind,
        command: &Command,
        sent: &mut u64,
    ) -> Result<Reply, FetchError> {
        let (mut exchange, capabilities) = self.exchange().await?;
        check_hash(hash, &capabilities)?;
        let request = command.encode(hash, &capabilities);
        let written = self.write(&mut exchange.connection.stream, &request, sent).await;
        let mut reply = Reply::new(Body::Pipe(exchange), self.stall);
        match written {
            Ok(()) => Ok(reply),
            // It may have said why before it hung up: at the first want that it doesn't have, say.
            Err(broken) => match reply.packet().await {
                Err(said) => Err(said),
                Ok(_) => Err(broken),
            },
        }
    }

    /// Writes the request as long as the other side takes some of it now and then.
    async fn write(
        &self,
        stream: &mut UnixStream,
        request: &Bytes,
        sent: &mut u64,
    ) -> Result<(), FetchError> {
        let mut rest = &request[..];
        while !rest.is_empty() {
            match tokio::time::timeout(self.stall, stream.write(rest)).await {
                Ok(Ok(n)) => {
                    *sent += n as u64;
                    rest = rest.get(n..).unwrap_or_default();
                }
                Ok(Err(e)) => {
                    return Err(retry(format!("the connection to git upload-pack broke: {e}")));
                }
                Err(_) => return Err(stalled(self.stall)),
            }
        }
        Ok(())
    }

    /// A connection that waits for a command: one that is there, or a new one.
    async fn exchange(self: &Arc<Self>) -> Result<(Exchange, Arc<Capabilities>), FetchError> {
        let slot = self.slots.clone().acquire_owned().await.map_err(|e| retry(e.to_string()))?;
        while let Some(connection) = self.take_idle() {
            let capabilities = connection.capabilities.clone();
            if let (true, Some(capabilities)) = (alive(&connection), capabilities) {
                let pipes = self.clone();
                return Ok((Exchange { connection, pipes, _slot: slot }, capabilities));
            }
        }
        let pipe = match tokio::time::timeout(self.stall, self.connector.connect()).await {
            Ok(Ok(pipe)) => pipe,
            Ok(Err(message)) => return Err(retry(format!("can't reach the origin: {message}"))),
            Err(_) => return Err(stalled(self.stall)),
        };
        let Pipe { stream, why } = pipe;
        let connection = Connection { stream, why, capabilities: None, last_used: Instant::now() };
        let exchange = Exchange { connection, pipes: self.clone(), _slot: slot };
        let mut reply = Reply::new(Body::Pipe(exchange), self.stall);
        let capabilities = Arc::new(reply.advertisement("the origin").await?);
        let mut exchange = reply
            .into_exchange()
            .ok_or_else(|| super::wrong("git upload-pack said more than it was asked"))?;
        exchange.connection.capabilities = Some(capabilities.clone());
        Ok((exchange, capabilities))
    }

    fn take_idle(&self) -> Option<Connection> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

/// Whether a connection that was kept can still be used: not old, not closed, nothing said unasked.
fn alive(connection: &Connection) -> bool {
    let silent = connection.stream.try_read(&mut [0]);
    connection.last_used.elapsed() < IDLE
        && matches!(silent, Err(e) if e.kind() == io::ErrorKind::WouldBlock)
}
