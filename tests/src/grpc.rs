//! gRPC calls over a Unix socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// A call that was refused: `grpc-status` and `grpc-message`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub code: Code,
    pub message: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}: {}", self.code, self.message)
    }
}

impl std::error::Error for Refusal {}

/// The codes that are told apart here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    InvalidArgument,
    NotFound,
    AlreadyExists,
    PermissionDenied,
    FailedPrecondition,
    Unimplemented,
    Other(u32),
}

impl From<u32> for Code {
    fn from(code: u32) -> Self {
        match code {
            3 => Self::InvalidArgument,
            5 => Self::NotFound,
            6 => Self::AlreadyExists,
            7 => Self::PermissionDenied,
            9 => Self::FailedPrecondition,
            12 => Self::Unimplemented,
            other => Self::Other(other),
        }
    }
}

/// Calls `method` (`/package.Service/Method`); gives the messages of the answer. A [`Refusal`] is the error's root.
/// `namespace`: of containerd's.
pub fn call<Q: Message, A: Message + Default>(
    socket: &Path,
    method: &str,
    namespace: &str,
    request: &Q,
) -> Result<Vec<A>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async {
        tokio::time::timeout(PATIENCE, send(socket, method, namespace, request.encode_to_vec()))
            .await
    });
    let frames = answer.with_context(|| format!("{method} takes too long"))??;
    frames.into_iter().map(|frame| Ok(A::decode(frame)?)).collect()
}

async fn send(
    socket: &Path,
    method: &str,
    namespace: &str,
    message: Vec<u8>,
) -> Result<Vec<Bytes>> {
    let stream = tokio::net::UnixStream::connect(socket).await;
    let stream = stream.with_context(|| format!("can't connect to {}", socket.display()))?;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut body = vec![0];
    body.extend(u32::try_from(message.len())?.to_be_bytes());
    body.extend(message);
    let request = hyper::Request::post(format!("http://localhost{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("containerd-namespace", namespace)
        .body(Full::new(Bytes::from(body)))?;
    let answer = sender.send_request(request).await?;
    let (head, body) = answer.into_parts();
    let collected = body.collect().await?;
    // an answer without messages has it all in its head
    let trailers = collected.trailers().cloned().unwrap_or(head.headers);
    let said = |name| trailers.get(name).and_then(|value| value.to_str().ok());
    let code: u32 = said("grpc-status").context("an answer without a status")?.parse()?;
    if code != 0 {
        let message = said("grpc-message").unwrap_or_default();
        let message = message.replace("%20", " ").replace("%22", "\"");
        bail!(Refusal { code: code.into(), message });
    }
    let mut rest = collected.to_bytes();
    let mut frames = Vec::new();
    while !rest.is_empty() {
        ensure!(rest.len() >= 5 && rest[0] == 0, "no gRPC message");
        let length = u32::from_be_bytes([rest[1], rest[2], rest[3], rest[4]]) as usize;
        ensure!(rest.len() >= 5 + length, "half a gRPC message");
        frames.push(rest.slice(5..5 + length));
        rest = rest.slice(5 + length..);
    }
    Ok(frames)
}
