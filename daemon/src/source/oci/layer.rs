//! A layer's blob as one stream that survives broken connections.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;

use super::registry::{Registry, retry, wrong};
use crate::object::ObjectId;
use crate::source::FetchError;

/// So often in a row a stream may break without a byte in between.
const ATTEMPTS: u32 = 5;
/// The first wait between two tries; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// An origin that wants a longer pause is given up here.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A blob that is being read from its start to its end.
#[derive(Debug)]
pub struct BlobStream<'a> {
    registry: &'a Registry,
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
        Self { registry, digest, size, at: 0, response: None, failures: 0 }
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
                        return Err(wrong("the registry sends more than the layer has"));
                    }
                    return Ok(Some(piece));
                }
                Err(FetchError::Retry { message, after }) => {
                    self.response = None;
                    self.failures += 1;
                    if self.failures >= ATTEMPTS {
                        return Err(FetchError::Retry { message, after });
                    }
                    let wait = after.unwrap_or(FIRST_WAIT * 2u32.pow(self.failures - 1));
                    tracing::debug!(message, ?wait, "a layer's stream broke off");
                    tokio::time::sleep(wait.min(LONGEST_WAIT)).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn step(&mut self) -> Result<Bytes, FetchError> {
        let response = match &mut self.response {
            Some(response) => response,
            none => none.insert(self.registry.blob(&self.digest, self.size, self.at).await?),
        };
        let piece = self.registry.piece(response).await?;
        piece.ok_or_else(|| retry("the registry ended a layer too early"))
    }
}
