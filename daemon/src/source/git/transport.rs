//! One interface to both transports: send a command, read its answer packet by packet.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::capabilities::{Capabilities, Reader};
use super::http::Http;
use super::pipe::{Exchange, Pipes};
use super::pktline::{Decoder, Encoder, Packet};
use super::{AGENT, refused, retry, wrong};
use crate::object::{HashKind, ObjectId};
use crate::source::FetchError;

/// How long the end of a body may come after the end of what is in it. (In tests it comes, on however busy a machine.)
const END: Duration = Duration::from_millis(if cfg!(test) { 20_000 } else { 100 });

/// How a repository is reached.
#[derive(Debug, Clone)]
pub enum Transport {
    Http(Arc<Http>),
    Pipe(Arc<Pipes>),
}

/// A command of protocol version 2.
#[derive(Debug)]
pub struct Command {
    pub name: &'static str,
    pub arguments: Vec<String>,
    /// Further arguments: each id behind the word.
    pub ids: (&'static str, Vec<ObjectId>),
    pub last: Option<&'static str>,
}

impl Command {
    /// The request, for a server with these capabilities.
    pub fn encode(&self, hash: HashKind, capabilities: &Capabilities) -> Bytes {
        let mut message = Encoder::default();
        message.line(&format!("command={}", self.name));
        // a server refuses what it has not offered
        if capabilities.agent.is_some() {
            message.line(&format!("agent={AGENT}"));
        }
        if capabilities.object_format.is_some() {
            message.line(&format!("object-format={}", hash.name()));
        }
        message.delim();
        for argument in &self.arguments {
            message.line(argument);
        }
        let (word, ids) = &self.ids;
        message.ids(word, ids);
        if let Some(last) = self.last {
            message.line(last);
        }
        message.flush()
    }
}

/// An error unless the repository has the hash function that we know it by.
pub fn check_hash(hash: HashKind, capabilities: &Capabilities) -> Result<(), FetchError> {
    match capabilities.object_format.unwrap_or(HashKind::Sha1) {
        theirs if theirs == hash => Ok(()),
        theirs => Err(refused(format!(
            "the repository has {} objects now, not {}",
            theirs.name(),
            hash.name()
        ))),
    }
}

impl Transport {
    pub async fn capabilities(&self, hash: HashKind) -> Result<Arc<Capabilities>, FetchError> {
        let capabilities = match self {
            Self::Http(http) => http.session().await?.capabilities.clone(),
            Self::Pipe(pipes) => pipes.capabilities().await?,
        };
        check_hash(hash, &capabilities)?;
        Ok(capabilities)
    }

    /// Sends a command. The answer has to be read to its [`Reply::end`], else the connection it
    /// came on is not used again. Adds the bytes that went out to `sent`, whatever comes of it.
    pub async fn command(
        &self,
        hash: HashKind,
        command: &Command,
        sent: &mut u64,
    ) -> Result<Reply, FetchError> {
        match self {
            Self::Http(http) => http.command(hash, command, sent).await,
            Self::Pipe(pipes) => pipes.command(hash, command, sent).await,
        }
    }

    /// What was found wrong with an answer may be out of date knowledge of the server's.
    pub fn forget(&self) {
        if let Self::Http(http) = self {
            http.forget();
        }
    }
}

/// Where the bytes of an answer come from.
#[derive(Debug)]
pub enum Body {
    Http(Box<reqwest::Response>),
    Pipe(Exchange),
}

impl Body {
    /// Appends some bytes; 0 at the end.
    async fn read(&mut self, decoder: &mut Decoder) -> Result<usize, FetchError> {
        match self {
            Self::Http(response) => match response.chunk().await {
                Ok(Some(bytes)) => {
                    decoder.push(&bytes);
                    Ok(bytes.len())
                }
                Ok(None) => Ok(0),
                Err(e) => Err(super::http::broken("the answer broke off", &e)),
            },
            Self::Pipe(exchange) => match exchange.read(decoder).await {
                Ok(length) => Ok(length),
                // it has ended before it has read all that it was sent
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(0),
                Err(e) => Err(retry(format!("the connection to git upload-pack broke: {e}"))),
            },
        }
    }

