//! The client of the admin socket.

mod lines;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hydrant_api::{Directories, ErrorBody, Progress, STATE_DIR_HEADER, Summary, VERSION_HEADER};
use reqwest::header::HeaderValue;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::failure::{Failure, Kind};
use lines::Lines;

/// How often a watcher is told that time goes by.
const TICK: Duration = Duration::from_millis(100);

/// A daemon that answered when it was last asked.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    directories: Directories,
    /// The only state directory whose daemon is meant ([`STATE_DIR_HEADER`]).
    state: Option<HeaderValue>,
}

/// Why no daemon can be talked to.
#[derive(Debug, thiserror::Error)]
pub enum Unreachable {
    /// Nobody listens.
    #[error("no daemon runs")]
    NotRunning,
    #[error("not allowed to talk to the daemon")]
    NotAllowed,
    #[error("can't talk to the daemon")]
    Other(#[source] io::Error),
}

/// Who follows an operation.
pub trait Watch {
    fn progress(&mut self, line: &Progress);
    /// Time goes by: ten times a second.
    fn tick(&mut self);
}

impl Client {
    /// Fails where nobody listens at the socket.
    pub fn connect(directories: &Directories) -> Result<Self, Unreachable> {
        let socket = directories.socket();
        UnixStream::connect(&socket).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Unreachable::NotRunning,
            io::ErrorKind::PermissionDenied => Unreachable::NotAllowed,
            _ => Unreachable::Other(error),
        })?;
        // reqwest sets TLS up also where none is spoken: it wants a provider, and certificates but
        // for an empty list of them. A provider that is there already is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .unix_socket(socket)
            .tls_certs_only([])
            .build()
            .map_err(|error| Unreachable::Other(io::Error::other(error)))?;
        Ok(Self { http, directories: directories.clone(), state: None })
    }

    /// Has a daemon of another state directory refuse what it is asked.
    pub fn only_for_state_dir(self) -> Self {
        let state = &self.directories.state;
        let state = state.canonicalize().unwrap_or_else(|_| state.clone());
        let state = HeaderValue::from_bytes(state.as_os_str().as_encoded_bytes()).ok();
        Self { state, ..self }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, url(path));
        match &self.state {
            Some(state) => request.header(STATE_DIR_HEADER, state),
            None => request,
        }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let response = self.request(Method::GET, path).send().await.map_err(|e| self.lost(&e))?;
        self.decode(response).await
    }

    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        let response = self.send(path, body).await?;
        self.decode(response).await
    }

    /// An operation that takes its time. Ctrl-C ends the watching, not the operation.
    pub async fn watch(
        &self,
        path: &str,
        body: &impl Serialize,
        watch: &mut impl Watch,
    ) -> Result<Summary, Failure> {
        let response = self.send(path, body).await?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response).await);
        }
        let mut lines = Lines::new(response);
        let mut clock = tokio::time::interval(TICK);
        loop {
            let line = tokio::select! {
                line = lines.next() => line.map_err(|e| self.lost(&e))?,
                _ = clock.tick() => {
                    watch.tick();
                    continue;
                }
                _ = tokio::signal::ctrl_c() => return Err(Failure {
                    kind: Kind::Interrupted,
                    ..Failure::new("interrupted; the daemon goes on")
                        .hint("`hydrant status` shows how far it is")
                }),
            };
            let Some(line) = line else {
                let log = self.directories.log();
                return Err(Failure::unreachable("the daemon ended before it was done")
                    .hint(format!("see the daemon's log, {} or the journal", log.display())));
            };
            match parse(&line)? {
                Progress::Done { summary } => return Ok(summary),
                Progress::Failed { error } => return Err(error.into()),
                line => watch.progress(&line),
            }
        }
    }

    async fn send(&self, path: &str, body: &impl Serialize) -> Result<Response, Failure> {
        let body = serde_json::to_vec(body)
            .map_err(|error| Failure::new(format!("can't encode the request: {error}")))?;
        let request = self.request(Method::POST, path).header("content-type", "application/json");
        request.body(body).send().await.map_err(|e| self.lost(&e))
    }

    async fn decode<T: DeserializeOwned>(&self, response: Response) -> Result<T, Failure> {
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response).await);
        }
        let version = version(&response);
        let body = response.bytes().await.map_err(|e| self.lost(&e))?;
        parse(&body).map_err(|failure| of_other_version(failure, version))
    }

    async fn refusal(&self, response: Response) -> Failure {
        let (status, version) = (response.status(), version(&response));
        match response.bytes().await {
            Ok(body) => match serde_json::from_slice::<ErrorBody>(&body) {
                // it may not know the request, or its client not make it well
                Ok(error) if error.hint.is_none() => of_other_version(error.into(), version),
                Ok(error) => error.into(),
                Err(_) => Failure::new(format!("the daemon answered {status}")),
            },
            Err(error) => self.lost(&error),
        }
    }

    fn lost(&self, error: &dyn std::error::Error) -> Failure {
        let mut reason = error;
        while let Some(source) = reason.source() {
            reason = source;
        }
        let socket = self.directories.socket();
        Failure::unreachable(format!("lost the daemon at {}: {reason}", socket.display())).hint(
            format!("see the daemon's log, {} or the journal", self.directories.log().display()),
        )
    }
}

/// The host in it is of no importance.
fn url(path: &str) -> String {
    format!("http://hydrantd{path}")
}

/// The daemon's version as it says.
fn version(response: &Response) -> Option<String> {
    response.headers().get(VERSION_HEADER)?.to_str().ok().map(str::to_owned)
}

/// A failure that may come from the daemon's being older or newer.
fn of_other_version(failure: Failure, version: Option<String>) -> Failure {
    const OURS: &str = env!("CARGO_PKG_VERSION");
    match version {
        Some(version) if version != OURS => failure.hint(format!(
            "the daemon is version {version}, this is {OURS}: `hydrant reload` starts the installed one"
        )),
        _ => failure,
    }
}

fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(text).map_err(|error| {
        Failure::new(format!("can't make sense of the daemon's answer: {error}"))
            .hint("the daemon may be of another version: restart it")
    })
}
