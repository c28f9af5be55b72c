//! A layer's blob as one stream that survives broken connections.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;

use super::registry::{Choices, Host, Need, Registry, retry, wrong};
use crate::object::ObjectId;
use crate::source::FetchError;

/// So often in a row a stream may break without a byte in between; and where another host can go on with it.
const ATTEMPTS: u32 = 5;
const ATTEMPTS_OF_MANY: u32 = 2;
/// The first wait between two tries; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// An origin that wants a longer pause is given up here.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A blob that is being read from its start to its end.
#[derive(Debug)]
pub struct BlobStream<'a> {
    choices: Choices<'a>,
    /// Who has given parts of it; the last one is the one that is asked.
    hosts: Vec<&'a Host>,
    digest: ObjectId,
    size: u64,
    at: u64,
    response: Option<Response>,
    failures: u32,
}

impl<'a> BlobStream<'a> {
    /// `size` is the blob's length in bytes.
    #[must_use]
    pub fn new(registry: &'a Registry, digest: ObjectId, size: u64) -> Self {
        let choices = registry.choices(Need::Content);
        Self { choices, hosts: Vec::new(), digest, size, at: 0, response: None, failures: 0 }
    }

    /// The next piece; `None` once all of the blob has come. It is not verified: who reads it looks at
    /// the digest at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        loop {
            if self.at == self.size {
                return Ok(None);
            }
            match self.step().await {
                Ok(piece) if piece.is_empty() => {}
                Ok(piece) => {
                    self.failures = 0;
                    self.at += piece.len() as u64;
                    if self.at > self.size {
                        return Err(wrong("more was sent than the layer has"));
                    }
                    return Ok(Some(piece));
                }
                Err(error) => self.failed(error).await?,
            }
        }
    }

    /// Waits, or has the next host go on where this one has stopped.
    async fn failed(&mut self, error: FetchError) -> Result<(), FetchError> {
        self.response = None;
        self.failures += 1;
        let alone = self.choices.left() == 0;
        let attempts = if alone { ATTEMPTS } else { ATTEMPTS_OF_MANY };
        match error {
            FetchError::Retry { message, after }
                if self.failures < attempts && (alone || after.is_none()) =>
            {
                let wait = after.unwrap_or(FIRST_WAIT * 2u32.pow(self.failures - 1));
                tracing::debug!(message, ?wait, "a layer's stream broke off");
                tokio::time::sleep(wait.min(LONGEST_WAIT)).await;
            }
            error => {
                self.choices.failed(error)?;
                self.ask_next()?;
            }
        }
        Ok(())
    }

    fn ask_next(&mut self) -> Result<&'a Host, FetchError> {
        self.failures = 0;
        let host = self.choices.ask()?;
        self.hosts.push(host);
        Ok(host)
    }

    /// All of it has come, and is wrong: others are asked before those who gave it.
    pub fn is_wrong(&self) {
        let error = wrong("the blob is another one");
        self.hosts.iter().for_each(|host| host.has_failed(&error));
    }

    async fn step(&mut self) -> Result<Bytes, FetchError> {
        let host = match self.hosts.last() {
            Some(host) => host,
            None => self.ask_next()?,
        };
        let response = match &mut self.response {
            Some(response) => response,
            none => none.insert(host.blob(&self.digest, self.size, self.at).await?),
        };
        let piece = host.piece(response).await?;
        piece.ok_or_else(|| retry(format!("{} ended a layer too early", host.shown())))
    }
}
