//! Answers that come in lines: an operation's progress, then its end.

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::Response;
use futures_util::stream;
use hydrant_api::{Progress, Summary};
use tokio::sync::mpsc;

use super::error::ApiError;

/// Lines that a client has not read yet. What comes on top is left out.
const BACKLOG: usize = 256;
/// How long a client may take to make room for the last line.
const LAST_LINE: Duration = Duration::from_secs(60);

/// Where an operation says how far it is. Sending never waits and never fails: a client that
/// doesn't read misses lines, but for the last one, and a client that is gone is no concern of the operation.
#[derive(Debug, Clone)]
pub struct ProgressSender(Option<mpsc::Sender<Progress>>);

impl ProgressSender {
    /// For an operation that nobody watches.
    #[must_use]
    pub fn unwatched() -> Self {
        Self(None)
    }

    /// A sender and what gets what it sends, for tests and for other front ends.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<Progress>) {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        (Self(Some(sender)), receiver)
    }

    /// A step begins: one of those that [`Progress::Step`] lists.
    pub fn step(&self, step: &str) {
        self.send(Progress::Step { step: step.to_owned() });
    }

    /// How far the step is; `unit` is a plural, or `bytes`.
    pub fn count(&self, done: u64, total: Option<u64>, unit: &str) {
        self.send(Progress::Count { done, total, unit: unit.to_owned() });
    }

    /// Something that the user should know.
    pub fn note(&self, message: impl Into<String>) {
        self.send(Progress::Note { message: message.into() });
    }

    fn send(&self, line: Progress) {
        if let Some(sender) = &self.0 {
            // Full or closed: see above.
            let _ = sender.try_send(line);
        }
    }
}

/// Runs the operation in a task of its own. The response has a line for each [`Progress`] and ends
/// with the outcome.
pub(super) fn respond<F>(
    name: &'static str,
    operation: impl FnOnce(ProgressSender) -> F,
) -> Response
where
    F: Future<Output = Result<Summary, ApiError>> + Send + 'static,
{
    let (progress, receiver) = ProgressSender::channel();
    let last = progress.0.clone();
    let task = tokio::spawn(operation(progress));
    tokio::spawn(async move {
        let outcome = task.await.unwrap_or_else(|error| {
            tracing::error!(%error, operation = name, "an operation did not end");
            Err(ApiError::internal(format!("{name} did not end: {error}")))
        });
        let line = match outcome {
            Ok(summary) => Progress::Done { summary },
            Err(error) => {
                tracing::warn!(operation = name, %error, "failed");
                Progress::Failed { error: error.into() }
            }
        };
        if let Some(sender) = last {
            let _ = sender.send_timeout(line, LAST_LINE).await;
        }
    });
    let lines = stream::unfold(receiver, |mut receiver| async move {
        let line = receiver.recv().await?;
        Some((Ok::<_, Infallible>(encode(&line)), receiver))
    });
    let mut response = Response::new(Body::from_stream(lines));
    let kind = HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn encode(line: &Progress) -> Bytes {
    let mut bytes = serde_json::to_vec(line).unwrap_or_else(|error| {
        // No Progress has a map with keys that are not strings, the only thing that can fail.
        tracing::error!(%error, "can't encode a line of progress");
        Vec::new()
    });
    bytes.push(b'\n');
    bytes.into()
}
