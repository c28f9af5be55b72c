//! Asks a daemon through its admin socket: HTTP/1.1 with JSON over a Unix socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hydrant_api::{ErrorBody, Mount, QueueEvent, Status};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A client of one daemon.
#[derive(Debug, Clone)]
pub struct Admin {
    socket: PathBuf,
}

impl Admin {
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    pub fn status(&self) -> Result<Status> {
        self.get("/v1/status")
    }

    pub fn mounts(&self) -> Result<Vec<Mount>> {
        self.get("/v1/mounts")
    }

    pub fn queue(&self) -> Result<Vec<QueueEvent>> {
        self.get("/v1/queue")
    }

    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let body = self.request("GET", path, &[])?;
        serde_json::from_slice(&body)
            .with_context(|| format!("GET {path}: {}", String::from_utf8_lossy(&body)))
    }

    /// Posts JSON; gives the body of the answer.
    pub fn post(&self, path: &str, body: &impl Serialize) -> Result<Vec<u8>> {
        self.request("POST", path, &serde_json::to_vec(body)?)
    }

    fn request(&self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>> {
        let socket = self.socket.display();
        let mut stream =
            UnixStream::connect(&self.socket).with_context(|| format!("nobody at {socket}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: hydrantd\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        // at once: who answers without looking at the body may close before it would come
        stream.write_all(&[head.as_bytes(), body].concat())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).with_context(|| format!("{method} {path}"))?;
        let (head, body) = crate::proxy::plain(&answer);
        let head = String::from_utf8_lossy(&head).into_owned();
        let status = head.split(' ').nth(1).and_then(|code| code.parse::<u16>().ok());
        if status.is_none_or(|code| code >= 400) {
            let error = serde_json::from_slice::<ErrorBody>(&body).map(|error| error.message);
            let message = error.unwrap_or_else(|_| String::from_utf8_lossy(&body).into_owned());
            bail!("{method} {path}: {status:?}: {message}");
        }
        Ok(body)
    }
}