    /// What it means that it ended.
    async fn ended(&mut self) -> FetchError {
        match self {
            Self::Http(_) => retry("the answer ends too early"),
            Self::Pipe(exchange) => exchange.ended().await,
        }
    }
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    body: Body,
    decoder: Decoder,
    stall: Duration,
    received: u64,
}

impl Reply {
    pub fn new(body: Body, stall: Duration) -> Self {
        Self { body, decoder: Decoder::default(), stall, received: 0 }
    }

    /// The next packet. An `ERR` packet is an error.
    pub async fn packet(&mut self) -> Result<Packet, FetchError> {
        let packet = self.raw_packet().await?;
        match &packet {
            Packet::Data(data) => match data.strip_prefix(b"ERR ") {
                Some(message) => Err(said_no(&super::pktline::text(message))),
                None => Ok(packet),
            },
            _ => Ok(packet),
        }
    }

    async fn raw_packet(&mut self) -> Result<Packet, FetchError> {
        loop {
            match self.decoder.packet() {
                Ok(Some(packet)) => return Ok(packet),
                Ok(None) => {}
                Err(e) => {
                    return Err(wrong(format!("it does not answer as a git server does: {e}")));
                }
            }
            let read = tokio::time::timeout(self.stall, self.body.read(&mut self.decoder));
            match read.await {
                Ok(Ok(0)) => return Err(self.body.ended().await),
                Ok(Ok(n)) => self.received += n as u64,
                Ok(Err(e)) => return Err(e),
                Err(_) => return Err(stalled(self.stall)),
            }
        }
    }

    /// Bytes that came in since this was last asked.
    pub fn take_received(&mut self) -> u64 {
        std::mem::take(&mut self.received)
    }

    /// After the flush packet that ends an answer: gives the connection back.
    pub async fn end(mut self) {
        if let Body::Http(_) = self.body {
            // An HTTP connection can be used again once the end of the body has been seen, which is
            // not worth a long wait.
            let end = self.body.read(&mut self.decoder);
            let _ = tokio::time::timeout(END, end).await;
        } else if let Body::Pipe(exchange) = self.body
            && self.decoder.is_empty()
        {
            exchange.give_back();
        }
    }

    /// Reads a capability advertisement.
    pub async fn advertisement(&mut self, from: &str) -> Result<Capabilities, FetchError> {
        let mut reader = Reader::default();
        loop {
            let packet = self.raw_packet().await?;
            match reader.packet(&packet) {
                Ok(None) => {}
                Ok(Some(capabilities)) => return Ok(capabilities),
                Err(super::capabilities::NotVersion2::Error(message)) => {
                    return Err(said_no(&message));
                }
                Err(e) => return Err(e.of(from)),
            }
        }
    }

    /// The pipe that the answer came on.
    pub fn into_exchange(self) -> Option<Exchange> {
        match self.body {
            Body::Pipe(exchange) if self.decoder.is_empty() => Some(exchange),
            _ => None,
        }
    }
}

/// What an `ERR` packet means: refused, unless it sounds as if it would pass.
pub fn said_no(message: &str) -> FetchError {
    const PASSES: [&str; 7] = [
        "try again",
        "unable to handle",
        "temporar",
        "rate limit",
        "too many",
        "timed out",
        "busy",
    ];
    let message = format!("the server says: {}", message.trim_end());
    let lower = message.to_lowercase();
    match PASSES.iter().any(|words| lower.contains(words)) {
        true => retry(message),
        false => refused(message),
    }
}

pub fn stalled(after: Duration) -> FetchError {
    retry(format!("nothing came from the origin for {} s", after.as_secs()))
}
