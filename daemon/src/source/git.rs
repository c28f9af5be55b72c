//! Git repositories: protocol version 2 (gitprotocol-v2(5)), over HTTP or a pipe.
//!
//! Any object can be asked for by its id (in C git's version 2 no configuration is needed for
//! that), so a blob is one request and one answer on a connection that is kept open. The answer is
//! a pack, which is taken apart as it arrives.

mod capabilities;
mod fetch;
mod http;
mod pack;
mod pipe;
mod pktline;
mod sizes;
mod transport;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

pub use self::capabilities::{Capabilities, ObjectInfo};
pub use self::http::{Clients, Credentials, load_system_roots};
pub(in crate::source) use self::http::{Origin, broken, check_status, redirected, shown};
pub use self::pipe::{Connector, Pipe};
pub use self::sizes::forge::{Forge, ForgeKind};
pub use self::sizes::sidecar;
pub use self::sizes::{SizesOutcome, SizesQuery};
use self::transport::Transport;
use super::{Content, Fetch, FetchError, Sink};
use crate::object::{HashKind, ObjectId};
use crate::queue::wire::{Credential, GitOrigin, GitTransport, HttpTransport, Limits};

/// How we name ourselves to git servers, in the protocol.
const AGENT: &str = concat!("hydrant/", env!("CARGO_PKG_VERSION"));

/// A git repository as an origin. Cheap to clone; what the server can do is asked for when it is
/// first needed.
#[derive(Clone)]
pub struct GitSource {
    inner: Arc<Inner>,
}

#[derive(Clone)]
struct Inner {
    hash: HashKind,
    transport: Transport,
    /// See [`GitSource::with_web`].
    web: Option<Arc<http::Http>>,
    forge: Option<Forge>,
    connections: usize,
}

/// Who has no name to give.
#[derive(Debug)]
pub struct Nobody;

impl Credentials for Nobody {
    fn get<'a>(
        &'a self,
        _: &'a str,
        _: Option<Credential>,
    ) -> BoxFuture<'a, Result<Option<Credential>, String>> {
        Box::pin(async { Ok(None) })
    }
}

/// How long a silence may be, and how many connections there are.
fn bounds(limits: Limits) -> (Duration, usize) {
    (Duration::from_secs(limits.stall_secs.max(1)), limits.connections.clamp(1, 64) as usize)
}

impl fmt::Debug for GitSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GitSource")
            .field("transport", &self.inner.transport)
            .finish_non_exhaustive()
    }
}

impl GitSource {
    /// `credentials` is asked when an HTTP server wants to know who we are, `connector` for pipes.
    /// An error when the origin's settings (URL, proxy, certificates) can't be used.
    pub fn new(
        origin: GitOrigin,
        limits: Limits,
        credentials: Arc<dyn Credentials>,
        connector: Arc<dyn Connector>,
    ) -> Result<Self, FetchError> {
        let (stall, connections) = bounds(limits);
        let transport = match origin.transport {
            GitTransport::Http(settings) => Transport::Http(Arc::new(http::Http::new(
                settings,
                stall,
                connections,
                credentials,
            )?)),
            GitTransport::Pipe => {
                Transport::Pipe(Arc::new(pipe::Pipes::new(connector, connections, stall)))
            }
        };
        let (web, forge) = (None, None);
        Ok(Self {
            inner: Arc::new(Inner { hash: origin.hash, transport, web, forge, connections }),
        })
    }

    /// Where the forge of a repository behind a pipe may have it for everybody, to be asked for what `git upload-pack`
    /// does not tell. It is not told who asks, and what is wrong with it is no matter.
    #[must_use]
    pub fn with_web(self, settings: HttpTransport, limits: Limits) -> Self {
        let (stall, connections) = bounds(limits);
        match http::Http::new(settings, stall, connections, Arc::new(Nobody)) {
            Ok(web) => self.with(|inner| inner.web = Some(Arc::new(web))),
            Err(error) => {
                tracing::debug!(%error, "can't ask the origin's forge");
                self
            }
        }
    }

    fn with(self, change: impl FnOnce(&mut Inner)) -> Self {
        let mut inner = Inner::clone(&self.inner);
        change(&mut inner);
        Self { inner: Arc::new(inner) }
    }

    /// The same repository, now that the hash function of its objects is known.
    #[must_use]
    pub fn with_hash(self, hash: HashKind) -> Self {
        self.with(|inner| inner.hash = hash)
    }

    /// With what another process knows of the server, if it does, so that the first question needs no other
    /// before it. `tell` is told what we find out ourselves. Only of HTTP servers.
    pub fn introduce(
        &self,
        known: Option<Capabilities>,
        tell: impl Fn(&Capabilities) + Send + Sync + 'static,
    ) {
        if let Transport::Http(http) = &self.inner.transport {
            http.introduce(known, tell);
        }
    }

    /// Gets to know an HTTP server, so that the first question needs no other before it. Trouble is
    /// left to that question.
    pub async fn meet(&self) {
        if let Transport::Http(http) = &self.inner.transport
            && let Err(error) = http.session().await
        {
            tracing::debug!(%error, "can't reach the origin yet");
        }
    }

    /// Uses this forge's API for sizes instead of the one that the URL suggests.
    #[must_use]
    pub fn with_forge(self, forge: Forge) -> Self {
        self.with(|inner| inner.forge = Some(forge))
    }

    /// What the server can do; asks it unless that is known.
    pub async fn capabilities(&self) -> Result<Arc<Capabilities>, FetchError> {
        self.inner.transport.capabilities(self.inner.hash).await
    }

    /// Whether the server gives this blob by its id, without having it sent: [`FetchError::Missing`] if
    /// not.
    pub async fn probe(&self, key: ObjectId) -> Result<(), FetchError> {
        fetch::probe(&self.inner.transport, self.inner.hash, key).await
    }

    /// Fetches blobs as [`Fetch::fetch`] does, and gives the pack that they came in, whole and with
    /// the right checksum: no delta in it has a base outside. For `git index-pack --stdin`.
    pub async fn raw_fetch(
        &self,
        keys: &[ObjectId],
        sink: &mut dyn Sink,
    ) -> Result<Content, FetchError> {
        let raw = fetch::fetch(&self.inner.transport, self.inner.hash, keys, true, sink).await?;
        raw.ok_or_else(|| wrong("no pack was kept"))
    }

    /// The sizes of blobs, by the cheapest way that the server has. Never a guess: what nobody tells
    /// is in [`SizesOutcome::unknown`] and has to be fetched.
    pub async fn sizes(&self, query: &SizesQuery<'_>) -> Result<SizesOutcome, FetchError> {
        sizes::sizes(&self.inner, query).await
    }
}

impl Fetch for GitSource {
    async fn fetch(&self, keys: &[ObjectId], sink: &mut dyn Sink) -> Result<(), FetchError> {
        fetch::fetch(&self.inner.transport, self.inner.hash, keys, false, sink).await.map(drop)
    }
}

fn wrong(message: impl Into<String>) -> FetchError {
    FetchError::Wrong { message: message.into() }
}

fn retry(message: impl Into<String>) -> FetchError {
    FetchError::Retry { message: message.into(), after: None }
}

fn refused(message: impl Into<String>) -> FetchError {
    FetchError::Refused { message: message.into() }
}

#[cfg(test)]
mod tests;
